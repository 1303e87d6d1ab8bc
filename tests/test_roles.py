"""What rubric.py promises of its roles: who sees what, how problems come to be. A script speaks for the LLM."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import pytest
import torch

import rubric
from data import Document
from engine import crutches
from engine.examples import EXAMPLES, example_fault
from engine.parsing import in_tags
from model import LLM, Completion
from pop import Config
from rubric import Answer, Criterion, Episode

# ------------------------------------------------------------------------------------------------- the script


@dataclass
class Call:
    """One call of the LLM: whose, every prompt in it, how many replies to each, and whether the adapters were on."""

    role: str
    ids: list[list[int]]
    prompts: list[str]
    n: int
    temperature: float | None
    adapters_on: bool


class Script:
    """Speaks for the LLM: call by call the given replies, one to each prompt. Records what was asked.

    A reply is a finished text, a `cut(text)`, or a list of them where several are asked for; instead of a call's
    replies there may be a function of a prompt. `yes`: how likely the gate is told Yes, by its question and a problem;
    without, the model itself is asked.
    """

    def __init__(self, llm: LLM, *replies, yes: Callable[[str, str], float] | None = None) -> None:
        llm.model.config.max_position_embeddings = 32_768  # a byte is a token here
        self.llm, self.replies, self.yes, self.calls = llm, list(replies), yes, []
        self.with_adapters = self.probe()
        self.choice_probs = llm.choice_probs
        llm.generate, llm.choice_probs = self.generate, self.rate

    @torch.no_grad()
    def probe(self) -> torch.Tensor:
        return self.llm.model(input_ids=torch.tensor([[1, 2, 3]])).logits

    def record(self, role: str, prompts: Sequence[list[int]], n: int = 1, temperature: float | None = None) -> Call:
        adapters_on = torch.equal(self.probe(), self.with_adapters)
        texts = [self.llm.decode(ids) for ids in prompts]
        self.calls.append(Call(role, list(prompts), texts, n, temperature, adapters_on))
        return self.calls[-1]

    def generate(
        self, prompts: Sequence[list[int]], *, desc: str, n: int = 1, temperature: float, **options
    ) -> list[list[Completion]]:
        call = self.record(desc, prompts, n, temperature)
        replies = self.replies.pop(0)
        replies = [replies(prompt) for prompt in call.prompts] if callable(replies) else replies
        groups = [reply if isinstance(reply, list) else [reply] for reply in replies]
        assert [len(group) for group in groups] == [n] * len(prompts), "the script has other replies"
        return [[r if isinstance(r, Completion) else self.said(r, desc) for r in group] for group in groups]

    def said(self, text: str, role: str) -> Completion:
        return watched(self.llm, text) if role == "judge" else whole(text)

    def rate(self, rows: Sequence[list[int]], choices: Sequence[int], desc: str) -> torch.Tensor:
        call = self.record(desc, rows)
        if desc != "gate" or not self.yes:
            return self.choice_probs(rows, choices, desc=desc)
        (why,) = {why for why in rubric.GATE for prompt in call.prompts if question(why) in prompt}
        yes = torch.tensor([self.yes(why, between(prompt, "problem")) for prompt in call.prompts])
        return torch.stack([yes, 1 - yes], dim=-1)

    def of(self, role: str) -> list[Call]:
        return [call for call in self.calls if call.role == role]


def whole(text: str) -> Completion:
    return Completion([7], text, finished=True)


def cut(text: str) -> Completion:
    """A reply that the length limit cut off."""
    return Completion([7], text, finished=False)


def watched(llm: LLM, text: str, *probs: Sequence[float]) -> Completion:
    """A judge's finished reply. Each digit was certain, or had the next of the probabilities given."""
    ids, told = llm.text_ids(text), iter(probs)
    certain = {digit: [float(digit == other) for other in "012"] for digit in "012"}
    seen = [next(told, certain[d]) if (d := llm.decode([i])) in certain else [0.0, 0.0, 1.0] for i in ids]
    return Completion([*ids, llm.eos_ids[0]], text, True, [*seen, [0.0, 0.0, 1.0]])


