"""Who answers what a benchmark asks about a model's answer: a local model, or an OpenAI-compatible endpoint.

A judge that cannot be reached, or whose reply holds no verdict, leaves a question unjudged: never a score of 0.
"""

import contextlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import Any
from urllib.parse import urlsplit

import torch
from tqdm.auto import tqdm

from data import UserError
from engine.constrained import Field, room
from model import LLM
from rubric import final_answer

Value = float | list[float]  # what a verdict is: 0 or 1, a score, ratings, a preference

CHUNK = 64  # questions of a local judge between two saves
REPLY_TOKENS = 1_024  # of an endpoint's reply
NO_VERDICT = "no verdict in the reply"
INSTEAD = {"max_tokens": "max_completion_tokens is sent", "temperature": "its verdicts may vary"}

FATAL = {401, 402, 403, 404, 405}  # HTTP statuses that every question would get
REMEDY = (
    "give the url's base, such as http://host:8000/v1, a model that it serves, and in JUDGE_API_KEY (or "
    "OPENAI_API_KEY) a key that may use it"
)


@dataclass(frozen=True)
class Question:
    id: str  # unique within an evaluation, e.g. "item-17/3"
    messages: list[dict[str, str]]  # chat messages: optional system, then user
    template: list[Field]  # of a local judge's reply
    read: Callable[[str], Value | None]  # the reply -> the verdict; None: nonsense
    max_tokens: int = REPLY_TOKENS  # room for the reply of an endpoint
    digits: str = ""  # "012": a local verdict is the expected one, by their probabilities; no template is filled in


@dataclass(frozen=True)
class Verdict:
    question: str  # the question's id
    value: Value | None  # None: unjudged, never scored 0
    reply: str  # what the judge said
    reason: str = ""  # why it is unjudged


