"""What rubric.py promises of rubrics and ratings: how they are written, read, tried out and added up."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
import torch
from conftest import tiny_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_roles import (
    ANSWERS,
    BREAD,
    BREAD_PROBLEM,
    BREAD_REFERENCE,
    BREAD_RUBRIC,
    KESTREL,
    KESTREL_REFERENCE,
    KESTREL_RUBRIC,
    Script,
    between,
    by_answer,
    by_name,
    episode,
    every_judge,
    named,
    rubric_text,
    verdict,
    watched,
)

import pop
import rubric
from engine import crutches, parsing
from engine.text import length_spread
from model import LLM
from pop import Config
from rubric import NO_GOLD, Answer, Criterion, Episode

# --------------------------------------------------------------------------------------------- rubric writer

STYLE = Criterion("Style", NO_GOLD, "Tells of the kestrel in short sentences.", 1.0)


def write(llm: LLM, *calls: Sequence, **options) -> tuple[Episode, Script]:
    """An episode after its rubric writer said these texts, call by call."""
    script = Script(llm, *calls)
    e = episode(rubric=[])
    rubric.write_rubrics(llm, [e], Config(**options))
    return e, script


def test_a_rubric_is_written_once_if_it_can_be_read(llm):
    e, script = write(llm, [rubric_text(KESTREL_RUBRIC)], ["never asked for"])
    assert (e.rubric, e.drop, e.failures, len(script.calls)) == (KESTREL_RUBRIC, None, [], 1)


def test_a_rubric_that_cannot_be_read_is_tried_again(llm):
    e, script = write(llm, ["I cannot."], [rubric_text(KESTREL_RUBRIC)], ["never asked for"])
    assert (e.rubric, e.drop, len(script.calls)) == (KESTREL_RUBRIC, None, 2)
    assert e.failures == [
        {"role": "rubric", "reason": "no complete criterion", "raw": rubric.RUBRIC_BEGUN[0] + "I cannot."}
    ]


def test_attempts_are_greedy_then_greedy_at_the_other_rendering_then_three_samples(llm):
    e, script = write(llm, ["no"], ["nor this"], [["1", "2", "3"]], ["never asked for"])
    asked = [(call.n, call.temperature > 0) for call in script.calls]
    assert asked == [(1, False), (1, False), (3, True)]
    first, second, third = (call.ids[0] for call in script.calls)
    assert first == third != second
    assert (e.rubric, e.drop) == ([], "rubric/no complete criterion")
    begun, other = rubric.RUBRIC_BEGUN
    assert [f["raw"] for f in e.failures] == [begun + "no", other + "nor this", begun + "1", begun + "2", begun + "3"]


def test_the_other_rendering_shows_the_same_in_another_order(llm):
    cfg, e = Config(rubric_answers=3), episode()
    one, other = (rubric.rubric_messages(e, cfg, rendering)[-1]["content"] for rendering in (0, 1))
    blocks = [re.findall(r"<(answer|document|reference|problem)>\n(.*?)\n</", text) for text in (one, other)]
    assert sorted(blocks[0]) == sorted(blocks[1])
    shown = [[text for tag, text in found if tag == "answer"] for found in blocks]
    assert shown[0] == shown[1][::-1] == sorted(ANSWERS[0], key=len)
    order = [[tag for tag, _ in found] for found in blocks]
    assert order == [
        ["problem", *3 * ["answer"], "document", "reference"],
        ["problem", "document", "reference", *3 * ["answer"]],
    ]
    assert one.rpartition("</")[2].partition("\n")[2] == other.rpartition("</")[2].partition("\n")[2]  # what is asked


def test_of_three_samples_the_first_good_one_is_taken(llm):
    samples = ["no", rubric_text(KESTREL_RUBRIC), rubric_text([STYLE])]
    e, _ = write(llm, ["no"], ["no"], [samples])
    assert e.rubric == KESTREL_RUBRIC and len(e.failures) == 3


def test_only_episodes_without_a_rubric_are_asked_for_again(llm):
    script = Script(llm, ["no", rubric_text(BREAD_RUBRIC)], [rubric_text(KESTREL_RUBRIC)])
    bread = episode(document=BREAD, problem=BREAD_PROBLEM, reference=BREAD_REFERENCE, rubric=[])
    kestrel, recorded = episode(rubric=[]), episode(rubric=[STYLE])
    rubric.write_rubrics(llm, [kestrel, bread, recorded], Config())
    assert [[KESTREL.text in prompt for prompt in call.prompts] for call in script.calls] == [[True, False], [True]]
    assert [e.rubric for e in (kestrel, bread, recorded)] == [KESTREL_RUBRIC, BREAD_RUBRIC, [STYLE]]


def test_bad_criteria_are_left_out_of_a_rubric(llm):
    roman = Criterion("Romans", "Roman engineers built aqueducts", "Tells who built them, and when.", 5.0)
    e, _ = write(llm, [rubric_text([roman, KESTREL_RUBRIC[0], STYLE])])
    assert (e.rubric, e.failures) == ([KESTREL_RUBRIC[0], STYLE], [])


def test_a_rubric_of_bad_criteria_alone_is_rejected_for_the_first_fault(llm):
    roman = Criterion("Romans", "Roman engineers built aqueducts", "Tells how they hunt voles.", 5.0)
    clear = Criterion("Clear", NO_GOLD, "Is clear and easy to read.", 1.0)
    e, _ = write(llm, *[[rubric_text([roman, clear])]] * 2, [[rubric_text([clear])] * 3])
    assert [f["reason"] for f in e.failures] == 2 * ["gold not from the document"] + 3 * ["would suit any problem"]
    assert (e.rubric, e.drop) == ([], "rubric/would suit any problem")


def test_a_rubric_has_at_most_max_criteria_and_none_twice(llm):
    again = replace(KESTREL_RUBRIC[0], name="New", gold=KESTREL_RUBRIC[0].gold.upper())
    e, _ = write(llm, [rubric_text([KESTREL_RUBRIC[0], again, STYLE, KESTREL_RUBRIC[1]])], max_criteria=2)
    assert e.rubric == [KESTREL_RUBRIC[0], STYLE]


def test_only_health_demands_a_gold_answer(llm):
    for task in ("instructions", "writing"):
        assert write(tiny_llm(), [rubric_text([STYLE])], task=task)[0].rubric == [STYLE]
    e, _ = write(llm, [rubric_text([STYLE])], [rubric_text([STYLE, KESTREL_RUBRIC[0]])], task="health")
    assert [f["reason"] for f in e.failures] == ["no criterion has a gold answer"]
    assert e.rubric == [STYLE, KESTREL_RUBRIC[0]]


WARFARIN = "My father has taken warfarin since 1868, he says. What has he to avoid, and may he eat spinach?"


@pytest.mark.parametrize(
    ("fault", "gold", "description"),
    [
        (None, "Warfarin", "Names the drug that he takes."),
        (None, "1868", "Gives the year when it began."),
        (None, "since 1868", "Gives the year when it began."),
        (None, "Yes", "Says whether he may eat spinach."),
        (None, NO_GOLD, "Tells the father calmly what to do."),
        (None, NO_GOLD, "The answer does not tell him to eat spinach, and gives the reference range of warfarin."),
        ("speaks of what the judge does not see", NO_GOLD, "The reference names warfarin, while the answer does not."),
        ("speaks of what the judge does not see", NO_GOLD, "Tells more of warfarin than the second answer."),
        ("speaks of what the judge does not see", NO_GOLD, "The answer does not mention warfarin."),
        ("gold not from the document", "Aspirin", "Names the drug that he takes, warfarin."),
        ("gold not from the document", "1869", "Gives the year when warfarin began."),
        ("gold speaks of the answer", "The answer should name warfarin", "Names the drug that he takes."),
        ("gold speaks of the answer", "A full answer names warfarin", "Names the drug that he takes."),
        ("gold speaks of the answer", "Should avoid spinach", "Says whether he may eat spinach."),
        ("would suit any problem", NO_GOLD, "Is clear, accurate, complete and easy to follow."),
        ("would suit any problem", "Yes", "Is clear, accurate, complete and easy to follow."),
        ("description too short", "Warfarin", "Names the drug."),
        ("repeats itself", "Warfarin", "Names the drug, warfarin. Names the drug, warfarin. Names the drug, warfarin."),
    ],
)
def test_a_criterion_is_rejected_for(fault, gold, description):
    assert parsing.criterion_fault(Criterion("It", gold, description, 1.0), "What must he avoid?", WARFARIN) == fault


def test_without_the_document_any_gold_about_the_problem_will_do():
    criterion = Criterion("Drug", "Aspirin", "Names the drug that he takes.", 1.0)
    assert parsing.criterion_fault(criterion, "Which drug does he take?", None) is None
    assert parsing.criterion_fault(criterion, "Why does bread rise?", None) == "would suit any problem"


@pytest.mark.parametrize(
    ("n", "lengths"),
    [
        (1, [1]),
        (2, [1, 9]),
        (3, [1, 5, 9]),
        (5, [1, 3, 5, 7, 9]),
        (9, [*range(1, 10)]),
        (20, [*range(1, 10)]),
    ],
)
def test_length_spread(n, lengths):
    texts = ["x" * size for size in (4, 9, 1, 7, 3, 8, 2, 6, 5)]
    assert [len(text) for text in length_spread(texts, n)] == lengths


# ------------------------------------------------------------------------------------------- reading a rubric

TWO = [
    Criterion("Volume", "5 litres", "Gives the volume.", 3.0),
    Criterion("Colour", "It is dark blue: nearly black", "Names the colour.", 0.5),
]
ITEMS = [asdict(c) for c in TWO]
STANDARD = json.dumps({"criteria": ITEMS})
THIRD = '{"name": "Cut", "gold": "a", "description": "Was cut off.", "weight": 2}'


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(STANDARD, id="standard"),
        pytest.param(json.dumps({"criteria": ITEMS}, indent=4), id="indented"),
        pytest.param(f"```json\n{STANDARD}\n```", id="fenced"),
        pytest.param(f"Sure {{here it is}}:\n\n{STANDARD}\n\nI hope this helps {{you}}!", id="chatter with braces"),
        pytest.param(json.dumps(ITEMS), id="a list alone"),
        pytest.param("\n".join(map(json.dumps, ITEMS)), id="an object on each line"),
        pytest.param(
            json.dumps({"differences": ["some {guess}", "others do not"], "criteria": ITEMS}), id="differences"
        ),
        pytest.param(json.dumps({"rubric": ITEMS}), id="another key"),
        pytest.param(json.dumps({"rubric": {"problem": 1, "criteria": ITEMS}}), id="nested deeper"),
        pytest.param(
            json.dumps({"name": "Rubric", "description": "for it", "criteria": ITEMS}), id="a rubric with a name"
        ),
        pytest.param(json.dumps({"criterion_1": ITEMS[0], "criterion_2": ITEMS[1]}), id="a key for each"),
        pytest.param(json.dumps({"criteria": [{**item, "id": 7, "met": None} for item in ITEMS]}), id="more fields"),
        pytest.param(json.dumps({"criteria": [dict(reversed(item.items())) for item in ITEMS]}), id="another order"),
        pytest.param(json.dumps([{**item, "weight": str(item["weight"])} for item in ITEMS]), id="weights as text"),
        pytest.param(repr({"criteria": ITEMS}), id="single quotes"),
        pytest.param(repr(ITEMS), id="a list in single quotes"),
        pytest.param(json.dumps(ITEMS).replace("}", ",}"), id="a comma too many"),
        pytest.param(STANDARD.replace("Gives the", "Gives\nthe").replace("5 l", "5\r\n\tl"), id="line ends in strings"),
        pytest.param(json.dumps({"criteria": [*ITEMS, "and so on", 5, None, {}]}), id="no criteria among them"),
        *(pytest.param(f"{STANDARD[:-2]}, {THIRD[:n]}", id=f"cut off at {n}") for n in range(1, len(THIRD))),
        pytest.param(STANDARD[:-1], id="one bracket missing"),
        pytest.param(STANDARD[:-2], id="two brackets missing"),
    ],
)
def test_a_rubric_is_read_in_many_formats(text):
    assert parsing.parse_rubric(text) == TWO


def gold_read(value: object) -> str:
    (criterion,) = parsing.parse_rubric(json.dumps({**ITEMS[0], "gold": value}))
    return criterion.gold


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (5, "5"),
        (2.5, "2.5"),
        (0, "0"),
        (1868, "1868"),
        ("Warfarin", "Warfarin"),
        (["urchins", "crabs", 2], "urchins; crabs; 2"),
        (["urchins", None], "urchins"),
        (" two\n\tlines ", "two lines"),
        ("None of the drugs may be given", "None of the drugs may be given"),
        ("null results of both trials", "null results of both trials"),
    ],
)
def test_a_gold_is_text_a_number_or_a_list(value, gold):
    assert gold_read(value) == gold


@pytest.mark.parametrize(
    "value",
    [
        *(None, "", "-", [], {}, [None], ["not applicable"]),
        *("N/A", "n/a", "NA.", "None", "none.", "null"),
        *("not applicable", "Not applicable.", "not applicable (style)", "not available"),
    ],
)
def test_a_gold_may_be_said_to_be_absent_in_many_ways(value):
    assert gold_read(value) == NO_GOLD


@pytest.mark.parametrize("key", ["name", "description"])
@pytest.mark.parametrize("value", [None, "", " \n", "...", [], {}, {"text": "It says so."}])
def test_a_criterion_needs_a_name_and_a_description(key, value):
    assert parsing.parse_rubric(json.dumps([{**ITEMS[0], key: value}, ITEMS[1]])) == TWO[1:]
    without = {k: v for k, v in ITEMS[0].items() if k != key}
    assert parsing.parse_rubric(json.dumps([without, ITEMS[1]])) == TWO[1:]


def test_without_a_gold_a_criterion_has_none_and_without_a_weight_it_weighs_1():
    text = json.dumps({"name": "Volume", "description": "Gives the volume."})
    assert parsing.parse_rubric(text) == [Criterion("Volume", NO_GOLD, "Gives the volume.", 1.0)]


@pytest.mark.parametrize(
    "weight",
    [
        *("0", "0.0", "-1", '"- 1"', "NaN", "Infinity", "-Infinity", "1e308", "1e-5", "101", "9" * 400),
        *('"five"', "null", "true", "[3]", '{"of": 3}'),
    ],
)
def test_a_weight_must_be_a_number_above_0_and_up_to_100(weight):
    assert parsing.parse_rubric(STANDARD.replace('"weight": 3.0', f'"weight": {weight}')) == TWO[1:]


@pytest.mark.parametrize(
    ("written", "weight"), [("1", 1), ("2.5", 2.5), ("100", 100), ('"4 (important)"', 4), ('"3/5"', 3)]
)
def test_weights_are_read(written, weight):
    read = parsing.parse_rubric(STANDARD.replace('"weight": 3.0', f'"weight": {written}'))
    assert [c.weight for c in read] == [weight, 0.5]


@pytest.mark.parametrize("depth", [10, 300, 900, 5_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('{"criteria":[', "]}"), ("{'a':", "}")])
@pytest.mark.parametrize("whole", [True, False])
def test_no_depth_is_too_deep_for_a_value_in_a_rubric(depth, opening, closing, whole):
    deep = depth * opening + "1" + depth * closing * whole
    assert (
        parsing.parse_rubric(f'{json.dumps(ITEMS[0])} {{"name": "x", "description": "x", "gold": {deep}}}')[:1]
        == TWO[:1]
    )


@pytest.mark.filterwarnings("error")
def test_to_read_a_rubric_warns_of_nothing():
    assert (
        parsing.parse_rubric(r"{'name': 'Path \d', 'description': 'Gives it \w.', 'weight': 1}")[0].name == r"Path \d"
    )


def distinct_golds(*golds: str) -> list[int]:
    criteria = [Criterion("n", gold, f"description {k}", 1.0) for k, gold in enumerate(golds)]
    return [criteria.index(c) for c in parsing.distinct(criteria)]


def test_criteria_with_the_same_gold_in_other_signs_are_one():
    assert distinct_golds("5 litres", "**5 Litres.**", "6 litres") == [0, 2]


def test_criteria_without_a_gold_are_told_apart_by_their_description():
    two = [replace(c, gold=NO_GOLD) for c in TWO]
    assert parsing.distinct([*two, *(replace(c, name="New") for c in two)]) == two


@pytest.mark.parametrize(
    "document", ["", 'Bread rises in the warm. "So it does," said the old baker. Yeast makes all of the gas.']
)
def test_a_filled_form_of_a_small_model_is_a_rubric(llm, document):
    """The values of this model are noise; with the two brackets that the form leaves out it is whole JSON."""
    form = crutches.rubric_template(document, Config(max_criteria=2))
    torch.manual_seed(0)
    for output in llm.generate([[72, 105]], n=12, max_new_tokens=300, temperature=1.5, templates=[form] * 12)[0]:
        criteria = json.loads(output.text + "]}", strict=False)["criteria"]
        assert [sorted(c) for c in criteria] == 2 * [["description", "gold", "name", "weight"]]
        if document:
            assert {c["gold"].strip() for c in criteria} == {"Bread rises in the warm.", "Yeast makes all of the gas."}


# ------------------------------------------------------------------------------------------ trying a rubric out


def tried(llm: LLM, *calls, episodes: Sequence[Episode] | None = None, **options) -> tuple[list[Episode], Script]:
    """Episodes after rubrics, ratings, and the trial of the rubrics."""
    script, cfg = Script(llm, *calls), Config(**{"judge": "generate", **options})
    episodes = episodes or [episode(rubric=[])]
    rubric.write_rubrics(llm, episodes, cfg)
    rubric.judge(llm, rubric.alive(episodes), cfg)
    rubric.check_rubrics(llm, episodes, cfg)
    return list(episodes), script


FIRST, SECOND = [KESTREL_RUBRIC[0]], [KESTREL_RUBRIC[1]]
FAIR = dict(zip([*ANSWERS[0], KESTREL_REFERENCE, rubric.UNRELATED], [0, 1, 2, 2, 0], strict=True))
TAKEN_IN = {**FAIR, rubric.UNRELATED: 2}
UNFAIR = pytest.mark.parametrize("unfair", [{**FAIR, KESTREL_REFERENCE: 0}, dict.fromkeys(FAIR, 1), TAKEN_IN])


def test_a_rubric_by_which_the_reference_is_better_is_kept(llm):
    (e,), script = tried(llm, [rubric_text(FIRST)], by_answer(FAIR), ["never asked for"])
    assert (e.rubric, e.drop, e.failures, len(script.calls)) == (FIRST, None, [], 2)
    assert [a.ratings for a in e.answers] == [[0.0], [1.0], [2.0]]


@UNFAIR
def test_a_rubric_that_does_not_tell_good_from_bad_is_written_once_more(llm, unfair):
    samples = [[rubric_text(SECOND), rubric_text(FIRST), "no"]]
    (e,), script = tried(llm, [rubric_text(FIRST)], by_answer(unfair), samples, by_answer(FAIR), ["never asked for"])
    assert [call.role for call in script.calls] == ["rubric", "judge", "rubric", "judge"]
    again = script.of("rubric")[1]
    assert (again.n, again.temperature > 0) == (3, True)
    assert (e.rubric, e.drop) == (SECOND, None)
    assert [a.ratings for a in e.answers] == [[0.0], [1.0], [2.0]]
    (failure,) = e.failures
    assert (failure["role"], failure["reason"]) == ("rubric", "does not tell good from bad")
    assert [Criterion(**c) for c in json.loads(failure["raw"])] == FIRST


@UNFAIR
def test_a_group_whose_second_rubric_does_not_either_is_dropped(llm, unfair):
    samples = [[rubric_text(SECOND)] * 3]
    (e,), _ = tried(llm, [rubric_text(FIRST)], by_answer(unfair), samples, by_answer(unfair), ["never asked for"])
    assert e.drop == "rubric/does not tell good from bad"
    assert [f["reason"] for f in e.failures] == 2 * ["does not tell good from bad"]


def test_a_group_without_a_second_rubric_is_dropped_for_that(llm):
    (e,), _ = tried(llm, [rubric_text(FIRST)], by_answer({**FAIR, KESTREL_REFERENCE: 0}), [["no"] * 3])
    assert e.drop == "rubric/no complete criterion"


def test_only_the_rubrics_that_fail_are_written_and_judged_again(llm):
    texts = [*ANSWERS[0], *ANSWERS[1], KESTREL_REFERENCE, BREAD_REFERENCE]
    said = dict(zip(texts, [0, 1, 2, 2, 2, 2, 2, 0], strict=True))  # by the kestrel's rubric bread is bad, and rightly
    bread = episode(document=BREAD, problem=BREAD_PROBLEM, reference=BREAD_REFERENCE, rubric=[])
    bread.answers = [Answer(text) for text in ANSWERS[1]]
    (kestrel, bread), script = tried(
        llm,
        [rubric_text(KESTREL_RUBRIC), rubric_text(BREAD_RUBRIC)],
        by_answer(said),
        [[rubric_text(BREAD_RUBRIC)] * 3],
        by_answer({**dict.fromkeys(texts, 0), BREAD_REFERENCE: 2, rubric.UNRELATED: 0}),
        episodes=[episode(rubric=[]), bread],
    )
    assert all(BREAD_PROBLEM in prompt for call in script.calls[2:] for prompt in call.prompts)
    assert (kestrel.drop, kestrel.failures, bread.drop, len(bread.failures)) == (None, [], None, 1)
    assert kestrel.answers[2].ratings == [2.0, 2.0] and bread.answers[0].ratings == [0.0, 0.0]


@pytest.mark.parametrize("unread", [KESTREL_REFERENCE, rubric.UNRELATED, ANSWERS[0][0]])
def test_what_the_judge_gives_no_readable_rating_drops_no_rubric(llm, unread):
    says = by_answer({**FAIR, unread: "hm"})
    (e,), _ = tried(llm, [rubric_text(FIRST)], says, says, ["never asked for"])
    assert (e.rubric, e.drop) == (FIRST, None)


def test_an_answer_keeps_no_rating_by_a_rubric_that_was_given_up(llm):
    unreadable = by_answer({**FAIR, ANSWERS[0][1]: "hm"})
    samples = [[rubric_text(KESTREL_RUBRIC)] * 3]
    unfair = by_answer({**FAIR, KESTREL_REFERENCE: 0})
    (e,), _ = tried(llm, [rubric_text(FIRST)], unfair, samples, unreadable, unreadable)
    assert [a.ratings for a in e.answers] == [[0.0, 0.0], None, [2.0, 2.0]]
    assert (e.answers[1].thoughts, e.drop) == ([], None)


def test_a_rubric_is_tried_on_the_reference_and_on_another_problems(llm):
    script = Script(llm, [rubric_text(FIRST), rubric_text(BREAD_RUBRIC)])
    bread = episode(document=BREAD, problem=BREAD_PROBLEM, reference=BREAD_REFERENCE, rubric=[])
    kestrel = episode(rubric=[])
    rubric.write_rubrics(script.llm, [kestrel, bread], Config())
    assert [a.text for a in kestrel.controls] == [KESTREL_REFERENCE, BREAD_REFERENCE]
    assert [a.text for a in bread.controls] == [BREAD_REFERENCE, KESTREL_REFERENCE]


def test_a_rubric_alone_is_tried_on_a_text_about_something_else(llm):
    e, _ = write(llm, [rubric_text(FIRST)])
    assert [a.text for a in e.controls] == [KESTREL_REFERENCE, rubric.UNRELATED]


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"check_rubric": False}, []),
        ({"rubric_document": False}, []),
        ({"rubric": "generic"}, []),
        ({"rubric": "holistic"}, []),
        ({}, [STYLE]),
    ],
)
def test_nothing_is_tried_without_a_rubric_written_with_the_document(llm, options, recorded):
    script = Script(llm, *([] if recorded or "rubric" in options else [[rubric_text(FIRST)]]))
    e = episode(rubric=recorded)
    rubric.write_rubrics(llm, [e], Config(**options))
    assert e.rubric and e.controls == []
    rubric.check_rubrics(llm, [e], Config(**options))
    assert e.drop is None and not script.replies


def test_controls_have_no_part_in_grades_and_advantages(llm):
    with_controls, _ = tried(llm, [rubric_text(FIRST)], by_answer(FAIR))
    without, _ = tried(tiny_llm(), [rubric_text(FIRST)], by_answer(FAIR), check_rubric=False)
    for episodes in (with_controls, without):
        pop.grade(episodes, Config(skip_guards=("all",)))
    (one,), (other,) = with_controls, without
    assert len(one.controls) == 2 and other.controls == []
    assert one.answers == other.answers
    assert [round(a.advantage, 6) for a in one.answers] == [-0.5, 0.0, 0.5]
    assert all((a.grade, a.reward, a.advantage) == (None, None, 0.0) for a in one.controls)


# ----------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(verdict(2, 0), id="standard"),
        pytest.param("Here are my ratings.\n\n" + verdict(2, 0) + "\n\nOverall, weak.", id="chatter"),
        pytest.param(verdict(2, 0).replace("Rating:", "**Rating:**"), id="bold label and colon"),
        pytest.param(verdict(2, 0).replace("Rating:", "  - **rating**:"), id="bold bullets"),
        pytest.param(verdict(2, 0).replace("Rating:", "1. Rating:"), id="numbers"),
        pytest.param(verdict(2, 0).upper().replace("THOUGHT ", "thought "), id="upper case"),
        pytest.param(verdict("**2**", "`0`"), id="bold values"),
        pytest.param(verdict("2/2", "0 (not met)"), id="explained"),
        pytest.param(verdict("2.", "0, as it is absent"), id="full stop"),
        pytest.param(verdict("[2]", '"0"'), id="brackets and quotes"),
        pytest.param(verdict(2, 0).replace("\n", "\r\n\r\n"), id="blank lines"),
        pytest.param(verdict(2, 0).replace("thought", "2 of 3, so Rating: 1? no, thought"), id="numbers in evidence"),
    ],
)
def test_ratings_are_read_in_many_formats(text):
    (one, at), (other, then) = parsing.parse_ratings(text, 2)
    assert (text[at], text[then]) == ("2", "0") and at < then
    assert "thought 1" in one and "thought 2" in other and "thought 1" not in other


@pytest.mark.parametrize("text", ["", verdict(2), verdict(2, 0, 1), "Evidence: 2\nEvidence: 0", "Rating:"])
def test_exactly_one_rating_per_criterion_is_read(text):
    assert parsing.parse_ratings(text, 2) is None


@pytest.mark.parametrize("rating", ["3", "2.5", "0.5", "-1", "- 1", "**-1**", ".1", "12", "1e3", "two", "?", "\n1"])
def test_anything_but_0_1_or_2_is_no_rating(rating):
    assert parsing.parse_ratings(verdict(rating, 1), 2) is None


noise = st.sampled_from(
    "\nEvidence: |\nRating: |\nRating: 2\n|\nRating: 1|\n|1. |**|- | |.|0|1|2|5|\uff12|\u00b2|x".split("|")
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.lists(noise | st.text(max_size=5), max_size=40).map("".join), st.integers(1, 4))
def test_no_text_yields_other_ratings_than_0_1_2(text, criteria):
    read = parsing.parse_ratings(text, criteria)
    if read is not None:
        places = [at for _, at in read]
        assert len(read) == criteria and places == sorted(set(places))
        assert all(text[at] in "012" for at in places)


@pytest.mark.parametrize("judge", ["generate", "each"])
def test_a_rating_is_the_expected_value_where_the_judge_wrote_it(llm, judge):
    """Not at another digit of its text, nor at the character's number: some take several tokens."""
    text = "1. Evidence: „2 von 3“, sagt sie, 🎉 0 of 1.\nRating: 1"
    decoy, wanted = [0.0, 0.0, 1.0], [0.2, 0.5, 0.3]
    reply = watched(llm, text, decoy, decoy, decoy, decoy, wanted)  # of the digits 1, 2, 0, 1, and the rating
    Script(llm, [reply])
    e = episode(rubric=KESTREL_RUBRIC[:1], answers=[Answer("By sight.")])
    rubric.judge(llm, [e], Config(judge=judge))
    assert e.answers[0].ratings == pytest.approx([0.5 + 2 * 0.3])
    assert e.answers[0].thoughts == ["Evidence: „2 von 3“, sagt sie, 🎉 0 of 1."]


