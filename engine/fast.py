"""What makes prefill, decoding and training fast. Each function changes how often or in what layout something is
computed, never what: tests hold the tokens and gradients against the plain way.

Shape letters as in model.py: B rows, P prompt tokens, T tokens of a row, D hidden size, V vocabulary.
"""

import contextlib
import copy
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.cache_utils import DynamicLayer

Linear = Callable[..., torch.Tensor]

# ---------------------------------------------------------------------------------------------------- weights


def lora_layers(model: torch.nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def adapted(base: Linear, a: torch.Tensor, b: torch.Tensor, scale: float, add: Linear, x: torch.Tensor) -> torch.Tensor:
    """base(x) + scale B A x: scaled and added inside one product, where peft takes three passes over the output.

    add: torch.addmm or, in place and without gradients, torch.Tensor.addmm_.
    """
    y = base(x)
    low = F.linear(x.reshape(-1, x.shape[-1]), a)  # (B T, r)
    return add(y.view(-1, y.shape[-1]), low, b.t(), alpha=scale).view_as(y)


def lora_of(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The weights A (r, inputs) and B (outputs, r) of a layer's adapter, and its scale."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def lora_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What peft's own forward of a LoRA layer computes, with gradients."""
    if layer.disable_adapters:
        return layer.base_layer(x)
    return adapted(layer.base_layer, *lora_of(layer), torch.addmm, x)


def dequantized(layer: Any, dtype: torch.dtype, copy: bool) -> torch.Tensor:
    """The weight of a linear layer as numbers, (outputs, inputs); without `copy` it may be the layer's own tensor."""
    if state := getattr(layer.weight, "quant_state", None):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, state).to(dtype)
    return layer.weight.data.to(dtype, copy=copy)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """x -> x W' + b for use without gradients. On a CPU in the layout of oneDNN: for the few rows of a decoding step
    F.linear would copy the whole weight into such a layout at each call, which takes longer than the product."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return functools.partial(F.linear, weight=weight, bias=bias)


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside, blocks over 1 MiB come from the system and not from glibc's heap, which temporary tensors would leave
    fragmented between copies that stay: with a 0.5B model by 40% of its weights."""
    glibc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(glibc, "mallopt", lambda option, value: None)
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    mallopt(threshold, 2**20)
    try:
        yield
    finally:
        mallopt(threshold, 2**25)  # both as high as glibc itself comes to set them
        mallopt(trim, 2**26)


@torch.no_grad()
@large_blocks_apart()
def prepared_forwards(model: Any, dtype: torch.dtype, with_adapters: bool, dequantize: bool) -> dict[Any, Linear]:
    """module -> the forward it may be given where no gradients are needed; no weight of the model changes.

    dequantize: from a dequantized copy of the weights; in fp32 the adapter is added to that copy. In 16 bits adapters
    are rounded once, not at each use, and stay products of their own: added to the weights, they would be lost in
    rounding.
    """
    fold = with_adapters and dequantize and dtype == torch.float32
    forwards: dict[Any, Linear] = {}
    for layer in lora_layers(model):
        forward, (a, b, scale) = layer.base_layer.forward, lora_of(layer)
        if dequantize:
            weight = dequantized(layer.base_layer, dtype, copy=fold)
            if fold:
                weight.addmm_(b, a, alpha=scale)
            forward = linear(weight, layer.base_layer.bias)
        if with_adapters and not fold:
            forward = functools.partial(adapted, forward, a.to(dtype), b.to(dtype), scale, torch.Tensor.addmm_)
        forwards[layer] = forward
    if dequantize and dtype == torch.float32:
        head = model.get_output_embeddings()
        forwards[head] = linear(head.weight.data, head.bias)
    return forwards


@contextlib.contextmanager
def replaced(forwards: dict[Any, Linear]) -> Iterator[None]:
    """Inside, the modules compute by these forwards."""
    own = {module: module.forward for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in own.items():
            module.forward = forward


# ------------------------------------------------------------------------------------------------------ cache


class Reserved(DynamicLayer):
    """A layer's key-value cache with room for `length` tokens of `rows` rows, which are written in place.

    DynamicLayer copies everything so far for each token that is added. What is not written yet is 0: attention gives it
    no weight, but 0 times the NaN that memory may hold would be NaN. With a `column`, a tensor, it is as a CUDA graph
    needs it: always of full length, and one token is written at the column that the tensor holds.
    """

    def __init__(self, rows: int, length: int) -> None:
        super().__init__()
        self.rows, self.length = rows, length
        self.stores: list[torch.Tensor] = []  # keys and values, each (rows, heads, length, head size)
        self.column: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.stores = [s.new_zeros(self.rows, s.shape[1], self.length, s.shape[3]) for s in (key_states, value_states)]
        self.set_length(0)

    def set_length(self, length: int) -> None:
        """Mark the first `length` columns as written."""
        self.keys, self.values = (store[:, :, :length] for store in self.stores)

    def begin(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the first columns of these rows (numbers): keys and values, each (B, heads, T, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for store, states in zip(self.stores, (keys, values), strict=True):
            store[rows, :, : states.shape[2]] = states
        self.set_length(max(keys.shape[2], self.get_seq_length()))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, column = self.get_seq_length(), self.column
        new = old + key_states.shape[2]
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            if column is None:
                store[:, :, old:new] = states
            else:
                store.index_copy_(2, column, states)
        if column is None:
            self.set_length(new)
        return self.keys, self.values

    def part(self, rows: slice) -> "Reserved":
        """Some rows alone, in the same memory."""
        part = copy.copy(self)
        part.stores = [store[rows] for store in self.stores]
        if part.is_initialized:
            part.set_length(self.get_seq_length())
        return part


def reserve(cache: Any, rows: torch.Tensor, length: int, keep: bool = False) -> Any:
    """A cache of these rows of another, one may come several times, with room for `length` tokens.

    Unless it is to be kept, the other is given up layer by layer: never more than one layer exists twice.
    """
    layers: list[Any] = []
    for layer in cache.layers:
        new = Reserved(len(rows), length)
        if layer.is_initialized:
            new.update(layer.keys.index_select(0, rows), layer.values.index_select(0, rows))
        if not keep:
            layer.keys, layer.values, layer.stores, layer.is_initialized = None, None, [], False
        layers.append(new)
    return Cache(layers=layers)


# --------------------------------------------------------------------------------------------------- batching


def padded(rows: Sequence[list[int]], filler: int, side: str = "right") -> torch.Tensor:
    """Rows of ids -> (B, longest), padded on one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side)


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with alike; at least one of each row is left over."""
    least = min(map(len, rows)) - 1
    first, last = min(rows), max(rows)  # all others lie between them
    return next((i for i in range(least) if first[i] != last[i]), least)


def shared_prefixes(rows: Sequence[list[int]]) -> list[tuple[list[int], int]]:
    """Group rows by their prefixes: (numbers of the rows, tokens of their common prefix).

    A row joins the group before it, in the order of their ids, if that leaves fewer tokens to prefill altogether.
    """
    groups: list[tuple[list[int], int]] = []
    for number in sorted(range(len(rows)), key=lambda i: rows[i]):
        if groups:
            members, common = groups[-1]
            joined = common_prefix([rows[members[0]], rows[members[-1]], rows[number]])
            if joined * len(members) > common * (len(members) - 1):
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


def visible(mask: torch.Tensor, seen: int) -> torch.Tensor:
    """Attention mask (B, T) -> what each token after the first `seen` may see, (B, 1, T - seen, T) bool.

    Padding sees itself: some kernels return NaN where a row sees nothing at all.
    """
    keys = torch.arange(mask.shape[1], device=mask.device)
    queries = keys[seen:, None]
    return (((keys <= queries) & mask[:, None].bool()) | (keys == queries))[:, None]


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What may be seen as what is added to the scores: 0 or -inf. Attention makes the same of a mask of booleans, but
    in each layer anew, and code that adds the mask would take True for +1.

    Rows begin at multiples of 16 entries, or CUDA's kernels would copy the mask in each layer.
    """
    keys = mask.shape[-1]
    room = torch.zeros(*mask.shape[:-1], -(-keys // 16) * 16, dtype=dtype, device=mask.device)
    return room[..., :keys].masked_fill_(~mask, -torch.inf)


def decoding_mask(mask: torch.Tensor, new: int, dtype: torch.dtype) -> torch.Tensor:
    """Attention mask (B, P) of a prompt -> the mask of all its decoding steps, (B, 1, 1, P + new or a few more).

    A step takes the columns so far. Rows begin at multiples of 16 entries as in `additive`, also after some have left.
    """
    width = -(-(mask.shape[1] + new) // 16) * 16
    return additive(F.pad(mask, (0, width - mask.shape[1]), value=1).bool(), dtype)[:, None, None]


def draw(scores: torch.Tensor) -> torch.Tensor:
    """One token of each row from softmax(scores): (B, V) -> (B,).

    By the inverse of the cumulative distribution, with one random number a row; torch.multinomial draws V of them.
    """
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1:]
    drawn = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * total
    drawn = drawn.minimum(total.nextafter(total.new_zeros(())))  # rounded up to the total, it would find no token
    return torch.searchsorted(cumulated, drawn, right=True).squeeze(-1)  # right: never a token of probability 0


STEPS_WORTH_A_GRAPH = 16  # capturing one takes as long as a few; rows that leave the batch make a new one


class FixedStep:
    """The decoding step of a batch with nothing in it that changes from step to step but the contents of tensors.

    On CUDA it is captured as one graph and launched as a whole, where the host would launch some 1,500 kernels one by
    one. The first call runs plainly, as capturing asks for, and the second captures. On a CPU every call runs plainly.
    """

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, written: int) -> None:
        """cache: of L tokens, `written` of them are in it or come next. mask: (B, 1, 1, L or more)."""
        self.model, self.cache = model, cache
        self.ids, self.position_ids = torch.zeros(2, len(mask), 1, dtype=torch.long, device=mask.device)
        self.column = torch.zeros(1, dtype=torch.long, device=mask.device)
        mask = mask.clone()
        mask[..., written:] = -torch.inf
        self.mask = mask[..., : cache.layers[0].length]
        for layer in cache.layers:
            layer.column = self.column
            layer.set_length(layer.length)
        self.graph: Any = None
        self.calls = 0

    def __call__(self, ids: torch.Tensor, position_ids: torch.Tensor, column: int) -> torch.Tensor:
        """Tokens and their positions, each (B, 1), written at `column` of the cache -> logits (B, V)."""
        self.ids.copy_(ids)
        self.position_ids.copy_(position_ids)
        self.column.fill_(column)
        self.mask[..., column] = 0
        self.calls += 1
        if self.calls == 2 and ids.device.type == "cuda":
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL has a thread of its own
                self.logits = self.forward()
        if self.graph is None:
            self.logits = self.forward()
        else:
            self.graph.replay()
        return self.logits

    def forward(self) -> torch.Tensor:
        return next_logits(self.model, self.ids, self.mask, self.position_ids, self.cache)


def next_logits(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor, cache: Any
) -> torch.Tensor:
    """Logits (B, V) after tokens (B, T) at positions (B, T) behind a cache; mask: (B, 1, T, cached + T), additive."""
    named = dict(attention_mask=mask, position_ids=position_ids, past_key_values=cache, logits_to_keep=1)
    return model(input_ids=ids, **named).logits[:, -1]


@torch.no_grad()
def decode(
    llm: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    new: int,
    ends: Sequence[int],
    *,
    sample: bool = False,
    processors: Sequence[Any] = (),
    progress: Callable[[int], Any] = lambda tokens: None,
) -> torch.Tensor:
    """The decoding loop within `generate`: prompts (B, P) -> the up to `new` tokens written after each, up to one of
    `ends` and then padded, (B, new). sample: they are drawn from softmax(scores), else they are the likeliest.

    mask: (B, P), 0 on padding. The cache holds all but the last token of the prompts and has room for what comes. Once
    a quarter of the rows is finished they leave the batch. Processors change or watch the scores, given the last tokens
    (B, 1) and scores (B, V), and are told by keep(rows), if they have it, which rows stay. progress: called with the
    tokens of each step.
    """
    rows, prompt = ids.shape
    output = ids.new_full((rows, new), llm.pad_id)
    last, position_ids = ids[:, -1:], positions(mask)[:, -1:]
    mask = decoding_mask(mask, new, llm.dtype)  # (B, 1, 1, P + new)
    stop = torch.tensor(ends, device=ids.device)
    present = torch.arange(rows, device=ids.device)  # the rows still in the batch
    done = torch.zeros_like(present, dtype=torch.bool)
    step: FixedStep | None = None
    for length in range(prompt, prompt + new):
        # An empty cache, of prompts of one token, has no memory yet that a FixedStep could write to.
        if llm.cuda_graph and not step and prompt + new - length >= STEPS_WORTH_A_GRAPH and cache.get_seq_length():
            step = FixedStep(llm.model, cache, mask, length)
        if step:
            logits = step(last, position_ids, length - 1)
        else:
            logits = next_logits(llm.model, last, mask[..., :length], position_ids, cache)
        scores = logits.float()
        for processor in processors:
            scores = processor(last, scores)
        tokens = draw(scores) if sample else scores.argmax(-1)
        tokens = tokens.masked_fill(done, llm.pad_id)
        output[present, length - prompt] = tokens
        done |= torch.isin(tokens, stop)
        progress(len(present))
        left = (~done).nonzero().squeeze(-1)
        if not len(left):
            break
        if 4 * len(left) <= 3 * len(present):
            step = None
            del logits, scores  # with them the memory of the step's graph goes, before there is a second cache
            for layer in cache.layers:
                layer.set_length(length)  # a FixedStep does not count
            cache = reserve(cache, left, prompt + new)
            present, done, mask, tokens = present[left], done[left], mask[left], tokens[left]
            position_ids = position_ids[left]
            for processor in processors:
                if hasattr(processor, "keep"):
                    processor.keep(left.tolist())
        last, position_ids = tokens[:, None], position_ids + 1
    return output


# ------------------------------------------------------------------------------------------------- the update


def segments_of(rows: Sequence[tuple[list[int], list[list[int]]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with completions -> (ids, segments), each (B, T), right-padded.

    A row is a prompt followed by any number of its completions, none of which sees another: `segments` is 0 on the
    prompt, k on the kth completion, -1 on padding.
    """
    ids = [sum(completions, prompt) for prompt, completions in rows]
    segments = [[k for k, part in enumerate([prompt, *parts]) for _ in part] for prompt, parts in rows]
    return padded(ids, pad_id), padded(segments, -1)


def segment_mask(segments: torch.Tensor) -> torch.Tensor | None:
    """(B, T) -> who sees whom, (B, 1, T, T) bool: each token what comes before it in its own segment and the prompt.

    None where that is what causal attention does anyway.
    """
    if segments.max() <= 1 and (segments[:, 0] == 0).all():  # right-padded: no real token sees the padding
        return None
    query, key = segments[:, :, None], segments[:, None, :]
    return ((query == key) | (key == 0)).tril()[:, None]


def segment_positions(segments: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T): those of the prompt, and each completion's as if it alone followed the prompt.

    On padding they go on: beginning again at 0, they would look to transformers like another text in the row, for which
    it makes a mask.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    prompt = (segments == 0).sum(-1, keepdim=True)
    within = index - torch.where(begins, index, 0).cummax(-1).values
    return torch.where(segments < 0, index, within + torch.where(segments > 0, prompt, 0))


def predictors(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the N completion tokens, in row order: its row, and the column of the token that predicts it.

    That is the one before it, or for a completion's first token the prompt's last.
    """
    index = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    last = torch.where(segments == 0, index, 0).amax(-1, keepdim=True)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    completions = segments > 0
    return completions.nonzero()[:, 0], torch.where(begins, last, index - 1)[completions]


def share_prompts(
    prompt: int, completions: Sequence[int], budget: int, pairs_a_token: float, masked: float = 1.0
) -> Iterator[list[int]]:
    """Which completions of one prompt (lengths in tokens) to put in a row: numbers, longest first.

    A completion joins a row while that saves more than it costs: the prompt need not be read again, but attention is
    computed between all tokens of the row, also where the mask discards it. pairs_a_token: how many pairs of tokens
    attention relates in the time that the rest of the model takes for one token. masked: how many times as long a pair
    takes in a row of several completions, which needs a mask. A row of several completions is within `budget`.
    """
    row: list[int] = []
    length = prompt
    for i in sorted(range(len(completions)), key=lambda i: -completions[i]):
        longer = length + completions[i]
        before = length**2 * (masked if len(row) > 1 else 1)
        wasted = masked * longer**2 - before - (prompt + completions[i]) ** 2
        if row and (wasted > pairs_a_token * prompt or longer > budget):
            yield row
            row, longer = [], prompt + completions[i]
        row, length = [*row, i], longer
    if row:
        yield row
