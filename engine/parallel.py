"""Several processes that train one adapter, each with a GPU of its own: `accelerate launch pop.py ...`, or torchrun.

Each plays its share of a step's documents; then all know all groups, each computes the gradient of its share of these,
and all apply the sum, so that their adapters stay the same. What is printed, saved and measured on held-out documents
is up to the first process. With one process nothing here does anything.
"""

import contextlib
import functools
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from tqdm.auto import tqdm

from data import UserError, brief

T = TypeVar("T")

WAIT = timedelta(hours=12)  # the others wait while the first measures; where a process ends, they are told at once


class Parted(UserError):
    """Another process has ended."""


def start() -> None:
    """Join the other processes, if a launcher has started some. Only the first one shows what it does.

    Raises UserError if they cannot be joined.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group(timeout=WAIT)
        # NCCL takes its buffers at the first use: now, before it is tried out what else fits into memory.
        distributed.all_reduce(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, ValueError, KeyError) as error:
        remedy = "start them by accelerate launch or torchrun, one for each GPU at most, or unset WORLD_SIZE"
        raise UserError(f"the processes cannot be joined ({brief(error)}): {remedy}") from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def check(documents: int) -> None:
    """Raises UserError if of so many documents a step a process would have none."""
    if (n := processes()) > documents:
        raise UserError(f"{n} processes for {documents} documents a step: start fewer, or raise --documents")


def processes() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of what all have."""
    return items[rank() :: processes()]


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Raises Parted where another process has ended, which would be an error of the network."""
    try:
        yield
    except RuntimeError as error:
        raise Parted(f"another process has ended ({brief(error)})") from None


def everyone(value: T) -> list[T]:
    """The value that each process gives, known to all."""
    values: list[Any] = [value] * processes()
    if processes() > 1:
        with connected():
            distributed.all_gather_object(values, value)
    return values


def together(part: Sequence[T]) -> list[T]:
    """The shares of all processes, in the order of what was shared."""
    parts = everyone(part)
    found: list[Any] = [None] * sum(map(len, parts))
    for i, each in enumerate(parts):
        found[i :: len(parts)] = each
    return found


def by_first(work: Callable[[], T]) -> T:
    """work() by the first process alone; all have its result."""
    return everyone(work() if is_first() else None)[0]  # type: ignore[return-value]


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Each number summed over all processes."""
    every = everyone(dict(values))  # where any has a share, the first has
    return {name: sum(each.get(name, 0.0) for each in every) for name in every[0]}


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the sum of the gradients of all."""
    if processes() == 1:
        return
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    with connected():
        distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)


def own_randomness(rng: random.Random, seed: int, step: int) -> None:
    """Let processes draw different numbers. The first one's states are in the checkpoints, the others begin each step
    from the seed, so that a run can go on with another number of processes."""
    if not is_first():
        rng.seed(f"{seed} {step} {rank()}")
        torch.manual_seed(rng.getrandbits(63))
