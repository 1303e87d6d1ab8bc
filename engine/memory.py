"""Fitting into memory: the largest batch of each role, and what happens where a batch does not fit.

`llm` is an LLM of model.py; its `token_budget` is lowered for good where memory runs out.
"""

import contextlib
import functools
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from tqdm.auto import tqdm

from config import FACTS_TOKENS, PRESETS, RATING_TOKENS, Config
from data import UserError
from engine import fast
from engine.crutches import TRIES_AT_ONCE
from engine.prefill import prefill

T = TypeVar("T")
Device = Literal["cuda", "cpu"]

OUT_OF_MEMORY = re.compile(
    r"CUDA (driver )?error: out of memory|can't allocate memory|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
)

# One chunk of float32 logits while log-probabilities are computed; its gradient takes as much again. Each chunk needs
# the whole output head, 1.1 GB of a 7B, which a GPU should not fetch too often.
LOGITS_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}

# Tokens of a prefill at once: more are no faster, padded to a longer row, and need more memory.
PREFILL_TOKENS = {"cpu": 1_024, "cuda": 8_192}

# Lengths in tokens, at most.
TOKENS_PER_WORD = 1.4  # English in a vocabulary of 50k to 150k takes 1.3
INSTRUCTIONS = 1_130  # of proposer and rubric writer with their worked examples; the rubric writer's are the longer
GRADING = 450  # the judge's instructions
TEMPLATE = 60  # the chat template around a problem, which is all that the solver is given
QUESTION = 50  # what the logits judge is asked after the answer

CONTROLS = 2  # answers that a rubric is tried on, beside a group's own
GENERIC_CRITERIA = 4  # with --rubric generic, whatever --max-criteria


@dataclass(frozen=True)
class Batch:
    """The largest batch of a role: `prompts` prompts of `prompt` tokens, each continued `n` times by `new` tokens.

    The logits judge writes nothing: its rows begin with one of `prefixes` shared prompts and end with `rest` tokens of
    their own.
    """

    prompts: int
    prompt: int
    new: int = 0
    n: int = 1
    rest: int = 0
    prefixes: int = 0

    @property
    def rows(self) -> int:
        return self.prompts * self.n


