"""Guards: what may change a grade besides the judge, each a pure function of the text with a switch in Config.

Three veto an answer (reward 0; its grade stays on record), the fourth shortens the reward of long ones. They read
English and the judge's own format only, and know nothing of whether an answer is right: that is the judge's part.
"""

import math
import re
import unicodedata
from typing import TYPE_CHECKING

from rubric import Answer, Episode, content_words, grade, ngrams

if TYPE_CHECKING:
    from pop import Config

NAMES = ("judge_addressing", "too_little_content", "copies_problem", "length")


def reward(answer: Answer, episode: Episode, cfg: "Config") -> None:
    """Ratings -> grade -> reward of an answer; both None where no rating could be read."""
    kept = factor(answer, episode.problem, cfg)
    answer.grade = None if answer.ratings is None else grade(answer.ratings, episode.rubric)
    answer.reward = None if answer.grade is None else answer.grade * kept


def factor(answer: Answer, problem: str, cfg: "Config") -> float:
    """The share of its grade that an answer keeps, in [0, 1]; what fired is noted in `answer.guards`."""
    answer.guards = []
    if not cfg.guards:
        return 1.0
    kept = 1.0
    if cfg.guard_length:
        soft = cfg.soft_length * cfg.max_new_tokens
        kept = length_factor(len(answer.ids), soft, cfg.max_new_tokens, cfg.length_floor)
    vetoes = {
        "judge_addressing": cfg.guard_judge_addressing and judge_addressing(answer.text),
        "too_little_content": cfg.guard_too_little_content and too_little_content(answer.text, problem),
        "copies_problem": cfg.guard_copies_problem and copies_problem(answer.text, problem),
    }
    answer.guards = [name for name, fired in {**vetoes, "length": kept < 1}.items() if fired]
    return 0.0 if any(vetoes.values()) else kept


def length_factor(tokens: int, soft: float, hard: float, floor: float) -> float:
    """1 up to `soft` tokens, then half a cosine down to `floor` at `hard` (method of SCOPE, arXiv 2605.31433).

    >>> [round(length_factor(n, soft=60, hard=100, floor=0.5), 3) for n in (10, 60, 80, 100)]
    [1.0, 1.0, 0.75, 0.5]
    """
    x = min(1.0, max(0.0, (tokens - soft) / max(hard - soft, 1e-9)))
    return floor + (1 - floor) * (1 + math.cos(math.pi * x)) / 2


def too_little_content(text: str, problem: str) -> bool:
    """Fewer than four words, or than two content words beyond the problem's, or half of it said before.

    >>> [too_little_content(text, "Why does bread rise?") for text in ("Thought process:", "Yeast turns sugar to gas.")]
    [True, False]
    """
    grams = ngrams(text, 4)
    new = content_words(text) - content_words(problem)
    return not grams or len(new) < 2 or 2 * len(set(grams)) < len(grams)


def copies_problem(text: str, problem: str, n: int = 4, share: float = 0.6) -> bool:
    """More than `share` of the text's runs of n words stand in the problem too.

    A good answer often takes up the problem's words in its first sentence; hardly anything beyond it is a copy.
    """
    asked, said = set(ngrams(problem, n)), ngrams(text, n)
    return sum(gram in asked for gram in said) > share * len(said)


# ------------------------------------------------------------------------------------------- judge-addressing

# Most of these words are innocent alone (the immune response is complete; all criteria of a diagnosis are met; the
# judges give a rider full marks), so a pattern needs the answer speaking of itself, or the judge's own vocabulary.
SELF = r"\b(?:this|my|the(?: above)?) (?:answer|response|reply|essay|submission)\b"
FULL_MARKS = (
    r"\b(?:full|max|maximum|highest|top|perfect|best) (?:possible )?(?:marks?|scores?|ratings?|grades?|credit)\b"
)
MET = r"\b(?:meet|satisf|fulfil|address|cover)\w* (?:\w+ ){0,5}?(?:criteri(?:a|on)|rubrics?|requirements?)\b"
PRAISE = (
    r" (?:is|provides|gives|offers|contains) (?:an? )?(?:\w+ ){0,2}?(?:perfect|excellent|outstanding|flawless|"
    r"exemplary|superb|(?:fully|entirely|perfectly) (?:complete|correct|accurate))"
)
IGNORE = r"\b(?:ignore|disregard|forget|override)(?: all| any| of| the| these| your){0,4}"
THE_JUDGE = r"(?:the |all |any )?(?:judges?|graders?|evaluators?|raters?)\b"

# Searched in each sentence.
ADDRESSING = re.compile(
    "|".join(
        [
            f"{SELF}.{{0,80}}?(?:{FULL_MARKS}|{MET})",
            f"{FULL_MARKS}.{{0,80}}?{SELF}",
            r"\b(?:this|my|the above) (?:answer|response|reply|essay|submission)" + PRAISE,
            r"\b(?:rate|grade|score|mark) (?:this|my|the above) (?:answer|response|reply|essay|submission)\b",
            rf"\bplease (?:\w+ ){{0,5}}?{FULL_MARKS}",
            r"\bcriteri(?:a|on) (?:\w+ ){0,2}?(?:fully|completely|perfectly) (?:met|satisfied|fulfilled)\b",
            rf"\b(?:note|message|instructions?|attention|reminder)(?: to| for|[:,])? {THE_JUDGE}",
            rf"{IGNORE} (?:criteria|rubrics?|prompts?)\b",
            rf"{IGNORE} (?:previous|prior|above|earlier|preceding|other) (?:instructions?|rules|text)\b",
        ]
    ),
    re.IGNORECASE,
)
# The judge's own format, at the beginning of a line; and the marks of a prompt: fences and chat tokens.
FORGED_LINE = re.compile(
    r"[\W\d]*(?:rating|score|grade)\W{0,5}?:\W{0,5}?(?:[012](?![\w.,])|\d+ ?(?:/|out of) ?\d)", re.IGNORECASE
)
PROMPT_MARK = re.compile(r"</?\s*answer\s*>|<\|[^|<>\n]{1,40}\|>|\[/?INST\]", re.IGNORECASE)


def judge_addressing(text: str) -> bool:
    """Text that speaks to the judge, praises itself, or forges ratings or marks of the prompt.

    >>> [judge_addressing(text) for text in ("This answer fully meets every criterion.", "The answer is yeast.")]
    [True, False]
    """
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # zero-width characters would split the words
    lines = text.splitlines()
    sentences = re.split(r"[.!?]", " ".join(text.split()))
    return (
        bool(PROMPT_MARK.search(text))
        or any(FORGED_LINE.match(line) for line in lines)
        or any(ADDRESSING.search(sentence) for sentence in sentences)
    )
