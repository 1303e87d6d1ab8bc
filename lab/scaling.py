"""What a step costs on one GPU and on many, by formulas: the tables of docs/scaling.md.

python -m lab.scaling

Each process plays its share of a step's documents. They meet when all have played and when all have their gradients,
so that twice a step all wait for the slowest.
"""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from config import PRESETS, Config
from engine import stats
from engine.memory import Batch, work_of
from lab.plan import CARDS, GIB, KNOWN, Shapes, predict, tokens_of
from lab.roles import share

# Measured on an H200 with the sizes of Qwen2.5-7B (docs/speed.md): seconds of a decoding step by CUDA graph with
# transformers 5.24, in NF4 at 4 and 64 rows, and with dequantized weights; of the step beside TRL's, seconds of the
# judge and of the update. The tokens that passed through the model there were counted by replaying it on a CPU.
NF4_4_ROWS, NF4_64_ROWS, DEQUANTIZED = 14.7e-3, 19.9e-3, 10.0e-3
JUDGE_SECONDS, JUDGE_TOKENS = 1.30, 40_399
UPDATE_SECONDS, UPDATE_TOKENS = 1.77, 5_731
BANDWIDTH = 4.8e12  # bytes a second as published for the H200, not measured
LINK = 25e9  # bytes a second from GPU to GPU: assumed
H200 = 129  # GiB to use of 140, the share that lab.plan uses of an 80 GB card

SEVEN = KNOWN["Qwen/Qwen2.5-7B"]
HEAD = 2 * SEVEN.vocab * SEVEN.hidden / BANDWIDTH  # seconds to read the output head, which stays in 16 bits
ROW = 264 * SEVEN.kv_bytes(2) / BANDWIDTH  # and a row's cache, half-way through the measured decoding
# What reading does not explain, for each layer; then NF4's seconds for a weight, and for a weight and a row.
LAYER = (DEQUANTIZED - HEAD - 4 * ROW - 2 * SEVEN.linear_params / BANDWIDTH) / SEVEN.layers
NF4_ROW = ((NF4_64_ROWS - NF4_4_ROWS) / 60 - ROW) / SEVEN.linear_params
NF4 = (NF4_4_ROWS - HEAD - LAYER * SEVEN.layers - 4 * ROW) / SEVEN.linear_params - 4 * NF4_ROW
# Seconds for a weight and a token; of the update the reference, the forward pass, its repetition and the backward pass.
FORWARD = JUDGE_SECONDS / (SEVEN.linear_params * JUDGE_TOKENS)
UPDATE = UPDATE_SECONDS / (SEVEN.linear_params * UPDATE_TOKENS)

# From runs of docs/evaluation.md, the 1.5B's by an earlier version: attempts that 12 documents took it on instructions,
# at a problem and at a rubric; the spread of a group's tokens over their mean, by the 0.5B (by the 1.5B 0.15); of 36
# documents in three tasks those that gave a group to train on.
TRIES = (2, 2, 3, 2, 2, 1, 1, 1, 2, 3, 2, 1)
RUBRICS = (1, 2, 2, 1, 1, 2, 1, 2, 2, 1, 2, 2)
SPREAD = 0.26
YIELD = {"1.5B": (34, 36), "0.5B": (13, 36)}


class Group(NamedTuple):
    """What is drawn for a document: its group's tokens over the mean, its attempts at a problem and at a rubric."""

    length: float = 1.0
    tries: int = 1
    rubrics: int = 1


Cost = Callable[[Sequence[Group]], Mapping[str, float]]  # seconds by phase of a process with these groups


def drawn(rng: random.Random, spread: float = SPREAD) -> Group:
    sigma = math.sqrt(math.log(1 + spread**2))
    return Group(rng.lognormvariate(-(sigma**2) / 2, sigma), rng.choice(TRIES), rng.choice(RUBRICS))