def question(why: str) -> str:
    return rubric.GATE[why].split("\n")[0]


def between(prompt: str, tag: str) -> str:
    """What stands in a prompt's last fence of that name."""
    return re.findall(rf"<{tag}>\s*(.*?)\s*</{tag}>", prompt, re.DOTALL)[-1]


# ------------------------------------------------------------------------------------------------- the pieces

KESTREL = Document(
    "kestrel",
    "The kestrel hovers above the motorway verge with its head locked still while the wings beat "
    "against the wind. From twenty metres up it follows the urine trails of field voles, which "
    "reflect ultraviolet light. A female lays four to six eggs in April on a bare ledge and sits on "
    "them for twenty-eight days.",
)
KESTREL_PROBLEM = "How does the kestrel hunt voles while it hovers above the verge?"
KESTREL_REFERENCE = (
    "It keeps its head still while the wings beat, and from twenty metres it sees the ultraviolet "
    "light which the urine trails of field voles reflect."
)
BREAD = Document(
    "bread",
    "Sourdough bread rises because wild yeast and lactic bacteria live together in the starter and "
    "feed on maltose. The baker refreshes the starter every twelve hours with rye flour and warm "
    "water, and keeps it at twenty-six degrees. A long cool proof overnight makes the crumb open "
    "and gives the crust its dark blisters.",
)
BREAD_PROBLEM = "Why does the starter of sourdough bread change the crumb and the crust?"
BREAD_REFERENCE = (
    "Wild yeast and lactic bacteria feed on maltose in the mixture; refreshed every twelve hours "
    "with rye flour and proofed cool overnight, they give open holes and dark blisters."
)
QUOTE = "it follows the urine trails of field voles, which reflect ultraviolet light"  # more than eight words
KESTREL_RUBRIC = [
    Criterion("Ultraviolet trails", QUOTE, "The answer states how it finds the voles.", 3.0),
    Criterion("Still head", "its head locked still above the motorway verge", "The answer states what it keeps.", 1.0),
]
BREAD_RUBRIC = [
    Criterion("Wild yeast", "wild yeast and lactic bacteria live together", "The answer states what lives in it.", 2.0),
    Criterion("Refreshing", "every twelve hours with rye flour", "The answer states how it is fed.", 2.0),
]
ANSWERS = [
    [
        "Quail.",
        "Perhaps the bird listens to small noises.",
        "By looking, I think, at " + QUOTE + ", all day long.",
    ],
    [
        "Salted butter is spread onto slices.",
        "Unknown.",
        "The loaf grows in the oven until somebody takes it out.",
    ],
]


def tagged(problem: str) -> str:
    """What a proposer writes."""
    return f"<problem>{problem}</problem>"


def rubric_text(criteria: Sequence[Criterion]) -> str:
    """What a rubric writer writes."""
    return json.dumps({"differences": ["some guess"], "criteria": [asdict(c) for c in criteria]})


def verdict(*ratings: object) -> str:
    """What a judge writes."""
    return "\n".join(f"{k}. Evidence: thought {k}\nRating: {r}" for k, r in enumerate(ratings, 1))


def named(prompt: str) -> list[str]:
    """The names of the criteria that a judge is given, in its order."""
    return re.findall(r"^\d+\. ([^:]+):", between(prompt, "criteria"), re.MULTILINE)


def by_name(**ratings: int) -> Callable[[str], str]:
    """A judge that rates each criterion by its name's first word."""
    return lambda prompt: verdict(*(ratings[name.split()[0]] for name in named(prompt)))


def by_answer(ratings: dict[str, object]) -> Callable[[str], str]:
    """A judge that rates by the answer alone: all criteria alike, or in other words."""

    def reply(prompt: str) -> str:
        rating = ratings[between(prompt, "answer")]
        return rating if isinstance(rating, str) else verdict(*[rating] * len(named(prompt)))

    return reply


def episode(**changes) -> Episode:
    """An episode that is ready for the judge."""
    ready = Episode(
        KESTREL,
        KESTREL_PROBLEM,
        KESTREL_REFERENCE,
        [Answer(text) for text in ANSWERS[0]],
        [replace(c) for c in KESTREL_RUBRIC],
    )
    return replace(ready, **changes)


