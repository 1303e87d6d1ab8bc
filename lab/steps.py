"""A training step on recorded answers, measured: seconds and memory of its phases, in alternation with another's.

Generation does all its work, sampling included, but the tokens are given, so that all sides train on the same ones.
"""

import contextlib
import json
import multiprocessing
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LogitsProcessor

import model
import pop
import rubric
from config import PRESETS, Config
from data import Answer, Criterion, Document, Episode, UserError
from engine import fast
from lab.plan import GIB

PHASES = ("rollout", "judge", "update")
Results = dict[str, list[dict[str, Any]]]  # of each side, what each of its steps returned


@dataclass(frozen=True)
class Work:
    """What a step is made of, the same for every side. Whatever is not named here is the preset's."""

    model: str = "smollm2"
    preset: str = "demo"
    problems: int = 2
    group_size: int = 8
    new_tokens: int = 64
    criteria: int = 2
    micro_rows: int = 8  # rows of a micro-batch, at most

    @property
    def rows(self) -> int:
        return self.problems * self.group_size

    def config(self) -> Config:
        chosen = dict(documents=self.problems, group_size=self.group_size, max_new_tokens=self.new_tokens)
        return Config(**{**PRESETS[self.preset], **chosen, "model": self.model, "oversample": 1.0})


def recorded(work: Work, tokenizer: Any, eos: int) -> list[Episode]:
    """The first problems of bench.jsonl, which has four, then the same again, with rubrics and G answers each.

    Answers longer than the 128 tokens on file are several of them one after the other, so that lengths stay as
    different as they are. They end with `eos` or at the limit.
    """
    lines = (Path(__file__).parents[1] / "docs/bench.jsonl").read_text("utf-8").splitlines()
    stretch = max(1, work.new_tokens // 128)
    episodes = []
    for number in range(work.problems):
        record = json.loads(lines[number % len(lines)])
        ids = [tokenizer(text, add_special_tokens=False).input_ids for text in record["answers"]]
        answers = [[token for k in range(stretch) for token in ids[(i + k) % len(ids)]] for i in range(work.group_size)]
        episode = Episode(Document("bench", ""), record["problem"], reference="-")
        episode.rubric = [Criterion(**c) for c in record["rubric"][: work.criteria]]
        episode.answers = [Answer("", [*answer, eos][: work.new_tokens]) for answer in answers]
        episodes.append(episode)
    return episodes


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
    """`with meter("judge"): ...` adds to the seconds and peak bytes of a phase. What a phase inside another takes is
    counted for the inner one alone.

    Memory is what torch has allocated on CUDA; else the process's own, looked at every 10 ms, without mapped files.
    """

    def __init__(self) -> None:
        self.phase, self.cuda = "outside", torch.cuda.is_available()
        self.clear()
        if not self.cuda:
            threading.Thread(target=self._watch, daemon=True).start()

    def clear(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, int] = defaultdict(int)
        self.since = time.perf_counter()

    def _watch(self) -> None:
        while True:
            self._look(self.phase)
            time.sleep(0.01)

    def _look(self, phase: str) -> None:
        used = torch.cuda.max_memory_allocated() if self.cuda else memory_in_use()
        self.peak[phase] = max(self.peak[phase], used)

    def _enter(self, phase: str) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self._look(self.phase)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        now = time.perf_counter()
        self.seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        outer = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def result(self) -> dict[str, dict[str, float]]:
        """Seconds and peak bytes of the three phases and of the whole step."""
        seconds, peak = ({p: values[p] for p in PHASES} for values in (self.seconds, self.peak))
        seconds["step"], peak["step"] = sum(seconds.values()), max(peak.values())
        return {"seconds": seconds, "peak": peak}


def memory_in_use() -> int:
    """Bytes this process holds in memory; without mapped files where the system tells them apart."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


class Ours:
    """One step of pop.py at a time, on recorded answers. llm: in place of the model that `work` names."""

    def __init__(self, work: Work, llm: model.LLM | None = None) -> None:
        cfg = work.config()
        options: dict[str, Any] = dict(token_budget=cfg.rollout_tokens, recompute=cfg.recompute)
        self.llm = llm or model.load(work.model, **cfg.loading, **options)
        self.recorded = recorded(work, self.llm.tokenizer, self.llm.eos_ids[0])
        # A micro-batch of no more tokens than TRL's.
        longest = max(len(self.llm.encode(e.problem)) for e in self.recorded) + work.new_tokens
        update_tokens = min(cfg.update_tokens, work.micro_rows * longest)
        self.cfg = replace(cfg, steps=10**6, warmup_steps=0, update_tokens=update_tokens)
        self.state = pop.new_state(self.llm, self.cfg)
        self.meter = Meter()

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, what is generated are the recorded answers."""
        left = {tuple(self.llm.encode(e.problem)): [a.ids for a in e.answers] for e in self.recorded}
        decode = fast.decode

        def given(llm: Any, ids: torch.Tensor, mask: torch.Tensor, *rest: Any, processors: Any, **named: Any) -> Any:
            rows = [left[tuple(row[some].tolist())].pop() for row, some in zip(ids, mask.bool(), strict=True)]
            replay = Replay(rows, self.llm.eos_ids[0])
            return decode(llm, ids, mask, *rest, processors=[*processors, replay], **named)

        fast.decode = given  # type: ignore[assignment]
        try:
            yield
        finally:
            fast.decode = decode

    def step(self) -> dict[str, Any]:
        """One optimizer step on all groups; rewards are the grades, guards are left out as TRL has none."""
        episodes = [replace(e, answers=[]) for e in self.recorded]
        self.meter.clear()
        with self.replayed(), self.meter("rollout"):
            rubric.solve(self.llm, episodes, self.cfg)
        for e, own in zip(episodes, self.recorded, strict=True):
            assert sorted(a.ids for a in e.answers) == sorted(a.ids for a in own.answers)
        with self.meter("judge"):
            rubric.judge(self.llm, episodes, self.cfg)
        rewards = []
        for e in episodes:
            grades = [rubric.grade(a.ratings or [], e.rubric) for a in e.answers]
            for a, advantage in zip(e.answers, pop.group_advantages(grades), strict=True):
                a.advantage = advantage
            rewards += grades
        with self.meter("update"):
            metrics = pop.update(self.llm, self.state, episodes, self.cfg)
        written = sum(len(a.ids) for e in episodes for a in e.answers)
        tokens = {"rollout": written, "update": metrics["trained_tokens"]}
        return {**self.meter.result(), "tokens": tokens, "reward": statistics.fmean(rewards), "loss": metrics["loss"]}


side: Any = None  # in a process that `alternate` began: what makes the steps of one side


def begin(build: Callable[..., Any], *given: Any) -> None:
    global side
    side = build(*given)


def step() -> dict[str, Any]:
    return side.step()


def alternate(sides: Mapping[str, tuple[Any, ...]], rounds: int) -> Results:
    """`rounds` steps of all sides in alternation, after one of each that warms up caches and thread pools.

    sides: name -> a function that makes an object with a method step(), and its arguments. Each side has a process of
    its own, so that nothing of one is in the other's memory. Raises UserError if one ends.
    """
    pools = {name: ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for name in sides}
    results: Results = {name: [] for name in sides}
    try:
        for name, given in sides.items():
            pools[name].submit(begin, *given).result()
        for number in range(rounds + 1):
            for name in sides if number % 2 else reversed(list(sides)):
                result = pools[name].submit(step).result()
                seconds = "  ".join(f"{phase} {value:6.2f}" for phase, value in result["seconds"].items())
                print(f"{f'round {number}/{rounds}' if number else 'warming up'}  {name:5} {seconds} s", flush=True)
                results[name].append(result)
    except BrokenProcessPool:
        raise UserError("the process of one side ended; its error is above") from None
    finally:
        for pool in pools.values():
            pool.shutdown()
    return results


def figures(results: Results) -> dict[str, float]:
    """Median seconds and peak GiB of each side and phase, and how many times as fast as TRL's ours is in the same round
    (median, lowest, highest), all without the first step. Of the first step, in which both sides have the same model,
    the mean reward and the loss, which should be equal.

    Raises UserError if the sides did not train on the same tokens.
    """
    counted = {json.dumps(r["tokens"]) for rounds in results.values() for r in rounds}
    if len(counted) > 1:
        raise UserError(f"the sides did not train on the same tokens: {counted}")
    found: dict[str, float] = {f"{phase}: tokens": n for phase, n in json.loads(counted.pop()).items()}
    for what in ("reward", "loss"):
        found |= {f"{what} of the first step, {name}": rounds[0][what] for name, rounds in results.items()}
    timed = {name: rounds[1:] for name, rounds in results.items()}
    for phase in (*PHASES, "step"):
        for name, rounds in timed.items():
            found[f"{phase}, {name}: s"] = statistics.median(r["seconds"][phase] for r in rounds)
            found[f"{phase}, {name}: GiB"] = max(r["peak"][phase] for r in rounds) / GIB
        if len(results) == 2:
            pairs = zip(timed["ours"], timed["trl"], strict=True)
            ratios = [theirs["seconds"][phase] / ours["seconds"][phase] for ours, theirs in pairs]
            for word, of in (("", statistics.median), (", lowest", min), (", highest", max)):
                found[f"{phase}: times as fast as TRL{word}"] = of(ratios)
    return found
