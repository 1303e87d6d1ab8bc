"""What each role writes with a preset's settings, how much of it is usable, and every text of it in a file.

python -m lab.roles --model PATH         # further flags are those of pop.py
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import torch

import data
import model
import pop
import rubric
from config import Config, parse_args
from data import HUB_CORPORA, Document, Episode, UserError, alive
from engine import sources
from engine.text import content_words
from lab import judging


def measure(args: argparse.Namespace, flags: Sequence[str]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    given = ["--preset", args.preset, "--model", args.model, *flags]
    base = parse_args(given)
    # On a CPU too, which has the memory: with weights in 4 bits decoding would take most of the time.
    dequantize = base.dequantize != "off"
    llm = model.load(base.model, token_budget=base.rollout_tokens, **base.loading | {"dequantize": dequantize})
    for task in args.tasks:
        cfg = parse_args([*given, "--task", task])
        torch.manual_seed(cfg.seed)
        corpus = sources.open_corpus(replace(cfg, corpus=cfg.corpus or "samples"))
        start, path = time.perf_counter(), args.output / f"{task}.jsonl"
        episodes, above = play(llm, list(islice(corpus.epoch(0), args.documents)), cfg, path)
        seconds = time.perf_counter() - start
        print(f"\n== {task}: {len(episodes)} documents, {seconds:.0f} s; all texts in {path}")
        for name, value in numbers(episodes, above).items():
            print(f"{name:48} {value}", flush=True)
        if len(usable := alive(episodes)) > 1:
            print(judging.table({cfg.judge: judging.seen(llm, usable, cfg.judge, cfg)}), flush=True)


def play(llm: model.LLM, documents: list[Document], cfg: Config, path: Path) -> tuple[list[Episode], list[bool]]:
    """A step of the self-play; and for each problem, by its first rubric, whether its own reference is graded above the
    reference of another. The texts are written to `path` after each phase."""
    episodes = rubric.propose(llm, documents, cfg, random.Random(cfg.seed))
    path.write_text(data.json_lines(episodes), encoding="utf-8")
    for phase in (rubric.solve, rubric.write_rubrics, rubric.judge):
        phase(llm, alive(episodes), cfg)
        path.write_text(data.json_lines(episodes), encoding="utf-8")
    graded = [[rubric.grade(a.ratings, e.rubric) for a in e.controls if a.ratings] for e in alive(episodes)]
    rubric.check_rubrics(llm, alive(episodes), cfg)
    for e in alive(episodes):
        for a in e.answers:
            rubric.reward(a, e, cfg)
    path.write_text(data.json_lines(episodes), encoding="utf-8")
    return episodes, [both[0] > both[1] for both in graded if len(both) == 2]


def numbers(episodes: Sequence[Episode], above: Sequence[bool]) -> dict[str, str]:
    """The figures of one task, from what was written down. above: of each comparison, whether it came out right."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for e in episodes:
        for failure in e.failures:
            reasons[failure["role"]][failure["reason"]] += 1
    proposed = [e for e in episodes if e.reference]
    with_rubric = [e for e in proposed if not (e.drop or "").startswith("rubric/")]
    first = [e for e in proposed if not any(f["role"] == "proposer" for f in e.failures)]
    gated = sum(n for reason, n in reasons["proposer"].items() if reason.startswith("gate"))
    reached = gated + len(proposed) + sum(n for why, n in reasons["proposer"].items() if why.startswith("reference"))
    criteria = [(e, c) for e in with_rubric for c in e.rubric]
    golds = [(e, c) for e, c in criteria if c.gold != rubric.NO_GOLD]
    found = [  # most of the gold's words
        len(words & content_words(e.document.text)) >= 0.6 * len(words)
        for e, c in golds
        for words in [content_words(c.gold)]
    ]
    named = [
        len(content_words(f"{c.name} {c.description} {c.gold}") & content_words(f"{e.problem} {e.document.text}")) > 1
        for e, c in criteria
    ]
    judged = [e for e in with_rubric if e.answers]
    grades = [[a.grade for a in e.answers if a.grade is not None] for e in judged]
    pairs = [abs(a - b) for each in grades for a, b in combinations(each, 2)]
    read = [a.ratings is not None for e in judged for a in [*e.answers, *e.controls]]
    spread = [statistics.pstdev(each) for each in grades if len(each) > 1]
    return {
        "proposals accepted at the first try": share(len(first), len(episodes)),
        "proposals accepted after all tries": share(len(proposed), len(episodes)),
        "of the problems that came to the gate, passed": share(reached - gated, reached),
        "proposals rejected": str(dict(reasons["proposer"])),
        "rubrics accepted": share(len(with_rubric), len(proposed)),
        "rubrics rejected": str(dict(reasons["rubric"])),
        "criteria of a rubric, mean": f"{len(criteria) / max(1, len(with_rubric)):.1f}",
        "criteria that name things of problem or document": share(sum(named), len(named)),
        "criteria with a gold answer": share(len(golds), len(criteria)),
        "golds that are found in the document": share(sum(found), len(found)),
        "judge's replies that could be read": share(sum(read), len(read)),
        "pairs of answers with one grade": share(sum(gap < 1e-3 for gap in pairs), len(pairs)),
        "groups with spread": share(sum(s > pop.ZERO_SPREAD for s in spread), len(judged)),
        "spread within a group, mean": f"{statistics.fmean(spread):.3f}" if spread else "-",
        "reference above another document's": share(sum(above), len(above)),
    }


def share(part: int, whole: int) -> str:
    """A proportion with its 95% interval (Wilson 1927)."""
    if not whole:
        return "-"
    p, z = part / whole, 1.96
    middle, half = p + z * z / (2 * whole), z * math.sqrt(p * (1 - p) / whole + (z / (2 * whole)) ** 2)
    low, high = (max(0.0, bound) / (1 + z * z / whole) for bound in (middle - half, middle + half))
    return f"{part} of {whole}, {p:.0%} (95%: {low:.0%} to {high:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct")
    parser.add_argument("--preset", default="24gb", help="whose settings to take")
    parser.add_argument("--documents", type=int, default=12, help="of each task's samples, or of --corpus")
    parser.add_argument("--tasks", nargs="+", default=list(HUB_CORPORA), choices=list(HUB_CORPORA))
    parser.add_argument("--output", type=Path, default=Path("roles"), help="folder for the texts")
    try:
        measure(*parser.parse_known_args())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
