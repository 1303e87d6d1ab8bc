"""Judges: a tiny local model, and an endpoint played by a server on this machine."""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest
import torch

import eval as evaluation
from benchmarks import judges
from benchmarks.judges import EndpointJudge, LocalJudge, Question, Verdict
from data import UserError
from engine.constrained import Field

KEY = "sk-secret-0123456789"
FORM = [Field("Rating: ", choices=tuple(map(str, range(1, 11))))]


def read(reply: str) -> float | None:
    found = re.fullmatch(r"Rating: (\d+)", reply)
    return float(found[1]) if found else None


def question(name: str, text: str = "", max_tokens: int = 16) -> Question:
    return Question(name, [{"role": "user", "content": text or name}], FORM, read, max_tokens)


def questions(n: int) -> list[Question]:
    return [question(f"q{i}") for i in range(n)]


def asked(judge: EndpointJudge | LocalJudge, some: list[Question]) -> dict[str, Verdict]:
    kept: list[Verdict] = []
    judge.ask(some, kept.extend)
    assert len(kept) == len(some)
    return {v.question: v for v in kept}


# --------------------------------------------------------------------------------------------- a local judge


def longer(n: int) -> list[Question]:
    """Prompts of different lengths, forms with room for different numbers of tokens."""
    return [
        question(f"q{i}", f"Item {i % 3}. " + "How good is it? " * (i % 5) + f"Part {i}.", 16 + i % 2) for i in range(n)
    ]


def test_a_local_judge_can_only_say_what_the_form_allows(llm):
    verdicts = asked(LocalJudge(llm, "tiny"), longer(12))
    assert set(verdicts) == {f"q{i}" for i in range(12)}
    for verdict in verdicts.values():
        assert verdict.value in range(1, 11) and verdict.reason == ""
        assert verdict.reply == f"Rating: {verdict.value:.0f}"


def test_a_local_judge_says_what_it_would_if_asked_one_by_one(llm, monkeypatch):
    monkeypatch.setattr(judges, "CHUNK", 5)
    judge = LocalJudge(llm, "tiny")
    together = asked(judge, longer(12))
    assert len({v.value for v in together.values()}) > 1
    assert together == {q.id: asked(judge, [q])[q.id] for q in longer(12)}


def test_a_local_judge_has_its_adapters_off(llm):
    judge = LocalJudge(llm, "tiny")
    before = asked(judge, longer(12))
    with torch.no_grad():
        for name, parameter in llm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=3.0)
    assert asked(judge, longer(12)) == before
    prompts = [llm.encode_messages(q.messages) for q in longer(12)]
    adapted = llm.generate(prompts, max_new_tokens=16, temperature=0, templates=[FORM] * 12)
    assert [c.text for (c,) in adapted] != [before[f"q{i}"].reply for i in range(12)]


def test_what_a_local_judge_says_is_read(llm):
    nonsense = Question("q", [{"role": "user", "content": "?"}], FORM, lambda reply: None, 16)
    verdict = asked(LocalJudge(llm, "tiny"), [nonsense])["q"]
    assert (verdict.value, verdict.reason) == (None, "no verdict in the reply")
    assert re.fullmatch(r"Rating: \d+", verdict.reply)


def test_a_local_judge_gives_the_expected_digit_where_it_is_asked_for(llm):
    some = [Question(q.id, q.messages, FORM, read, 16, "012") for q in longer(7)]
    verdicts = asked(LocalJudge(llm, "tiny"), [*some, question("formed")])
    assert verdicts["formed"].reply.startswith("Rating: ")
    digits = [llm.tokenizer(d).input_ids[0] for d in "012"]
    for q in some:
        with torch.no_grad(), llm.adapters_off():
            logits = llm.model(input_ids=torch.tensor([llm.encode_messages(q.messages)])).logits[0, -1, digits]
        assert verdicts[q.id].value == pytest.approx(
            (logits.double().softmax(-1) @ torch.arange(3.0).double()).item(), abs=1e-5
        )