def propose(script: Script, documents: Sequence[Document], **options) -> list[Episode]:
    return rubric.propose(script.llm, documents, Config(**{"gate": False, **options}), random.Random(0))


def eightgrams(*texts: str) -> set[tuple[str, ...]]:
    found = set()
    for text in texts:
        w = re.findall(r"\w+", text.lower())
        found |= {tuple(w[i : i + 8]) for i in range(len(w) - 7)}
    return found


SECRET = eightgrams(KESTREL.text, BREAD.text, KESTREL_REFERENCE, BREAD_REFERENCE)


def play(llm: LLM, **options) -> tuple[list[Episode], Script]:
    """Two documents through all roles."""
    script = Script(
        llm,
        [tagged(KESTREL_PROBLEM), tagged(BREAD_PROBLEM)],
        [KESTREL_REFERENCE, BREAD_REFERENCE],
        ANSWERS,
        [rubric_text(KESTREL_RUBRIC), rubric_text(BREAD_RUBRIC)],
        lambda prompt: verdict(*[1] * len(named(prompt))),
        yes=lambda why, problem: 0.0 if problem in rubric.GATE_BAD else 1.0,
    )
    cfg = Config(group_size=3, rubric_answers=2, **options)
    episodes = rubric.propose(llm, [KESTREL, BREAD], cfg, random.Random(0))
    rubric.solve(llm, episodes, cfg)
    rubric.write_rubrics(llm, episodes, cfg)
    rubric.judge(llm, episodes, cfg)
    assert [e.failures for e in episodes] == [[], []]
    return episodes, script


everywhere = pytest.mark.parametrize("task", ["instructions", "health", "writing"])
every_judge = pytest.mark.parametrize("judge", ["generate", "each", "logits"])


# -------------------------------------------------------------------------------------------- who sees what


@everywhere
def test_the_solver_sees_the_problem_and_nothing_else(llm, task):
    episodes, script = play(llm, task=task)
    (solver,) = script.of("solve")
    assert solver.ids == [llm.encode(problem) for problem in (KESTREL_PROBLEM, BREAD_PROBLEM)]
    assert [e.prompt_ids for e in episodes] == solver.ids
    assert [[a.text for a in e.answers] for e in episodes] == ANSWERS


@everywhere
@every_judge
def test_the_judge_sees_a_document_or_reference_only_through_problem_rubric_and_answer(llm, task, judge):
    episodes, script = play(llm, task=task, judge=judge)
    (call,) = script.of("judge")
    for prompt in call.prompts:
        (e,) = (e for e in episodes if e.problem in prompt)
        criteria = [c for c in e.rubric if c.description in prompt]
        assert len(criteria) == (2 if judge == "generate" else 1)
        given = [e.problem, between(prompt, "answer"), *(part for c in criteria for part in (c.gold, c.description))]
        assert all(text in prompt for text in given)
        assert not eightgrams(prompt) & (SECRET - eightgrams(*given))


@every_judge
def test_the_judge_sees_one_answer_at_a_time(llm, judge):
    _, script = play(llm, judge=judge, check_rubric=False)
    (call,) = script.of("judge")
    seen = [[text for group in ANSWERS for text in group if text in prompt] for prompt in call.prompts]
    assert all(len(texts) == 1 for texts in seen)
    times = 1 if judge == "generate" else 2  # a prompt for each of the two criteria
    assert Counter(texts[0] for texts in seen) == {text: times for group in ANSWERS for text in group}


@everywhere
def test_the_gate_sees_the_problem_alone(llm, task):
    _, script = play(llm, task=task)
    gate = script.of("gate")
    known = [*rubric.GATE_BAD, *rubric.GATE_GOOD]
    for why, call in zip(rubric.GATE, gate, strict=True):
        ask = rubric.GATE[why].replace("{problem}", "%s")
        shots = [
            {"role": role, "content": content}
            for problem, reply in rubric.GATE_SHOTS
            for role, content in (("user", ask % problem), ("assistant", reply))
        ]
        asked = [[*shots, {"role": "user", "content": ask % p}] for p in (*known, KESTREL_PROBLEM, BREAD_PROBLEM)]
        assert call.ids == [llm.encode_messages(messages) for messages in asked]


