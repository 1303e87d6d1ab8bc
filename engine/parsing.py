"""Reading answers, problems, rubrics and ratings back from what models write, and what they are rejected for."""

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from data import Criterion
from engine.text import (
    content_words,
    points_at_source,
    refers_to_nothing,
    repeated,
    short_answer_fits,
    taken_from,
    words,
)

REPEATED = 0.32  # more is a loop: a refrain, a table, or code before and after a change repeat less than a third


def final_answer(text: str) -> str:
    """The text without the thoughts of a reasoning model, which are trained on but never judged.

    A chat template may open them in the prompt: then the text holds the closing tag alone, at the end of a line.
    "" where they were never closed.

    >>> final_answer("<think>2 + 2? Easy.</think>\\n\\nFour."), final_answer("<think>Two plus two")
    ('Four.', '')
    """
    opened = text.lstrip().startswith("<think>")
    first = re.search(r"</?think>[^\S\n]*(\n|\Z)?", text)
    if not opened and not (first and first[0].startswith("</") and first[1] is not None):
        return text
    _, closed, answer = text.rpartition("</think>")
    return answer.strip() if closed else ""


# ------------------------------------------------------------------------------------- problems and references


def in_tags(text: str) -> str:
    """The problem in a proposer's text, "" if none is there. The closing tag may be missing.

    >>> in_tags("Here it is: <problem>\\nWhy?</problem> Good luck!")
    'Why?'
    """
    found = re.search(r"(?is)(?:<\s*problem\s*>\s*)+(.*?)(?:<\s*(?:/\s*)?problem\s*>|\Z)", final_answer(text))
    return found[1].strip() if found else ""


def first_fault(faults: dict[str, bool]) -> str | None:
    return next((why for why, found in faults.items() if found), None)


def problem_fault(problem: str, document: str | None) -> str | None:
    """Why a problem is rejected, or None. document: None where its writer has not seen one."""
    asked = content_words(problem)
    shared = len(asked) if document is None else len(asked & content_words(document))
    faults = {
        "unfinished": not problem,
        # characters too, for scripts that put no space between words
        "too short": len(words(problem)) < 4 and len(problem) < 16,
        "mentions the text": refers_to_nothing(problem) or points_at_source(problem, problem),
        "repeats itself": repeated(problem) > REPEATED,
        "not about the document": shared < min(len(asked) / 2, max(2, len(asked) / 10)),
    }
    return first_fault(faults)


def reference_fault(reference: str, problem: str, document: str | None, n: int = 10) -> str | None:
    """Why a pair of problem and reference is rejected, or None. `n`: words in a row that give the answer away.

    A reference may take up a first line that the problem gives, but not most of itself.
    """
    said, added = words(reference), content_words(reference) - content_words(problem)
    facts = added if document is None else added & content_words(document)
    brief = len(said) < 8  # "Paris." adds nothing else, and may be one of the choices that the problem gives
    faults = {
        "reference too short": not said or (brief and not short_answer_fits(problem)),
        "reference mentions the text": points_at_source(reference, problem),
        "reference repeats itself": repeated(reference) > REPEATED,
        "problem gives the answer away": not brief and taken_from(problem, reference, n) > 0.5,
        "reference adds no fact": not brief and len(facts) < 2,
    }
    return first_fault(faults)


# ----------------------------------------------------------------------------------------------------- rubrics

NO_GOLD = "not applicable"  # the gold of a criterion that has none
NO_GOLD_SAID = re.compile(r"(?i)(?:(?:n/?a|none|null)\W*\Z|not (?:applicable|available)\b)")
# A gold answer is a fact: "The answer states that ..." before one is left out, an order to whoever answers is none.
ANSWER = r"(?i)\A(?:the |a |an )?(?:full |good |better )?"
ANSWER_SAYS = re.compile(
    rf"{ANSWER}answer (?:correctly |clearly )?"
    r"(?:states?|says?|mentions?|explains?|notes?|includes?|identifies|gives?)(?: that)?:? "
)
ABOUT_THE_ANSWER = re.compile(rf"{ANSWER}(?:answer|response)s?\b|\Ashould\b")
# A description that compares the texts which the rubric writer was shown, or tells what one of them lacks, is no use to
# a judge, who sees none of them: "The reference mentions it, while the second answer does not."
SHOWN = re.compile(
    r"(?i)\bthe reference\b(?! (?:frame|interval|list|range|value)s?\b)"
    r"|\b(?:first|second|third|fourth|other|better|worse) answers?\b"
    r"|\banswers? (?:does|do|did) not (?:address|discuss|explain|give|include|mention|provide|state)\b"
)