def test_a_question_beyond_the_context_is_unjudged_and_says_by_how_much(llm):
    long = question("long", "word " * 2_000)
    tokens = len(llm.encode_messages(long.messages)) + len("Rating: 10\n")  # or the end token, in bytes
    verdicts = asked(LocalJudge(llm, "tiny"), [*longer(2), long])
    assert verdicts["long"].value is None
    assert verdicts["long"].reason == f"too long for the judge: {tokens} tokens, its context is 8192"
    assert verdicts["q0"].value and verdicts["q1"].value


def test_each_question_is_answered_on_its_own_form(llm):
    def voting(name, text, choices):
        return Question(name, [{"role": "user", "content": text}], [Field("Vote: ", choices=choices)], len, 16)

    some = [voting("long", "a" * 8192, ("no",)), voting("b", "b", ("yes", "maybe")), voting("c", "c", ("A", "B"))]
    replies = {name: verdict.reply for name, verdict in asked(LocalJudge(llm, "tiny"), some).items()}
    assert replies["long"] == ""
    assert replies["b"] in ("Vote: yes", "Vote: maybe") and replies["c"] in ("Vote: A", "Vote: B")


def test_a_question_that_just_fits_is_judged(llm):
    """With room for the longest reply that its form allows, whatever an endpoint might need."""
    template = len(llm.encode_messages(question("", " ").messages)) - 1
    longest = "a" * (8192 - template - len("Rating: 10\n"))
    some = [question("q", longest, max_tokens=10_000), question("q+", longest + "a"), *longer(1)]
    verdicts = asked(LocalJudge(llm, "tiny"), some)
    assert [verdicts[name].value is None for name in ("q", "q+", "q0")] == [False, True, False]


def test_chunks_are_kept_as_they_finish(llm, monkeypatch):
    monkeypatch.setattr(judges, "CHUNK", 2)
    calls, kept = [], []
    real = llm.generate
    monkeypatch.setattr(llm, "generate", lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])
    LocalJudge(llm, "tiny").ask(questions(5), lambda verdicts: kept.append((len(calls), len(verdicts))))
    assert kept == [(1, 2), (2, 2), (3, 1)]


def test_questions_that_begin_alike_are_asked_together(llm, monkeypatch):
    monkeypatch.setattr(judges, "CHUNK", 3)
    mixed = [question(f"{item}/{part}", f"About {item}. Part {part}.") for part in range(3) for item in "abc"]
    chunks = []
    LocalJudge(llm, "tiny").ask(mixed, lambda verdicts: chunks.append({v.question[0] for v in verdicts}))
    assert chunks == [{"a"}, {"b"}, {"c"}]


# ------------------------------------------------------------------------------------------------ an endpoint


class Endpoint:
    """A server whose `script(text, n, request)` says how the n-th request with a text is answered.

    A string is what the model says, a dictionary the choice, a tuple an HTTP status with a message or a body and
    perhaps headers, bytes a whole body. None: the connection is closed without an answer.
    """

    def __init__(self, script):
        self.requests, self.keys, self.times = [], [], []
        endpoint, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = request["messages"][-1]["content"]
                with lock:
                    n = sum(text == r["messages"][-1]["content"] for r in endpoint.requests)
                    endpoint.requests.append(request)
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint.times.append(time.monotonic())
                answer = script(text, n, request)
                status, headers = 200, {"Content-Type": "application/json"}
                if answer is None:
                    return
                if isinstance(answer, tuple):
                    status, message, *more = answer
                    headers |= more[0] if more else {}
                    answer = message if isinstance(message, bytes) else {"error": {"message": message}}
                elif not isinstance(answer, bytes):
                    choice = {"message": {"content": answer}} if isinstance(answer, str) else answer
                    answer = {"choices": [choice]}
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def handle(self):
                with contextlib.suppress(ConnectionError):  # the client did not wait
                    super().handle()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def judge(self, **settings) -> EndpointJudge:
        return EndpointJudge(self.url, "big", **settings)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint(monkeypatch):
    """Makes Endpoints; the client pauses for milliseconds only, and no key or proxy is set."""
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = []

    def make(script):
        made.append(Endpoint(script))
        return made[-1]

    yield make
    for one in made:
        one.close()


