"""How fast, how large, and how close to the machine's limits is a training step? Beside TRL, on the same work.

    pip install trl matplotlib
    python bench.py               # a step of ours and of TRL's GRPOTrainer in alternation, both judges: table and JSON
    python bench.py --sweep       # time and memory of each phase against sizes: table and plot

Both sides solve, judge and update on the problems, rubrics and answers of bench.jsonl. Answers are replayed: generation
does all its work, sampling included, but the tokens are given, so that both judge and train on the same ones.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import config
import model
import pop
import rubric
from data import Document, UserError
from engine import fast
from lab import plan
from lab.plan import GIB, Shapes, memory_in_use
from rubric import Criterion, Episode

PHASES = ("rollout", "judge", "update")

# ------------------------------------------------------------------------------------------------------- work


@dataclass(frozen=True)
class Work:
    """What a step is made of, the same for every side."""

    model: str = "smollm2"
    load_in: str = "4bit"
    judge: str = "logits"
    problems: int = 2
    group_size: int = 8
    new_tokens: int = 64
    criteria: int = 2
    micro_rows: int = 8
    temperature: float = 0.7
    kl_coef: float = 1e-3
    document_words: int = 128  # --sweep only


@dataclass
class Group:
    """A problem, what its answers are graded by, and G recorded answers: ids up to an end token or the limit."""

    problem: str
    rubric: list[Criterion]
    answers: list[list[int]]


def groups_of(work: Work, tokenizer: Any, eos: int) -> list[Group]:
    """The first problems of bench.jsonl, which has four, then the same again.

    Answers longer than the 128 tokens on file are several of them one after the other, so that lengths stay as
    different as they are.
    """
    records = [
        json.loads(line) for line in (Path(__file__).parents[1] / "docs/bench.jsonl").read_text("utf-8").splitlines()
    ]
    stretch = max(1, work.new_tokens // 128)
    groups = []
    for number in range(work.problems):
        record = records[number % len(records)]
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in record["answers"]]
        answers = [[token for k in range(stretch) for token in ids[(i + k) % len(ids)]] for i in range(work.group_size)]
        answers = [[*answer, eos][: work.new_tokens] for answer in answers]
        groups.append(Group(record["problem"], [Criterion(**c) for c in record["rubric"][: work.criteria]], answers))
    return groups


class Replay(LogitsProcessor):
    """Leaves each row nothing to sample but its recorded tokens, one at each step, and `eos` after the last."""

    def __init__(self, rows: Sequence[list[int]], eos: int) -> None:
        self.rows, self.eos, self.step = list(rows), eos, 0

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[i] for i in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = [row[self.step] if self.step < len(row) else self.eos for row in self.rows]
        self.step += 1
        at = torch.tensor(wanted, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, at, scores.gather(1, at))


class Meter:
    """Seconds and peak bytes of each phase; a thread looks every 10 ms at what the process holds."""

    def __init__(self) -> None:
        self.phase = "update"
        self.clear()
        threading.Thread(target=self._watch, daemon=True).start()

    def clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)

    def _watch(self) -> None:
        while True:
            phase = self.phase
            self.peak[phase] = max(self.peak[phase], memory_in_use())
            time.sleep(0.01)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        start = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.peak[phase] = torch.cuda.max_memory_allocated()
            self.seconds[phase] += time.perf_counter() - start
            self.phase = outer


# ------------------------------------------------------------------------------------------------------- ours


class Ours:
    """One step of pop.py at a time, on recorded answers."""

    def __init__(self, work: Work) -> None:
        self.work, self.meter = work, Meter()
        overrides = {**config.PRESETS["demo"], "model": work.model, "load_in": work.load_in, "judge": work.judge}
        overrides |= {"group_size": work.group_size, "max_new_tokens": work.new_tokens}
        overrides |= {"temperature": work.temperature, "kl_coef": work.kl_coef, "documents": work.problems}
        self.cfg = pop.Config(**overrides)
        self.llm = model.load(
            work.model,
            load_in=work.load_in,
            token_budget=self.cfg.rollout_tokens,
            dequantize=self.cfg.dequantize == "on",
            recompute=self.cfg.recompute,
        )
        self.groups = groups_of(work, self.llm.tokenizer, self.llm.eos_ids[0])
        self.optimizer, self.scheduler = pop.make_optimizer(self.llm, replace(self.cfg, steps=10**6))
        self.decoding = 0.0  # seconds inside the decoding loop of the rollout
        self.steps: list[tuple[int, int]] = []  # its (rows, tokens in the cache of each)
        self.count_positions()

    def count_positions(self) -> None:
        """Positions that went through the model in each phase, padding included."""
        self.positions: dict[str, int] = defaultdict(int)

        def count(module: Any, args: Any, output: torch.Tensor) -> None:
            self.positions[self.meter.phase] += output.shape[0] * output.shape[1]

        self.llm.model.get_input_embeddings().register_forward_hook(count)

    def episodes(self) -> list[Episode]:
        return [
            Episode(Document("bench", ""), problem=group.problem, rubric=group.rubric, reference="-")
            for group in self.groups
        ]

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, what is generated are the recorded answers; the loop is timed and its batches written down."""
        left = {self.prompt(group): list(group.answers) for group in self.groups}
        decode = fast.decode

        def timed(llm: Any, input_ids: torch.Tensor, logits_processor: Any, **named: Any) -> torch.Tensor:
            mask = named["mask"]
            rows = [left[tuple(ids[kept.bool()].tolist())].pop() for ids, kept in zip(input_ids, mask, strict=True)]
            length = input_ids.shape[1]

            def progress(n: int) -> None:
                self.steps.append((n, length + len(self.steps) - first))
                shown(n)

            first, shown, named["progress"] = len(self.steps), named["progress"], progress
            replay = Replay(rows, self.llm.eos_ids[0])
            start = time.perf_counter()
            result = decode(llm, input_ids, logits_processor=LogitsProcessorList([*logits_processor, replay]), **named)
            self.decoding += time.perf_counter() - start
            return result

        fast.decode = timed  # type: ignore[assignment]
        try:
            yield
        finally:
            fast.decode = decode

    def prompt(self, group: Group) -> tuple[int, ...]:
        return tuple(self.llm.encode("", group.problem))

    def step(self) -> dict[str, Any]:
        """One optimizer step on all groups; rewards are the grades, guards are left out as TRL has none."""
        llm, cfg, meter, episodes = self.llm, self.cfg, self.meter, self.episodes()
        meter.clear()
        self.decoding, self.steps = 0.0, []
        self.positions.clear()
        with self.replayed(), meter("rollout"):
            rubric.solve(llm, episodes, cfg)
        assert [sorted(a.ids for a in e.answers) for e in episodes] == [sorted(g.answers) for g in self.groups]
        with meter("judge"):
            rubric.judge(llm, episodes, cfg)
        for e in episodes:
            e.answers = [a for a in e.answers if a.ratings is not None]
            grades = [rubric.grade(a.ratings or [], e.rubric) for a in e.answers]
            for a, advantage in zip(e.answers, pop.group_advantages(grades), strict=True):
                a.advantage = advantage
        budgets = {"budgets": {"update": self.update_tokens()}, "nonfinite": 0}
        with meter("update"):
            result = pop.update(llm, self.optimizer, self.scheduler, episodes, cfg, budgets)
        return {
            "seconds": dict(meter.seconds) | {"total": sum(meter.seconds.values())},
            "peak": dict(meter.peak),
            "tokens": {
                "rollout": sum(len(a) for g in self.groups for a in g.answers),
                "update": result["trained_tokens"],
            },
            "loss": result["loss"],
            "decoding": self.decoding,
            "decode_steps": self.steps,
            "positions": dict(self.positions),
        }

    def operations(self) -> dict[str, Any]:
        """Tokens and floating-point operations that a step cannot do without, of the phases that are mostly products.

        Padding is none of them, nor is what is computed a second time in the backward pass (given apart). Backward:
        the gradients of activations and of the adapters; the frozen weights need none.
        """
        llm, cfg, shapes = self.llm, self.cfg, plan.shapes_of(self.work.model)
        linear, lora = 2 * shapes.linear_params, 2 * shapes.lora_params(cfg.lora_r)
        head, pair = 2 * shapes.vocab * shapes.hidden, 4 * shapes.layers * shapes.heads * shapes.head_dim
        result: dict[str, Any] = {}
        if cfg.judge == "logits":
            rows = [
                llm.encode("", rubric.rate_prompt(g.problem, c, llm.decode(answer).strip()))
                for g in self.groups
                for answer in g.answers
                for c in g.rubric
            ]
            tokens = pairs = 0.0
            for members, common in fast.shared_prefixes(rows):
                rest = [len(rows[i]) - common for i in members]
                tokens += common + sum(rest)
                pairs += common**2 / 2 + sum(n * common + n**2 / 2 for n in rest)
            result["judge"] = {"tokens": tokens, "operations": tokens * linear + pairs * pair + len(rows) * head}
        samples = [[pop.Sample(list(self.prompt(g)), answer, 0.0) for answer in g.answers] for g in self.groups]
        tokens = pairs = 0.0
        for row in (row for part in pop.micro_batches(llm, samples, self.update_tokens()) for row in part):
            prompt, completions = len(row[0].prompt), [len(sample.completion) for sample in row]
            tokens += prompt + sum(completions)
            pairs += prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in completions)
        trained = sum(len(answer) for g in self.groups for answer in g.answers)
        forward = tokens * (linear + lora) + pairs * pair + trained * head
        backward = tokens * (linear + 2 * lora) + 2 * pairs * pair + trained * head
        reference = tokens * linear + pairs * pair + trained * head if cfg.kl_coef else 0.0
        result["update"] = {
            "tokens": tokens * (2 if cfg.kl_coef else 1),
            "operations": reference + forward + backward,
            "recomputed": forward if cfg.recompute else trained * head,
        }
        return result

    def update_tokens(self) -> int:
        """The budget of a micro-batch: no more tokens than TRL's has."""
        longest = max(len(self.prompt(g)) for g in self.groups) + self.cfg.max_new_tokens
        return min(self.cfg.update_tokens, self.work.micro_rows * longest)


