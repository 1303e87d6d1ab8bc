"""Constrained decoding: a model fills in a template, whose labels are given and whose values are its own, so that the
record is always complete. And what is noted meanwhile: how likely certain replies were at each token."""

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Field:
    """One line of a template: the label is given, the value is the model's, up to the end of the line.

    `choices`: the value is one of these strings, of any length. `optional`: the model may end the record instead.
    `min_tokens`: the line does not end before so many. `distinct`: the value is another choice than any before it in
    the record, while there is one. `quoted`: the value stands between double quotes that the labels bring, and the
    model may end it with one instead of a line end.
    """

    label: str
    max_tokens: int = 40
    choices: tuple[str, ...] = ()
    optional: bool = False
    min_tokens: int = 1
    distinct: bool = False
    quoted: bool = False


def room(llm: Any, template: Sequence[Field]) -> int:
    """The most tokens that a filled template can take, its end token included."""
    free = [len(llm.text_ids(line.label)) + line.max_tokens for line in template if not line.choices]
    chosen = [max(len(llm.text_ids(line.label + c)) for c in line.choices) for line in template if line.choices]
    return sum(free + chosen) + len(template)  # a line end after each, the end token after the last


# What a row may write besides the tokens named to it: nothing, any token but special ones, of these no line end, or of
# these only what a value may begin with, which is nothing blank either. QUOTED is added to the last three: no double
# quote and no backslash.
CLOSED, OPEN, NO_LINE_END, BEGIN = range(4)
QUOTED = 3


class Wanted(NamedTuple):
    """What the next token of a row may be: one of its kind's or of `named`."""

    kind: int = CLOSED
    named: Collection[int] = ()


class TemplateFiller:
    """A processor for fast.decode by which each row fills in its template.

    Small models lose any format they are merely asked for; here a finished record is the only thing they can write.
    """

    def __init__(self, llm: Any, templates: Sequence[Sequence[Field]]) -> None:
        vocabulary = llm.tokenizer.convert_ids_to_tokens(range(len(llm.tokenizer)))
        self.line_ends = {i for i, t in enumerate(vocabulary) if t and ("\n" in t or "Ċ" in t or t == "<0x0A>")}
        blank = {i for i, t in enumerate(vocabulary) if t and not t.strip(" \t\r▁Ġĉč")}
        quotes = {i for i, t in enumerate(vocabulary) if t and ('"' in t or t == "<0x22>")}
        slashes = {i for i, t in enumerate(vocabulary) if t and ("\\" in t or t == "<0x5C>")}
        self.newline, self.eos = llm.text_ids("\n")[-1], llm.eos_ids[0]
        special = {*llm.eos_ids, *llm.tokenizer.all_special_ids}
        barred = [special, special | self.line_ends, special | self.line_ends | blank]  # OPEN, NO_LINE_END, BEGIN
        barred += [tokens | quotes | slashes for tokens in barred]
        kinds = torch.ones(1 + len(barred), llm.model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
        kinds[CLOSED] = False
        for kind, tokens in enumerate(barred, 1):
            kinds[kind, sorted(tokens)] = False
        self.kinds = kinds.to(llm.device)  # (kinds, V): whether a row of that kind may write a token
        self.closing = torch.tensor([self.eos, *sorted(quotes)], device=llm.device)  # what may end a quoted value
        self.rows = [self.fill(llm, template) for template in templates]
        self.started = False

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.rows = [self.rows[i] for i in rows]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The last tokens, (B, 1), and scores (B, V) -> the scores, -inf where a token may not come."""
        came: list[Any] = ids[:, -1].tolist() if self.started else [None] * len(ids)
        self.started = True
        wanted = [row.send(token) for row, token in zip(self.rows, came, strict=True)]
        # One upload a step, however many rows: each row's kind, then row and token of each that is named.
        named = [number for i, w in enumerate(wanted) for token in w.named for number in (i, token)]
        index = torch.tensor([w.kind for w in wanted] + named, device=scores.device)
        kind, (row, token) = index[: len(scores)], index[len(scores) :].view(-1, 2).unbind(-1)
        may = self.kinds[kind].index_put_((row, token), torch.ones_like(row, dtype=torch.bool))  # (B, V)
        # In free text an end token means the end of the line, in a quoted value a double quote too.
        ends = torch.where(kind > QUOTED, scores[:, self.closing].amax(-1), scores[:, self.eos])
        ends = ends.masked_fill(kind == CLOSED, -torch.inf)
        scores = scores.clone()
        scores[:, self.newline] = torch.maximum(scores[:, self.newline], ends)
        return scores.masked_fill(~may, -torch.inf)

    def fill(self, llm: Any, template: Sequence[Field]) -> Generator[Wanted, int, None]:
        """One row's template as a coroutine: yields what may come next, is sent what came."""
        yield from self.record(llm, template)
        while True:
            yield Wanted(named=[self.eos])

    def record(self, llm: Any, template: Sequence[Field]) -> Generator[Wanted, int, None]:
        """The same up to its last line, or until the model ends it before an optional one."""
        taken: list[list[int]] = []  # the choices so far
        for number, line in enumerate(template, 1):
            end = self.newline if number < len(template) else self.eos
            label, choices = llm.continuations(line.label, line.choices)
            for k, token in enumerate(label):
                came = yield Wanted(named=[token, self.eos] if line.optional and k == 0 else [token])
                if came == self.eos:
                    return
            if choices:
                lines = [[*ids, end] for ids in choices]  # the end tells a choice from another that it begins
                left = [ids for ids in lines if not (line.distinct and ids[:-1] in taken)] or lines
                chosen: list[int] = []
                while chosen not in left:
                    begun = [ids for ids in left if ids[: len(chosen)] == chosen]
                    chosen = [*chosen, (yield Wanted(named={ids[len(chosen)] for ids in begun}))]
                taken.append(chosen[:-1])
                continue
            for count in range(line.max_tokens):
                kind = BEGIN if count == 0 else NO_LINE_END if count < line.min_tokens else OPEN
                came = yield Wanted(kind + QUOTED * line.quoted)
                if came in self.line_ends:
                    break
            if came not in self.line_ends:
                yield Wanted(named=[end])


class Watcher:
    """A processor for fast.decode that notes how likely each of K replies was in the place of each token written.

    It changes nothing. Before all others, it sees the model's own logits. They stay on the device until the end: a GPU
    never waits.
    """

    def __init__(self, llm: Any, replies: Sequence[str], rows: int) -> None:
        spellings = llm.reply_ids(replies)
        self.ids = torch.tensor([i for ids in spellings for i in sorted(ids)], device=llm.device)  # (S,) of all replies
        self.sizes = [len(ids) for ids in spellings]
        self.present = list(range(rows))  # the rows still in the batch
        self.steps: list[tuple[list[int], torch.Tensor]] = []  # rows and their logits, (B, S)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.present = [self.present[i] for i in rows]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append((self.present, scores.index_select(1, self.ids)))  # a copy: the logits' memory is used again
        return scores

    def probs(self) -> list[list[list[float]]]:
        """For each row and each token it took part in, the probabilities of the K replies among themselves."""
        logits = torch.cat([logits for _, logits in self.steps]).cpu()  # (steps x rows, S)
        parts = logits.double().softmax(-1).split(self.sizes, dim=-1)
        probs = torch.stack([part.sum(-1) for part in parts], dim=-1).tolist()  # (steps x rows, K)
        rows = [row for present, _ in self.steps for row in present]
        result: list[list[list[float]]] = [[] for _ in self.steps[0][0]]
        for row, of_token in zip(rows, probs, strict=True):
            result[row].append(of_token)
        return result
