"""Evaluations from end to end on a tiny model: what is asked, what is on disk, what goes on after a kill."""

import itertools
import json
import math
import re
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import tiny_llm

import eval as evaluation
import model
from benchmarks import judges, results
from benchmarks import sets as benchmarks
from config import Config
from data import UserError
from engine import heldout, loading, stats

PROMPTS = [f"Name {n} rivers of the north." for n in ("two", "three", "four", "five", "six", "seven", "eight", "nine")]


@pytest.fixture
def tiny(monkeypatch):
    """The model is the tiny one, whatever its name; `calls` are the prompts put to it, `loads` the models' names."""
    calls, loads = [], []
    generate = model.LLM.generate

    def counted(self, prompts, **settings):
        calls.extend((settings.get("desc"), tuple(prompt)) for prompt in prompts)
        return generate(self, prompts, **settings)

    def load(name, cfg, token_budget=evaluation.TOKEN_BUDGET):
        loads.append(name)
        llm = tiny_llm(trained=False, token_budget=token_budget)
        llm.model.config.max_position_embeddings = 16_384
        return llm

    monkeypatch.setattr(model.LLM, "generate", counted)
    monkeypatch.setattr(evaluation, "load_model", load)
    monkeypatch.setattr(loading, "resolve", lambda name: name)
    monkeypatch.setattr(evaluation, "CHUNK", 3)
    monkeypatch.setattr(judges, "CHUNK", 3)
    monkeypatch.setattr(benchmarks, "REASON_TOKENS", 4)
    tiny_llm.calls, tiny_llm.loads = calls, loads
    return tiny_llm


@pytest.fixture
def run(tmp_path):
    """A run's folder with an adapter that changes what the model says."""
    return adapter(tmp_path / "run")


def adapter(folder, seed=0, **config):
    folder.mkdir()
    llm = tiny_llm(seed)
    llm.model.peft_config["default"].base_model_name_or_path = "tiny"
    llm.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "load_in": "fp32", "preset": "demo", **config}))
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def command(bench, tmp_path, *more):
    return [bench, "--model", "tiny", "--load-in", "fp32", "--max-new-tokens", "8", *map(str, more)] + (
        [] if "--output" in more else ["--output", str(tmp_path / "out")]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server on this machine: `say` turns the judge's prompt into its reply; `asked` counts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            server.asked.append(prompt)
            message = {"role": "assistant", "content": server.say(prompt)}
            reply = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
            content = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", **reply}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------- one evaluation


def test_the_base_model_is_always_measured_and_all_adapters_share_one_load(tiny, tmp_path, prompts, run):
    other = adapter(tmp_path / "other", seed=1)
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run, other))
    assert tiny.loads == ["tiny"]
    out = tmp_path / "out"
    said = {path.name.split("-")[1]: [r["text"] for r in lines(path)] for path in sorted(out.glob("answers-*.jsonl"))}
    assert {name.removesuffix(".jsonl") for name in said} == {"base", "run", "other"}

    alone = tiny_llm(trained=False)  # each model by itself, as its own load would answer
    ids = [alone.encode(p) for p in PROMPTS]

    def answers(llm):
        return [c.text for (c,) in llm.generate(ids, max_new_tokens=8, temperature=0)]

    assert said["base.jsonl"] == answers(alone)
    assert said["run"] == answers(tiny_llm(0)) != said["base.jsonl"]
    alone.take_adapter(other / "adapter")
    assert said["other"] == answers(alone) != said["run"]