def simulate(
    cost: Cost,
    taken: int,
    trained: int,
    processes: int,
    draw: Callable[[], Group],
    meeting: float = 0,
    steps: int = 100,
) -> dict[str, float]:
    """Mean seconds of a step: of each phase over the processes, "waiting" for the slowest, and "step", all together.

    meeting: seconds in which the gradients are summed.
    """
    seen: list[dict[str, float]] = []
    for _ in range(steps):
        groups = [draw() for _ in range(taken)]
        played = [{**cost(groups[i::processes]), "update": 0.0} for i in range(processes)]
        updates = [cost(groups[:trained][i::processes])["update"] for i in range(processes)]
        phases = {name: sum(p[name] for p in played) / processes for name in played[0]}
        phases["update"] = sum(updates) / processes
        step = max(sum(p.values()) for p in played) + max(updates) + meeting
        seen.append({**phases, "waiting": step - sum(phases.values()), "step": step})
    return {name: sum(s[name] for s in seen) / steps for name in seen[0]}


def decoding_step(shapes: Shapes, rows: int, context: float, dequantized: bool) -> float:
    """The weights once for all rows, each row's keys and values, and what the layers take besides."""
    weights = 2 / BANDWIDTH if dequantized else NF4 + NF4_ROW * rows
    read = 2 * shapes.vocab * shapes.hidden + rows * context * shapes.kv_bytes(2)
    return shapes.linear_params * weights + read / BANDWIDTH + LAYER * shapes.layers


def decoding(shapes: Shapes, rows: int, batch: Batch, new: float, dequantized: bool) -> float:
    """In batches of at most batch.rows, each as long as its longest row may be."""
    parts = [min(batch.rows, rows - begun) for begun in range(0, rows, batch.rows)]
    return sum(new * decoding_step(shapes, part, batch.prompt + new / 2, dequantized) for part in parts)