class LocalJudge:
    """A model of this process, its adapters off: greedy constrained decoding, or the expected digit."""

    def __init__(self, llm: LLM, label: str) -> None:
        self.llm, self.label = llm, label

    def ask(self, questions: Sequence[Question], keep: Callable[[list[Verdict]], None]) -> None:
        """Hand every question's verdict to `keep`, CHUNK at a time."""
        context, kinds = self.llm.context, defaultdict(list)
        for q in questions:
            tokens = room(self.llm, q.template)
            if (needed := len(self.llm.encode_messages(q.messages)) + tokens) <= context:
                kinds[q.digits, tokens].append(q)
            else:
                keep([Verdict(q.id, None, "", f"too long for the judge: {needed} tokens, its context is {context}")])
        for (digits, tokens), alike in sorted(kinds.items()):
            alike.sort(key=lambda q: [m["content"] for m in q.messages])  # a prefix in common is prefilled once
            for start in range(0, len(alike), CHUNK):
                keep(self._verdicts(alike[start : start + CHUNK], digits, tokens))

    def _verdicts(self, questions: Sequence[Question], digits: str, tokens: int) -> list[Verdict]:
        llm, prompts = self.llm, [self.llm.encode_messages(q.messages) for q in questions]
        with llm.adapters_off():
            if digits:
                probs = llm.choice_probs(prompts, llm.choice_ids(digits), desc="judge")  # (prompts, digits)
                values = (probs @ torch.arange(len(digits), dtype=probs.dtype)).tolist()
                return [Verdict(q.id, value, "") for q, value in zip(questions, values, strict=True)]
            templates = [q.template for q in questions]
            outputs = llm.generate(prompts, max_new_tokens=tokens, temperature=0, templates=templates, desc="judge")
        read = [(q.id, q.read(final_answer(c.text)), c.text) for q, (c,) in zip(questions, outputs, strict=True)]
        return [Verdict(*each, NO_VERDICT if each[1] is None else "") for each in read]


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, asked by `workers` threads at once, at temperature 0.

    The key of JUDGE_API_KEY or OPENAI_API_KEY is in no message, reply or file. timeout: seconds. tries: of a question,
    with growing pauses, while no answer comes. give_up: after so many questions without an answer, no more are asked.
    Raises UserError for a url that is none, a key that cannot be one, and without the package openai.
    """

    def __init__(
        self, url: str, name: str, *, workers: int = 8, timeout: float = 120.0, tries: int = 4, give_up: int = 10
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("a judge behind a url needs the package openai: pip install openai") from None
        self.url, self.label = checked_url(url), name
        self.workers, self.tries, self.give_up = workers, tries, give_up
        self._key = api_key()
        client = openai.OpenAI(
            base_url=self.url,
            api_key=self._key or "none",  # local servers want none, the client wants one
            timeout=openai.Timeout(timeout, connect=min(timeout, 10)),
            max_retries=tries - 1,
        )
        self._create: Any = client.chat.completions.create  # here, as it imports what threads should not at once
        self._errors = (openai.APIError, ValueError)
        self._refused: set[str] = set()  # parameters that the endpoint does not take
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question], keep: Callable[[list[Verdict]], None]) -> None:
        """Hand each verdict to `keep`, in this thread, as it comes. Raises UserError where all would get the same."""
        self._silent = 0  # questions in a row that got no answer
        with ThreadPool(self.workers) as pool:  # its threads are daemons: Ctrl-C does not wait for their timeouts
            for verdict in pool.imap_unordered(self._verdict, questions):
                keep([verdict])

    def _verdict(self, question: Question) -> Verdict:
        if self._silent >= self.give_up:
            return Verdict(question.id, None, "", "the endpoint did not answer")
        text = reason = ""
        for temperature in (0.0, 0.7, 0.7):  # asked again greedily, the same nonsense would come
            choice = self._complete(question, temperature)
            if isinstance(choice, Exception):
                return Verdict(question.id, None, "", self._failed(choice))
            self._count(True)
            content = choice.message.content
            text = self._without_key(content) if isinstance(content, str) else ""
            said = final_answer(content).strip() if text else ""
            if choice.finish_reason == "length":  # the last word may be half of one
                said = said.rpartition("\n")[0]
            if said and (value := question.read(said)) is not None:
                return Verdict(question.id, value, text)
            cut_off = f", which was cut off at {question.max_tokens} tokens"
            reason = NO_VERDICT + (cut_off if choice.finish_reason == "length" else "")
        return Verdict(question.id, None, text, reason)

    def _failed(self, failure: Exception) -> str:
        """Why a question has no answer. Raises UserError for a status of FATAL."""
        reason = f"no answer, {self.tries} times: {failure.__cause__ or failure}"
        if status := getattr(failure, "status_code", 0):
            reason = f"HTTP {status}: {message_of(failure)}"
        elif isinstance(failure, ValueError):
            reason = f"its answer is no chat completion: {failure}"
        reason = self._without_key(reason)[:500]
        if status in FATAL:
            self._silent = self.give_up  # the other threads ask no more
            raise UserError(f"the judge {self.label} at {self.url} says {reason}; {REMEDY}")
        # 408, 409, 429 and 5xx are retried by the client.
        self._count(400 <= status < 500 and status not in (408, 409, 429), reason)
        return reason

    def _count(self, answered: bool, reason: str = "") -> None:
        with self._lock:
            if self._silent < self.give_up:  # or it has been given up for good
                self._silent = 0 if answered else self._silent + 1
                if self._silent == self.give_up:
                    tqdm.write(
                        f"WARNING: the judge at {self.url} gave no answer to {self._silent} questions in a row "
                        f"({reason}): the others are left unjudged"
                    )

    def _complete(self, question: Question, temperature: float) -> Any:
        """The endpoint's reply, or the error instead. Raised, it would carry the key that a server may echo along."""
        while True:
            sent: dict[str, Any] = {"max_tokens": question.max_tokens, "temperature": temperature}
            sent = {name: value for name, value in sent.items() if name not in self._refused}
            if "max_tokens" not in sent:  # OpenAI's reasoning models refuse it; other servers know no other name
                sent["max_completion_tokens"] = question.max_tokens
            try:
                completion = self._create(model=self.label, messages=question.messages, **sent)
            except self._errors as error:
                if (refused := refused_parameter(error)) not in sent:
                    return error
                with self._lock:
                    if refused not in self._refused:
                        tqdm.write(f"the judge {self.label} takes no {refused}: {INSTEAD[refused]}")
                    self._refused.add(refused)
                continue
            choices = getattr(completion, "choices", None)
            if not choices or choices[0].message is None:
                return ValueError(getattr(completion, "error", None) or completion)
            return choices[0]

    def _without_key(self, text: str) -> str:
        """A server may echo the key. Halves of surrogate pairs, which no file takes, become question marks."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "***") if self._key else text


def message_of(error: Any) -> str:
    """What a server said of an error, in whatever form."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return " ".join(str(message or error.body or "no reason given").split())


def refused_parameter(error: Exception) -> str:
    """The parameter that an HTTP 400 or 422 says is not taken, or nothing."""
    said = message_of(error) if getattr(error, "status_code", 0) in (400, 422) else ""
    if re.search(r"\bmax_tokens\b", said) and re.search(r"unsupported|not support", said, re.IGNORECASE):
        return "max_tokens"  # not if it is only too large
    return "temperature" if re.search(r"\btemperature\b", said) else ""


def checked_url(url: str) -> str:
    """Raises UserError unless it is the base of an endpoint. One with a password or a query is not repeated."""
    if set("@?#") & set(url):
        raise UserError("the judge's url must have no user, password, ? or #: give a key in JUDGE_API_KEY")
    with contextlib.suppress(ValueError):  # brackets, a port
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    raise UserError(f"the judge's url {url!r} is none: give its base, such as http://host:8000/v1")


def api_key() -> str:
    """Raises UserError for a key that no header can carry, which an error of the client would spell out."""
    keys = [os.environ.get(name, "").strip() for name in ("JUDGE_API_KEY", "OPENAI_API_KEY")]
    key = keys[0] or keys[1]
    if not (key.isascii() and key.isprintable()):
        raise UserError("JUDGE_API_KEY or OPENAI_API_KEY has characters that no key has: copy it again")
    return key