def work_of(cfg: Config, device: Device = "cuda") -> dict[str, Batch]:
    """The largest batch of each role, were every text as long as it may be."""
    answers = min(cfg.rubric_answers, cfg.group_size)  # that the rubric writer sees
    if held_out(cfg):  # just as many are made there, and always some: see heldout.yardstick
        answers = cfg.rubric_answers or Config(**PRESETS.get(cfg.preset, {})).rubric_answers
    document = round(cfg.max_words * TOKENS_PER_WORD)
    criteria = max(cfg.max_criteria, GENERIC_CRITERIA if cfg.rubric == "generic" else 0)
    asked, told = cfg.problem_tokens + TEMPLATE, cfg.problem_tokens + INSTRUCTIONS
    graded = cfg.problem_tokens + GRADING + cfg.max_new_tokens
    written = max(FACTS_TOKENS + cfg.problem_tokens, cfg.reference_tokens)  # by the proposer
    shown = cfg.reference_tokens + answers * cfg.max_new_tokens
    taken = cfg.documents_taken
    n = max(1, min(cfg.group_size, (cfg.update_tokens - asked) // cfg.max_new_tokens))  # answers in a row of the update
    row = asked + n * cfg.max_new_tokens

    def largest(count: int, prompt: int, new: int, n: int = 1) -> Batch:
        rows = max(1, min(count * n, cfg.rollout_tokens // (prompt + new)))
        return Batch(max(1, rows // n), prompt, new, min(n, rows))

    if cfg.judge == "logits":  # a prompt for each answer and criterion, those of a group with the same prefix
        judge = largest(taken * criteria, graded + cfg.criterion_tokens, 0, cfg.group_size)
        rest = cfg.max_new_tokens + QUESTION  # after the prefix: the answer and what follows
        prefilled = max(1, min(PREFILL_TOKENS[device], cfg.rollout_tokens) // rest)
        judge = Batch(min(judge.rows, prefilled), judge.prompt, rest=rest, prefixes=judge.prompts)
    else:
        rated = taken * (cfg.group_size + CONTROLS * cfg.check_rubric)
        judge = largest(rated, graded + criteria * cfg.criterion_tokens, criteria * RATING_TOKENS)
    return {
        "propose": largest(taken, document + told, written, TRIES_AT_ONCE if cfg.crutches else 1),
        "solve": largest(taken, asked, cfg.max_new_tokens, cfg.group_size),
        "rubric": largest(taken, document + told + shown, cfg.max_criteria * cfg.criterion_tokens, 3),
        "judge": judge,
        "update": Batch(max(1, min(cfg.documents, cfg.update_tokens // row)), asked, cfg.max_new_tokens, n),
    }


def held_out(cfg: Config) -> bool:
    """Whether held-out documents are played too: by all roles, whatever the run itself leaves out."""
    return bool(cfg.audit or cfg.eval_every)


def in_use(cfg: Config) -> list[str]:
    """The roles that have work to do."""
    playing = cfg.replay == "problems"  # otherwise answers and ratings are recorded ones
    recorded = cfg.episodes and cfg.rubric_document and cfg.rubric_answers  # rubrics, as sources.replayed takes them
    used = {
        "propose": not cfg.episodes,
        "solve": playing,
        "rubric": playing and cfg.rubric == "written" and not recorded,
        "judge": playing,
    }
    return [role for role in used if used[role] or held_out(cfg)] + ([] if cfg.synthesize else ["update"])


def check_fits(llm: Any, cfg: Config) -> None:
    """Raises UserError if any role in use may get a prompt that, with what is to follow, exceeds the context."""
    work = work_of(cfg)
    # The update's rows are the solver's, or recorded and as long as they are.
    tokens = {role: work[role].prompt + work[role].new for role in in_use(cfg) if role != "update"}
    if cfg.audit:  # has references judged that are padded to three times their length
        tokens["judge"] += max(0, 3 * cfg.reference_tokens - cfg.max_new_tokens)
    llm.check_length(max(tokens.values(), default=0))


# ------------------------------------------------------------------------------------------- where it runs out


def out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator has its own exception; the driver, cuBLAS, cuDNN and the CPU's allocator raise others. Where it
    happens while a CUDA graph is captured, another error is raised because of it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    because = None if error.__suppress_context__ else error.__context__
    return OUT_OF_MEMORY.search(str(error)) is not None or (because is not None and out_of_memory(because))


def within_memory(work: Callable[[], T], smaller: Callable[[], None]) -> T:
    """work(), again after smaller() as often as memory runs out; smaller() raises UserError when nothing is left."""
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


def one_row_too_long(what: str, tokens: int) -> str:
    return (
        f"out of memory in {what}, even with one row ({tokens} tokens): lower --max-words, --max-new-tokens or "
        "--rubric-answers, or choose a smaller model"
    )


def halved(what: str, rows: int, longest: int, budget: int) -> int:
    """The token budget for what ran out of memory with so many rows of so many tokens. Raises UserError for one row."""
    if rows <= 1:
        raise UserError(one_row_too_long(what, longest))
    budget = min(budget, rows * longest) // 2
    tqdm.write(f"out of memory in {what} with {rows} rows of {longest} tokens: from now on at most {budget} in a batch")
    return budget


def make_smaller(llm: Any, what: str, rows: int, longest: int) -> None:
    """After a rollout's batch did not fit: no dequantized copy of the weights or, without one, half the budget."""
    if llm.dequantize:
        llm.dequantize = False
        tqdm.write(f"out of memory in {what}: from now on without a dequantized copy of the weights")
    else:
        llm.token_budget = halved(what, rows, longest, llm.token_budget)


def in_batches(llm: Any, what: str, rows: Sequence[list[int]], new: int, work: Callable[[list[int]], None]) -> None:
    """work(numbers of some rows) until all were worked on, each of which may be continued by `new` tokens.

    Batches are within llm.token_budget, and rows that begin alike stay together. Where memory runs out, see
    make_smaller, it goes on from the batch that did not fit. Each try of a batch begins with the same random states.
    Raises UserError if one row exceeds the model's context or memory.
    """
    lengths = [len(row) + new for row in rows]
    llm.check_length(max(lengths, default=0))
    groups = [members for members, _ in fast.shared_prefixes(rows)]
    plan = fast.batches(groups, lengths, llm.token_budget)

    def smaller() -> None:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        before = llm.token_budget
        make_smaller(llm, what, len(plan[0]), max(lengths[i] for i in plan[0]))
        if llm.token_budget < before:
            todo = {i for batch in plan for i in batch}
            left = [some for group in groups if (some := [i for i in group if i in todo])]
            plan[:] = fast.batches(left, lengths, llm.token_budget)

    while plan:
        cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all()
        within_memory(lambda: work(plan[0]), smaller)
        del plan[0]


# ---------------------------------------------------------------------------------------------------- rehearsal


def rehearse(llm: Any, cfg: Config, update_tokens: int) -> int:
    """Each role's largest batch once, so that a run that cannot fit fails in its first minute.

    Lowers llm.token_budget, or gives up the dequantized copy of the weights, as the run itself would; returns the
    update's token budget, lowered likewise. Weights, gradients and random states stay as they are. Raises UserError if
    one row does not fit.
    """
    start = time.perf_counter()

    def largest(role: str) -> Batch:
        return work_of(replace(cfg, rollout_tokens=llm.token_budget, update_tokens=update_tokens), llm.kind)[role]

    def run(role: str) -> None:
        (rehearse_update if role == "update" else rehearse_rollout)(llm, largest(role))

    def smaller(role: str) -> None:
        nonlocal update_tokens
        batch = largest(role)
        if role == "update":
            update_tokens = halved(role, batch.rows, batch.prompt // batch.n + batch.new, update_tokens)
        else:
            make_smaller(llm, role, batch.rows, batch.prompt + batch.new)

    for role in in_use(cfg):
        within_memory(functools.partial(run, role), functools.partial(smaller, role))
    torch.cuda.empty_cache()
    print(f"the longest batch of each phase fits in memory ({time.perf_counter() - start:.0f} s)")
    return update_tokens


@torch.no_grad()
def rehearse_rollout(llm: Any, batch: Batch) -> None:
    """The memory of a batch: a prefill, then one token behind a cache of full length."""
    prompt = min(batch.prompt, llm.context - batch.new)
    # Different second tokens: what prompts share is little, and the rest needs a mask. One is shorter: only then is
    # there padding.
    rows = [[llm.pad_id, i % 2**15] + [llm.pad_id] * (prompt - 2 - (i == 0)) for i in range(batch.prompts)]
    with llm.inference(), few_layers(llm):
        ids, mask, cache = prefill(llm, [row for row in rows for _ in range(batch.n)], batch.new)
        if not batch.new:
            return
        for layer in cache.layers:
            if not layer.is_initialized:  # not run
                layer.lazy_initialization(*cache.layers[0].stores)
            for store in layer.stores:
                store.fill_(0)  # memory that is reserved is in use once it is written
            layer.set_length(layer.length - 1)
        see, length = fast.decoding_mask(mask, batch.new, llm.dtype), ids.shape[1] + batch.new
        position_ids = fast.positions(mask)[:, -1:] + batch.new
        if llm.cuda_graph:
            step = fast.FixedStep(llm.model, cache, see, length)
            for _ in range(2):  # the second is captured
                step(ids[:, -1:], position_ids, length - 1)
        else:
            fast.next_logits(llm.model, ids[:, -1:], see[..., :length], position_ids, cache)


def rehearse_update(llm: Any, batch: Batch) -> None:
    """The memory of a micro-batch: forward and backward pass, beside AdamW's moments, made in the first step."""
    prompt = min(batch.prompt, llm.context - batch.new)
    rows = [([llm.pad_id] * prompt, [[llm.pad_id] * batch.new] * batch.n)] * batch.prompts
    parameters = [p for p in llm.model.parameters() if p.requires_grad]
    moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
    try:
        with llm.training(), few_layers(llm):
            llm.logps(*fast.segments_of(rows, llm.pad_id), temperature=1.0)[0].sum().backward()
    finally:
        del moments
        for p in parameters:
            p.grad = None


@contextlib.contextmanager
def few_layers(llm: Any) -> Iterator[None]:
    """On a CPU, where a full pass takes as long as the work itself, only the first layer is run.

    Layers need their memory one after the other, so it is nearly the same.
    """
    decoder = llm.model.get_base_model().get_decoder()
    layers = getattr(decoder, "layers", None)
    if llm.kind != "cpu" or layers is None:
        yield
        return
    decoder.layers = layers[:1]
    try:
        yield
    finally:
        decoder.layers = layers
