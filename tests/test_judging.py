"""lab/judging.py: how often a judge sees what is wrong with an answer, with judges whose sight is known."""

import json
from dataclasses import asdict

import pytest
from conftest import tiny_llm

import rubric
from config import Config
from data import UserError
from lab import judging
from rubric import Answer, Criterion, Document, Episode

FACTS = (
    "Mehmed took the city in 1453 with cannon of bronze.",
    "Tides turn twice a day, pulled by the near Moon alone.",
)
EPISODES = [
    Episode(Document(f"d{k}", text), f"What of {k}?", text, rubric=[Criterion("It", "not applicable", text, 1.0)])
    for k, text in enumerate(FACTS)
]


@pytest.mark.parametrize(
    ("reference", "other", "found"),
    [
        ("In 1453 it fell.", "", "In 1948 it fell."),
        ("It weighs 3 tonnes and 9 kilos.", "", "It weighs 15 tonnes and 9 kilos."),
        ("It cost 1,200.50 pounds under Mehmed.", "It was Zheng.", "It cost 1,200.50 pounds under Zheng."),
        ("It was Mehmed, and Mehmed alone.", "Here sailed Zheng.", "It was Zheng, and Zheng alone."),
        ("It was Mehmed.", "It was Mehmed.", None),
        ("Nothing to alter.", "It was Zheng.", None),
    ],
)
def test_one_fact_is_altered_and_nothing_else(reference, other, found):
    assert judging.altered(reference, other) == found


def judged_by(monkeypatch, rule) -> None:
    """rule(episode, text) -> the ratings, or None."""

    def judge(llm, episodes, cfg):
        for e in episodes:
            for a in e.answers:
                a.ratings = rule(e, a.text)

    monkeypatch.setattr(rubric, "judge", judge)


def of_the_subject(e, text):
    return [2.0 * any(len(word) > 4 and word in e.reference for word in text.split())]


@pytest.mark.parametrize(
    ("rule", "wins"),  # wins of the two references, in the order of WORSE; of the second no fact can be altered
    [
        (lambda e, text: [2.0 if text == e.reference else 1.0], [[1, 1], [1, 1], [1, 1], [1]]),  # sees all
        (lambda e, text: [1.0], [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5]]),  # sees nothing
        (lambda e, text: [float("1453" not in text)], [[0, 1], [0, 0.5], [0, 0.5], [0]]),  # dislikes a fact
        (of_the_subject, [[1, 1], [1, 1], [0.5, 0.5], [0.5]]),
    ],
)
def test_wins_are_of_the_reference_over_each_worse_answer_of_its_own_problem(monkeypatch, rule, wins):
    judged_by(monkeypatch, rule)
    assert judging.seen(None, EPISODES, "logits", Config()) == dict(zip(judging.WORSE, wins, strict=True))


def test_an_answer_whose_ratings_cannot_be_read_is_left_out(monkeypatch):
    judged_by(monkeypatch, lambda e, text: None if text == rubric.UNRELATED else [1.0])
    found = judging.seen(None, EPISODES, "logits", Config())
    assert found["beside the point"] == [] and len(found["cut in half"]) == 2


def test_each_way_of_judging_rates_with_the_episodes_rubric_and_leaves_it_as_it_was():
    llm, before = tiny_llm(), [asdict(e) for e in EPISODES]
    for judge in judging.JUDGES:
        found = judging.seen(llm, EPISODES, judge, Config(criterion_tokens=60))
        assert all(len(wins) <= 2 for wins in found.values())
    assert [asdict(e) for e in EPISODES] == before


def test_the_command_prints_a_table_with_intervals(monkeypatch, tmp_path, capsys):
    judged_by(monkeypatch, lambda e, text: [2.0 if text == e.reference else 1.0])
    monkeypatch.setattr(judging.model, "load", lambda *_, **__: None)
    path = tmp_path / "episodes.jsonl"
    path.write_text("".join(json.dumps(asdict(e)) + "\n" for e in EPISODES))
    judging.main([str(path), "--judges", "logits", "--preset", "demo"])
    printed = capsys.readouterr().out
    assert "| logits | 1.000 [1.000, 1.000] of 2" in printed and "smollm2, 2 problems" in printed
    with pytest.raises(UserError, match="two problems with rubrics"):
        path.write_text(json.dumps(asdict(EPISODES[0])) + "\n")
        judging.main([str(path), "--preset", "demo"])


def group(grades, texts="abcd"):
    answers = [Answer(text, [1], grade=grade) for text, grade in zip(texts, grades, strict=False)]
    return Episode(Document("d", "d"), "p", "The reference.", rubric=RUBRIC, answers=answers)


RUBRIC = [Criterion("It", "not applicable", "d", 1.0)]


@pytest.mark.parametrize(
    ("recorded", "taus"),
    [
        ([0.1, 0.2, 0.3, 0.4], [1.0]),
        ([0.4, 0.3, 0.2, 0.1], [-1.0]),
        ([0.1, 0.2, 0.4, 0.3], [(5 - 1) / 6]),  # one of six pairs the other way round
        ([0.1, 0.2, 0.3, None], [1.0]),
        ([0.5, 0.5, 0.5, 0.5], []),  # no ranks
        ([None, None, None, 0.5], []),
    ],
)
def test_ranks_are_compared_within_each_group(monkeypatch, recorded, taus):
    judged_by(monkeypatch, lambda e, text: ["abcd".index(text) / 2])
    monkeypatch.setattr(judging.heldout, "similarities", lambda pairs: [-"abcd".index(text) for text, _ in pairs])
    found = judging.ranks(None, [group(recorded), group(recorded)], "logits", Config())
    assert found["the recorded grades"] == pytest.approx(taus * 2)
    assert found["the likeness to the reference"] == pytest.approx([-1.0] * 2)


def test_a_judge_that_likes_length_is_told_of(monkeypatch):
    texts = ["one", "one two", "one two three four", "one two three"]
    judged_by(monkeypatch, lambda e, text: [texts.index(text) / 2])
    monkeypatch.setattr(judging.heldout, "similarities", lambda pairs: None)
    found = judging.ranks(None, [group([None] * 4, texts)], "logits", Config())
    assert found["the length in words"] == pytest.approx([(5 - 1) / 6])


def test_without_answers_or_likeness_there_is_no_tau(monkeypatch):
    judged_by(monkeypatch, lambda e, text: ["abcd".index(text) / 2])
    monkeypatch.setattr(judging.heldout, "similarities", lambda pairs: None)
    found = judging.ranks(None, [group([]), group([0.1, 0.2])], "logits", Config())
    assert found == {"the recorded grades": [1.0], "the likeness to the reference": [], "the length in words": []}