FOUR = [
    Criterion(f"{name} part", NO_GOLD, f"Tells of the {name} part.", 1.0)
    for name in ("first", "second", "third", "last")
]
RATED = dict(first=0, second=1, third=2, last=1)


@pytest.mark.parametrize("judge", ["generate", "each"])
def test_ratings_come_back_in_the_order_of_the_rubric(llm, judge):
    script = Script(llm, by_name(**RATED))
    episodes = [episode(problem=f"{k}?", rubric=FOUR) for k in range(5)]
    rubric.judge(llm, episodes, Config(judge=judge))
    assert [a.ratings for e in episodes for a in e.answers] == 15 * [[0.0, 1.0, 2.0, 1.0]]
    if judge == "generate":
        thoughts = {tuple(t[-1] for t in a.thoughts) for e in episodes for a in e.answers}
        assert len(thoughts) > 1, "if the order were always the same, nothing were proved"
    assert len(script.calls) == 1


def orders(seed: int) -> list[list[str]]:
    """The order of the criteria in the prompt of each of three answers to each of six problems."""
    llm = tiny_llm()
    script = Script(llm, by_name(**RATED))
    rubric.judge(llm, [episode(problem=f"{k}?", rubric=FOUR) for k in range(6)], Config(seed=seed, judge="generate"))
    return [[name.split()[0] for name in named(prompt)] for prompt in script.calls[0].prompts]


