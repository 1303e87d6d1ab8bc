"""What goes wrong in a run of days: signals, too little memory, a broken connection, roles that only write rubbish."""

import contextlib
import copy
import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm.auto import tqdm

import heldout
from checkpoint import rng_states, set_rng_states
from data import Corpus, Document, Unreachable, UserError
from model import LLM, out_of_memory
from plan import in_use, work_of
from rubric import Episode

if TYPE_CHECKING:
    from pop import Config

T = TypeVar("T")

RESUMABLE = 75  # the exit code EX_TEMPFAIL of sysexits.h: try again later
PAUSES = (5, 30, 120)  # seconds before a broken stream is opened again
NONFINITE_LIMIT = 3  # updates in a row
YIELD_STEPS = 3  # steps in a row

# ----------------------------------------------------------------------------------------------------- signals


class Interrupted(KeyboardInterrupt):
    """A signal asks the run to end. Like its parent no Exception: no library takes it for an error of its own."""


class Signals:
    """Inside `with Signals() as signals`, SIGINT, SIGTERM and SIGHUP raise Interrupted, once.

    Within `with signals.held()` that waits for the end of the block. A Ctrl-C after that ends the process at once;
    a further SIGTERM or SIGHUP changes nothing, because a closing terminal often sends two.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.holding = False
        self.terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def __enter__(self) -> "Signals":
        self.before = {
            s: signal.signal(s, self.handle)
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(s) is not signal.SIG_IGN  # nohup stays nohup
        }
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT:
                os._exit(130)
            return
        self.received = signal.Signals(number).name
        if number == signal.SIGHUP:  # the terminal is gone: to print there would fail before anything is saved
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for fd in self.terminals:
                os.dup2(nowhere, fd)
        if not self.holding:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.check()  # where an exception is raised in a destructor, Python drops it
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        self.check()

    def check(self) -> None:
        if self.received:
            raise Interrupted(self.received)


# ------------------------------------------------------------------------------------------------------ memory


def within_memory(llm: LLM, phase: str, work: Callable[[], T], undo: Callable[[], None], budgets: dict[str, int]) -> T:
    """work(); where memory runs out, again after undo() and under half the phase's token budget.

    Raises UserError when not even one row fits.
    """
    while True:
        llm.batch = (0, 0)
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
        # Only here, outside of the except block, do the error's frames let go of their tensors.
        gc.collect()
        torch.cuda.empty_cache()
        rows, longest = llm.batch
        if rows == 0 and llm.dequantize:  # no batch was begun
            llm.dequantize, llm.unpacked = False, None
            tqdm.write(f"out of memory in {phase}: from now on without a copy of the weights out of 4 bits")
            undo()
            continue
        if rows <= 1:
            raise UserError(
                f"out of memory in {phase}, even with one row ({longest} tokens): lower --max-words, "
                "--max-new-tokens or --rubric-answers, or choose a smaller model"
            )
        budgets[phase] = min(budgets[phase], rows * longest) // 2
        tqdm.write(f"out of memory in {phase} with {rows} rows of {longest} tokens: now under {budgets[phase]} tokens")
        undo()


def rollout(
    llm: LLM,
    phase: str,
    work: Callable[[], T],
    rng: random.Random,
    budgets: dict[str, int],
    episodes: Sequence[Episode] = (),
) -> T:
    """A phase of the self-play within memory: every try begins with the same random states and the same episodes."""
    states, before = rng_states(rng), copy.deepcopy(list(episodes))

    def attempt() -> T:
        llm.token_budget = budgets[phase]
        return work()

    def undo() -> None:
        set_rng_states(rng, states)
        for episode, was in zip(episodes, before, strict=True):
            vars(episode).update(copy.deepcopy(vars(was)))

    return within_memory(llm, phase, attempt, undo, budgets)


def try_longest(llm: LLM, cfg: "Config", budgets: dict[str, int]) -> None:
    """Each phase's longest possible batch once, so that a run that cannot fit fails in its first minute.

    Halves budgets as the run itself would. Weights and random states stay as they are.
    """
    start = time.perf_counter()
    parameters = [p for p in llm.model.parameters() if p.requires_grad]

    def forget() -> None:
        for p in parameters:
            p.grad = None

    def attempt(phase: str) -> None:
        # `budgets` counts here: it shrinks between attempts.
        budget = budgets[phase]
        work = work_of(replace(cfg, rollout_tokens=budget, update_tokens=budget), llm.kind)[phase]
        if phase == "update":
            moments = [torch.empty_like(p) for p in parameters for _ in range(2)]  # AdamW's, made in the first step
            llm.rehearse_update(work.prompts, work.prompt, work.new, work.n)
            del moments
        else:
            llm.rehearse(work.prompts, work.prompt, work.new, work.n)

    for phase in (p for p in in_use(cfg) if p in budgets):
        within_memory(llm, phase, lambda phase=phase: attempt(phase), forget, budgets)  # type: ignore[misc]
        forget()
    torch.cuda.empty_cache()
    print(f"the longest batch of each phase fits in memory ({time.perf_counter() - start:.0f} s)")


# --------------------------------------------------------------------------------------------------- documents


def documents_from(
    corpus: Corpus | heldout.Recording, consumed: int, last: str | None = None, held_out: Sequence[Episode] = ()
) -> Iterator[Document]:
    """The corpus after its first `consumed` documents, read again from the start: exact for shuffled streams too.

    Documents of the episodes `held_out` are left out, and not counted.

    A stream whose connection breaks is opened again after each of PAUSES, then Unreachable is raised. Raises
    UserError if the last document passed over is not the one with the id `last`: the corpus is not what it was.
    """
    failures = 0
    while True:
        try:
            for number, document in enumerate(heldout.without(corpus, held_out), start=1):
                if number == consumed and last not in (None, document.id):
                    raise UserError(
                        f"the corpus {corpus.name} has changed: document {consumed} was {last} and is now {document.id}"
                    )
                if number > consumed:
                    consumed, last, failures = number, document.id, 0
                    yield document
        except Unreachable as error:
            if failures == len(PAUSES):
                raise
            tqdm.write(f"{error}; again in {PAUSES[failures]} s")
            time.sleep(PAUSES[failures])
            failures += 1


# ------------------------------------------------------------------------------------------- what stops a run


def yields(episodes: Sequence[Episode]) -> dict[str, float]:
    """Share of the episodes that got past each role, of those that came to it; no entry where none came."""
    left, result = list(episodes), {}
    for role in ("proposer", "rubric", "judge"):
        passed = [e for e in left if not (e.drop or "").startswith(role + "/")]
        if left:
            result[role] = len(passed) / len(left)
        left = passed
    return result


def trouble(episodes: Sequence[Episode], cfg: "Config", progress: dict[str, Any]) -> str | None:
    """Count what may stop a run in `progress`; the reason to stop after this step, or None.

    A counter that stops the run starts again at 0: resumed, the run is given as long once more.
    """
    low = progress["low_yield"]
    for role, share in yields(episodes).items():
        low[role] = low.get(role, 0) + 1 if share < cfg.min_yield else 0
        if low[role] >= YIELD_STEPS:
            low[role] = 0
            raw = [f"{f['reason']}: {f['raw'][:300]!r}" for e in episodes for f in e.failures if f["role"] == role]
            return (
                f"the {role} failed on more than {1 - cfg.min_yield:.0%} of its work for {YIELD_STEPS} steps: a larger "
                "model or a lower --min-yield may help. Three of its outputs:\n  " + "\n  ".join(raw[-3:])
            )
    if (count := progress["nonfinite"]) >= NONFINITE_LIMIT:
        progress["nonfinite"] = 0
        return (
            f"loss or gradient was not finite in {count} updates in a row, all of them skipped: "
            "a lower --lr may help (in a new run). The last episodes are in nonfinite.json of the run"
        )
    return None