def good(text, n, request):
    return "Rating: 7"


def test_an_endpoint_is_asked_greedily_and_its_verdict_is_read(endpoint):
    server = endpoint(good)
    assert asked(server.judge(), [question("q", "How good?")]) == {"q": Verdict("q", 7.0, "Rating: 7")}
    assert server.requests == [
        {
            "model": "big",
            "messages": [{"role": "user", "content": "How good?"}],
            "max_tokens": 16,
            "temperature": 0.0,
        }
    ]


def test_nonsense_is_asked_again_at_a_temperature(endpoint):
    server = endpoint(lambda text, n, request: "Rating: 7" if n else "Well.")
    assert asked(server.judge(), [question("q")])["q"].value == 7
    assert [r["temperature"] for r in server.requests] == [0.0, 0.7]


def test_nonsense_three_times_is_unjudged_and_not_0(endpoint):
    server = endpoint(lambda text, n, request: f"Well, {n}." if text == "q0" else "Rating: 7")
    verdicts = asked(server.judge(), questions(2))
    assert verdicts["q0"] == Verdict("q0", None, "Well, 2.", "no verdict in the reply")
    assert verdicts["q1"].value == 7 and len(server.requests) == 4


@pytest.mark.parametrize("content", [None, "", " \n", [{"text": "Rating: 7"}]])
def test_a_reply_without_text_is_nonsense(endpoint, content):
    server = endpoint(lambda text, n, request: {"message": {"content": content, "reasoning_content": "Rating: 7"}})
    anything = Question("q", [{"role": "user", "content": "q"}], FORM, lambda reply: 1.0, 16)
    verdict = asked(server.judge(), [anything])["q"]
    assert (verdict.value, verdict.reason, len(server.requests)) == (None, "no verdict in the reply", 3)


def test_a_reply_cut_off_before_its_verdict_says_so(endpoint):
    server = endpoint(lambda text, n, request: {"message": {"content": "Wel"}, "finish_reason": "length"})
    reason = asked(server.judge(), [question("q")])["q"].reason
    assert reason == "no verdict in the reply, which was cut off at 16 tokens"


@pytest.mark.parametrize(("reply", "value"), [("Rating: 1", None), ("Rating: 1\nand", 1.0)])
def test_of_a_reply_that_was_cut_off_the_last_line_does_not_count(endpoint, reply, value):
    """Its number may have been going on."""
    server = endpoint(lambda text, n, request: {"message": {"content": reply}, "finish_reason": "length"})
    some = Question(
        "q", [{"role": "user", "content": "q"}], FORM, lambda said: 1.0 if "Rating: 1" in said else None, 16
    )
    assert asked(server.judge(), [some])["q"].value == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("<think>Rating: 1</think>Rating: 7", 7),
        ("\n<think>\nRating: 1\n</think>\n\nRating: 7\n", 7),
        ("Rating: 1, at first\n</think>\n\nRating: 7", 7),  # opened by the chat template
        ("<think>Rating: 7", None),  # cut off
        ("<think></think>", None),
    ],
)
def test_thoughts_are_not_read(endpoint, reply, value):
    def first(said):
        return float(found[1]) if (found := re.search(r"Rating: (\d+)", said)) else None

    some = [Question("q", [{"role": "user", "content": "q"}], FORM, first, 16)]
    verdict = asked(endpoint(lambda *_: reply).judge(), some)["q"]
    assert (verdict.value, verdict.reply) == (value, reply)


def test_a_tag_amid_a_reply_ends_no_thoughts(endpoint):
    quoted = Question("q", [{"role": "user", "content": "q"}], FORM, lambda reply: float(len(reply)), 16)
    reply = "It has </think> in it and <think>."
    assert asked(endpoint(lambda *_: reply).judge(), [quoted])["q"].value == len(reply)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_trouble_that_passes_does_not_matter(endpoint, status):
    server = endpoint(lambda text, n, request: "Rating: 7" if n == 3 else (status, "busy"))
    assert asked(server.judge(), [question("q")])["q"].value == 7
    assert len(server.requests) == 4