def test_thoughts_stay_on_disk_and_are_shown_to_no_judge_or_scorer(tiny, tmp_path, prompts, run, endpoint, monkeypatch):
    real, scored, numbers = model.LLM.generate, [], itertools.count()
    winrate = benchmarks.BENCHMARKS["winrate"]

    def thinking(self, prompts, **settings):
        groups = real(self, prompts, **settings)
        return [[replace(c, text=f"<think>\nSECRET\n</think>\n\nAnswer {next(numbers)}.") for c in g] for g in groups]

    def score(item, answer, verdicts):
        scored.append(answer["text"])
        return type(winrate).score(winrate, item, answer, verdicts)

    monkeypatch.setattr(model.LLM, "generate", thinking)
    monkeypatch.setattr(winrate, "score", score)
    endpoint.say = lambda prompt: "Better: A"
    url = ["--judge", "big", "--judge-url", endpoint.url]
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run, *url))
    assert scored and all(text.startswith("Answer ") for text in scored)
    assert endpoint.asked and not any("SECRET" in prompt or "think>" in prompt for prompt in endpoint.asked)
    out = tmp_path / "out"
    assert all("SECRET" in line["text"] and line["words"] == 2 for line in lines(out / "answers-base.jsonl"))
    assert json.loads((out / "results-big.json").read_text())["models"]["base"]["mean_words"] == 2


def test_results_have_intervals_paired_differences_lengths_and_the_sampling(tiny, tmp_path, prompts, run, capsys):
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run))
    result = json.loads((tmp_path / "out" / "results-base.json").read_text())
    label = next(name for name in result["models"] if name != "base")
    trained = result["models"][label]
    games = np.array([score["win_rate"] for score in result["scores"][label].values()])
    wins = games[..., :1] / games[..., 1:]
    assert trained["metrics"]["win_rate"]["value"] == pytest.approx(wins[:, 0, 0].mean())
    assert trained["metrics"]["win_rate"]["low"] <= wins[:, 0, 0].mean() <= trained["metrics"]["win_rate"]["high"]
    assert result["models"]["base"]["metrics"]["win_rate"]["value"] == 0.5
    assert trained["difference"]["win_rate"]["value"] == pytest.approx(wins[:, 0, 0].mean() - 0.5)
    assert 0 < trained["metrics"]["length_controlled"]["value"] < 1
    answers = lines(only(tmp_path / "out", "answers-run*.jsonl"))
    assert trained["mean_tokens"] == pytest.approx(sum(a["tokens"] for a in answers) / 8)
    assert trained["mean_words"] == pytest.approx(sum(len(a["text"].split()) for a in answers) / 8)
    assert result["sampling"] == "greedy, up to 8 tokens, seed 0"
    said = capsys.readouterr().out
    assert trained["difference"]["win_rate"]["said"] in said and "| tokens |" in said
    assert "flatters what it trained" in said  # the judge is the base model


def test_two_copies_of_an_adapter_score_the_same_and_no_change_is_reported(tiny, tmp_path, capsys):
    untrained = tiny_llm(trained=False)
    untrained.model.peft_config["default"].base_model_name_or_path = "tiny"
    untrained.model.save_pretrained(tmp_path / "same", save_embedding_layers=False)
    evaluation.main(command("ifeval", tmp_path, "--adapter", tmp_path / "same", "--limit", "6"))
    said = capsys.readouterr().out
    assert "no detectable change (+0.000, 95% interval +0.000 to +0.000, p = 1, 6 items)" in said


