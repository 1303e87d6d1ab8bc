"""What makes reading, writing and training fast. Each function changes how often or in what layout something is
computed, never what: tests hold the tokens and gradients against the plain way.

Shape letters as in model.py: B rows, P prompt tokens, T tokens of a row, D hidden size, V vocabulary.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

Linear = Callable[..., torch.Tensor]

# ---------------------------------------------------------------------------------------------------- weights


def lora_layers(model: torch.nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def lora_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A linear layer with its adapter, W x + s B A x: scaled and added inside one product, where peft takes three
    passes over the output."""
    y = layer.base_layer(x)
    if layer.disable_adapters:
        return y
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    low = F.linear(x.reshape(-1, x.shape[-1]), a)  # (B T, r)
    return torch.addmm(y.view(-1, y.shape[-1]), low, b.t(), alpha=layer.scaling["default"]).view_as(y)


def plain_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """A copy of the weight of a linear layer as numbers, (outputs, inputs)."""
    from bitsandbytes import functional, nn

    weight: Any = layer.weight
    if isinstance(layer, nn.Linear4bit):
        return functional.dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return weight.data.to(dtype, copy=True)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """x -> x W' + b for use without gradients. On a CPU in the layout of oneDNN: for the few rows of a decoding step
    F.linear would copy the whole weight into such a layout at each call, which takes longer than the product."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return functools.partial(F.linear, weight=weight, bias=bias)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside, blocks over 1 MiB come from the system and not from glibc's heap: among copies that stay, those that are
    freed would leave holes there that the next does not fit, with a 0.5B model 40% of its weights."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    mallopt(threshold, 2**20)
    try:
        yield
    finally:
        mallopt(threshold, 2**25)  # both as high as glibc itself comes to set them
        mallopt(trim, 2**26)


@torch.no_grad()
@large_blocks_apart()
def unpacked_forwards(model: Any, dtype: torch.dtype, adapted: bool) -> dict[torch.nn.Module, Linear]:
    """module -> the forward it may be given for a phase without gradients: weights out of 4 bits, held in full.

    adapted: in fp32 the adapter is added to this copy of the weight (never to the weight itself, and never in 4 or 16
    bits, where rounding would swallow it); in bf16 it stays a product of its own.
    """
    forwards: dict[torch.nn.Module, Linear] = {}
    for layer in lora_layers(model):
        base = layer.base_layer
        weight = plain_weight(base, dtype)
        if adapted and dtype == torch.float32:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            forwards[layer] = linear(weight.addmm_(b, a, alpha=layer.scaling["default"]), base.bias)
        else:
            forwards[base] = linear(weight, base.bias)
    head = model.get_output_embeddings()
    if dtype == torch.float32:
        forwards[head] = linear(head.weight.data, getattr(head, "bias", None))
    return forwards


# ------------------------------------------------------------------------------------------------------ cache


class Reserved(DynamicLayer):
    """A layer's key-value cache with room for all tokens to come, which are written in place.

    DynamicLayer copies everything so far for each token that is added.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def take(self, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
        """Begin with these `rows` of keys and values, each (B, heads, T, head size)."""
        self.lazy_initialization(keys, values)
        self.stores = []
        for tensor in (keys, values):
            store = tensor.new_empty(len(rows), tensor.shape[1], self.length, tensor.shape[3])
            torch.index_select(tensor, 0, rows, out=store[:, :, : tensor.shape[2]])
            self.stores.append(store)
        self.keys, self.values = (store[:, :, : keys.shape[2]] for store in self.stores)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            rows = torch.arange(len(key_states), device=key_states.device)
            self.take(key_states[:, :, :0], value_states[:, :, :0], rows)
        old = self.get_seq_length()
        new = old + key_states.shape[2]
        for store, tensor in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, old:new] = tensor
        self.keys, self.values = (store[:, :, :new] for store in self.stores)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


