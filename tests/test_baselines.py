"""benchmarks/baselines.py: asked and counted as the package that brings the data does it."""

import argparse
import json
import random

import numpy as np
import pytest
from eval_framework.tasks.alpaca_eval_task import AlpacaEvalTask
from eval_framework.tasks.arena_hard_task import ArenaHardTask

from benchmarks import baselines
from benchmarks.sets import BENCHMARKS
from engine import stats

HARD, CREATIVE, ALPACA = (baselines.PUBLISHED[name]() for name in ("arena-hard", "arena-creative", "alpaca-eval"))
WIN = BENCHMARKS["winrate"]
LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A", "A<<B", "A<B", "B=A", "B<<A", "B<A")


def sent(judge, *texts: str) -> list[dict[str, str]]:
    """What a task of the package says to its judge."""
    seen = []

    def sampler(messages):
        seen.append(messages)
        return argparse.Namespace(response_text="[[A=B]] m")

    judge(sampler, *texts)
    return seen[0]


@pytest.mark.parametrize("item", [HARD[0], CREATIVE[0]], ids=["hard", "creative"])
def test_arena_hard_is_asked_in_the_packages_words_against_the_baseline_of_the_category(item):
    task = ArenaHardTask()
    (question,) = [q for q in task.load_prompts() if q["uid"] == item.id]
    baseline = task._extract_answer(task.load_baseline_outputs()[item.id])
    first, second = WIN.questions(item, "Mine.", "the base model's, which is not asked about")
    assert first.messages == sent(lambda s: task._judge_one(s, question, "Mine.", baseline))
    assert second.messages == sent(lambda s: task._judge_one(s, question, baseline, "Mine."))


def test_alpaca_eval_is_asked_in_the_packages_words_against_its_baseline():
    task, item = AlpacaEvalTask(), ALPACA[7]
    (record,) = [r for r in task._load_reference_records() if r["instruction"] == item.messages[0]["content"]]
    first, second = WIN.questions(item, "Mine.", "")
    told = (record["instruction"], "Mine.", record["output"], "m")
    assert first.messages == sent(lambda s: task._judge_one(s, *told))
    told = (record["instruction"], record["output"], "Mine.", "M")
    assert second.messages == sent(lambda s: task._judge_one(s, *told))


def test_all_published_prompts_have_a_baseline():
    assert (len(HARD), len(CREATIVE), len(ALPACA)) == (500, 250, 805)
    assert len({i.id for i in [*HARD, *CREATIVE]}) == 750
    assert all(i.data["against"].strip() for i in [*HARD, *CREATIVE, *ALPACA])


def test_arena_hards_verdicts_are_counted_as_the_package_counts_them(tmp_path):
    draw, records, scores = random.Random(0), [], []
    for item in HARD[:60]:
        labels = [draw.choice(LABELS) for _ in range(2)]
        # The package's first game has the baseline as A, its second the model.
        games = [{"score": label} for label in reversed(labels)]
        records.append({"uid": item.id, "games": games})
        asked = WIN.questions(item, "Mine.", "")
        verdicts = [q.read(f"My verdict is: [[{label}]]") for q, label in zip(asked, labels, strict=True)]
        scores.append(WIN.score(item, {}, verdicts)["win_rate"])
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    official = ArenaHardTask().aggregate_winrate(str(path))["overall"]["winrate"]
    assert stats.interval(np.array(scores)).value == pytest.approx(official)


def test_alpaca_evals_verdicts_are_counted_as_the_package_counts_them(tmp_path):
    draw, records, scores = random.Random(1), [], []
    for item in ALPACA[:40]:
        said = [draw.choice("mM") for _ in range(2)]
        positions = ("m", "M")  # of the model's answer
        games = [{"preference": s, "model_position": p} for s, p in zip(said, positions, strict=True)]
        records.append({"instruction": item.messages[0]["content"], "games": games})
        asked = WIN.questions(item, "Mine.", "")
        verdicts = [q.read(reply) for q, reply in zip(asked, said, strict=True)]
        scores.append(WIN.score(item, {}, verdicts)["win_rate"])
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    official = AlpacaEvalTask().aggregate_winrate(str(path))["overall"]["winrate"]
    assert stats.interval(np.array(scores)).value == pytest.approx(official)


REPLIES = ["", "A is better.", "[[A>C]]", "[[A>>", "[A>B", "[[A>A]]", "[[AB]]", "[A>B]", "[[A>B]] or [B>A]", "[[b>>a]]"]


@pytest.mark.parametrize("reply", REPLIES)
def test_a_label_is_found_where_the_package_finds_one_that_it_counts(reply):
    found = ArenaHardTask()._extract_score(reply)
    counted = {"A>B": [1.0, 1.0], "B>>A": [0.0, 3.0]}.get(found or "")
    assert baselines.read_label(reply, "A") == counted


@pytest.mark.parametrize("reply", ["M. I'm confident.", "m", "M\n", "**M**", "the first one", "", "I'm sure: M"])
def test_a_name_is_found_where_the_package_finds_it(reply):
    found = AlpacaEvalTask._parse_preference(reply)
    assert baselines.read_name(reply, "M") == (None if found is None else [float(found == "M"), 1.0])


def test_the_answer_that_is_the_baseline_is_a_tie_in_both_orders():
    item = ALPACA[0]
    assert WIN.questions(item, item.data["against"], "") == []
    assert WIN.score(item, {}, [])["win_rate"] == [(1.0, 2.0)]