@everywhere
def test_the_rubric_writer_sees_document_problem_reference_and_its_own_answers(llm, task):
    episodes, script = play(llm, task=task)
    (writer,) = script.of("rubric")
    for e, answers, prompt in zip(episodes, ANSWERS, writer.prompts, strict=True):
        assert between(prompt, "document") == e.document.text
        assert (between(prompt, "problem"), between(prompt, "reference")) == (e.problem, e.reference)
        shown = re.findall(r"<answer>\n(.*?)\n</answer>", prompt[prompt.index(e.problem) :])
        assert shown == [min(answers, key=len), max(answers, key=len)]


@pytest.mark.parametrize(("shown", "lengths"), [(2, [10, 60]), (3, [10, 30, 60]), (9, [10, 20, 30, 50, 60])])
def test_the_rubric_writer_sees_answers_from_the_shortest_to_the_longest(llm, shown, lengths):
    script = Script(llm, [rubric_text(KESTREL_RUBRIC)])
    answers = {size: f"answer{size} ".ljust(size, "z") for size in (30, 60, 10, 50, 20)}
    ready = episode(answers=[Answer(text) for text in answers.values()], rubric=[])
    rubric.write_rubrics(llm, [ready], Config(rubric_answers=shown))
    (prompt,) = script.calls[0].prompts
    assert sorted(size for size, text in answers.items() if text in prompt) == lengths


@everywhere
def test_the_proposer_sees_its_own_document(llm, task):
    _, script = play(llm, task=task)
    for role in ("propose", "reference"):
        (call,) = script.of(role)
        assert [between(prompt, "document") for prompt in call.prompts] == [KESTREL.text, BREAD.text]


@everywhere
def test_problem_and_reference_are_asked_for_in_the_words_of_the_task(llm, task):
    _, script = play(llm, task=task)
    asked = rubric.REFERENCE[task].split("\n")[0]
    assert all(rubric.PROPOSER[task] in prompt for prompt in script.of("propose")[0].prompts)
    assert all(asked in prompt for prompt in script.of("reference")[0].prompts)


@every_judge
@pytest.mark.parametrize("roles", ["base", "policy"])
def test_only_the_solver_always_runs_with_adapters(llm, roles, judge):
    _, script = play(llm, roles=roles, judge=judge)
    assert all(call.adapters_on for call in script.of("solve"))
    others = {call.role: call.adapters_on for call in script.calls if call.role != "solve"}
    assert others == dict.fromkeys(["propose", "gate", "reference", "rubric", "judge"], roles == "policy")


THOUGHTS = "I wonder whether it smells them. Owls listen."


@pytest.mark.parametrize("rubric_kind", ["written", "holistic"])
@every_judge
def test_thoughts_are_never_shown_to_rubric_writer_or_judge(llm, judge, rubric_kind):
    reply = "1. Evidence: so\nRating: 1\nScore: 3" if rubric_kind == "holistic" else None
    script = Script(
        llm,
        *([[rubric_text(KESTREL_RUBRIC)]] if rubric_kind == "written" else []),
        lambda prompt: reply or verdict(*[1] * len(named(prompt))),
    )
    e = episode(answers=[Answer(f"<think>{THOUGHTS}</think>\n\nBy sight."), Answer(f"<think>\n{THOUGHTS}")], rubric=[])
    cfg = Config(judge=judge, rubric=rubric_kind)
    rubric.write_rubrics(llm, [e], cfg)
    rubric.judge(llm, [e], cfg)
    assert {call.role for call in script.calls} == ({"rubric", "judge"} if rubric_kind == "written" else {"judge"})
    for call in script.calls:
        assert any("By sight." in prompt for prompt in call.prompts)
        assert not any("whether it smells" in prompt or "think>" in prompt for prompt in call.prompts)