def test_a_server_is_given_the_time_it_asks_for(endpoint):
    server = endpoint(lambda text, n, request: "Rating: 7" if n else (429, "slowly", {"Retry-After": "0.4"}))
    assert asked(server.judge(), [question("q")])["q"].value == 7
    assert server.times[1] - server.times[0] >= 0.4


def test_trouble_that_stays_leaves_a_question_unjudged(endpoint):
    server = endpoint(lambda text, n, request: (503, "loading") if text == "q0" else "Rating: 7")
    verdicts = asked(server.judge(), questions(3))
    assert verdicts["q0"] == Verdict("q0", None, "", "HTTP 503: loading")
    assert verdicts["q1"].value == verdicts["q2"].value == 7


def test_no_connection_is_unjudged_with_the_reason(endpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        judge = EndpointJudge(f"http://127.0.0.1:{free.getsockname()[1]}", "big")
        verdict = asked(judge, [question("q")])["q"]
    assert verdict.value is None
    assert verdict.reason == "no answer, 4 times: [Errno 111] Connection refused"


def test_a_slow_server_is_asked_again_then_the_question_is_unjudged(endpoint):
    awake = threading.Event()
    server = endpoint(lambda text, n, request: good(text, n, awake.wait(5)))
    verdict = asked(server.judge(timeout=0.1, tries=2), [question("q")])["q"]
    awake.set()
    assert verdict == Verdict("q", None, "", "no answer, 2 times: timed out") and len(server.requests) == 2


def test_a_server_that_does_not_answer_is_given_up(endpoint, capsys):
    server = endpoint(lambda text, n, request: "Rating: 7" if text == "q0" else None)
    verdicts = asked(server.judge(workers=1, tries=2, give_up=3), questions(20))
    assert len(server.requests) == 1 + 3 * 2
    reasons = [v.reason for v in verdicts.values()]
    assert [r.partition(":")[0] for r in reasons] == [
        "",
        *["no answer, 2 times"] * 3,
        *["the endpoint did not answer"] * 16,
    ]
    assert [v.value for v in verdicts.values()] == [7.0, *[None] * 19]
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == 1 and server.url in warnings[0] and "the others are left unjudged" in warnings[0]


def test_with_several_workers_only_what_is_under_way_goes_on_after_giving_up(endpoint):
    server = endpoint(lambda text, n, request: None)
    asked(server.judge(workers=4, tries=1, give_up=3), questions(50))
    assert len({r["messages"][0]["content"] for r in server.requests}) <= 3 + 4


def test_an_answer_that_was_under_way_does_not_take_back_the_giving_up(endpoint, monkeypatch):
    judge = endpoint(good).judge(workers=1, give_up=1)
    complete = judge._complete

    def meanwhile_another_fails(*given):
        judge._count(False, "silence")
        return complete(*given)

    monkeypatch.setattr(judge, "_complete", meanwhile_another_fails)
    verdicts = asked(judge, questions(2))
    assert (verdicts["q0"].value, verdicts["q1"].reason) == (7, "the endpoint did not answer")


def test_an_endpoint_that_was_given_up_is_asked_the_next_questions(endpoint):
    server = endpoint(lambda text, n, request: None if text == "q0" else "Rating: 7")
    judge = server.judge(workers=1, tries=1, give_up=1)
    assert asked(judge, questions(2))["q1"].reason == "the endpoint did not answer"
    assert asked(judge, [question("q1")])["q1"].value == 7


@pytest.mark.parametrize("answer", ["Rating: 7", "Well.", (400, "no")])
def test_only_failures_in_a_row_count(endpoint, answer):
    server = endpoint(lambda text, n, request: answer if text in ("q2", "q5", "q8") else None)
    verdicts = asked(server.judge(workers=1, tries=1, give_up=3), questions(9))
    assert not any(v.reason == "the endpoint did not answer" for v in verdicts.values())


@pytest.mark.parametrize(
    "body", [b"<html>Welcome</html>", b'{"oops', b'{"error": {"message": "no"}}', b'{"choices": [{}]}', b"[1]", b'"x"']
)
def test_an_answer_that_is_no_chat_completion_is_no_answer(endpoint, body):
    server = endpoint(lambda *_: body)
    verdicts = asked(server.judge(workers=1, give_up=2), questions(4))
    assert verdicts["q0"].value is None
    assert verdicts["q0"].reason.startswith("its answer is no chat completion: ")
    assert verdicts["q3"].reason == "the endpoint did not answer"


HTML = b"<html><head><title>502 Bad Gateway</title></head>\n<body>nginx</body></html>"


@pytest.mark.parametrize("status", [400, 502])
def test_a_page_of_a_proxy_is_no_verdict_and_the_others_are_judged(endpoint, status):
    page = (status, HTML, {"Content-Type": "text/html"})
    server = endpoint(lambda text, n, request: page if text == "q1" else "Rating: 7")
    verdicts = asked(server.judge(), questions(3))
    assert [verdicts[f"q{i}"].value for i in range(3)] == [7, None, 7]
    assert verdicts["q1"].reason.startswith(f"HTTP {status}: <html>") and verdicts["q1"].reply == ""
    assert "\n" not in verdicts["q1"].reason


@pytest.mark.parametrize("kind", ["text/html", "application/json", "text/plain; charset=utf-16"])
@pytest.mark.parametrize(
    "body", [HTML, b"", b"\xff\xfe\x00", b'{"choices": [{"message": {"content": "Rating: 7"', b"null"]
)
def test_a_page_or_cut_json_in_place_of_an_answer_is_unjudged_whatever_it_calls_itself(endpoint, kind, body):
    server = endpoint(lambda text, n, request: (200, body, {"Content-Type": kind}) if text == "q0" else "Rating: 7")
    verdicts = asked(server.judge(tries=1), questions(2))
    assert verdicts["q1"].value == 7
    assert verdicts["q0"].value is None and verdicts["q0"].reason


def test_an_answer_that_breaks_off_is_asked_for_again_and_then_unjudged(endpoint):
    half = (200, b'{"choices": [{"message": {"content": "Rating: 7"', {"Content-Length": "999"})
    server = endpoint(lambda text, n, request: half if text == "q0" or n == 0 else "Rating: 7")
    verdicts = asked(server.judge(tries=3), questions(2))
    assert (verdicts["q0"].value, verdicts["q1"].value) == (None, 7)
    assert verdicts["q0"].reason.startswith("no answer, 3 times: ") and len(server.requests) == 3 + 2


@pytest.mark.parametrize("error", [{"message": "overloaded"}, "overloaded", {"code": 529, "type": "overloaded"}])
def test_an_error_that_comes_as_a_success_says_why(endpoint, error):
    server = endpoint(lambda *_: json.dumps({"error": error}).encode())
    verdict = asked(server.judge(), [question("q")])["q"]
    assert verdict.value is None and "overloaded" in verdict.reason


def test_why_verdicts_are_missing_is_printed_the_most_frequent_reason_first(endpoint, tmp_path, capsys):
    script = {"q0": (400, "too long"), "q1": (400, "too long"), "q2": "Well."}
    judge = endpoint(lambda text, n, request: script.get(text, "Rating: 7")).judge()
    values = evaluation.verdicts_of(judge, questions(4), "base", argparse.Namespace(folder=tmp_path))
    assert values == {"q0": None, "q1": None, "q2": None, "q3": 7.0}
    said = "base: 3 verdicts are missing (2x HTTP 400: too long; 1x no verdict in the reply)"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_question_is_unjudged_and_the_others_are_judged(endpoint, status):
    server = endpoint(lambda text, n, request: (status, "max_tokens is too large: 16") if text == "q1" else "Rating: 7")
    verdicts = asked(server.judge(), questions(4))
    assert verdicts["q1"] == Verdict("q1", None, "", f"HTTP {status}: max_tokens is too large: 16")
    assert [verdicts[f"q{i}"].value for i in (0, 2, 3)] == [7, 7, 7]
    assert len(server.requests) == 4 and all("max_tokens" in r for r in server.requests)


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_an_answer_that_all_would_get_stops_at_once(endpoint, status):
    server = endpoint(lambda text, n, request: (status, "sorry") if text == "q2" else "Rating: 7")
    kept = []

    def keep(verdicts):
        time.sleep(0.05)  # time for a worker that went on
        kept.extend(verdicts)

    said = re.escape(f"at {server.url} says HTTP {status}: sorry; ") + ".*http://host:8000/v1, .*JUDGE_API_KEY"
    with pytest.raises(UserError, match=said):
        server.judge(workers=1).ask(questions(9), keep)
    assert [v.question for v in kept] == ["q0", "q1"] and len(server.requests) == 3


def test_the_key_reaches_the_server_and_nothing_else(endpoint, monkeypatch, capsys, caplog):
    monkeypatch.setenv("JUDGE_API_KEY", KEY + "\n")
    caplog.set_level("DEBUG")
    echo = f"Incorrect API key provided: {KEY}"
    script = {"q0": "Rating: 7", "q1": echo, "q2": (400, echo), "q3": (500, echo), "q4": (422, "x" * 475 + KEY)}
    script["q5"] = json.dumps({"error": echo}).encode()
    server = endpoint(lambda text, n, request: script.get(text, (401, echo)))
    judge = server.judge(tries=2)
    verdicts = asked(judge, questions(6))
    assert verdicts["q1"].reply == "Incorrect API key provided: ***" == verdicts["q2"].reason.removeprefix("HTTP 400: ")
    with pytest.raises(UserError, match="401") as caught:
        judge.ask([question("other")], print)
    said = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__context__)
    printed = capsys.readouterr()
    for text in (str(verdicts), repr(judge), str(vars(judge)["_create"]), said, printed.out, printed.err, caplog.text):
        assert KEY not in text and KEY[:12] not in text
    assert set(server.keys) == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("keys", "sent"),
    [({}, "none"), ({"OPENAI_API_KEY": "b"}, "b"), ({"OPENAI_API_KEY": "b", "JUDGE_API_KEY": "a"}, "a")],
)
def test_which_key_is_sent(endpoint, monkeypatch, keys, sent):
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    server = endpoint(good)
    asked(server.judge(), [question("q")])
    assert server.keys == [f"Bearer {sent}"]


