"""A GPU of make-believe: tensors that say they are on the device "gpu", while their numbers are on the CPU.

As on CUDA they meet no tensor of the CPU in an operation, so that one made on the wrong device shows on any machine;
not as an index either, which CUDA would upload at each use. And what costs time on a GPU however small the tensors are
is counted. It needs a hook for devices written in Python that newer versions of torch have: see `available`.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "gpu:0"
aten = torch.ops.aten

# Not beside a real GPU: autograd would mix up the two devices' streams.
available = hasattr(backend_registration, "_setup_privateuseone_for_python_backend") and not torch.cuda.is_available()

# The host must wait for these: they decide what comes next (item, bool), or how large a result is.
WAITING = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
WAITING |= {aten.repeat_interleave.Tensor, aten._unique2.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
NO_KERNEL = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default}
NO_KERNEL |= {aten._unsafe_view.default}


@dataclass
class Counts:
    """How often each operation made the host wait, uploaded something, launched a kernel.

    To fetch a tensor is to wait; so are CUDA's uploads, which are counted apart. A kernel here is an operation of torch
    that is no mere view: CUDA needs more for some, fewer for attention, which is computed piece by piece here.
    """

    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)


counts = Counts()


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """What happens on the device inside."""
    global counts
    outer, counts = counts, Counts()
    try:
        yield counts
    finally:
        counts = outer


class OnDevice(torch.Tensor):
    """A tensor of the device; `numbers` is the one on the CPU that it stands for."""

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "OnDevice":
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **layout, device=DEVICE)
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return perform(operation, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.numbers!r} on {DEVICE}"


def perform(operation: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation of the device, unless CUDA would refuse it, and count it."""
    name = operation.name().removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    result_here = bool(here)
    if operation is aten.copy_.default:
        result_here = isinstance(args[0], OnDevice)
    elif kwargs.get("device") is not None:
        result_here = torch.device(kwargs["device"]).type == "gpu"
        kwargs = {**kwargs, "device": "cpu"}

    if operation in (aten.copy_.default, aten._to_copy.default):
        source = tensors[-1]
        if result_here and not isinstance(source, OnDevice) and source.numel():
            counts.uploads[name] += 1
        if isinstance(source, OnDevice) and not result_here:
            counts.syncs[name] += 1
    elif here and any(tensor.dim() and not isinstance(tensor, OnDevice) for tensor in tensors):  # a mere number may be
        raise RuntimeError(f"{name}: some tensors are on the device, others on the CPU")
    masks = operation in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
    if operation in WAITING or masks:
        counts.syncs[name] += 1
    if not operation.is_view and operation not in NO_KERNEL:
        counts.launches[name] += 1

    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, OnDevice) else x, (args, kwargs))
    result = operation(*args, **kwargs)
    known = {id(tensor.numbers): tensor for tensor in here}  # operations in place return one of these

    def shown(x: Any) -> Any:
        return known[id(x)] if id(x) in known else OnDevice(x) if isinstance(x, torch.Tensor) else x

    return tree_map(shown, result) if result_here else result


def move(llm: Any) -> Any:
    """Put all tensors of an LLM on the device, those of its quantization included; returns the LLM."""
    for module in llm.model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            moved = module._parameters[name] = torch.nn.Parameter(OnDevice(p.data), p.requires_grad)
            if state := getattr(p, "quant_state", None):
                for part in (state, state.state2):
                    vars(part).update({k: OnDevice(v) for k, v in vars(part).items() if isinstance(v, torch.Tensor)})
                moved.quant_state = state
        module._buffers |= {name: OnDevice(b) for name, b in module._buffers.items() if b is not None}
    llm._forwards = None  # made of the tensors before
    return llm


if available:

    class Module(backend_registration._DummyBackendModule):
        """What torch looks for in torch.gpu, as it would in torch.cuda."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return torch.empty(0)  # its random numbers are the CPU's

        def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
            pass

    backend_registration._setup_privateuseone_for_python_backend("gpu", Module())
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda operation, *args, **kwargs: perform(operation, args, kwargs), "PrivateUse1")
    # The fallback is not asked for tensors made of nothing, nor for a copy while torch makes one of Python's numbers.
    making = (aten.empty.memory_format, aten.empty_strided.default, aten.arange.default, aten.arange.start)
    for operation in (*making, aten.arange.start_step, aten.copy_.default):
        run = functools.partial(lambda operation, *args, **kwargs: perform(operation, args, kwargs), operation)
        some.impl(operation, run, "PrivateUse1")