def copied(cache: Any, rows: torch.Tensor, length: int, give_up: bool = False) -> Any:
    """A cache of these rows of another, one may come several times, with room for `length` tokens."""
    layers: list[Any] = []
    for layer in cache.layers:
        new = Reserved(length)
        if layer.get_seq_length():
            new.take(layer.keys, layer.values, rows)
        if give_up:
            layer.keys = layer.values = None
            layer.stores = []
        layers.append(new)
    return Cache(layers=layers)


def reserve(cache: Any, rows: torch.Tensor, length: int) -> Any:
    """`copied`, where the other cache is given up layer by layer: never more than one layer exists twice."""
    return copied(cache, rows, length, give_up=True)


# --------------------------------------------------------------------------------------------------- batching


def common_beginning(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with alike; at least one of each row is left over."""
    least = min(map(len, rows)) - 1
    first, last = min(rows), max(rows)  # all others lie between them
    return next((i for i in range(least) if first[i] != last[i]), least)


def shared_beginnings(rows: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Group rows that begin alike: (numbers of the rows, tokens of their common beginning).

    A row joins the group before it, in the order of their ids, if that leaves fewer tokens to read altogether.
    """
    groups: list[tuple[list[int], int]] = []
    for number in sorted(range(len(rows)), key=lambda i: rows[i]):
        if groups:
            members, common = groups[-1]
            joined = common_beginning([rows[members[0]], rows[members[-1]], rows[number]])
            saved, would_save = common * (len(members) - 1), joined * len(members)
            if would_save > saved:
                groups[-1] = ([*members, number], joined)
                continue
        groups.append(([number], len(rows[number]) - 1))
    return groups


def batches(groups: Sequence[Sequence[int]], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rows (numbers into `lengths`) into batches of similar length under a token budget, longest first.

    A batch is padded to its longest row: rows x longest exceeds the budget only where a single row does. A group stays
    together unless it exceeds the budget alone.
    """
    plan: list[list[int]] = []
    longest = 0  # of the last batch
    for group in sorted(groups, key=lambda group: -max(lengths[i] for i in group)):
        ordered = sorted(group, key=lambda i: -lengths[i])
        fits = max(1, budget // lengths[ordered[0]])
        if len(ordered) > fits:
            plan += [ordered[at : at + fits] for at in range(0, len(ordered), fits)]
            longest = budget + 1  # nothing joins these
        elif plan and (len(plan[-1]) + len(ordered)) * longest <= budget:
            plan[-1] += ordered
        else:
            plan.append(ordered)
            longest = lengths[ordered[0]]
    return plan


# --------------------------------------------------------------------------------------------------- decoding


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Attention mask (B, T) -> position ids (B, T) counted from the first real token of each row."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def draw(scores: torch.Tensor) -> torch.Tensor:
    """One token of each row from softmax(scores): (B, V) -> (B,).

    By the inverse of the cumulative distribution, with one random number a row; torch.multinomial draws V of them.
    """
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    at = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulated[:, -1:]
    at = at.minimum(cumulated[:, -1:].nextafter(at.new_zeros(())))  # rounded up to the total, it would find no token
    return torch.searchsorted(cumulated, at, right=True).squeeze(-1)  # right: never a token of probability 0


@torch.no_grad()
def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    generation_config: GenerationConfig,
    *,
    mask: torch.Tensor,
    reserved: Any,
    progress: Callable[[int], Any],
    **_: Any,
) -> torch.Tensor:
    """The decoding loop of `generate(custom_generate=...)`: input_ids (B, P) with their continuations, padded.

    mask: (B, P), 0 on padding. The cache `reserved` holds a beginning of input_ids and has room for all. Once a quarter
    of the rows is finished they leave the batch. progress: called with the tokens of each step.
    """
    rows, prompt = input_ids.shape
    new, pad = generation_config.max_new_tokens, generation_config.pad_token_id
    ends = torch.tensor(generation_config.eos_token_id, device=input_ids.device)
    output = F.pad(input_ids, (0, new), value=pad)
    seen = reserved.get_seq_length()
    ids, at = input_ids[:, seen:], positions(mask)[:, seen:]
    mask = F.pad(mask, (0, new), value=1)
    present = torch.arange(rows, device=input_ids.device)  # the rows still in the batch
    done = torch.zeros_like(present, dtype=torch.bool)
    for length in range(prompt, prompt + new):
        logits = model(
            input_ids=ids,
            attention_mask=mask[:, :length],
            position_ids=at,
            past_key_values=reserved,
            logits_to_keep=1,
        ).logits[:, -1]
        scores = logits_processor(output[present, :length], logits.float())  # type: ignore[arg-type]
        tokens = draw(scores) if generation_config.do_sample else scores.argmax(-1)
        tokens = tokens.masked_fill(done, pad)
        output[present, length] = tokens
        done |= torch.isin(tokens, ends)
        progress(len(present))
        left = (~done).nonzero().squeeze(-1)
        if not len(left):
            break
        if 4 * len(left) <= 3 * len(present):
            reserved = reserve(reserved, left, prompt + new)
            present, done, mask, tokens, at = present[left], done[left], mask[left], tokens[left], at[left]
            for processor in logits_processor:
                if hasattr(processor, "keep"):
                    processor.keep(left.tolist())
        ids, at = tokens[:, None], at[:, -1:] + 1
    return output


# ------------------------------------------------------------------------------------------------- the update


def segments_of(rows: Sequence[tuple[list[int], list[list[int]]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with completions -> (ids, segments), each (B, T), right-padded.

    A row is a prompt followed by any number of its completions, none of which sees another: `segments` is 0 on the
    prompt, k on the kth completion, -1 on padding.
    """
    width = max(len(prompt) + sum(map(len, completions)) for prompt, completions in rows)
    ids = torch.full((len(rows), width), pad_id)
    segments = torch.full((len(rows), width), -1)
    for i, (prompt, completions) in enumerate(rows):
        end = 0
        for k, part in enumerate([prompt, *completions]):
            ids[i, end : end + len(part)] = torch.tensor(part)
            segments[i, end : end + len(part)] = k
            end += len(part)
    return ids, segments


def segment_mask(segments: torch.Tensor) -> torch.Tensor | None:
    """(B, T) -> who sees whom, (B, 1, T, T) bool: each token what comes before it in its own segment and the prompt.

    None where that is what causal attention does anyway.
    """
    if segments.max() <= 1 and (segments[:, 0] == 0).all():  # right-padded: no real token sees the padding
        return None
    query, key = segments[:, :, None], segments[:, None, :]
    return ((query == key) | (key == 0)).tril()[:, None]


def segment_positions(segments: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T): those of the prompt, and each completion's as if it alone followed the prompt."""
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    prompt = (segments == 0).sum(-1, keepdim=True)
    within = index - torch.where(begins, index, 0).cummax(-1).values
    return torch.where(segments == -1, index, torch.where(segments == 0, within, prompt + within))


def before(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the N completion tokens, in row order: its row, and the column of the token that predicts it.

    That is the one before it, or for a completion's first token the prompt's last.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    last = torch.where(segments == 0, index, 0).amax(-1, keepdim=True)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    at = segments > 0
    return at.nonzero()[:, 0], torch.where(begins, last, index - 1)[at]


def share_prompts(prompt: int, completions: Sequence[int], budget: int, worth: float) -> Iterator[list[int]]:
    """Which completions of one prompt (lengths in tokens) to put in a row: numbers, longest first.

    A completion joins a row while that saves more than it costs: the prompt need not be read again, but attention is
    computed between all tokens of the row, also where the mask discards it. worth: how many pairs of tokens attention
    relates in the time that the rest of the model takes for one token. A row of several completions is within `budget`.
    """
    row: list[int] = []
    length = prompt
    for i in sorted(range(len(completions)), key=lambda i: -completions[i]):
        longer = length + completions[i]
        wasted = longer**2 - length**2 - (prompt + completions[i]) ** 2
        if row and (wasted > worth * prompt or longer > budget):
            yield row
            row, longer = [], prompt + completions[i]
        row, length = [*row, i], longer
    if row:
        yield row