def test_the_judge_is_given_criteria_in_an_order_of_each_problems_own():
    found = orders(0)
    assert all(sorted(order) == sorted(RATED) for order in found)
    by_problem = [found[k : k + 3] for k in range(0, 18, 3)]
    assert all(one == two == three for one, two, three in by_problem)
    assert len({tuple(order) for order in found}) > 3
    assert orders(0) == found != orders(1)


@every_judge
@pytest.mark.parametrize("kind", ["written", "generic"])
def test_that_there_is_no_gold_answer_is_never_shown_to_a_judge(llm, judge, kind):
    script = Script(llm, lambda prompt: verdict(*[1] * len(named(prompt))))
    e = episode(rubric=[] if kind == "generic" else [STYLE, KESTREL_RUBRIC[0]])
    cfg = Config(judge=judge, rubric=kind)
    rubric.write_rubrics(llm, [e], cfg)
    rubric.judge(llm, [e], cfg)
    prompts = [prompt for call in script.calls for prompt in call.prompts]
    assert prompts and not any("not applicable" in prompt.lower() for prompt in prompts)
    shown = any("Gold answer:" in prompt for prompt in prompts)
    assert shown == (kind == "written")


@every_judge
def test_without_rubric_gold_no_gold_answer_is_shown_to_a_judge(llm, judge):
    script = Script(llm, lambda prompt: verdict(*[1] * len(named(prompt))))
    e = episode(answers=[Answer("Quail.")])
    rubric.judge(llm, [e], Config(judge=judge, rubric_gold=False))
    (call,) = script.calls
    assert all("Gold answer:" not in prompt for prompt in call.prompts)
    assert not any(c.gold in prompt for c in KESTREL_RUBRIC for prompt in call.prompts)
    assert all(any(c.description in prompt for prompt in call.prompts) for c in KESTREL_RUBRIC)


