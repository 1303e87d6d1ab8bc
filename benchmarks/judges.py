"""Who answers what a benchmark asks about a model's answer: a local model, or an OpenAI-compatible endpoint.

A judge that cannot be reached, or whose reply holds no verdict, leaves a question unjudged: never a score of 0.
"""

import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from tqdm.auto import tqdm

from data import UserError
from engine.constrained import Field, room
from rubric import final_answer

if TYPE_CHECKING:
    from model import LLM

Value = float | list[float]  # what a verdict is: 0 or 1, a score, ratings, a preference

CHUNK = 64  # questions of a local judge between two saves
CONNECT_SECONDS = 10.0
REPEAT_TEMPERATURE = 0.7  # of a question asked again: greedily the same nonsense would come
RETRIED = (408, 409, 429)  # besides 5xx, by the client
NO_VERDICT = "no verdict in the reply"

# Answers that every question would get -> what to do about it.
REMEDIES = {
    401: "set JUDGE_API_KEY (or OPENAI_API_KEY) to a key that it takes",
    402: "it wants to be paid",
    403: "the key has no right to use this model there",
    404: "give the url's base, such as http://host:8000/v1, and a model that it serves",
    405: "give the url's base, such as http://host:8000/v1",
}


@dataclass(frozen=True)
class Question:
    """One call of the judge."""

    id: str  # unique within an evaluation, e.g. "item-17/3"
    messages: list[dict[str, str]]  # chat messages: optional system, then user
    form: list[Field]  # how a local model is made to answer
    read: Callable[[str], Value | None]  # the reply -> the verdict; None: nonsense
    max_tokens: int  # room for the reply of an endpoint
    digits: str = ""  # "012": a local judge's verdict is the expected one, by their probabilities; no form is filled in


@dataclass(frozen=True)
class Verdict:
    """What a question came to."""

    question: str  # the question's id
    value: Value | None  # None: unjudged, never scored 0
    reply: str  # what the judge said
    reason: str = ""  # why it is unjudged


Keep = Callable[[list[Verdict]], None]  # is handed verdicts as they come, to write them down


def read_json(text: str) -> dict[str, Any] | None:
    """The JSON object in a reply: bare, fenced or amid prose; of several the last. None if there is none.

    What a judge says last counts: it may quote the answer, draft, or repeat the format before.

    >>> read_json('It is short, so: {"score": 7}')
    {'score': 7}
    >>> read_json('[{"score": 7}]') is None
    True
    """
    decoder, found, at = json.JSONDecoder(strict=False), None, 0
    opening = re.compile(r'\[(?=\s*\{)|\{(?=\s*["}])')
    while match := opening.search(text, at):
        try:
            found, at = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError as error:
            at = max(error.pos, match.end())  # what a broken object holds is no reply of its own
        except RecursionError:  # a loop of brackets
            return None
    return found if isinstance(found, dict) else None


# ------------------------------------------------------------------------------------------------ a local model