@pytest.mark.parametrize(("bench", "tokens"), [("ifeval", 1280), ("healthbench", 1024), ("writing", 2048)])
def test_answers_may_be_as_long_as_the_benchmark_says_unless_told_otherwise(bench, tokens, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "answers_of", lambda *_: pytest.fail("answers"))
    with pytest.raises(pytest.fail.Exception, match="answers"):
        evaluation.main([bench, "--model", "tiny", "--load-in", "fp32", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["max_new_tokens"] == tokens


def test_a_limit_takes_prompts_at_random_and_a_higher_one_adds_to_them(tiny, tmp_path):
    ids = []
    for limit in (4, 7):
        evaluation.main(command("ifeval", tmp_path, "--limit", limit))
        ids.append(list(json.loads((tmp_path / "out" / "results.json").read_text())["scores"]["base"]))
    assert ids[1][:4] == ids[0] and len(ids[1]) == 7
    assert (
        ids[0]
        != [item.id for item in benchmarks.BENCHMARKS["ifeval"].items(evaluation.parser().parse_args(["ifeval"]))][:4]
    )
    assert len(tiny.calls) == 7  # the first four were not answered again


def test_sampled_answers_do_not_depend_on_where_a_run_was_killed(tiny, tmp_path):
    more = ("--limit", 9, "--temperature", 1)
    evaluation.main(command("ifeval", tmp_path, *more, "--output", str(tmp_path / "whole")))
    whole = (tmp_path / "whole" / "answers-base.jsonl").read_text()
    half = tmp_path / "half"
    half.mkdir()
    (half / "answers-base.jsonl").write_text("".join(whole.splitlines(keepends=True)[:3]))
    evaluation.main(command("ifeval", tmp_path, *more, "--output", str(half)))
    assert (half / "answers-base.jsonl").read_text() == whole


# ------------------------------------------------------------------------------------------------- going on


class Killed(Exception):
    pass


def rows_of(bench):
    """Four prompts with two criteria each."""
    rubrics = [{"criterion": "Is true", "points": 5}, {"criterion": "Is rude", "points": -3}]
    checklist = [
        {"name": "Truth", "criteria_description": "Is it true?"},
        {"name": "Style", "criteria_description": "?"},
    ]
    for n, prompt in enumerate(PROMPTS[:4]):
        if bench == "healthbench":
            yield {"prompt_id": str(n), "prompt": [{"role": "user", "content": prompt}], "rubrics": rubrics}
        else:
            yield {"index": n, "lang": "en", "query": prompt, "checklist": checklist}


@pytest.mark.parametrize("bench", ["ifeval", "winrate", "writing", "healthbench"])
def test_a_killed_evaluation_goes_on_without_a_repeated_call(bench, tiny, tmp_path, prompts, run, monkeypatch):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(bench)))
    more = ["--adapter", run, *(["--data", prompts if bench == "winrate" else data] if bench != "ifeval" else [])]
    more += ["--limit", 4]
    evaluation.main(command(bench, tmp_path, *more, "--output", str(tmp_path / "whole")))
    whole = list(tiny.calls)
    assert len(whole) >= 8
    counted = model.LLM.generate
    tiny.calls.clear()
    for allowed in range(1, 100):  # killed at every call of the model in turn, after the first of a process

        def generate(self, rows, left=[allowed, 1], **settings):  # noqa: B006 (a counter of its own each time)
            if left[1] == 0:
                raise Killed
            left[1] -= 1
            return counted(self, rows, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(model.LLM, "generate", generate)
            try:
                evaluation.main(command(bench, tmp_path, *more))
                break
            except Killed:
                pass
    assert sorted(tiny.calls, key=str) == sorted(whole, key=str)
    first, second = (next((tmp_path / name).glob("results*.json")).read_text() for name in ("whole", "out"))
    assert json.loads(first) == json.loads(second)


@pytest.mark.parametrize("missing", [20, 1])  # 1: the end of the line alone, to which the next would be glued
def test_half_a_line_that_a_kill_left_is_dropped_and_answered_again(tiny, tmp_path, missing):
    evaluation.main(command("ifeval", tmp_path, "--limit", 3))
    path = tmp_path / "out" / "answers-base.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-missing])
    tiny.calls.clear()
    evaluation.main(command("ifeval", tmp_path, "--limit", 3))
    assert path.read_bytes() == whole and len(tiny.calls) == 1


def test_another_judge_reuses_the_answers_and_keeps_the_first_judge_s_results(tiny, tmp_path, prompts, run, endpoint):
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run))
    tiny.calls.clear()
    endpoint.say = lambda prompt: "Reason: so\nBetter: tie"
    more = ("--data", prompts, "--adapter", run, "--judge-url", endpoint.url, "--judge", "big/judge")
    evaluation.main(command("winrate", tmp_path, *more))
    assert tiny.calls == [] and len(endpoint.asked) == 16
    assert {p.name for p in (tmp_path / "out").glob("results*")} == {"results-base.json", "results-big-judge.json"}
    result = json.loads((tmp_path / "out" / "results-big-judge.json").read_text())
    assert {m["metrics"]["win_rate"]["value"] for m in result["models"].values()} == {0.5}