def test_an_unreadable_judgement_is_asked_for_once_more_and_then_missing(llm):
    script = Script(llm, [verdict(2, 2), "hm", verdict(2)], [verdict(0, 0), verdict(2)], ["never asked for"])
    e = episode()
    rubric.judge(llm, [e], Config(judge="generate"))
    assert [a.ratings for a in e.answers] == [[2.0, 2.0], [0.0, 0.0], None]
    assert [sorted(a.thoughts) for a in e.answers] == [["Evidence: thought 1", "Evidence: thought 2"]] * 2 + [[]]
    assert [call.temperature > 0 for call in script.calls] == [False, True]
    rejected = [("judge", "not 2 ratings", raw) for raw in ("hm", verdict(2), verdict(2))]
    assert [(f["role"], f["reason"], f["raw"]) for f in e.failures] == rejected


def test_readable_judgements_are_not_asked_for_again(llm):
    script = Script(llm, [verdict(2, 1), "hm", verdict(1, 1)], [verdict(0, 1)])
    e = episode()
    rubric.judge(llm, [e], Config(judge="generate"))
    first, second = script.calls
    assert second.ids == first.ids[1:2]
    assert e.answers[1].text in second.prompts[0]


def test_judged_each_criterion_in_a_call_an_answer_with_one_unreadable_reply_is_judged_once_more(llm):
    script = Script(llm, [verdict(2), verdict(2), verdict(1), "hm"], by_name(Ultraviolet=0, Still=1))
    e = episode(answers=[Answer("a"), Answer("b")])
    rubric.judge(llm, [e], Config(judge="each"))
    assert [len(call.prompts) for call in script.calls] == [4, 2]
    assert all(between(prompt, "answer") == "b" for prompt in script.calls[1].prompts)
    assert [a.ratings for a in e.answers] == [[2.0, 2.0], [0.0, 1.0]]