def parse_rubric(text: str, longest: int = 20_000) -> list[Criterion]:
    """The complete criteria of a rubric writer's text, in order: the JSON objects in it that are some, however deep.

    >>> parse_rubric('Sure: [{"name": "Volume", "gold": 5, "description": "Gives the volume.", "weight": 3}] Done.')
    [Criterion(name='Volume', gold='5', description='Gives the volume.', weight=3.0)]
    """
    criteria, text, at = [], text[:longest], 0
    while (at := text.find("{", at)) >= 0:
        item, end = read_object(text, at)
        criterion = read_criterion(item)
        criteria += [criterion] if criterion else []
        at = end if criterion else at + 1
    return criteria


def read_object(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The JSON object at a "{" and its end; {} if it cannot be read. In single quotes too, if it holds no other."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.JSONDecoder(strict=False).raw_decode(text, at)  # line ends within strings are allowed
    end = text.find("}", at) + 1
    if 0 < end - at < 2_000:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            with warnings.catch_warnings(action="ignore"):  # such as of an escape sequence that Python does not know
                value = ast.literal_eval(text[at:end])
            if isinstance(value, dict):
                return value, end
    return {}, at + 1


def read_criterion(item: dict[str, Any]) -> Criterion | None:
    """None for an object that is no whole criterion (its weight in (0, 100]), or holds others in a list."""
    if any(isinstance(part, dict) for value in item.values() if isinstance(value, list) for part in value):
        return None
    name, gold, description = (as_line(item.get(field)) for field in ("name", "gold", "description"))
    weight = re.match(r"\d{1,3}(?:\.\d{1,6})?(?![\w.])", str(item.get("weight", 1)))
    if not words(name) or not words(description) or not weight or not 0 < float(weight[0]) <= 100:
        return None
    gold = ANSWER_SAYS.sub("", gold)
    gold = NO_GOLD if not words(gold) or NO_GOLD_SAID.match(gold) else gold
    return Criterion(name, gold, description, float(weight[0]))


def as_line(value: Any) -> str:
    """A JSON value, or a list of such, as one line of text, as it stands in the judge's prompt."""
    parts = value if isinstance(value, list) else [value]
    return " ".join("; ".join(str(part) for part in parts if isinstance(part, str | int | float)).split())


def criterion_fault(criterion: Criterion, problem: str, document: str | None) -> str | None:
    """Why a criterion is rejected, or None. document: None where its writer has not seen one."""
    gold, known = content_words(criterion.gold), content_words(document or "")
    said = gold | content_words(f"{criterion.name} {criterion.description}")
    has_gold = criterion.gold != NO_GOLD
    faults = {
        "description too short": len(words(criterion.description)) < 4,
        "speaks of what the judge does not see": bool(SHOWN.search(criterion.description)),
        "repeats itself": repeated(criterion.description) > REPEATED,
        "would suit any problem": not said & (known | content_words(problem)),
        "gold speaks of the answer": has_gold and bool(ABOUT_THE_ANSWER.match(criterion.gold)),
        "gold not from the document": has_gold and document is not None and bool(gold) and not gold & known,
    }
    return first_fault(faults)


def distinct(criteria: Sequence[Criterion]) -> list[Criterion]:
    """The criteria without those that ask for the same as one before: the same gold, or quality where there is none."""
    kept: dict[tuple[Any, ...], Criterion] = {}
    for c in criteria:
        kept.setdefault((c.gold == NO_GOLD, *words(c.description if c.gold == NO_GOLD else c.gold)), c)
    return list(kept.values())


# ----------------------------------------------------------------------------------------------------- ratings

RATING = re.compile(r"(?im)^(?:\d|[^\w\n])*rating\b\W*?:[ \t*_`(\[\"]*([012])(?!\w|\.\d)")
SCORE = re.compile(r"(?im)^[^\w\n]*score\b[^\w:]*:\W*(10|[1-9])(?!\w|\.\d)")


def parse_ratings(text: str, criteria: int) -> list[tuple[str, int]] | None:
    """A judge's text -> what is said before each rating and where its digit is, or None unless each criterion has one.

    >>> parse_ratings("1. Evidence: It says so.\\nRating: 2", 1)
    [('Evidence: It says so.', 33)]
    """
    found = list(RATING.finditer(text))
    if len(found) != criteria:
        return None
    starts = [0, *(match.end() for match in found)]
    said = [text[start : match.start()] for start, match in zip(starts, found, strict=False)]
    return [(" ".join(s.split()).lstrip("0123456789.) "), match.start(1)) for s, match in zip(said, found, strict=True)]


def written_ratings(text: str, criteria: int) -> list[float] | None:
    """The ratings in a judge's text as the digits it wrote, or None; for judges whose probabilities are not known."""
    found = parse_ratings(text, criteria)
    return None if found is None else [float(text[digit]) for _, digit in found]


def parse_score(text: str) -> list[tuple[str, float]] | None:
    """A judge's text with a score of 1 to 10 -> [(thought, rating in 0 to 2)], or None."""
    found = SCORE.search(text)
    return [(text[: found.start()].strip(), 2 * (int(found[1]) - 1) / 9)] if found else None