def test_answers_to_a_prompt_that_has_changed_are_not_taken(tiny, tmp_path, prompts, run):
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run))
    prompts.write_text("\n".join(["Where is the longest river?", *PROMPTS[1:]]))
    tiny.calls.clear()
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run))
    assert sum(desc == "answer" for desc, _ in tiny.calls) == 2  # by the base model and by the adapter
    assert sum(desc == "judge" for desc, _ in tiny.calls) == 2  # in both orders


def test_a_folder_with_answers_made_in_another_way_is_refused(tiny, tmp_path):
    evaluation.main(command("ifeval", tmp_path, "--limit", 3))
    with pytest.raises(UserError, match=r"holds answers of temperature 0.0, not 0.5.*--output"):
        evaluation.main(command("ifeval", tmp_path, "--limit", 3, "--temperature", 0.5))


def test_an_adapter_that_was_trained_on_is_another_model(tiny, tmp_path, prompts, run):
    before = evaluation.find_adapter(str(run)).label
    with (run / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    assert evaluation.find_adapter(str(run)).label != before


# ------------------------------------------------------------------------------------------------- the judge


def test_healthbench_by_an_endpoint_with_known_verdicts_is_the_score_worked_out_by_hand(tiny, tmp_path, endpoint):
    rows = [
        {
            "prompt_id": f"p{n}",
            "prompt": [{"role": "user", "content": f"Question {n}?"}],
            "rubrics": [{"criterion": f"{n}-{k}", "points": points} for k, points in enumerate(all_points)],
        }
        for n, all_points in enumerate([[7, 5, 10, -6], [4, -8], [3]])
    ]
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    met = {"0-0", "0-2", "0-3", "1-0", "1-1"}

    def say(prompt):
        (criterion,) = re.findall(r"^\[-?\d+\] (\d-\d)$", prompt, re.MULTILINE)
        return json.dumps({"explanation": "so", "criteria_met": criterion in met})

    endpoint.say = say
    more = ("--data", data, "--judge-url", endpoint.url, "--judge", "known")
    evaluation.main(command("healthbench", tmp_path, *more))
    result = json.loads((tmp_path / "out" / "results-known.json").read_text())
    each = {item: score["score"][0][0] for item, score in result["scores"]["base"].items()}
    assert each == {"p0": pytest.approx(11 / 22), "p1": pytest.approx(-4 / 4), "p2": 0.0}
    assert result["models"]["base"]["metrics"]["score"]["value"] == 0.0  # the mean, -1/6, is clipped
    assert len(endpoint.asked) == 7


def test_an_unjudged_answer_is_left_out_and_counted_and_asked_for_again(tiny, tmp_path, endpoint, capsys):
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of("writing")))

    def measured(say):
        endpoint.say = say
        endpoint.asked.clear()
        more = ("--data", data, "--judge-url", endpoint.url, "--judge", "moody")
        evaluation.main(command("writing", tmp_path, *more))
        of_base = json.loads((tmp_path / "out" / "results-moody.json").read_text())["models"]["base"]
        return of_base["unjudged"], of_base["metrics"]["score"]["value"], of_base["metrics"]["score"]["n"]

    six = '{"score": 6, "reason": "fair"}'
    assert measured(lambda prompt: "no comment") == (4, None, 0)  # and not 0
    assert measured(lambda prompt: "no comment" if "three rivers" in prompt else six) == (1, 6.0, 3)
    assert "1 answers are unjudged and left out; the same command asks for them again" in capsys.readouterr().out
    assert measured(lambda prompt: '{"score": 2, "reason": "poor"}') == (0, (3 * 6 + 2) / 4, 4)
    assert len(endpoint.asked) == 2  # the two criteria of the one


def test_another_local_judge_is_loaded_in_the_policy_s_place(tiny, tmp_path, prompts, run, capsys):
    evaluation.main(command("winrate", tmp_path, "--data", prompts, "--adapter", run, "--judge", "other/judge"))
    assert tiny.loads == ["tiny", "other/judge"]
    assert (tmp_path / "out" / "results-other-judge.json").exists()
    assert "flatters" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- heldout