# ------------------------------------------------------------------------------------------------- alternation


def serve(side: str, work: Work, line: Connection) -> None:
    """A process of its own for each side, so that nothing of one is in the other's memory: a step at each call."""
    try:
        if side == "ours":
            worker: Any = Ours(work)
        else:
            from lab import trl_bench as bench_trl

            worker = bench_trl.Theirs(work)
        line.send({"ready": memory_in_use()})
        while (wanted := line.recv()) != "end":
            line.send(getattr(worker, wanted)())
    except UserError as error:
        line.send({"error": str(error)})
    except ImportError as error:
        line.send({"error": f"{error}: pip install 'trl>=1.16' (or give --alone)"})


class Side:
    """A worker process and what it has measured."""

    def __init__(self, side: str, work: Work) -> None:
        self.name, self.results = side, list[dict[str, Any]]()
        spawn = multiprocessing.get_context("spawn")
        self.line, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(side, work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.idle = self.answer()["ready"]

    def answer(self) -> dict[str, Any]:
        try:
            result = self.line.recv()
        except EOFError:
            raise UserError(f"the process of {self.name} ended; its error is above") from None
        if "error" in result:
            raise UserError(result["error"])
        return result

    def ask(self, what: str) -> dict[str, Any]:
        self.line.send(what)
        return self.answer()

    def end(self) -> None:
        self.line.send("end")
        self.process.join()


def limits() -> dict[str, float]:
    """What this machine does at best, see plan.limits."""
    device: plan.Device = "cuda" if torch.cuda.is_available() else "cpu"
    fp32 = plan.limits(torch.float32, device)
    result = {"fp32 products/s": fp32.products, "bytes read/s": fp32.read}
    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        result["bf16 products/s"] = plan.limits(torch.bfloat16, device).products
    return result


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of ours and TRL in alternation for each judge, with the machine's limits measured in between."""
    report: dict[str, Any] = {"work": {}, "limits": defaultdict(list), "judges": {}}
    for judge in args.judges:
        work = work_of(args, judge)
        report["work"] = asdict(work)
        names = ["ours"] if args.alone else ["ours", "trl"]
        print(f"judge {judge}: starting {' and '.join(names)} ...", flush=True)
        sides = [Side(name, work) for name in names]
        for side in sides:
            side.ask("step")  # the first one is not counted: caches, thread pools, page faults
        for number in range(args.rounds):
            for name, value in limits().items():
                report["limits"][name].append(value)
            for side in sides if number % 2 == 0 else reversed(sides):
                side.results.append(side.ask("step"))
                seconds = side.results[-1]["seconds"]
                shown = "  ".join(f"{phase} {seconds[phase]:6.2f}" for phase in (*PHASES, "total"))
                print(f"  round {number + 1}/{args.rounds}  {side.name:5} {shown} s", flush=True)
        needed = sides[0].ask("operations")
        for side in sides:
            side.end()
        report["judges"][judge] = summary(work, sides, needed, report["limits"])
    report["limits"] = {name: spread(values) for name, values in report["limits"].items()}
    return report


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summary(work: Work, sides: Sequence[Side], needed: dict[str, Any], limit: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, ratios of the same round, and what share of the machine's limits ours reaches."""
    result: dict[str, Any] = {}
    for side in sides:
        result[side.name] = {
            "seconds": {p: spread([r["seconds"][p] for r in side.results]) for p in (*PHASES, "total")},
            "peak GiB": {p: max(r["peak"][p] for r in side.results) / GIB for p in PHASES},
            "idle GiB": side.idle / GIB,
            "tokens": side.results[0]["tokens"],
        }
        medians = {p: result[side.name]["seconds"][p]["median"] for p in PHASES}
        amounts = side.results[0]["tokens"] | {"judge": work.problems * work.group_size * work.criteria}
        result[side.name]["a second"] = {p: amounts[p] / medians[p] for p in PHASES}
    ours = sides[0]
    if len(sides) > 1:
        counted = {json.dumps(r["tokens"]) for side in sides for r in side.results}
        if len(counted) > 1:
            raise UserError(f"the two sides did not train on the same tokens: {counted}")
        result["times faster"] = {
            p: spread([b["seconds"][p] / a["seconds"][p] for a, b in zip(ours.results, sides[1].results, strict=True)])
            for p in (*PHASES, "total")
        }
        result["memory of TRL's"] = {
            p: result["ours"]["peak GiB"][p] / result["trl"]["peak GiB"][p] for p in PHASES
        } | {"step": max(result["ours"]["peak GiB"].values()) / max(result["trl"]["peak GiB"].values())}
    products, read = (statistics.median(limit[name]) for name in ("fp32 products/s", "bytes read/s"))
    seconds = {p: result["ours"]["seconds"][p]["median"] for p in PHASES}
    shares: dict[str, Any] = {}
    for phase, counts in needed.items():
        shares[phase] = counts["operations"] / products / seconds[phase]
    shares["update, recomputed work counted"] = (
        (needed["update"]["operations"] + needed["update"]["recomputed"]) / products / seconds["update"]
    )
    decoding = statistics.median(r["decoding"] for r in ours.results)
    least = decode_seconds(plan.shapes_of(work.model), ours.results[0]["decode_steps"], products, read)
    shares["decoding"] = least / decoding
    result["share of the limit"] = shares
    positions = ours.results[0]["positions"]
    result["padding"] = {phase: 1 - counts["tokens"] / positions[phase] for phase, counts in needed.items()}
    steps = ours.results[0]["decode_steps"]
    result["decoding"] = {
        "seconds": decoding,
        "steps": len(steps),
        "rows": statistics.fmean(rows for rows, _ in steps),
        "tokens/s": sum(rows for rows, _ in steps) / decoding,
    }
    return result


def decode_seconds(shapes: Shapes, steps: Sequence[tuple[int, int]], products: float, read: float) -> float:
    """The least time for decoding steps of (rows, tokens in each one's cache): by what must be read, fp32 weights and
    the cache, or by what must be multiplied, whichever takes longer."""
    weights = shapes.linear_params + shapes.vocab * shapes.hidden
    pair = 4 * shapes.layers * shapes.heads * shapes.head_dim
    return sum(
        max(
            (4 * weights + rows * tokens * shapes.kv_bytes(4)) / read,
            rows * (2 * weights + tokens * pair) / products,
        )
        for rows, tokens in steps
    )


def work_of(args: argparse.Namespace, judge: str) -> Work:
    given = {name: getattr(args, name) for name in Work.__dataclass_fields__ if hasattr(args, name)}
    return Work(**{**given, "judge": judge})


def table(report: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    work, limit = report["work"], report["limits"]
    lines = [
        f"{work['model']} in {work['load_in']}: {work['problems']} problems x {work['group_size']} answers of up to "
        f"{work['new_tokens']} tokens, {work['criteria']} criteria, micro-batches of {work['micro_rows']} rows",
        "limits: " + ", ".join(f"{v['median'] / 1e9:.0f} G {name}" for name, v in limit.items()),
    ]
    for judge, result in report["judges"].items():
        sides = [name for name in ("ours", "trl") if name in result]
        lines += [
            "",
            f"judge {judge}",
            "",
            "| phase | " + " | ".join(f"{s}, s | {s}, GiB" for s in sides) + " | times faster |",
        ]
        lines.append("|---" * (2 * len(sides) + 2) + "|")
        for phase in (*PHASES, "total"):
            cells = [phase if phase != "total" else "whole step"]
            for side in sides:
                s, peaks = result[side]["seconds"][phase], result[side]["peak GiB"]
                cells.append(f"{s['median']:.2f} ({s['low']:.2f}-{s['high']:.2f})")
                cells.append(f"{peaks[phase] if phase in peaks else max(peaks.values()):.2f}")
            if len(sides) > 1:
                ratio = result["times faster"][phase]
                cells.append(f"**{ratio['median']:.2f}** ({ratio['low']:.2f}-{ratio['high']:.2f})")
            else:
                cells.append("-")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        lines.append("tokens, both sides: " + ", ".join(f"{k} {v:,}" for k, v in result["ours"]["tokens"].items()))
        for side in sides:
            rates = result[side]["a second"]
            lines.append(
                f"{side} a second: {rates['rollout']:.0f} tokens in the rollout, {rates['judge']:.1f} ratings, "
                f"{rates['update']:.0f} tokens in the update"
            )
        lines.append("padding, of all positions: " + ", ".join(f"{k} {v:.0%}" for k, v in result["padding"].items()))
        d = result["decoding"]
        lines.append(f"decoding: {d['steps']} steps, {d['rows']:.1f} rows on average, {d['tokens/s']:.0f} tokens/s")
        lines.append(
            "share of the machine's limit: "
            + ", ".join(f"{k} {v:.0%}" for k, v in result["share of the limit"].items())
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------- sweep

AXES: dict[str, tuple[int, ...]] = {
    "group_size": (4, 8, 16, 32),
    "new_tokens": (64, 256, 512, 1024),
    "document_words": (128, 512, 1024),
    "criteria": (1, 3, 5),
}
SWEPT = ("propose", "solve", "rubric", "judge", "update")


def round_of_play(work: Work, line: Connection) -> None:
    """All five phases of a step on one document, measured: {"seconds": ..., "peak": ...}."""
    ours = Ours(work)
    llm, meter = ours.llm, ours.meter
    words = " ".join(
        path.read_text("utf-8") for path in sorted((Path(__file__).parents[1] / "samples/instructions").glob("*.txt"))
    )
    document = Document("bench", " ".join(words.split()[: work.document_words]))
    cfg = replace(ours.cfg, tries=1, crutches=True, max_criteria=work.criteria, group_size=work.group_size)
    episodes = ours.episodes()
    for e in episodes:
        e.document, e.reference = document, document.text[:200]
    llm.generate([list(ours.prompt(ours.groups[0]))], max_new_tokens=2, temperature=1.0)  # warms up
    meter.clear()
    with meter("propose"):
        rubric.propose(llm, [document], cfg, random.Random(0))
    with ours.replayed(), meter("solve"):
        rubric.solve(llm, episodes, cfg)
    with meter("rubric"):
        rubric.write_rubrics(llm, [replace(e, rubric=[]) for e in episodes], cfg)
    with meter("judge"):
        rubric.judge(llm, episodes, cfg)
    for e in episodes:
        for i, answer in enumerate(e.answers):
            answer.advantage = (-1.0) ** i
    with meter("update"):
        budgets = {"budgets": {"update": ours.cfg.update_tokens}, "nonfinite": 0}
        pop.update(llm, ours.optimizer, ours.scheduler, episodes, cfg, budgets)
    line.send({"seconds": dict(meter.seconds), "peak": dict(meter.peak)})


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """One axis at a time from a small base, each point in a fresh process."""
    base = Work(model=args.model, load_in=args.load_in, judge=args.judges[0], problems=1, group_size=4, new_tokens=64)
    spawn = multiprocessing.get_context("spawn")
    measured: dict[Work, Any] = {}  # the base is a point of several axes
    points: dict[str, dict[int, Any]] = {}
    for axis, values in AXES.items():
        points[axis] = {}
        for value in values:
            work = Work(**{**asdict(base), axis: value})
            if work not in measured:
                ours, theirs = spawn.Pipe()
                process = spawn.Process(target=round_of_play, args=(work, theirs), daemon=True)
                process.start()
                theirs.close()
                try:
                    measured[work] = ours.recv()
                except EOFError:
                    raise UserError(f"the process measuring {axis} {value} ended; its error is above") from None
                process.join()
            points[axis][value] = measured[work]
            seconds = "  ".join(f"{p} {measured[work]['seconds'][p]:.2f}" for p in SWEPT)
            print(f"{axis:15} {value:5}  {seconds} s", flush=True)
    return {"work": asdict(base), "points": points}


def growth(xs: Sequence[int], ys: Sequence[float]) -> float:
    """The exponent e of y ~ x^e between the last two points."""
    return math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])


def sweep_table(report: dict[str, Any]) -> str:
    lines = ["| axis | value | " + " | ".join(f"{p}, s (GiB)" for p in SWEPT) + " |", "|---" * (len(SWEPT) + 2) + "|"]
    for axis, points in report["points"].items():
        for value, m in points.items():
            cells = [f"{m['seconds'][p]:.2f} ({m['peak'][p] / GIB:.2f})" for p in SWEPT]
            lines.append(f"| {axis} | {value} | " + " | ".join(cells) + " |")
        exponents = [growth(list(points), [m["seconds"][p] for m in points.values()]) for p in SWEPT]
        lines.append(f"| {axis} | *grows as* | " + " | ".join(f"x^{e:.2f}" for e in exponents) + " |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Seconds (both scales logarithmic) and GiB of each phase along each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(AXES), figsize=(4 * len(AXES), 7), sharey="row", layout="constrained")
    for column, (axis, points) in enumerate(report["points"].items()):
        for row, (what, unit, label) in enumerate((("seconds", 1, "seconds"), ("peak", GIB, "peak memory, GiB"))):
            for phase in SWEPT:
                axes[row][column].plot(
                    list(points), [m[what][phase] / unit for m in points.values()], "o-", label=phase
                )
            scale, name = ("log", "linear")[row], axis.replace("_", " ")
            axes[row][column].set(xscale="log", yscale=scale, xlabel=name, ylabel=label)
            axes[row][column].set_xticks(list(points), [str(value) for value in points])
            axes[row][column].minorticks_off()
            axes[row][column].grid(alpha=0.3)
    axes[1][0].set_ylim(bottom=0)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(SWEPT))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="cost against sizes, instead of the comparison")
    parser.add_argument("--alone", action="store_true", help="without TRL")
    parser.add_argument("--model", default=Work.model, help="as pop.py takes it")
    parser.add_argument("--load-in", default=Work.load_in, choices=["4bit", "fp32"])
    parser.add_argument("--judges", nargs="+", default=["logits", "generate"], choices=["logits", "generate"])
    parser.add_argument("--rounds", type=int, default=5, help="alternations of each judge")
    for name in ("problems", "group_size", "new_tokens", "criteria", "micro_rows"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Work, name))
    parser.add_argument("--output", default="runs/bench", help="where to write the .json (and the sweep's .png)")
    args = parser.parse_args()
    path = Path(args.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        report = sweep(args) if args.sweep else compare(args)
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        print("\n" + (sweep_table(report) if args.sweep else table(report)))
        if args.sweep:
            plot(report, path.with_suffix(".png"))
        print(f"\nwritten to {path.with_suffix('.json')}" + (" and .png" if args.sweep else ""))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