def test_without_a_key_nothing_is_hidden(endpoint):
    assert asked(endpoint(lambda *_: "It has none.").judge(), [question("q")])["q"].reply == "It has none."


@pytest.mark.parametrize("key", ["sk-\u201cquoted\u201d", "sk-two\nlines"])
def test_a_key_that_no_header_can_carry_is_refused_without_repeating_it(endpoint, monkeypatch, key):
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pytest.raises(UserError, match="JUDGE_API_KEY or OPENAI_API_KEY has characters that no key has") as caught:
        EndpointJudge("http://127.0.0.1/v1", "big")
    assert "sk-" not in str(caught.value)


def test_max_tokens_is_sent_by_the_name_that_the_server_takes(endpoint, capsys):
    def strict(text, n, request):
        if "max_tokens" in request:
            return 400, "Unsupported parameter: 'max_tokens' is not supported with this model."
        if "temperature" in request:
            return 400, f"Unsupported value: 'temperature' does not support {request['temperature']} with this model."
        return "Rating: 7"

    server = endpoint(strict)
    judge = server.judge(workers=4)
    assert all(v.value == 7 for v in asked(judge, questions(12)).values())
    before = len(server.requests)
    assert asked(judge, [question("q")])["q"].value == 7
    (last,) = server.requests[before:]  # known by now
    assert (set(last), last["max_completion_tokens"]) == ({"model", "messages", "max_completion_tokens"}, 16)
    assert capsys.readouterr().out.splitlines() == [
        "the judge big takes no max_tokens: max_completion_tokens is sent",
        "the judge big takes no temperature: its verdicts may vary",
    ]