@pytest.fixture
def open_gates(monkeypatch):
    """A random model's problems pass."""
    for gate in ("problem_fault", "reference_fault", "criterion_fault"):
        monkeypatch.setattr(heldout.rubric, gate, lambda text, *_: None if text else "empty")


def test_held_out_problems_are_never_of_documents_that_an_adapter_was_trained_on(tiny, tmp_path, open_gates):
    corpus = tmp_path / "notes"
    corpus.mkdir()
    for i in range(9):
        (corpus / f"{i}.txt").write_text(f"Document number {i} is about the bread of village {i}. " * 9)
    small = {
        "episodes": "",
        "corpus": str(corpus),
        "problem_tokens": 16,
        "reference_tokens": 16,
        "max_words": 80,
        "tries": 1,
    }
    runs = [adapter(tmp_path / name, seed, **small) for seed, name in enumerate(["one", "two"])]
    trained = {0: ("0", "1"), 1: ("1", "2", "3")}
    documents = {
        d.id.split("/")[-1][0]: d
        for d in evaluation.sources.open_corpus(Config(corpus=str(corpus), max_words=80)).epoch(0)
    }
    for seed, folder in enumerate(runs):
        episodes = [{"document": {"id": documents[n].id, "text": documents[n].text}} for n in trained[seed]]
        (folder / "episodes.jsonl").write_text("".join(json.dumps(e) + "\n" for e in episodes))
    evaluation.main(command("heldout", tmp_path, "--adapter", runs[0], "--limit", 4))
    evaluation.main(command("heldout", tmp_path, "--adapter", *runs, "--limit", 4))
    result = json.loads((tmp_path / "out" / "results-base.json").read_text())
    used = {name.split("/")[-1][0] for name in result["scores"]["base"]}
    assert used and used.isdisjoint("0123")
    names = {"grade", "reward", "similarity", "reference_logp", "win_rate"}
    assert set(result["models"]["base"]["metrics"]) == names
    logps = [m["metrics"]["reference_logp"]["value"] for m in result["models"].values()]
    assert len(set(logps)) == 3 and max(logps) < 0  # a pass of each model of its own
    assert {m["metrics"]["win_rate"]["value"] for m in result["models"].values()} == {None}  # the judge is the base
    made = [e["document"]["id"] for e in lines(tmp_path / "out" / "heldout.jsonl")]
    assert len(made) == len(set(made))  # what was there is not made again


def test_the_best_adapter_has_seen_what_it_was_chosen_by_too(tmp_path):
    run = adapter(tmp_path / "run")
    shutil.copytree(run / "adapter", run / "best")
    for name in ("episodes", "heldout"):
        (run / f"{name}.jsonl").write_text(json.dumps({"document": {"id": "d", "text": f"of {name}"}}) + "\n")
    found = {name: evaluation.find_adapter(str(run / name)) for name in (".", "best")}
    assert evaluation.texts_seen(found["."], run) == {"of episodes"}
    assert evaluation.texts_seen(found["best"], run) == {"of episodes", "of heldout"}


def test_a_run_without_episodes_is_one_line(tmp_path):
    run = adapter(tmp_path / "run")
    with pytest.raises(UserError, match=r"^--adapter \S+run: it has no episodes.jsonl, which tells what documents"):
        evaluation.texts_seen(evaluation.find_adapter(str(run)), run)


# ------------------------------------------------------------------------------------------------- settings


def settings_of(tmp_path, monkeypatch, *flags, **trained):
    """What `eval.py heldout` is set to for a run of these settings, on a machine of which a large card is made much."""
    monkeypatch.setattr(evaluation, "pick_preset", lambda: ("48gb", "as if"))
    folder = adapter(tmp_path / "run", **trained)
    args = evaluation.parser().parse_args(["heldout", "--adapter", str(folder), *flags])
    return evaluation.configure(args, ("model", "load_in", "task", "corpus", "seed"), folder)


