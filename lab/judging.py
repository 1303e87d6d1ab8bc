"""Does the judge see? How often each way of judging grades a reference above answers that are worse in a known way.

    python -m lab.judging RUN/episodes.jsonl --model M       # problems, references and rubrics as recorded there

A model that puts a reference above the same text with one fact altered can be trusted with facts; one that only puts it
above another problem's reference can tell the subject, and no more.
"""

import argparse
import math
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from scipy.stats import kendalltau

import model
import rubric
from benchmarks.results import estimate
from config import Config, parse_args
from data import Answer, Episode, UserError
from engine import heldout, sources, stats
from engine.parsing import final_answer
from engine.text import words

JUDGES = ("logits", "generate", "each", "holistic")


def altered(reference: str, other: str) -> str | None:
    """The reference with one fact changed: a number or, without one, a name for one of another text; None without both.

    >>> altered("It fell in 1453.", ""), altered("It was taken by Mehmed.", "He sailed with Zheng.")
    ('It fell in 1948.', 'It was taken by Zheng.')
    """
    if number := re.search(r"(?<![\d.,])\d+(?![\d.,]*\d)", reference):
        # A third more, and 11: no part of the number stays, and no year becomes one that is nearly right.
        changed = int(number[0]) + int(number[0]) // 3 + 11
        return reference[: number.start()] + str(changed) + reference[number.end() :]
    names = [re.search(r"(?<=[a-z,] )[A-Z][a-z]{3,}", text) for text in (reference, other)]
    if names[0] and names[1] and names[0][0] != names[1][0]:
        return re.sub(rf"\b{names[0][0]}\b", names[1][0], reference)
    return None


def half(reference: str) -> str:
    said = reference.split()
    return " ".join(said[: len(said) // 2])


# What is wrong with an answer -> how it is made of an episode and another one's; None: it cannot be.
WORSE: dict[str, Callable[[Episode, Episode], str | None]] = {
    "another problem's reference": lambda e, other: other.reference,
    "beside the point": lambda e, other: rubric.UNRELATED,
    "cut in half": lambda e, other: half(e.reference),
    "one fact altered": lambda e, other: altered(e.reference, other.reference),
}


def seen(llm: model.LLM, episodes: Sequence[Episode], judge: str, cfg: Config) -> dict[str, list[float]]:
    """For each kind of worse answer, of each problem: 1 if the reference is graded above it, 0 if below, 0.5 if equal.

    Answers whose ratings could not be read are left out. The mean is the AUC of pairs from the same problem.
    """
    tried = []
    for e, other in zip(episodes, [*episodes[1:], *episodes[:1]], strict=True):
        texts = [e.reference, *(worse(e, other) or "" for worse in WORSE.values())]
        criteria = rubric.OVERALL if judge == "holistic" else e.rubric
        tried.append(replace(e, rubric=list(criteria), answers=[Answer(t) for t in texts], controls=[], failures=[]))
    found: dict[str, list[float]] = {name: [] for name in WORSE}
    for e, grades in zip(tried, graded(llm, tried, judge, cfg), strict=True):
        best, *others = [grade if a.text else None for a, grade in zip(e.answers, grades, strict=True)]
        for name, grade in zip(WORSE, others, strict=True):
            if best is not None and grade is not None:
                found[name].append(0.5 if abs(best - grade) < 1e-6 else float(best > grade))
    return found


def graded(llm: model.LLM, episodes: Sequence[Episode], judge: str, cfg: Config) -> list[list[float | None]]:
    """The grades that a way of judging gives to the answers of each episode; None where no rating could be read."""
    how: dict[str, Any] = {"judge": judge} if judge != "holistic" else {"judge": "logits", "rubric": "holistic"}
    rubric.judge(llm, episodes, replace(cfg, **how))
    return [[None if a.ratings is None else rubric.grade(a.ratings, e.rubric) for a in e.answers] for e in episodes]


def ranks(llm: model.LLM, episodes: Sequence[Episode], judge: str, cfg: Config) -> dict[str, list[float]]:
    """How a way of judging ranks the recorded answers of each group: Kendall's tau-b between its grades and something
    else. A group gives none where one of the two is the same for all answers, or was not recorded.
    """
    names = ("the recorded grades", "the likeness to the reference", "the length in words")
    found: dict[str, list[float]] = {name: [] for name in names}
    again = [
        replace(e, answers=[replace(a, ratings=None) for a in e.answers], controls=[], failures=[]) for e in episodes
    ]
    for e, grades in zip(episodes, graded(llm, again, judge, cfg), strict=True):
        alike = heldout.similarities([(final_answer(a.text), e.reference) for a in e.answers]) if e.answers else None
        lengths = [len(final_answer(a.text).split()) for a in e.answers]
        others: list[Sequence[float | None]] = [[a.grade for a in e.answers], alike or [], lengths]
        for name, values in zip(found, others, strict=True):
            pairs = [(x, y) for x, y in zip(grades, values, strict=False) if x is not None and y is not None]
            tau = kendalltau([x for x, _ in pairs], [y for _, y in pairs]).statistic if len(pairs) > 1 else math.nan
            found[name] += [] if math.isnan(tau) else [float(tau)]
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """judge -> kind of answer -> wins, as a table: the share of wins with its 95% interval over problems."""
    rows = [["judge", *WORSE]]
    for judge, wins in found.items():
        scores = [np.array([[[w, 1.0]] for w in wins[name]]).reshape(-1, 1, 2) for name in WORSE]
        rows.append([judge, *(f"{estimate(asdict(stats.interval(s)))} of {len(s)}" for s in scores)])
    return stats.aligned(rows)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.judging", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("episodes", nargs="+", help="recorded episodes, such as a run's episodes.jsonl")
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES))
    parser.add_argument("--limit", type=int, default=64, help="at most so many problems")
    args, flags = parser.parse_known_args(argv)
    cfg = parse_args(flags)
    every = [e for name in args.episodes for e in sources.read(name, answers=True, flag="")]
    episodes = [e for e in every if e.rubric and len(words(e.reference)) >= 8]
    random.Random(cfg.seed).shuffle(episodes)
    episodes = episodes[: args.limit]
    if len(episodes) < 2:
        raise UserError(f"{', '.join(args.episodes)}: two problems with rubrics and references of 8 words are needed")
    llm = model.load(cfg.model, **cfg.loading, token_budget=cfg.rollout_tokens)
    found = {}
    for judge in args.judges:
        start = time.perf_counter()
        found[judge] = seen(llm, episodes, judge, cfg)
        print(f"\n{cfg.model}, {len(episodes)} problems, {judge} in {time.perf_counter() - start:.0f} s", flush=True)
        print(table(found), flush=True)
        if judge != "holistic":  # which has no part in the rubric's grades
            for name, taus in ranks(llm, episodes, judge, cfg).items():
                told = stats.t_interval(taus)
                tau = estimate({**told, "value": told["mean"]}, "+") or "-"
                print(f"within a group, Kendall's tau with {name}: {tau} ({len(taus)} groups)", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