def test_placeholders_in_a_text_stay_text(llm):
    script = Script(llm, [rubric_text(KESTREL_RUBRIC)])
    text = "{document} {answers} {problem} {reference} {most} {0} {}"
    document = Document("braces", f"{KESTREL.text} {text} end of document")
    answer = Answer(f"an answer {text} end of answer")
    e = episode(document=document, problem=f"{text}?", answers=[answer], rubric=[])
    e.reference = f"reference {text}"
    rubric.write_rubrics(llm, [e], Config())
    (prompt,) = script.calls[0].prompts
    assert all(prompt.count(part) == 1 for part in (document.text, e.reference, answer.text, f"{text}?"))


# -------------------------------------------------------------------------------------------------- proposer


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<problem>Why?</problem>", "Why?"),
        ("Here it is:\n<problem>\n  Why?\n</problem>\nGood luck!", "Why?"),
        ("<problem>Why?", "Why?"),
        ("<problem>Why?<problem>", "Why?"),
        ("<PROBLEM>Why?</Problem>", "Why?"),
        ("< problem >Why?</ problem >", "Why?"),
        ("<problem>Why?< / problem>", "Why?"),
        ("<problem>First line.\n\nSecond line.</problem>", "First line.\n\nSecond line."),
        ("<problem>Is 2 < 3, and what is a <b>tag</b>?</problem>", "Is 2 < 3, and what is a <b>tag</b>?"),
        ("<think>A <problem>draft</problem>.</think>\n<problem>Why?</problem>", "Why?"),
        ("A <problem>draft</problem>.\n</think>\n<problem>Why?</problem>", "Why?"),
        ("<think>A <problem>draft</problem>.", ""),
        ("Why?", ""),
        ("<problem></problem>", ""),
        ("", ""),
    ],
)
def test_a_problem_is_what_stands_in_the_tags(text, problem):
    assert in_tags(text) == problem


def test_a_document_is_dropped_after_the_last_try_with_every_reject_recorded(llm):
    script = Script(llm, *[[tagged(f"penguins swim number {i}?")] for i in range(3)])
    (e,) = propose(script, [KESTREL], tries=3)
    assert len(script.calls) == 3
    assert e.drop == "proposer/not about the document"
    assert [(f["role"], f["reason"]) for f in e.failures] == [("proposer", "not about the document")] * 3
    assert [f["raw"] for f in e.failures] == [tagged(f"penguins swim number {i}?") for i in range(3)]


def test_a_rejected_reference_costs_a_try_and_is_recorded(llm):
    script = Script(llm, [tagged(KESTREL_PROBLEM)], ["Yes."], [tagged(KESTREL_PROBLEM)], [KESTREL_REFERENCE])
    (e,) = propose(script, [KESTREL], tries=2)
    assert (e.drop, e.reference) == (None, KESTREL_REFERENCE)
    (failure,) = e.failures
    assert (failure["role"], failure["reason"]) == ("proposer", "reference too short")
    assert "Yes." in failure["raw"] and KESTREL_PROBLEM in failure["raw"]


def test_a_document_whose_references_all_fail_is_dropped(llm):
    script = Script(llm, *[[tagged(KESTREL_PROBLEM)], ["Yes."]] * 2)
    (e,) = propose(script, [KESTREL], tries=2)
    assert (e.drop, len(e.failures)) == ("proposer/reference too short", 2)


@pytest.mark.parametrize(("bad", "reason"), [("the", "unfinished"), (cut(tagged(BREAD_PROBLEM)), "unfinished")])
def test_only_documents_without_a_pair_are_tried_again(llm, bad, reason):
    script = Script(
        llm, [tagged(KESTREL_PROBLEM), bad], [KESTREL_REFERENCE], [[tagged(BREAD_PROBLEM), "no"]], [BREAD_REFERENCE]
    )
    kestrel, bread = propose(script, [KESTREL, BREAD], tries=5)
    asked = [BREAD.text in prompt for call in script.calls for prompt in call.prompts]
    assert asked == [False, True, False, True, True]
    assert (kestrel.reference, bread.reference) == (KESTREL_REFERENCE, BREAD_REFERENCE)
    assert (kestrel.failures, [f["reason"] for f in bread.failures]) == ([], [reason, "unfinished"])