def test_what_a_run_was_made_with_counts_and_not_this_machine(tmp_path, monkeypatch):
    cfg = settings_of(tmp_path, monkeypatch, judge="generate", max_new_tokens=48, problem_tokens=30)
    assert (cfg.preset, cfg.model, cfg.load_in, cfg.judge) == ("demo", "tiny", "fp32", "generate")
    assert (cfg.max_new_tokens, cfg.problem_tokens, cfg.group_size, cfg.corpus) == (48, 30, 4, "samples")
    assert not heldout.yardstick(cfg).gate and not heldout.yardstick(cfg).check_rubric  # as the demo's


def test_a_run_of_no_preset_that_is_known_has_its_own_settings_and_the_defaults(tmp_path, monkeypatch):
    assert settings_of(tmp_path, monkeypatch, preset="auto", rollout_tokens=99).rollout_tokens == 99


def test_no_card_too_small_for_the_defaults_stops_the_evaluation_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("config.torch.cuda.is_available", lambda: pytest.fail("asked for the card"))
    folder = adapter(tmp_path / "run")
    args = evaluation.parser().parse_args(["heldout"])
    assert evaluation.configure(args, (), folder).preset == "demo"


def test_flags_win_over_what_a_run_was_made_with(tmp_path, monkeypatch):
    flags = ["--preset", "16gb", "--load-in", "bf16", "--task", "health"]
    cfg = settings_of(tmp_path, monkeypatch, *flags, rollout_tokens=99, max_new_tokens=48, task="writing")
    assert (cfg.preset, cfg.load_in, cfg.task) == ("16gb", "bf16", "health")
    assert (cfg.rollout_tokens, cfg.max_new_tokens) == (32_768, 48)


def test_without_a_run_the_lengths_are_those_of_training_on_the_task():
    args = evaluation.parser().parse_args(["audit", "--preset", "24gb", "--task", "writing"])
    cfg = evaluation.configure(args, ("model", "judge", "task", "corpus", "seed"))
    assert (cfg.max_new_tokens, cfg.reference_tokens, cfg.rollout_tokens) == (2_048, 1_536, 98_304)


def test_a_tracker_that_a_run_had_elsewhere_is_not_needed(tmp_path, monkeypatch):
    assert settings_of(tmp_path, monkeypatch, tracker="wandb").tracker == "none"


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("ifeval", "--adapter", "nowhere"), r"--adapter nowhere: no adapter there"),
        (("winrate",), r"winrate compares an adapter with the base model: give --adapter"),
        (("writing", "--judge-url", "http://127.0.0.1:9"), r"--judge-url needs --judge NAME"),
        (("ifeval", "--limit", "0"), r"--limit 0: must be 1 or more"),
        (("ifeval", "--temperature", "-1"), r"--temperature -1.0: must be 0 \(greedy\) or more"),
        (("compare", "nowhere"), r"nowhere: no finished evaluation there"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(more, said, tiny, tmp_path):
    with pytest.raises(UserError, match=said):
        evaluation.main(list(more))
    assert tiny.loads == []


def test_an_adapter_of_another_model_is_refused_before_anything_is_loaded(tiny, tmp_path, run):
    with pytest.raises(UserError, match=r"was trained on tiny, not on --model huge"):
        evaluation.main(["ifeval", "--model", "huge", "--adapter", str(run)])
    assert tiny.loads == []


def test_prompts_that_do_not_fit_the_context_are_left_out_for_all_models(tiny, tmp_path, run, capsys):
    data = tmp_path / "long.txt"
    data.write_text("\n".join([*PROMPTS[:3], "word " * 4_000]))
    evaluation.main(command("winrate", tmp_path, "--data", data, "--adapter", run))
    assert "1 prompts leave no room for 8 tokens in the context: left out (line-4)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results-base.json").read_text())["items"] == 3


# ------------------------------------------------------------------------------------------------- compare, chat


def test_compare_puts_evaluations_of_a_benchmark_into_one_table(tiny, tmp_path, capsys):
    for name in ("a", "b"):
        evaluation.main(command("ifeval", tmp_path, "--limit", 6, "--output", str(tmp_path / name)))
    capsys.readouterr()
    evaluation.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    said = capsys.readouterr().out
    assert said.count("| tiny (fp32) |") == 2 and said.count("strict_average") == 1