class LocalJudge:
    """A model of this process, with its base weights: it fills in each question's form greedily, or says how likely it
    finds each digit."""

    def __init__(self, llm: "LLM", label: str) -> None:
        self.llm, self.label = llm, label

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Hand every question's verdict to `keep`, CHUNK at a time.

        Questions that begin alike are asked together, because what they share is read once.
        """
        kinds = {q.id: (q.digits, room(self.llm, q.form)) for q in questions}
        ordered = sorted(questions, key=lambda q: (kinds[q.id], [m["content"] for m in q.messages]))
        with tqdm(total=len(ordered), desc="judge", unit="verdict", leave=False) as bar:
            for (_, tokens), group in groupby(ordered, key=lambda q: kinds[q.id]):
                alike = list(group)
                for at in range(0, len(alike), CHUNK):
                    verdicts = self._judge(alike[at : at + CHUNK], tokens)
                    keep(verdicts)
                    bar.update(len(verdicts))

    def _judge(self, questions: Sequence[Question], tokens: int) -> list[Verdict]:
        prompts = [(q, self.llm.encode_messages(q.messages)) for q in questions]
        context = self.llm.context
        fitting = [(q, prompt) for q, prompt in prompts if len(prompt) + tokens <= context]
        verdicts = [
            Verdict(q.id, None, "", f"too long for the judge: {len(prompt) + tokens} tokens, its context is {context}")
            for q, prompt in prompts
            if len(prompt) + tokens > context
        ]
        if not fitting:
            return verdicts
        if digits := fitting[0][0].digits:
            with self.llm.adapters_off():
                probs = self.llm.choice_probs([p for _, p in fitting], self.llm.choice_ids("", digits)[1], desc="judge")
            values = (probs @ torch.arange(len(digits), dtype=probs.dtype)).tolist()
            return verdicts + [Verdict(q.id, value, "") for (q, _), value in zip(fitting, values, strict=True)]
        with self.llm.adapters_off():
            outputs = self.llm.generate(
                [prompt for _, prompt in fitting],
                max_new_tokens=tokens,
                temperature=0,
                templates=[q.form for q, _ in fitting],
                desc="judge",
            )
        for (q, _), (completion,) in zip(fitting, outputs, strict=True):
            value = q.read(final_answer(completion.text))
            verdicts.append(Verdict(q.id, value, completion.text, NO_VERDICT if value is None else ""))
        return verdicts


# -------------------------------------------------------------------------------------------------- an endpoint


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, asked by several threads at once, at temperature 0.

    url: its base, such as http://host:8000/v1. The key is read from JUDGE_API_KEY or OPENAI_API_KEY; it is in no
    message, reply or file. timeout: seconds to wait for an answer. tries: how often a question is sent while the
    endpoint gives none (no connection, timeout, HTTP 408, 409, 429, 5xx), with growing pauses or those that it asks
    for, up to two minutes. nonsense_tries: how often it is asked before a reply that cannot be read is given up.
    give_up: after so many questions in a row without an answer, no more are asked.

    Raises UserError for a url that is none, a key that cannot be one, and without the package openai.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        workers: int = 8,
        timeout: float = 120.0,
        tries: int = 4,
        nonsense_tries: int = 3,
        give_up: int = 10,
    ) -> None:
        try:
            import openai
        except ImportError:
            raise UserError("a judge behind a url needs the package openai: pip install openai") from None
        self.url, self.label = checked_url(url), name
        self.workers, self.timeout, self.tries = workers, timeout, tries
        self.nonsense_tries, self.give_up = nonsense_tries, give_up
        self._key = api_key()
        client = openai.OpenAI(
            base_url=self.url,
            api_key=self._key or "none",  # local servers want none, the client wants one
            timeout=openai.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            max_retries=tries - 1,
        )
        self._create: Any = client.chat.completions.create  # here, as it imports what threads should not at once
        self._refused: set[str] = set()  # parameters that the endpoint does not take
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question], keep: Keep) -> None:
        """Hand every question's verdict to `keep`, in this thread, one by one as they come.

        Raises UserError for an answer that every question would get, such as that of a wrong key.
        """
        waiting, done = deque(questions), SimpleQueue[Verdict | Exception]()
        unanswered = 0  # in a row

        def work() -> None:
            nonlocal unanswered
            while (question := first_of(waiting)) is not None:
                try:
                    verdict, answered = self._judge(question)
                except Exception as error:  # raised below
                    waiting.clear()
                    done.put(error)
                    return
                done.put(verdict)
                with self._lock:
                    unanswered = 0 if answered else unanswered + 1
                    given_up = unanswered >= self.give_up
                if given_up and (rest := list(iter(lambda: first_of(waiting), None))):
                    tqdm.write(
                        f"WARNING: the judge at {self.url} gave no answer to {self.give_up} questions in a row "
                        f"({verdict.reason}): {len(rest)} more are left unjudged"
                    )
                    for q in rest:
                        done.put(Verdict(q.id, None, "", "the endpoint did not answer"))

        # Daemons, unlike an executor's threads, are not waited for at exit: Ctrl-C need not outlast their timeouts.
        for _ in range(min(self.workers, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in tqdm(questions, desc="judge", unit="verdict", leave=False):
                came = done.get()
                if isinstance(came, Exception):
                    raise came
                keep([came])
        finally:
            waiting.clear()

    def _judge(self, question: Question) -> tuple[Verdict, bool]:
        """The verdict, and whether the endpoint answered. Raises UserError for an answer that is one of REMEDIES."""
        import openai

        text = reason = ""
        for attempt in range(self.nonsense_tries):
            failure: Exception | None = None
            try:
                choice = self._complete(question, REPEAT_TEMPERATURE if attempt else 0.0)
            except (openai.APIError, ValueError) as error:
                failure = error
            if failure is not None:  # not in the except block, so that no other errors hang on to one raised here
                return self._unanswered(question, failure)
            content = choice.message.content
            text = content if isinstance(content, str) else ""
            said = final_answer(text).strip()
            value = question.read(said) if said else None
            if value is not None:
                return Verdict(question.id, value, self._hide(text)), True
            cut = choice.finish_reason == "length"
            reason = f"{NO_VERDICT}, which was cut off at {question.max_tokens} tokens" if cut else NO_VERDICT
        return Verdict(question.id, None, self._hide(text), reason), True

    def _unanswered(self, question: Question, failure: Exception) -> tuple[Verdict, bool]:
        status = getattr(failure, "status_code", 0)
        if status:
            reason = f"HTTP {status}: {said_by(failure)}"
        elif isinstance(failure, ValueError):
            reason = f"its answer is no chat completion: {failure}"
        else:
            reason = f"no answer, {self.tries} times: {failure.__cause__ or failure}"
        reason = self._hide(reason)[:500]
        if status in REMEDIES:
            raise UserError(f"the judge {self.label} at {self.url} says {reason}; {REMEDIES[status]}")
        return Verdict(question.id, None, "", reason), 400 <= status < 500 and status not in RETRIED

    def _complete(self, question: Question, temperature: float) -> Any:
        """The endpoint's reply. Raises openai.APIError, or ValueError if it is no chat completion."""
        import openai

        while True:
            sent: dict[str, Any] = {"max_tokens": question.max_tokens, "temperature": temperature}
            if "max_tokens" in self._refused:  # by OpenAI's reasoning models; other servers know no other name
                sent["max_completion_tokens"] = sent.pop("max_tokens")
            if "temperature" in self._refused:
                del sent["temperature"]
            try:
                completion = self._create(model=self.label, messages=question.messages, **sent)
            except openai.APIStatusError as error:
                refused = refused_parameter(error)
                if refused not in sent:
                    raise
                self._do_without(refused)
                continue
            choices = getattr(completion, "choices", None)
            if not choices or choices[0].message is None:
                raise ValueError(getattr(completion, "error", None) or completion)
            return choices[0]

    def _do_without(self, parameter: str) -> None:
        with self._lock:
            if parameter not in self._refused:
                instead = "max_completion_tokens is sent" if parameter == "max_tokens" else "its verdicts may vary"
                tqdm.write(f"the judge {self.label} takes no {parameter}: {instead}")
            self._refused.add(parameter)

    def _hide(self, text: str) -> str:
        """Without the key, which a server may echo, and without halves of characters, which no file takes."""
        text = text.encode(errors="replace").decode()
        return text.replace(self._key, "***") if self._key else text


