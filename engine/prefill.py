"""Prefill: a batch's prompts pass through the model once, what several of them begin with alike only once for all.

`llm` is an LLM of model.py. Shape letters as there: B rows, P prompt tokens, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from engine import fast


@dataclass
class Prefixes:
    """The shared prompt prefixes of a batch, already prefilled, with their KV cache."""

    cache: Any  # a row for each prefix, padded on the right to the longest
    width: int  # tokens of the longest
    owner: list[int]  # for each row of the batch: its prefix
    tokens: list[int]  # ... and the tokens of that

    def lay_out(self, rows: Sequence[list[int]], chosen: Sequence[int], pad_id: int) -> tuple[torch.Tensor, ...]:
        """The chosen rows -> (ids, attention mask), each (B, P), and the prefix of each, (B,), on the CPU.

        Prefixes are padded on the right to `width`, what follows them on the left: all rows end in the last column.
        """
        prefixes = fast.padded([rows[i][: self.tokens[i]] for i in chosen], -1)
        rest = fast.padded([rows[i][self.tokens[i] :] for i in chosen], -1, "left")
        ids = torch.cat([F.pad(prefixes, (0, self.width - prefixes.shape[1]), value=-1), rest], dim=1)
        mask = (ids >= 0).long()
        return ids.masked_fill(mask == 0, pad_id), mask, torch.tensor([self.owner[i] for i in chosen])


def prefill_prefixes(llm: Any, rows: Sequence[list[int]]) -> Prefixes:
    """Find and prefill what the rows begin with alike, for a row by itself all but its last token.

    Prefixes are padded on the right: there no real token sees the padding, so attention needs no mask, which would rule
    out its fastest kernels. At most llm.prefill_tokens tokens pass through the model at once.
    """
    groups = fast.shared_prefixes(rows)
    found = sorted((i, number, tokens) for number, (members, tokens) in enumerate(groups) for i in members)
    lengths = [tokens for _, tokens in groups]
    layers = llm.model.config.get_text_config().num_hidden_layers
    cache: Any = Cache(layers=[fast.Reserved(len(groups), max(lengths)) for _ in range(layers)])
    some = [[number] for number, tokens in enumerate(lengths) if tokens]
    for chunk in fast.batches(some, lengths, llm.prefill_tokens):  # the longest first
        prefixes = [rows[groups[number][0][0]][: lengths[number]] for number in chunk]
        ids = fast.padded(prefixes, llm.pad_id).to(llm.device)
        part: Any = DynamicCache()
        llm.hidden(ids, None, torch.arange(ids.shape[1], device=llm.device).expand_as(ids), part)
        numbers = torch.tensor(chunk, device=llm.device)
        for layer, new in zip(cache.layers, part.layers, strict=False):
            layer.begin(numbers, new.keys, new.values)
    return Prefixes(cache, max(lengths), [number for _, number, _ in found], [tokens for _, _, tokens in found])


def rest_mask(llm: Any, mask: torch.Tensor, seen: int) -> torch.Tensor:
    """Attention mask (B, P) -> the additive mask of all tokens after the first `seen`, (B, 1, P - seen, P)."""
    return fast.additive(fast.visible(mask, seen), llm.dtype)


@torch.no_grad()
def prefill(llm: Any, rows: Sequence[list[int]], new: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Prefill all of the rows but their last token: (ids, attention mask), each (B, P), and a cache of P - 1 tokens
    with room for P + new."""
    prefixes = prefill_prefixes(llm, rows)
    ids, mask, owner = (t.to(llm.device) for t in prefixes.lay_out(rows, range(len(rows)), llm.pad_id))
    cache = fast.reserve(prefixes.cache, owner, ids.shape[1] + new)
    seen, end = prefixes.width, ids.shape[1] - 1
    if seen == end:
        return ids, mask, cache
    position_ids, some = fast.positions(mask), max(1, llm.prefill_tokens // (end - seen))
    for part in (slice(first, first + some) for first in range(0, len(ids), some)):
        layers = Cache(layers=[layer.part(part) for layer in cache.layers])
        see = rest_mask(llm, mask[part, :end], seen)
        llm.hidden(ids[part, seen:end], see, position_ids[part, seen:end], layers)
    for layer in cache.layers:
        if layer.is_initialized:
            layer.set_length(end)
    return ids, mask, cache


@torch.no_grad()
def last_states(llm: Any, rows: Sequence[list[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Some rows at a time: (their numbers, the hidden states of their last tokens (len(numbers), D))."""
    prefixes = prefill_prefixes(llm, rows)
    rest = [len(row) - tokens for row, tokens in zip(rows, prefixes.tokens, strict=True)]
    for part in fast.batches([[i] for i in range(len(rows))], rest, llm.prefill_tokens):
        ids, mask, owner = (t.to(llm.device) for t in prefixes.lay_out(rows, part, llm.pad_id))
        cache, seen = fast.reserve(prefixes.cache, owner, ids.shape[1], keep=True), prefixes.width
        yield part, llm.hidden(ids[:, seen:], rest_mask(llm, mask, seen), fast.positions(mask)[:, seen:], cache)[:, -1]