def test_chat_asks_both_models_with_their_own_histories(tiny, tmp_path, run, monkeypatch, capsys):
    typed = iter(["Hello.", "And then?", "", "Hello."])

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    evaluation.main(["chat", "--adapter", str(run), "--max-new-tokens", "8"])
    prompts = [ids for _, ids in tiny.calls]
    assert len(prompts) == 6
    assert prompts[0] == prompts[1] == prompts[4] == prompts[5]  # the empty line began anew
    assert prompts[2] != prompts[3] and prompts[2][: len(prompts[0])] == prompts[0]
    said = capsys.readouterr().out
    label = evaluation.find_adapter(str(run)).label
    assert said.count("\nbase: ") == said.count(f"\n{label}: ") == 3


# ------------------------------------------------------------------------------------------------- results


def measured(*metrics, clip=None):
    bench = benchmarks.Benchmark()
    bench.metrics, bench.clip = metrics, clip
    return bench


def test_the_table_and_the_summary_are_of_the_numbers_given():
    answers = {
        m: {i: {"words": w, "tokens": 2 * w, "finished": w < 9} for i, w in zip("abc", ws, strict=True)}
        for m, ws in {"base": [1, 2, 3], "new": [7, 8, 9]}.items()
    }
    scores = {
        "base": {"a": {"m": [(1.0, 1.0)]}, "b": {"m": [(0.0, 1.0)]}, "c": {"m": [(math.nan, math.nan)]}},
        "new": {"a": {"m": [(1.0, 1.0)]}, "b": {"m": [(1.0, 1.0)]}, "c": {"m": [(1.0, 1.0)]}},
    }
    found = results.summary(measured("m"), answers, scores)
    base, new = found["models"]["base"], found["models"]["new"]
    assert (base["metrics"]["m"]["value"], new["metrics"]["m"]["value"]) == (0.5, 1.0)
    assert (base["unjudged"], new["unjudged"]) == (1, 0)
    assert new["difference"]["m"]["value"] == 0.5 and new["difference"]["m"]["n"] == 2  # over items with both
    assert (new["mean_words"], new["mean_tokens"], new["cut_off"]) == (8.0, 16.0, pytest.approx(1 / 3))
    json.dumps(found, allow_nan=False)
    shown = results.as_markdown([{**found, "model": "tiny", "load_in": "fp32", "judge": "j"}])
    head, _, first, second, *said = shown.split("\n")
    assert [cell.strip() for cell in head.split("|")[1:4]] == ["model", "judge", "items"]
    assert "| 0.500 [" in first and "| 1.000 [" in second and "| +0.500 [" in second and "| 33%" in second
    assert said[0] == f"new, m against base: {new['difference']['m']['said']}" and said[1].startswith(
        "1 answers are un"
    )


def test_a_metric_s_interval_is_that_of_stats():
    scores = {"base": {str(i): {"m": [(float(i % 3), 2.0)]} for i in range(30)}}
    answers = {"base": {str(i): {"words": 1, "tokens": 1, "finished": True} for i in range(30)}}
    found = results.summary(measured("m", clip=(0.0, 1.0)), answers, scores)["models"]["base"]["metrics"]["m"]
    expected = stats.interval(np.array([[[i % 3, 2]] for i in range(30)], float), (0.0, 1.0))
    assert found == {"value": expected.value, "low": expected.low, "high": expected.high, "n": 30}


@pytest.mark.parametrize(("flag", "value"), [("--temperature", "nan"), ("--max-new-tokens", "0")])
def test_a_chat_that_cannot_be_is_refused_before_the_model_is_loaded(tiny, run, flag, value):
    with pytest.raises(UserError, match=f"{flag} {value}: must be"):
        evaluation.main(["chat", "--model", "tiny", "--load-in", "fp32", "--adapter", str(run), flag, value])
    assert not tiny.loads