def test_an_unfinished_reference_is_rejected(llm):
    script = Script(llm, [tagged(KESTREL_PROBLEM)], [cut(KESTREL_REFERENCE + " A female")])
    (e,) = propose(script, [KESTREL], tries=1)
    assert (e.drop, e.reference) == ("proposer/reference unfinished", "")


def test_with_crutches_the_length_limit_may_end_problem_and_reference(llm):
    problem = cut("<problem>" + KESTREL_PROBLEM[:-1])
    script = Script(llm, [[problem, "no", "no"]], [cut(KESTREL_REFERENCE + " A female")])
    (e,) = propose(script, [KESTREL], crutches=True)
    assert (e.problem, e.reference) == (KESTREL_PROBLEM[:-1], KESTREL_REFERENCE + " A female")


def test_a_reference_is_kept_without_its_thoughts(llm):
    script = Script(llm, [tagged(KESTREL_PROBLEM)], [f"<think>{THOUGHTS}</think>\n{KESTREL_REFERENCE}"])
    (e,) = propose(script, [KESTREL])
    assert e.reference == KESTREL_REFERENCE


def test_of_tries_at_once_the_first_good_pair_is_kept_and_every_reject_recorded(llm, monkeypatch):
    monkeypatch.setattr(crutches, "TRIES_AT_ONCE", 4)
    second = "From twenty metres it follows the urine trails, with its head locked still while the wings beat."
    problems = [tagged("penguins swim so far?"), *3 * [tagged(KESTREL_PROBLEM)]]
    script = Script(llm, [problems], ["Yes.", KESTREL_REFERENCE, second])
    (e,) = propose(script, [KESTREL], tries=8, crutches=True)
    assert [(call.role, len(call.prompts), call.n) for call in script.calls] == [("propose", 1, 4), ("reference", 3, 1)]
    assert (e.problem, e.reference, e.drop) == (KESTREL_PROBLEM, KESTREL_REFERENCE, None)
    assert [f["reason"] for f in e.failures] == ["not about the document", "reference too short"]


def test_attempts_side_by_side_are_no_more_than_the_tries(llm):
    script = Script(llm, [["no"] * 3], [["no"] * 2])
    propose(script, [KESTREL], tries=5, crutches=True)
    assert [call.n for call in script.calls] == [3, 2]


def test_later_attempts_fill_the_rows_of_the_first(llm):
    script = Script(llm, ["no", tagged(BREAD_PROBLEM)], [BREAD_REFERENCE], [["no", "no"]], [["no"]])
    kestrel, _ = propose(script, [KESTREL, BREAD], tries=4)
    asked = [(len(call.prompts), call.n) for call in script.calls if call.role == "propose"]
    assert asked == [(2, 1), (1, 2), (1, 1)]
    assert len(kestrel.failures) == 4


# ------------------------------------------------------------------------------------------------------ gate

BAD, GOOD = rubric.GATE_BAD, rubric.GATE_GOOD
WHYS = list(rubric.GATE)


def leaning(problems: dict[str, float], bad: Sequence[float] = (0.1, 0.3), good: Sequence[float] = (0.9, 0.7)):
    """How likely Yes is, whatever the question."""
    said = {**dict(zip(BAD, bad, strict=True)), **dict(zip(GOOD, good, strict=True)), **problems}
    return lambda why, problem: said[problem]


def stopped(llm: LLM, problems: Sequence[str], **options) -> list[str | None]:
    """Why the gate stops each problem, asked as propose asks it."""
    pairs = [(episode(problem=problem), problem) for problem in problems]
    with llm.adapters_off():
        passed = rubric.gate(llm, pairs, Config(**options))
    reasons = [[f["reason"].removeprefix("gate: ") for f in e.failures] for e, _ in pairs]
    assert [pair for pair, why in zip(pairs, reasons, strict=True) if not why] == passed
    return [why[0] if why else None for why in reasons]


@pytest.mark.parametrize(
    ("bad", "good", "limit"),
    [((0.1, 0.3), (0.9, 0.7), 0.5), ((0.9, 0.92), (0.97, 0.99), 0.945), ((0.0, 0.04), (0.1, 0.06), 0.05)],
)
def test_the_limit_is_half_way_between_problems_known_to_be_bad_and_good(llm, bad, good, limit):
    problems = {"just below": limit - 0.005, "just above": limit + 0.005}
    script = Script(llm, yes=leaning(problems, bad, good))
    assert stopped(script.llm, list(problems)) == [WHYS[0], None]


