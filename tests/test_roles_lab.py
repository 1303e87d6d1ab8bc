"""lab/roles.py: the figures of what the roles wrote, each worked by hand, and that it writes down every text."""

import ast
import re
import sys

import pytest
import training

from data import HUB_CORPORA, Document
from lab import roles
from rubric import NO_GOLD, Answer, Criterion, Episode

DOCUMENT = Document("otters", "Otters of the Danube eat carp and crayfish. Their cubs stay in the holt for ten weeks.")
PROBLEM = "What do otters of the Danube eat, and how long do cubs stay?"
DIET = Criterion("Diet of otters", "carp and crayfish", "Says what Danube otters eat.", 3.0)
CUBS = Criterion("Cubs", "twelve weeks", "Says for what time they are at home.", 1.0)
STYLE = Criterion("Form", NO_GOLD, "Two plain sentences.", 4.0)


def rated(*ratings: float, grade: float) -> Answer:
    return Answer("Carp.", [1], ratings=list(ratings), grade=grade)


UNREAD = Answer("Carp.", [1])


def failed(role: str, *reasons: str) -> list[dict[str, str]]:
    return [{"role": role, "reason": reason, "raw": ""} for reason in reasons]


def episode(**said) -> Episode:
    return Episode(DOCUMENT, **{"problem": PROBLEM, "reference": "Carp.", **said})


def played() -> list[Episode]:
    """Seven documents: five with a problem, four of these with a rubric."""
    lost = "proposer/gate: it says nothing"
    return [
        episode(
            rubric=[DIET, CUBS],
            answers=[rated(2.0, 2.0, grade=1.0), rated(1.6, 2.0, grade=0.85), rated(0.2, 0.2, grade=0.1), UNREAD],
            controls=[rated(2.0, 2.0, grade=None), rated(0.0, 1.0, grade=None)],
        ),
        episode(
            failures=failed("proposer", "too short", "gate: it says nothing") + failed("rubric", "no criterion"),
            rubric=[DIET],
            answers=[rated(1.0, grade=0.5), rated(1.0, grade=0.5)],
            controls=[rated(1.0, grade=None), rated(1.5, grade=None)],
        ),
        episode(
            failures=failed("proposer", "reference too short"),
            rubric=[STYLE],
            answers=[rated(2.0, grade=1.0), UNREAD],
            controls=[UNREAD, rated(1.0, grade=None)],
        ),
        episode(rubric=[STYLE, CUBS, DIET]),
        episode(failures=failed("rubric", "no criterion", "too short"), drop="rubric/too short"),
        Episode(DOCUMENT, failures=failed("proposer", "gate: it says nothing"), drop=lost),
        Episode(DOCUMENT, failures=failed("proposer", "gate: it is vague", "gate: it says nothing"), drop=lost),
    ]


ABOVE = [True, False]  # of the comparisons made

FIGURES = {
    "proposals accepted at the first try": "3 of 7",
    "proposals accepted after all tries": "5 of 7",
    "of the problems that came to the gate, passed": "6 of 10",  # 5 accepted and 1 with a bad reference; 4 not
    "rubrics accepted": "4 of 5",
    "criteria of a rubric, mean": "1.8",  # 2, 1, 1, 3
    "criteria that name things of problem or document": "5 of 7",  # DIET: otters, Danube; CUBS: cubs, weeks
    "criteria with a gold answer": "5 of 7",
    "golds that are found in the document": "3 of 5",  # not twelve
    "judge's replies that could be read": "11 of 14",
    "pairs of answers with one grade": "1 of 4",
    "groups with spread": "1 of 3",
    "spread within a group, mean": "0.197",  # of 1, 0.85, 0.1, which is 0.3937, and of equals
    "reference above another document's": "1 of 2",
}
REJECTS = {
    "proposals rejected": {
        "too short": 1,
        "gate: it says nothing": 3,
        "gate: it is vague": 1,
        "reference too short": 1,
    },
    "rubrics rejected": {"no criterion": 2, "too short": 1},
}


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_is_the_one_worked_by_hand(figure: str):
    assert roles.numbers(played(), ABOVE)[figure].split(",")[0] == FIGURES[figure]


@pytest.mark.parametrize("figure", REJECTS)
def test_rejects_are_counted_by_role_and_reason(figure: str):
    assert ast.literal_eval(roles.numbers(played(), ABOVE)[figure]) == REJECTS[figure]


def test_every_figure_is_worked_by_hand_here():
    assert roles.numbers(played(), ABOVE).keys() == FIGURES.keys() | REJECTS.keys()


@pytest.mark.parametrize("drop", ["proposer/too short", "rubric/no criterion"])
def test_figures_of_documents_that_gave_nothing_are_dashes(drop: str):
    nothing = Episode(DOCUMENT, reference="Carp." if drop.startswith("rubric") else "", drop=drop)
    assert roles.numbers([nothing], [])["criteria with a gold answer"] == "-"


@pytest.mark.parametrize(
    ("part", "whole", "interval"),
    [(0, 10, "0% to 28%"), (5, 10, "24% to 76%"), (10, 10, "72% to 100%"), (81, 263, "26% to 37%")],  # Newcombe 1998
)
def test_intervals_are_wilsons(part: int, whole: int, interval: str):
    assert roles.share(part, whole).endswith(f"(95%: {interval})")


@pytest.fixture
def play_roles(monkeypatch, tmp_path_factory, tmp_path):
    """`python -m lab.roles` with a tiny model, whose noise passes the gates; returns the folder of the texts."""
    training.open_gates(monkeypatch.setattr)
    model = training.tiny_folder(tmp_path_factory.mktemp("tiny"))

    def go(*flags):
        short = training.flags(model, tmp_path / "out", documents=3)
        monkeypatch.setattr(sys, "argv", ["roles", *flags, "--crutches", *short])
        roles.main()
        return tmp_path / "out"

    return go


def test_roles_writes_down_every_document_of_each_task(play_roles):
    files = list(play_roles().iterdir())
    documents = {file.name: len({record["document"]["id"] for record in training.lines(file)}) for file in files}
    assert documents == {f"{task}.jsonl": 3 for task in HUB_CORPORA}


def test_roles_prints_the_figures_of_what_it_wrote(play_roles, capsys):
    (file,) = play_roles("--tasks", "health", "--check-rubric").iterdir()
    proposed = sum(bool(record["reference"]) for record in training.lines(file))
    (printed,) = re.findall(r"accepted after all tries +(\d of \d)", capsys.readouterr().out)
    assert printed == f"{proposed} of 3" and proposed > 0