def test_judgements_reach_the_answers_they_are_about(llm):
    Script(llm, [verdict(0), verdict(1), verdict(0, 0), verdict(1, 1), verdict(2, 2)])
    one = episode(rubric=KESTREL_RUBRIC[:1], answers=[Answer("a"), Answer("b")])
    two = episode()
    rubric.judge(llm, [one, two], Config(judge="generate"))
    assert [a.ratings for a in one.answers + two.answers] == [[0.0], [1.0], [0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


@torch.no_grad()
def naive_rating(llm: LLM, row: list[int]) -> float:
    """Expected rating from all logits of one unpadded row."""
    digits = [llm.tokenizer.convert_tokens_to_ids(digit) for digit in "012"]
    with llm.adapters_off():
        logits = llm.model(input_ids=torch.tensor([row])).logits[0, -1].double()  # (V,)
    probabilities = torch.softmax(logits[digits], -1)
    return (probabilities[1] + 2 * probabilities[2]).item()


def test_judge_logits_gives_the_expected_rating_of_each_criterion(llm):
    script = Script(llm)
    episodes = [
        episode(rubric=[*KESTREL_RUBRIC, STYLE]),
        episode(rubric=BREAD_RUBRIC[:1], answers=[Answer("Bread.")]),
    ]
    rubric.judge(llm, episodes, Config(judge="logits"))
    asked = [(a.text, c.description) for e in episodes for a in e.answers for c in e.rubric]
    ratings = [rating for e in episodes for a in e.answers for rating in a.ratings]
    rows = script.calls[0].ids
    for (answer, description), rating, row in zip(asked, ratings, rows, strict=True):
        assert f"<answer>{answer}</answer>" in llm.decode(row) and description in llm.decode(row)
        assert rating == pytest.approx(naive_rating(llm, row), abs=1e-4) and 0 <= rating <= 2
    assert max(ratings) - min(ratings) > 0.01, "a judge that always says the same would prove nothing"
    assert [e.failures for e in episodes] == [[], []]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Thought: good.\nScore: 10", 2.0),
        ("Score: 1.", 0.0),
        ("**Score:** 7/10", 4 / 3),
        ("Thought: ok\n- score : 4", 2 / 3),
    ],
)
def test_a_holistic_score_of_1_to_10_is_a_rating_of_0_to_2(text, rating):
    ((_, read),) = parsing.parse_score(text)
    assert read == pytest.approx(rating)


@pytest.mark.parametrize("text", ["", "Score: 0", "Score: 11", "Score: 7.5", "Score:", "A score of 7", "Score: seven"])
def test_any_other_score_is_none(text):
    assert parsing.parse_score(text) is None


# ----------------------------------------------------------------------------------------------------- grade


@pytest.mark.parametrize(
    ("ratings", "grade"),
    [
        ([0, 0], 0.0),
        ([2, 2], 1.0),
        ([2, 0], 0.75),  # 3 * 2 / (2 * 4)
        ([0, 2], 0.25),
        ([1, 2], 0.625),  # (3 * 1 + 1 * 2) / 8
        ([0.5, 1.5], 0.375),  # (1.5 + 1.5) / 8
        ([5, -3], 0.75),  # as [2, 0]
        ([2.0000001, 2], 1.0),
    ],
)
def test_grade_is_the_weighted_mean_rating(ratings, grade):
    three_to_one = [replace(TWO[0], weight=3.0), replace(TWO[1], weight=1.0)]
    assert rubric.grade(ratings, three_to_one) == pytest.approx(grade, abs=1e-12)


def test_grade_refuses_another_number_of_ratings():
    with pytest.raises(ValueError):
        rubric.grade([2.0], TWO)