@torch.no_grad()
def naive_yes(llm: LLM, why: str, problem: str) -> float:
    """The probability of Yes against No from all logits of one unpadded row, by the first byte of each."""
    turns = []
    for shown, reply in (*rubric.GATE_SHOTS, (problem, "")):
        asked = {"role": "user", "content": rubric.GATE[why].replace("{problem}", shown)}
        turns += [asked, {"role": "assistant", "content": reply}]
    row = llm.encode_messages(turns[:-1])
    with llm.adapters_off():
        logits = llm.model(input_ids=torch.tensor([row])).logits[0, -1].double()  # (V,)
    return logits[llm.tokenizer.convert_tokens_to_ids(["Y", "N"])].softmax(-1)[0].item()


def test_what_the_gate_stops_follows_from_the_models_own_probabilities(llm):
    script = Script(llm)
    problems = [KESTREL_PROBLEM, BREAD_PROBLEM, "Why?", *(p for p, _ in rubric.GATE_SHOTS)]
    found = stopped(llm, problems)
    expected: list[str | None] = [None] * len(problems)
    for why in reversed(WHYS):  # the first reason is the one given
        yes = {p: naive_yes(script.llm, why, p) for p in (*BAD, *GOOD, *problems)}
        limit = sum(yes[p] for p in (*BAD, *GOOD)) / 4
        expected = [why if yes[p] < limit else other for p, other in zip(problems, expected, strict=True)]
    assert found == expected
    assert len(set(found)) > 1, "if it stopped all or none, nothing were proved"


@pytest.mark.parametrize("why", WHYS)
def test_a_problem_is_stopped_by_either_question(llm, why):
    no = leaning({KESTREL_PROBLEM: 0.2})
    script = Script(llm, yes=lambda asked, p: 0.8 if asked != why and p == KESTREL_PROBLEM else no(asked, p))
    assert stopped(script.llm, [KESTREL_PROBLEM]) == [why]


def test_no_reference_is_asked_for_a_problem_that_the_gate_stops(llm):
    yes = leaning({KESTREL_PROBLEM: 0.2, BREAD_PROBLEM: 0.8})
    script = Script(llm, [tagged(KESTREL_PROBLEM), tagged(BREAD_PROBLEM)], [BREAD_REFERENCE], yes=yes)
    kestrel, bread = propose(script, [KESTREL, BREAD], gate=True, tries=1)
    assert [call.role for call in script.calls] == ["propose", "gate", "gate", "reference"]
    (prompt,) = script.of("reference")[0].prompts
    assert BREAD.text in prompt and bread.reference == BREAD_REFERENCE
    assert kestrel.drop == f"proposer/gate: {WHYS[0]}"
    assert kestrel.failures == [{"role": "proposer", "reason": f"gate: {WHYS[0]}", "raw": KESTREL_PROBLEM}]


def test_a_problem_that_the_gate_stops_costs_a_try(llm):
    other = "How does a female kestrel sit on her eggs in April?"
    yes = leaning({KESTREL_PROBLEM: 0.2, other: 0.8})
    script = Script(llm, [tagged(KESTREL_PROBLEM)], [tagged(other)], [KESTREL_REFERENCE], yes=yes)
    (e,) = propose(script, [KESTREL], gate=True, tries=2)
    assert [call.role for call in script.calls] == ["propose", "gate", "gate", "propose", "gate", "gate", "reference"]
    assert (e.problem, e.reference, len(e.failures)) == (other, KESTREL_REFERENCE, 1)


def test_without_the_gate_or_a_problem_nothing_is_asked_of_it(llm):
    script = Script(llm)
    assert stopped(llm, [KESTREL_PROBLEM], gate=False) == [None]
    assert stopped(llm, []) == []
    assert script.calls == []


# ------------------------------------------------------------------------------------------------- worked examples


