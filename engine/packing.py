"""The micro-batches of an update: answers packed behind their prompt in rows, rows in batches that fit into memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tqdm.auto import tqdm

from config import Config
from data import Answer, UserError
from engine import memory
from engine.checkpoint import State
from engine.fast import batches, share_prompts
from model import LLM, MASKED

T = TypeVar("T")


@dataclass
class Group:
    """A prompt and answers to it with their advantages: all that are trained on, or those of one row of a batch."""

    prompt: list[int]
    answers: list[Answer]
    advantages: list[float]


MicroBatch = list[Group]  # its rows; a row is a prompt, prefilled once, with some of its answers behind it


def micro_batches(llm: LLM, groups: Sequence[Group], budget: int, cfg: Config) -> list[MicroBatch]:
    """The answers of all groups in rows, those of similar length together, each batch under `budget` tokens.

    A pair of DPO stays in one row, since its loss is of both answers together.
    """
    rows = []
    for g in groups:
        lengths, every = [len(a.ids) for a in g.answers], [list(range(len(g.answers)))]
        shared = share_prompts(len(g.prompt), lengths, budget, llm.pairs_a_token, MASKED[llm.kind])
        for members in every if cfg.loss == "dpo" else shared:
            rows.append(Group(g.prompt, [g.answers[i] for i in members], [g.advantages[i] for i in members]))
    planned = batches([[i] for i in range(len(rows))], [row_tokens(row) for row in rows], budget)
    return [[rows[i] for i in batch] for batch in planned]


def row_tokens(row: Group) -> int:
    return len(row.prompt) + sum(len(a.ids) for a in row.answers)


def answers_in(batch: MicroBatch) -> list[Answer]:
    return [a for row in batch for a in row.answers]


def fitting(llm: LLM, state: State, groups: Sequence[Group], cfg: Config, work: Callable[[list[MicroBatch]], T]) -> T:
    """work(micro-batches); where memory runs out, again with the gradient zeroed and under half the token budget."""

    def parts() -> list[MicroBatch]:
        return micro_batches(llm, groups, state.progress["budgets"]["update"], cfg)

    def smaller() -> None:
        state.optimizer.zero_grad(set_to_none=True)
        rows = max(len(part) for part in parts())
        longest = max(row_tokens(row) for part in parts() for row in part)
        if rows == 1 and all(len(row.answers) == 1 or cfg.loss == "dpo" for part in parts() for row in part):
            raise UserError(memory.one_row_too_long("update", longest))
        state.progress["budgets"]["update"] = min(state.progress["budgets"]["update"], rows * longest) // 2
        tqdm.write(f"out of memory in the update: now under {state.progress['budgets']['update']} tokens a batch")

    return memory.within_memory(lambda: work(parts()), smaller)
