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
    `min_tokens`: the line does not end before so many. `distinct`: the value is another choice than the record's
    earlier distinct values, or begins with another token. `quoted`: the value stands between double quotes that the
    labels bring, and the model may end it with one instead of a line end.
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
    longest = [
        max((len(llm.text_ids(line.label + c)) for c in line.choices), default=0)
        or len(llm.text_ids(line.label)) + line.max_tokens
        for line in template
    ]
    return sum(longest) + len(template)  # a line end after each, the end token after the last


# What a row may write besides the tokens named to it: nothing, any token but special ones, of these no line end, or of
# these only what a value may begin with, which is nothing blank either. QUOTED is added to the last three: no double
# quote and no backslash.
CLOSED, OPEN, NO_LINE_END, BEGIN = range(4)
QUOTED = 3


class Wanted(NamedTuple):
    """What the next token of a row may be: one of its kind's or of `allowed`, but none of `banned`."""

    kind: int = CLOSED
    allowed: Collection[int] = ()
    banned: Collection[int] = ()


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
        self.newline = llm.text_ids("\n")[-1]
        self.eos = llm.eos_ids[0]
        special = {*llm.eos_ids, *llm.tokenizer.all_special_ids}
        free = [special, special | self.line_ends, special | self.line_ends | blank]  # OPEN, NO_LINE_END, BEGIN
        banned = free + [tokens | quotes | slashes for tokens in free]
        kinds = torch.ones(1 + len(banned), llm.model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
        kinds[CLOSED] = False
        for kind, tokens in enumerate(banned, 1):
            kinds[kind, sorted(tokens)] = False
        self.kinds = kinds.to(llm.device)  # (kinds, V): whether a row of that kind may write a token
        self.closing = torch.tensor([self.eos, *sorted(quotes)], device=llm.device)  # what may end a quoted value
        self.rows = [self.fill(llm, template) for template in templates]
        self.wanted = [next(row) for row in self.rows]
        self.started = False

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.rows = [self.rows[i] for i in rows]
        self.wanted = [self.wanted[i] for i in rows]

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The last tokens, (B, 1) or more, and scores (B, V) -> the scores, -inf where a token may not come."""
        if self.started:
            full = Wanted(allowed=[self.eos])
            for i, token in enumerate(ids[:, -1].tolist()):
                try:
                    self.wanted[i] = self.rows[i].send(token)
                except StopIteration:
                    self.wanted[i] = full
        self.started = True
        # One upload a step, however many rows: each row's kind, then each token named: row, token, allowed or not.
        named = [(i, token, 1) for i, wanted in enumerate(self.wanted) for token in wanted.allowed]
        named += [(i, token, 0) for i, wanted in enumerate(self.wanted) for token in wanted.banned]
        told = [wanted.kind for wanted in self.wanted] + [number for triple in named for number in triple]
        index = torch.tensor(told, device=scores.device)
        kind, (row, token, allowed) = index[: len(scores)], index[len(scores) :].view(-1, 3).unbind(-1)
        may = self.kinds[kind].index_put_((row, token), allowed.bool())  # (B, V)
        # In free text an end token means the end of the line, in a quoted value a double quote too.
        ends = torch.where(kind > QUOTED, scores[:, self.closing].amax(-1), scores[:, self.eos])
        ends = ends.masked_fill(kind == CLOSED, -torch.inf)
        scores = scores.clone()
        scores[:, self.newline] = torch.maximum(scores[:, self.newline], ends)
        return scores.masked_fill(~may, -torch.inf)

    def fill(self, llm: Any, template: Sequence[Field]) -> Generator[Wanted, int, None]:
        """One row's template as a coroutine: yields what may come next, is sent what came."""
        begun: set[int] = set()  # first tokens of the distinct values so far
        taken: list[list[int]] = []  # those that were choices
        for number, line in enumerate(template):
            label, choices = llm.continuations(line.label, line.choices)
            for position, token in enumerate(label):
                may_end = position == 0 and line.optional
                came = yield Wanted(allowed=[token, self.eos] if may_end else [token])
                if came == self.eos:
                    return
            if choices:
                if line.distinct:
                    choices = [ids for ids in choices if ids not in taken] or choices
                came, chosen = yield from self.choose(choices)
                taken += [chosen] if line.distinct else []
            for count in range(line.max_tokens if not choices else 0):
                kind = BEGIN if count == 0 else NO_LINE_END if count < line.min_tokens else OPEN
                distinct = count == 0 and line.distinct
                came = yield Wanted(kind + QUOTED * line.quoted, banned=begun if distinct else ())
                if distinct:
                    begun.add(came)
                if came in self.line_ends:
                    break
            if came not in self.line_ends and number < len(template) - 1:
                yield Wanted(allowed=[self.newline])

    def choose(self, choices: Sequence[list[int]]) -> Generator[Wanted, int, tuple[int, list[int]]]:
        """Let one of several strings of ids be written, token by token: (the last token that came, the string)."""
        came = self.newline
        written: list[int] = []
        while following := {ids[len(written)] for ids in choices if len(ids) > len(written)}:
            may_end = written in choices  # it begins a longer one
            came = yield Wanted(allowed=following | ({self.newline} if may_end else set()))
            if may_end and came == self.newline:
                break
            choices = [ids for ids in choices if ids[len(written) : len(written) + 1] == [came]]
            written = [*written, came]
        return came, written


class Watcher:
    """A processor for fast.decode that notes how likely each of K replies was in the place of each token written.

    It changes nothing. Before all others, it sees the model's own logits. They stay on the device until the end: a GPU
    never waits.
    """

    def __init__(self, llm: Any, replies: Sequence[str], rows: int) -> None:
        spellings = llm.reply_ids(replies)
        self.ids = torch.tensor([i for ids in spellings for i in sorted(ids)], device=llm.device)  # (S,) of all replies
        self.sizes = [len(ids) for ids in spellings]
        self.rows = rows
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
        result: list[list[list[float]]] = [[] for _ in range(self.rows)]
        numbers = [row for present, _ in self.steps for row in present]
        for row, of_token in zip(numbers, probs, strict=True):
            result[row].append(of_token)
        return result