def test_the_examples_stand_before_the_document_as_turns_of_the_chat(llm, task="health"):
    messages = rubric.problem_messages(KESTREL.text, "a nurse about a patient", Config(task=task))
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2, "user"]
    asked, replies = messages[1::2], messages[2::2]
    documents = [between(m["content"], "document") for m in asked]
    assert documents == [*(x.document for x in EXAMPLES[task]), KESTREL.text]
    assert [between(m["content"], "problem") for m in replies] == [x.problem for x in EXAMPLES[task]]
    assert all(m["content"].startswith(rubric.PROBLEM_BEGUN) for m in replies)


@everywhere
@pytest.mark.parametrize("rendering", [0, 1])
def test_the_rubric_writers_example_is_begun_as_its_own_reply_will_be(task, rendering):
    messages = rubric.rubric_messages(episode(), Config(task=task), rendering)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"].startswith(rubric.RUBRIC_BEGUN[rendering])
    tags = [re.findall(r"<(\w+)>", messages[turn]["content"]) for turn in (1, 3)]
    assert list(dict.fromkeys(tags[0])) == list(dict.fromkeys(tags[1]))  # in the same order


@everywhere
def test_the_examples_pass_every_check_that_what_is_written_has_to_pass(task):
    for x in EXAMPLES[task]:
        assert rubric.problem_fault(x.problem, x.document) is None
    first = EXAMPLES[task][0]
    source = None if task == "writing" else first.document
    assert rubric.reference_fault(first.reference, first.problem, source) is None
    e = Episode(Document("x", first.document), first.problem)
    rubric.keep_criteria(e, json.dumps(first.rubric), Config(task=task))
    assert [asdict(c) for c in e.rubric] == first.rubric["criteria"]


def test_an_example_has_no_more_criteria_than_are_allowed():
    _, _, reply, _ = rubric.rubric_messages(episode(), Config(max_criteria=1))
    assert len(json.loads(reply["content"])["criteria"]) == 1


@pytest.mark.parametrize("hidden", ["rubric_document", "proposer_document"])
def test_an_example_shows_no_document_where_none_is_shown(hidden):
    cfg = Config(**{hidden: False})
    messages = [*rubric.rubric_messages(episode(), cfg), *rubric.problem_messages(KESTREL.text, "x", cfg)]
    shown = ["<document>" in m["content"] for m in messages]
    assert any(shown) and not any(shown[:4] if hidden == "rubric_document" else shown[4:])


def test_a_problem_with_a_name_from_the_examples_copies_them_unless_its_document_has_the_name(llm):
    copied = "Why does the kestrel of the Suez Canal hover above the verge with its head locked still?"
    script = Script(llm, [tagged(copied)], [tagged(KESTREL_PROBLEM)], [KESTREL_REFERENCE])
    (e,) = propose(script, [KESTREL])
    assert [f["reason"] for f in e.failures] == ["copies an example"] and e.problem == KESTREL_PROBLEM
    own = Document("canal", KESTREL.text + " It breeds along the Suez Canal.")
    script = Script(llm, [tagged(copied)], [KESTREL_REFERENCE])
    (e,) = propose(script, [own])
    assert (e.failures, e.problem) == ([], copied)


@pytest.mark.parametrize("task", list(EXAMPLES))
def test_a_problem_in_the_words_of_an_example_copies_it_unless_its_document_has_the_words(task):
    shown = EXAMPLES[task][1].problem.split()
    start = next(i for i in range(len(shown)) if not re.search(r"[A-Z-]", " ".join(shown[i : i + 8])))  # without a name
    seven, eight = (f"He asks whether {' '.join(shown[start : start + n])} too" for n in (7, 8))
    assert example_fault(seven, "a document", task) is None
    assert example_fault(eight, "a document", task) == "copies an example"
    assert example_fault(eight, f"a document: {eight}", task) is None


def test_models_on_crutches_are_shown_no_examples():
    cfg = Config(crutches=True)
    assert [m["role"] for m in rubric.rubric_messages(episode(), cfg)] == ["user"]
    assert [m["role"] for m in rubric.problem_messages(KESTREL.text, "x", cfg)] == ["user"]