def side_by_side(tries: Sequence[int], most: int) -> list[int]:
    """Attempts at a problem in each round, as rubric.propose makes them: in later ones several for a document left."""
    rows: list[int] = []
    done = 0
    while done < most and (left := sum(t > done for t in tries)):
        at_once = min(most - done, len(tries) // left)
        rows.append(left * at_once)
        done += at_once
    return rows


def on_gpu(shapes: Shapes, cfg: Config, dequantized: bool) -> Cost:
    """Of a process with an H200: texts as long as --dry-run counts them, attempts as many as are drawn."""
    work, taken = work_of(cfg), cfg.documents_taken
    counted = {role: tokens[0] / taken for role, tokens in tokens_of(cfg).items()}  # read for a document
    problem = tokens_of(cfg)["propose"][1] / taken / cfg.tries  # written at an attempt: the reference, too

    def cost(groups: Sequence[Group]) -> dict[str, float]:
        size = sum(g.length for g in groups)
        tried, written = side_by_side([g.tries for g in groups], cfg.tries), [g.rubrics for g in groups]
        # Documents left at each attempt are decoded together.
        left = {"propose": tried, "solve": [len(groups) * cfg.group_size]}
        left["rubric"] = [sum(t > k for t in written) for k in range(3)]
        new = {"propose": problem, "solve": cfg.max_new_tokens, "rubric": work["rubric"].new}
        phases = {r: sum(decoding(shapes, n, work[r], new[r], dequantized) for n in rows) for r, rows in left.items()}
        reading = counted["propose"] * sum(tried) / cfg.tries + counted["rubric"] * sum(written) / 3
        reading += counted["solve"] * len(groups)
        update = counted["update"] * taken / cfg.documents * size
        reading, judge = FORWARD * reading, FORWARD * counted["judge"] * size
        rest = {"reading": reading, "judge": judge, "update": UPDATE * update}
        return phases | {phase: seconds * shapes.linear_params for phase, seconds in rest.items()}

    return cost


# Measured on two quiet cores of an EPYC, by the number of processes: seconds of a step of the demo with 4 documents and
# one thread to a process, medians of two steps with each of three seeds.
CPU = {
    1: {"propose": 7.5, "solve": 3.8, "rubric": 10.4, "judge": 5.5, "update": 13.1, "waiting": 0.0, "step": 39.7},
    2: {"propose": 4.9, "solve": 2.9, "rubric": 6.6, "judge": 2.4, "update": 6.5, "waiting": 2.3, "step": 25.9},
}
CPU_DOCUMENTS = 4
# Counted in two of these steps by one process: tokens read, and rows of a decoding step in the mean.
CPU_READ = {"propose": 1_912, "solve": 238, "rubric": 2_668}
CPU_ROWS = {"propose": 6.8, "solve": 13.7, "rubric": 3.1}
CPU_TOKEN = 1.24e-3  # seconds to read a token: the judge took 2.9 s for 2,360 and 6.2 s for 4,970


def on_cpu(groups: Sequence[Group]) -> dict[str, float]:
    """One process's seconds, shared out by documents, but for what a decoding step takes with however few rows."""
    part, phases = sum(g.length for g in groups) / CPU_DOCUMENTS, {}
    for role in (*CPU_ROWS, "judge", "update"):
        fixed = 0.0
        if role in CPU_ROWS:  # 8, 16 and 32 answers took 3.7, 5.5 and 7.5 s (docs/speed.md): 2.7 s and 0.154 for each
            fixed = (CPU[1][role] - CPU_TOKEN * CPU_READ[role]) * 2.7 / (2.7 + 0.154 * CPU_ROWS[role])
        phases[role] = fixed + (CPU[1][role] - fixed) * part
    return phases


# ---------------------------------------------------------------------------------------------------- the tables

NAMES = {name: KNOWN[f"Qwen/Qwen2.5-{name}"] for name in ("7B", "32B", "72B")}
PLACES = ((1, 64), (8, 64), (64, 64), (64, 512))  # GPUs, --documents
WRITING = ("propose", "solve", "rubric")


def settings(documents: int, preset: str = "48gb") -> Config:
    return Config(**{**PRESETS[preset], "preset": preset, "documents": documents})  # type: ignore[arg-type]


def peak(shapes: Shapes, cfg: Config, dequantized: bool = False) -> float:
    return max(predict(shapes, work_of(cfg), "cuda", cfg, dequantized).values()) / GIB


@functools.cache
def predicted(name: str, gpus: int, documents: int, alike: str = "") -> dict[str, float]:
    """alike: "lengths" or "attempts", in which groups do not differ."""
    shapes, cfg, rng = NAMES[name], settings(documents), random.Random(0)

    def draw() -> Group:
        group = drawn(rng, 0 if alike == "lengths" else SPREAD)
        return Group(group.length, tries=2) if alike == "attempts" else group

    meeting = 2 * (gpus - 1) / gpus * 4 * shapes.lora_params(cfg.lora_r) / LINK
    cost = on_gpu(shapes, cfg, peak(shapes, cfg, dequantized=True) <= H200)
    return simulate(cost, cfg.documents_taken, documents, gpus, draw, meeting)


def groups_per_hour(name: str, gpus: int, documents: int) -> float:
    """Of one GPU."""
    return 3600 * documents / predicted(name, gpus, documents)["step"] / gpus


def markdown(header: str, rows: Sequence[Sequence[str]]) -> str:
    return stats.aligned([header.split(" | "), *rows])


def error(by_formula: float, measured: float) -> str:
    return f"{round(100 * (by_formula / measured - 1)):+d}%"


def steps_table() -> str:
    rows = []
    for name in NAMES:
        for gpus, documents in PLACES:
            s = predicted(name, gpus, documents)
            phases = {p: seconds for p, seconds in s.items() if p != "step"}
            rate = groups_per_hour(name, gpus, documents)
            row = [name, f"{gpus}", f"{documents}", *(f"{seconds:,.0f}" for seconds in phases.values())]
            row += [f"**{s['step']:,.0f}**", f"{rate * gpus:,.0f}", f"{rate / groups_per_hour(name, *PLACES[0]):.0%}"]
            row += [f"{sum(s[p] for p in WRITING) / s['step']:.0%}", max(phases, key=lambda p: phases[p])]
            rows.append(row)
    header = "model | GPUs | documents | " + " | ".join(phases) + " | step | groups/h | efficiency | decoding | most"
    return markdown(header, rows)


def sizes_table() -> str:
    rows = []
    for name, shapes in NAMES.items():
        plain, copied = peak(shapes, settings(16, "16gb")), peak(shapes, settings(64), dequantized=True)
        card = next(size for size, gib in CARDS.items() if plain <= gib)
        adapter = 4 * shapes.lora_params(32) / 1e9
        row = [name, f"{plain:.0f} GiB: {card} GB", f"{copied:.0f} GiB: {'yes' if copied <= H200 else 'no'}"]
        rows.append([*row, f"{adapter:.2f} GB", f"{3 * adapter:.2f} GB", f"{1e3 * 2 * 1e9 * adapter / LINK:.0f} ms"])
    header = "model | preset 16gb: card | dequantized, 48gb: fits an H200 | adapter | a checkpoint | gradients summed"
    return markdown(header, rows)


def waiting_table() -> str:
    rows = []
    for gpus, documents in PLACES[1:]:
        waits = [predicted("7B", gpus, documents, alike) for alike in ("", "lengths", "attempts")]
        rows.append([f"{gpus}", f"{documents}", *(f"{w['waiting'] / w['step']:.0%}" for w in waits)])
    return markdown("GPUs | documents | as drawn | lengths alike | attempts alike", rows)


def corpus_table() -> str:
    cfg, rows = settings(64), []
    pages = {
        name: 3600 * cfg.documents_taken / predicted(name, 8, 64)["step"] / 8 for name in NAMES
    }  # of a GPU, an hour
    hours = [f"{1e9 / pages[name] / 1e6:.1f} million" for name in NAMES]
    for judge, (groups, documents) in YIELD.items():
        got = 1e9 * groups / documents
        tokens = f"{got * cfg.group_size * cfg.max_new_tokens / 1e12:.1f} trillion"
        rows.append([judge, share(groups, documents), f"{got / 1e6:.0f} million", tokens, *hours])
    header = "acceptance of | documents with a group | groups | tokens of answers | hours of an H200, 7B | 32B | 72B"
    return markdown(header, rows)


def h200_table() -> str:
    """Against measurements that nothing was fitted to."""
    wide, batch = 32, Batch(32, 200, n=1)

    def ms(rows: int, dequantized: bool) -> float:
        return 1e3 * decoding_step(SEVEN, rows, 264, dequantized)

    found = [
        ("a decoding step of 32 rows, NF4, ms", 18.4, ms(32, False)),
        ("the same dequantized", 10.6, ms(32, True)),
        ("32 rows of up to 1,024 tokens, NF4, s", 19.1, decoding(SEVEN, wide, batch, 1024, False)),
        ("the same dequantized", 12.1, decoding(SEVEN, wide, batch, 1024, True)),
        ("rollout beside TRL, 32 rows of up to 192, NF4, s", 3.85, decoding(SEVEN, wide, batch, 192, False)),
    ]
    rows = [[what, f"{m:g}", f"{p:.3g}", error(p, m)] for what, m, p in found]
    return markdown("H200, 7B | measured | formula | error", rows)


def cpu_table() -> str:
    rng = random.Random(0)
    found = simulate(on_cpu, CPU_DOCUMENTS, CPU_DOCUMENTS, 2, lambda: drawn(rng))
    rows = []
    for phase, seconds in found.items():
        off = error(seconds, CPU[2][phase]) if phase != "waiting" else ""
        rows.append([phase, *(f"{value:.1f}" for value in (CPU[1][phase], CPU[2][phase], seconds)), off])
    return markdown("two CPU cores, 135M | one process, measured | two, measured | two, predicted | error", rows)


TABLES = (steps_table, sizes_table, waiting_table, corpus_table, h200_table, cpu_table)


def main() -> None:
    print("\n\n".join(table() for table in TABLES))


if __name__ == "__main__":
    main()
