"""For models too small to keep to a format that they are asked for, such as the demo's 135M (`--crutches`).

Each role fills in a form while it decodes: labels are forced, values are its own. Prompts and parsers are the same as
without. No preset for a GPU comes here.
"""

import random
from typing import TYPE_CHECKING

from forms import Field

if TYPE_CHECKING:
    from pop import Config

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


def problem_form(cfg: "Config", rng: random.Random) -> list[Field]:
    opening = rng.choice(list(OPENINGS[cfg.task]))
    return [Field(f"<problem>{opening}", cfg.problem_tokens, min_tokens=4), Field("</problem>", 0)]


def reference_form(problem: str, cfg: "Config") -> list[Field]:
    begun = [reference for opening, reference in OPENINGS[cfg.task].items() if problem.startswith(opening)]
    return [Field(begun[0] if begun else "The", cfg.reference_tokens, min_tokens=12)]


def rubric_form(cfg: "Config") -> list[Field]:
    """Two criteria, if so many are allowed, then more if the model wants to."""
    room, form = cfg.criterion_tokens // 3, []
    for k in range(cfg.max_criteria):
        label = ', {"name": "' if k else '{"criteria": [{"name": "'
        form += [
            Field(label, room // 3, optional=k > 1, quoted=True),
            Field('", "gold": "', room, distinct=True, quoted=True),
            Field('", "description": "The answer', room, min_tokens=5, quoted=True),
            Field('", "weight": ', choices=tuple(f"{weight}}}" for weight in range(1, 6))),
        ]
    return form