def first_of(waiting: deque[Question]) -> Question | None:
    """The next question, taken out; None if another thread took the last."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def said_by(error: Any) -> str:
    """What a server said of an error, in whatever form."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    return str(message or error.body or "no reason given")


def refused_parameter(error: Any) -> str:
    """The parameter that an HTTP 400 or 422 says is not taken, or nothing."""
    said = said_by(error)
    if error.status_code not in (400, 422):
        return ""
    if re.search(r"\bmax_tokens\b", said) and re.search(r"unsupported|not support", said, re.IGNORECASE):
        return "max_tokens"  # not if it is only too large
    return "temperature" if re.search(r"\btemperature\b", said) else ""


def checked_url(url: str) -> str:
    """Raises UserError unless it is the base of an endpoint. One with a password or a query is not repeated."""
    if any(mark in url for mark in "@?#"):
        raise UserError("the judge's url must have no user, password, ? or #: give a key in JUDGE_API_KEY")
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    except ValueError:  # brackets, a port
        pass
    raise UserError(f"the judge's url {url!r} is none: give its base, such as http://host:8000/v1")


def api_key() -> str:
    """Raises UserError for a key that no header can carry, which an error of the client would spell out."""
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY"):
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise UserError(f"{name} has characters that no key has: copy it again")
            return key
    return ""
