"""For models too small to keep to a format that they are asked for, such as the demo's 135M (`--crutches`).

Decoding is constrained to each role's template: labels are forced, golds are sentences of the document, other values
its own. The proposer gets prompts of one sentence, since the real ones are too long for a 135M; all else it is asked in
the words that every model gets. No preset for a GPU comes here.
"""

import random
import re

from config import Config
from engine.constrained import Field

TRIES_AT_ONCE = 3  # attempts at a problem side by side: with crutches most of them are no good

# Beginning of a problem -> of its reference. A small model that is told how to begin goes on sensibly where it
# would otherwise talk about its instructions, or answer a question by repeating it.
OPENINGS = {
    "instructions": {
        "Why does": "Because the",
        "Why did": "Because the",
        "How did": "First, the",
        "What happened": "First, the",
        "Explain how": "First, the",
    },
    "health": {
        "Why do": "Because",
        "Why is": "Because the",
        "What happens when": "Then the",
        "What causes": "The cause is that",
        "Explain how": "First, the",
    },
    "writing": {
        "Write a story about a": "There was a",
        "Write a story in which a": "It began when",
        "Write a story set in": "There was a",
    },
}
PROBLEM = {
    "instructions": "Write one question about the text above. Output only the question.",
    "health": "Write one question about health that the text above answers. Output only the question.",
    "writing": "Ask for a story in one sentence: who is the text above about, where are they, and what happens?",
}
REFERENCE = "Use the facts above to answer this in two or three sentences: {problem}"
DESCRIPTIONS = (
    "states this fact in its own words.",
    "explains this fact and its cause.",
    "tells this with names and numbers.",
)


def problem_template(cfg: Config, rng: random.Random) -> list[Field]:
    opening = rng.choice(list(OPENINGS[cfg.task]))
    return [Field(f"<problem>{opening}", cfg.problem_tokens, min_tokens=4), Field("</problem>", 0)]


def reference_template(problem: str, cfg: Config) -> list[Field]:
    begun = [reference for opening, reference in OPENINGS[cfg.task].items() if problem.startswith(opening)]
    return [Field(begun[0] if begun else "The", cfg.reference_tokens, min_tokens=12)]


def rubric_template(document: str, cfg: Config) -> list[Field]:
    """Two criteria, if so many are allowed, then more if the model wants to."""
    facts, template = tuple(statements(document)), []
    for k in range(cfg.max_criteria):
        template += [
            Field(', {"name": "' if k else '{"criteria": [{"name": "', 6, optional=k > 1, quoted=True),
            Field('", "gold": "', 24, choices=facts, distinct=True, quoted=not facts),
            Field('", "description": "The answer ', choices=DESCRIPTIONS),
            Field('", "weight": ', choices=tuple(f"{weight}}}" for weight in range(1, 6))),
        ]
    return template


def statements(document: str, longest: int = 18) -> list[str]:
    """The sentences of a document of 5 words or more that can stand in JSON; a long one ends at a comma before that.

    >>> statements("Heat rises, as a rule, in air. So it is. Unless the wind")
    ['Heat rises, as a rule, in air.']
    """
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", document.strip())[: None if document.rstrip().endswith(".") else -1]:
        said = sentence.split()
        short = sentence if len(said) <= longest else " ".join(said[:longest]).rpartition(", ")[0]
        if len(short.split()) >= 5 and not set(short) & set('"\\'):
            found.append(" ".join(short.split()))
    return list(dict.fromkeys(found))