def test_a_parameter_is_left_out_once_and_no_more(endpoint):
    server = endpoint(lambda *_: (400, "the temperature is wrong"))
    assert asked(server.judge(), [question("q")])["q"].reason == "HTTP 400: the temperature is wrong"
    assert [set(r) & {"temperature"} for r in server.requests] == [{"temperature"}, set()]


def test_verdicts_are_kept_as_they_come_and_in_the_calling_thread(endpoint):
    first = threading.Event()
    server = endpoint(lambda text, n, request: good(text, n, request) if text != "q3" or first.wait(5) else "late")
    kept = []

    def keep(verdicts):
        kept.append([(v.question, v.value) for v in verdicts])
        assert threading.current_thread() is threading.main_thread()
        first.set()

    server.judge(workers=2).ask(questions(4), keep)
    assert sorted(kept) == [[(f"q{i}", 7.0)] for i in range(4)]


def test_as_many_questions_as_workers_are_under_way(endpoint):
    together, lock, now, most = threading.Barrier(4), threading.Lock(), [0], [0]

    def script(text, n, request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(5)
        time.sleep(0.05)  # a fifth would come in by now
        with lock:
            now[0] -= 1
        return "Rating: 7"

    verdicts = asked(endpoint(script).judge(workers=4), questions(12))
    assert all(v.value == 7 for v in verdicts.values()) and most == [4]


def test_an_interrupt_keeps_what_is_finished_and_asks_no_more(endpoint):
    awake, kept = threading.Event(), []

    def script(text, n, request):
        if text in ("q0", "q1"):
            return "Rating: 7"
        if text == "q2":
            while len(kept) < 2:  # the main thread may be late
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        awake.wait(10)
        return "Rating: 7"

    server, start = endpoint(script), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        server.judge(workers=1).ask(questions(20), kept.extend)
    assert time.monotonic() - start < 5
    awake.set()
    time.sleep(0.2)
    assert [v.question for v in kept] == ["q0", "q1"] and len(server.requests) == 3


def test_an_interrupted_process_does_not_wait_for_answers(endpoint, tmp_path):
    hanging, awake = threading.Event(), threading.Event()

    def script(text, n, request):
        hanging.set()
        awake.wait(30)
        return "Rating: 7"

    program = (
        "import sys\n"
        "from benchmarks import judges\n"
        "question = judges.Question('q', [{'role': 'user', 'content': 'q'}], [], float, 16)\n"
        "judges.EndpointJudge(sys.argv[1], 'big').ask([question], print)\n"
    )
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", program, endpoint(script).url], cwd=root, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    try:
        assert hanging.wait(30)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - start < 3 and b"KeyboardInterrupt" in errors
    finally:
        process.kill()
        awake.set()


def test_a_mistake_in_reading_is_not_taken_for_nonsense(endpoint):
    def broken(reply):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        asked(endpoint(good).judge(), [Question("q", [{"role": "user", "content": "q"}], FORM, broken, 16)])


def test_what_is_kept_can_be_written_down(endpoint):
    half = b'{"choices": [{"message": {"content": "Good \\ud83d"}}]}'  # of an emoji, cut off
    verdict = asked(endpoint(lambda *_: half).judge(), [question("q")])["q"]
    assert verdict.reply.encode() == b"Good ?"


def test_no_questions_no_requests(endpoint, llm):
    server = endpoint(good)
    assert asked(server.judge(), []) == asked(LocalJudge(llm, "tiny"), []) == {}
    assert server.requests == []


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "ftp://host/v1", "http://", "http:///v1", "http://host:99999/v1", "http://[::1/v1"]
)
def test_a_url_that_is_none_is_named(url):
    with pytest.raises(UserError, match=re.escape(f"the judge's url {url!r} is none: give its base")):
        EndpointJudge(url, "big")


@pytest.mark.parametrize("url", [f"http://me:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"https://host/v1#{KEY}"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url):
    with pytest.raises(UserError, match="JUDGE_API_KEY") as caught:
        EndpointJudge(url, "big")
    assert KEY not in str(caught.value)


def test_without_the_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="pip install openai"):
        EndpointJudge("http://host/v1", "big")
