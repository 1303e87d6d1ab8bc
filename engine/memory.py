"""Fitting into memory: the largest batch of each role, and what happens where one does not fit."""

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from config import FACTS_TOKENS, Config
from engine.crutches import TRIES_AT_ONCE
from engine.fast import batches

Device = Literal["cuda", "cpu"]

OUT_OF_MEMORY = re.compile(
    r"CUDA (driver )?error: out of memory|can't allocate memory|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
)

# One chunk of float32 logits while log-probabilities are computed; its gradient takes as much again. Each chunk reads
# the whole output head, 1.1 GB of a 7B, which a GPU should not do too often.
LOGITS_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}

# Tokens read at once: more are no faster, padded to a longer row, and need more memory.
READ_TOKENS = {"cpu": 1_024, "cuda": 8_192}


# Lengths in tokens, at most.
TOKENS_PER_WORD = 1.4  # English in a vocabulary of 50k to 150k takes 1.3

INSTRUCTIONS = 1_130  # of proposer and rubric writer with their worked examples; the rubric writer's are the longer

GRADING = 450  # the judge's instructions

TEMPLATE = 60  # the chat template around a problem, which is all that the solver is given

CONTROLS = 2  # answers that a rubric is tried on, beside a group's own

QUESTION = 50  # what the logits judge is asked after the answer


@dataclass(frozen=True)
class Batch:
    """The largest batch of a role: `prompts` prompts of `prompt` tokens, each continued `n` times by `new` tokens.

    Where they are only read: all but the last `rest` tokens of each row are the beginning of one of `beginnings`.
    """

    prompts: int
    prompt: int
    new: int = 0
    n: int = 1
    rest: int = 0
    beginnings: int = 0

    @property
    def rows(self) -> int:
        return self.prompts * self.n


def work_of(cfg: Config, device: Device = "cuda") -> dict[str, Batch]:
    """The largest batch of each role, were every text as long as it may be."""
    document = round(cfg.max_words * TOKENS_PER_WORD)
    rubric = cfg.criterion_tokens * cfg.max_criteria
    asked, told = cfg.problem_tokens + TEMPLATE, cfg.problem_tokens + INSTRUCTIONS
    graded = cfg.problem_tokens + GRADING + cfg.max_new_tokens
    noted = FACTS_TOKENS + cfg.problem_tokens
    shown = cfg.reference_tokens + min(cfg.rubric_answers, cfg.group_size) * cfg.max_new_tokens
    taken = cfg.documents_taken
    rated_answers = taken * (cfg.group_size + CONTROLS * cfg.check_rubric)
    rest = cfg.max_new_tokens + QUESTION  # of the judge's prompt, the answer and what follows
    n = max(1, min(cfg.group_size, (cfg.update_tokens - asked) // cfg.max_new_tokens))  # answers in a row of the update
    row = asked + n * cfg.max_new_tokens

    def largest(count: int, prompt: int, new: int, n: int = 1, budget: int = cfg.rollout_tokens) -> Batch:
        groups = [[i * n + k for k in range(n)] for i in range(count)]
        rows = len(batches(groups, [prompt + new] * (count * n), budget)[0])
        return Batch(max(1, rows // n), prompt, new, min(n, rows))

    # Of the logits judge: a prompt for each answer and criterion, those of a group beginning alike.
    rated = largest(taken * cfg.max_criteria, graded + cfg.criterion_tokens, 0, n=cfg.group_size)
    return {
        "propose": largest(
            taken, document + told, max(noted, cfg.reference_tokens), n=TRIES_AT_ONCE if cfg.crutches else 1
        ),
        "solve": largest(taken, asked, cfg.max_new_tokens, n=cfg.group_size),
        "rubric": largest(taken, document + told + shown, rubric, n=3),
        "judge": largest(rated_answers, graded + rubric, cfg.rating_tokens * cfg.max_criteria)
        if cfg.judge != "logits"
        else Batch(
            min(rated.rows, max(1, min(READ_TOKENS[device], cfg.rollout_tokens) // rest)),
            rated.prompt,
            rest=rest,
            beginnings=rated.prompts,
        ),
        "update": Batch(max(1, min(cfg.documents, cfg.update_tokens // row)), asked, cfg.max_new_tokens, n),
    }


def in_use(cfg: Config) -> list[str]:
    """The roles of work_of that have work to do: without training no update, and with recorded answers nothing else."""
    if cfg.replay == "answers":
        return ["update"]
    return ["propose", "solve", "rubric", "judge"] + ([] if cfg.synthesize else ["update"])


def out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator has its own exception; the driver, cuBLAS, cuDNN and the CPU's allocator raise others. Where it
    happens while a CUDA graph is captured, another error is raised because of it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    because = None if error.__suppress_context__ else error.__context__
    return OUT_OF_MEMORY.search(str(error)) is not None or (because is not None and out_of_memory(because))


T = TypeVar("T")


def one_row_too_long(phase: str, tokens: int) -> str:
    return (
        f"out of memory in {phase}, even with one row ({tokens} tokens): lower --max-words, --max-new-tokens or "
        "--rubric-answers, or choose a smaller model"
    )


def within_memory(work: Callable[[], T], smaller: Callable[[], None]) -> T:
    """work(), again after smaller() as often as memory runs out. smaller raises UserError where nothing is left."""
    while True:
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Only here, outside of the except block, do the error's frames let go of their tensors.
        gc.collect()
        torch.cuda.empty_cache()
        smaller()


def rehearse(llm: Any, cfg: Config, update_tokens: int) -> int:
    return update_tokens
