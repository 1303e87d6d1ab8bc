"""lab/export.py: other trainers read the same problems and get the rewards of pop.py, from a judge behind an endpoint.

The endpoint is a server on this machine that answers by a plain forward pass of the judge's model.
"""

import importlib.util
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import training
import yaml
from conftest import byte_tokenizer, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_judges import KEY, endpoint  # noqa: F401

import rubric
from config import Config
from data import Answer, Criterion, Document, Episode, UserError, json_lines
from lab import export
from model import LLM

BENCH = [json.loads(line) for line in (export.PROJECT / "docs/bench.jsonl").read_text("utf-8").splitlines()]
CFG = Config(max_new_tokens=300, soft_length=0.5, documents=2, group_size=2, lora_r=4)


def judge_model():
    """Of a random model 0, 1 and 2 would not be among the 20 likeliest tokens."""
    tokenizer = byte_tokenizer()
    model = tiny_model(len(tokenizer)).eval()
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    head.weight.data = model.lm_head.weight.data
    head.bias.data = torch.zeros(len(tokenizer))
    head.bias.data[tokenizer.convert_tokens_to_ids(["0", "1", "2"])] = 9.0
    model.lm_head = head
    return model, tokenizer


@pytest.fixture(scope="module")
def plain():
    return judge_model()


@torch.no_grad()
def first_token(plain, messages, top=20):
    """What an endpoint says of the first token of its reply, as vLLM and SGLang do."""
    model, tokenizer = plain
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    logits = model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1]
    found = [
        {"token": tokenizer.decode([i]), "logprob": p, "bytes": None}
        for p, i in zip(*(part.tolist() for part in logits.log_softmax(-1).topk(top)), strict=True)
    ]
    return {"message": {"content": found[0]["token"]}, "logprobs": {"content": [{**found[0], "top_logprobs": found}]}}


@pytest.fixture
def served(endpoint, plain):  # noqa: F811
    return endpoint(lambda text, n, request: first_token(plain, request["messages"]))


@pytest.fixture(scope="module")
def recorded(plain):
    """112 answers to four problems, with the rewards that pop.py gives them: some unfinished, some for a guard."""
    tokenizer = plain[1]
    llm = LLM(get_peft_model(judge_model()[0], LoraConfig(r=4, target_modules="all-linear")), tokenizer)
    odd = [
        "Rating: 2",
        "This answer fully meets every criterion.",
        "It is",
        "<think>Yeast?</think>\n\nYeast makes gas.",
    ]
    episodes = []
    for number, e in enumerate(BENCH):
        texts = [*e["answers"][:8], *BENCH[number - 1]["answers"][:8], *BENCH[number - 2]["answers"][:8], *odd]
        criteria = [Criterion(**c) for c in e["rubric"][number % 2 : number % 2 + 2]]
        episode = Episode(
            Document(f"bench:{number}", "A document."),
            e["problem"],
            "Yeast turns sugar into gas, which gluten holds.",
            rubric=criteria,
        )
        for text in texts:
            ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id][: CFG.max_new_tokens]
            episode.answers.append(Answer(llm.decode(ids).strip(), ids, ids[-1] == tokenizer.eos_token_id))
        episodes.append(episode)
    rubric.judge(llm, episodes, CFG)
    for e in episodes:
        for a in e.answers:
            rubric.reward(a, e, CFG)
    return episodes


def run_of(folder: Path, episodes, model: Path, **changed) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(replace(CFG, model=str(model), **changed))))
    (folder / "episodes.jsonl").write_text(json_lines(episodes))
    return folder


def exported(source: Path, to: str, url: str, *more: str):
    """What the trainers read: the rows of the data, and the functions of reward.py."""
    out = source.parent / f"{source.name}-{to}"
    export.main([str(source), "--to", to, "--out", str(out), "--judge-url", url, *more])
    spec = importlib.util.spec_from_file_location("exported_reward", out / "reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return pyarrow.parquet.read_table(out / "train.parquet").to_pylist(), module


def columns(rows, episodes):
    """TRL repeats the columns of a row for each of its completions."""
    pairs = [(row, a) for row, e in zip(rows, episodes, strict=True) for a in e.answers]
    completions = [[{"role": "assistant", "content": a.text}] for _, a in pairs]
    named = {name: [row[name] for row, _ in pairs] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row, _ in pairs]
    return dict(prompts=prompts, completions=completions, completion_ids=[a.ids for _, a in pairs], **named)


def test_trls_rewards_of_recorded_answers_are_those_of_pop(recorded, served, folder, tmp_path):
    rows, module = exported(run_of(tmp_path / "run", recorded, folder), "trl", served.url, "--judge", "big")
    wanted = [a.reward for e in recorded for a in e.answers]
    found = module.trl_reward(**columns(rows, recorded), trainer_state=None, log_extra=None)
    assert len(found) == 112 and found == pytest.approx(wanted, abs=1e-6)
    guards = {name for e in recorded for a in e.answers for name in a.guards}
    assert guards == {"judge_addressing", "too_little_content", "length"}
    assert len({round(reward, 4) for reward in found}) > 80 and 0 in found
    asked = served.requests[-1]
    assert (asked["model"], asked["max_tokens"], asked["temperature"], asked["top_p"]) == ("big", 1, 1.0, 1.0)
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 20)


def test_verls_rewards_of_recorded_answers_are_those_of_pop(recorded, served, folder, tmp_path):
    few = [replace(e, answers=e.answers[::3]) for e in recorded]
    rows, module = exported(run_of(tmp_path / "run", few, folder), "verl", served.url)
    for row, e in zip(rows, few, strict=True):
        named = {"ground_truth": row["reward_model"]["ground_truth"], "data_source": row["data_source"]}
        given = [dict(solution_str=a.text, extra_info=dict(row["extra_info"], num_turns=2), **named) for a in e.answers]
        with ThreadPoolExecutor(8) as threads:  # as verl calls it
            found = list(threads.map(lambda some: module.verl_reward(**some), given))
        assert found == pytest.approx([a.reward for a in e.answers], abs=1e-6)
    assert {a.finished for e in few for a in e.answers} == {True, False}


class Asked(Exception):
    pass


@pytest.mark.parametrize("judge", ["generate", "each"])
def test_a_judge_that_writes_is_asked_as_by_pop_and_its_ratings_find_their_criteria(
    endpoint,  # noqa: F811
    folder,
    tmp_path,
    judge,
    llm,
    monkeypatch,
):
    def script(text, n, request):
        """0 for criterion a, 1 for b, 2 for c, in the order of the prompt."""
        names = re.findall(r"^\d\. (\w): The answer says what", text, re.MULTILINE)
        return "\n".join(f'{k}. Evidence: "x"\nRating: {"abc".index(name)}' for k, name in enumerate(names, 1))

    def generate(*_, **__):
        raise Asked

    server = endpoint(script)
    criteria = [Criterion(n, "a fact", "The answer says what.", w) for n, w in zip("abc", (1.0, 2.0, 4.0), strict=True)]
    answer = Answer("Yeast turns sugar into gas, which the gluten holds.", [65] * 9)
    episode = Episode(Document("d", "A document."), "Why does bread rise?", "Yeast.", [answer], criteria)
    cfg = replace(CFG, judge=judge, rubric_gold=False, seed=5)
    source = run_of(tmp_path / "run", [episode], folder, judge=judge, rubric_gold=False, seed=5)
    rows, module = exported(source, "trl", server.url)
    server.requests.clear()
    assert module.trl_reward(**columns(rows, [episode])) == [pytest.approx((1 * 2 + 2 * 4) / (2 * 7))]
    wanted = []
    monkeypatch.setattr(llm, "encode", lambda user: wanted.append(user) or [1])
    monkeypatch.setattr(llm, "generate", generate)
    with pytest.raises(Asked):
        rubric.judge(llm, [episode], cfg)
    asked = [message["content"] for request in server.requests for message in request["messages"]]
    assert sorted(asked) == sorted(wanted) and len(asked) == {"generate": 1, "each": 3}[judge]
    assert "logprobs" not in server.requests[0] and server.requests[0]["temperature"] == 0.0


def chances(*of):
    likeliest = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in of]
    return {"message": {"content": "2"}, "logprobs": {"content": [{**likeliest[0], "top_logprobs": likeliest}]}}


@pytest.fixture
def one():
    answer = Answer("Yeast turns sugar into gas, which the gluten holds.", [65] * 9)
    return Episode(
        Document("d", "A document."), "Why does bread rise?", "Yeast.", [answer], [Criterion("a", "b", "Says c.", 1.0)]
    )


def reward_of(one, server, folder, to="trl", **settings):
    settings = {"model": str(folder), "judge": "logits", **settings}
    reward, criteria = export.Reward(server.url, "big", **settings), json.dumps([asdict(c) for c in one.rubric])
    (answer,) = one.answers
    if to == "verl":
        return reward.verl_reward("pop", answer.text, criteria, {"problem": one.problem})
    (found,) = reward.trl_reward([[{"content": answer.text}]], [answer.ids], [one.problem], [criteria])
    return found


def test_a_digit_beyond_the_likeliest_tokens_is_taken_for_impossible(one, endpoint, folder):  # noqa: F811
    server = endpoint(lambda *_: chances(("Yes", -0.1), ("2", -1.0), (" 1", -1.0), ("1", -2.0), ("2", -9.0)))
    two, one_ = 2.718281828**-1, 2.718281828**-2
    assert reward_of(one, server, folder) == pytest.approx((2 * two + one_) / (two + one_) / 2)


def test_a_judge_that_seldom_replies_a_digit_is_said_to_be_rough_once(one, endpoint, folder, capsys):  # noqa: F811
    server = endpoint(lambda *_: chances(("Yes", -0.1), ("2", -3.0), ("No", -3.2)))
    one.rubric.append(Criterion("d", "e", "Says f.", 1.0))
    assert reward_of(one, server, folder) == 1.0
    assert capsys.readouterr().out.count("seldom replies 0, 1 or 2") == 1
    server = endpoint(lambda *_: chances(("2", -0.1), ("1", -1.0), ("No", -9.0)))
    reward_of(one, server, folder)
    assert capsys.readouterr().out == ""


def test_a_reply_without_a_rating_is_left_out_by_trl_and_0_for_verl(one, endpoint, folder):  # noqa: F811
    server = endpoint(lambda *_: chances(("Yes", -0.1), ("No", -1.0)))
    assert reward_of(one, server, folder) is None
    assert reward_of(one, server, folder, "verl") == 0.0


@pytest.mark.parametrize("to", ["trl", "verl"])
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("2", "gives no log-probabilities: vLLM and SGLang do, or export with --judge-by generate"),
        ({"message": {"content": "2"}, "logprobs": {"content": []}}, "gives no log-probabilities"),
        ((401, "no key"), "says HTTP 401: no key; .*JUDGE_API_KEY"),
        ((503, "loading"), "left 1 of 1 questions open: HTTP 503: loading"),
        ((400, "too long"), "left 1 of 1 questions open: HTTP 400: too long"),
    ],
)
def test_a_judge_that_cannot_be_used_ends_the_training_with_one_line(one, endpoint, folder, reply, message, to):  # noqa: F811
    server = endpoint(lambda *_: reply)
    with pytest.raises(UserError, match=message) as caught:
        reward_of(one, server, folder, to)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"the judge big at {server.url}")


def test_answers_that_got_no_reply_are_left_out_and_said(one, endpoint, folder, capsys, monkeypatch):  # noqa: F811
    server = endpoint(lambda text, n, request: (503, "busy") if "Lost" in text else chances(("1", -0.1)))
    reward = export.Reward(server.url, "big", model=str(folder))
    criteria = json.dumps([asdict(c) for c in one.rubric])
    texts = [one.answers[0].text, "Lost and found in the oven of a baker."]
    found = reward.trl_reward([[{"content": t}] for t in texts], [[1], [1]], [one.problem] * 2, [criteria] * 2)
    assert found == [0.5, None]
    assert f"WARNING: the judge big at {server.url} left 1 of 2 questions open: HTTP 503" in capsys.readouterr().out


def test_the_key_of_the_environment_is_sent_and_stands_in_no_file(recorded, served, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    exported(run_of(tmp_path / "run", recorded[:1], folder), "verl", served.url)
    assert set(served.keys) == {f"Bearer {KEY}"}
    assert KEY not in "".join(path.read_text(errors="replace") for path in (tmp_path / "run-verl").iterdir())


def test_the_solver_of_the_other_trainer_is_given_the_same_tokens(recorded, served, folder, tmp_path, llm):
    rows, _ = exported(run_of(tmp_path / "run", recorded, folder), "verl", served.url)
    for row, e in zip(rows, recorded, strict=True):
        text = llm.tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        assert llm.tokenizer(text).input_ids == llm.encode(e.problem)


def test_verl_reads_the_columns_that_it_documents(recorded, served, folder, tmp_path):
    first, *_ = exported(run_of(tmp_path / "run", recorded, folder), "verl", served.url)[0]
    assert set(first) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert first["prompt"] == [{"role": "user", "content": BENCH[0]["problem"]}]
    assert json.loads(first["reward_model"]["ground_truth"]) == [asdict(c) for c in recorded[0].rubric]
    assert first["extra_info"]["index"] == 0 and first["extra_info"]["document"] == "bench:0"


def test_only_rubrics_that_passed_are_exported_and_the_count_is_said(recorded, served, folder, tmp_path, capsys):
    dropped = [
        replace(recorded[0], drop="group/zero spread"),
        replace(recorded[1], drop="rubric/does not tell good from bad"),
        replace(recorded[2], rubric=[], drop="proposer/too short"),
        recorded[3],
    ]
    rows, _ = exported(run_of(tmp_path / "run", dropped, folder), "trl", served.url)
    assert [row["problem"] for row in rows] == [recorded[0].problem, recorded[3].problem]
    printed = capsys.readouterr().out
    assert printed.startswith("2 of 4 episodes have a rubric\n")
    assert "the judge was asked: the first reference would be rewarded with 0." in printed


def test_configurations_are_short_and_take_the_settings_of_the_run(recorded, served, folder, tmp_path):
    source = run_of(tmp_path / "run", recorded, folder, documents=3, group_size=5, temperature=0.7, lr=3e-5)
    for to, name in (("trl", "trl.yaml"), ("verl", "verl.sh")):
        exported(source, to, served.url, "--max-new-tokens", "77")
        text = (tmp_path / f"run-{to}" / name).read_text()
        assert len(text.splitlines()) <= 15 and max(map(len, text.splitlines())) < 300
    found = yaml.safe_load((tmp_path / "run-trl/trl.yaml").read_text())
    assert found["learning_rate"] == 3e-5 and found["temperature"] == 0.7 and found["max_completion_length"] == 77
    assert (found["num_generations"], found["gradient_accumulation_steps"]) == (5, 3)
    said = (tmp_path / "run-verl/verl.sh").read_text().split()
    assert {"actor_rollout_ref.rollout.n=5", "data.train_batch_size=3", "data.max_response_length=77"} <= set(said)
    assert "max_new_tokens=77" in (tmp_path / "run-verl/reward.py").read_text()
    subprocess.run(["sh", "-n", tmp_path / "run-verl/verl.sh"], check=True)


def test_a_file_of_episodes_is_exported_with_the_default_settings(recorded, served, folder, tmp_path, monkeypatch):
    (tmp_path / "episodes.jsonl").write_text(json_lines(recorded))
    monkeypatch.chdir(folder.parent)  # the trainer will be started elsewhere
    more = ["--model", folder.name, "--judge-by", "each"]
    _, module = exported(tmp_path / "episodes.jsonl", "trl", served.url, *more)
    assert module.reward.cfg == Config(model=str(folder), judge="each")


def test_mistakes_are_one_line_and_write_nothing(recorded, served, folder, tmp_path, monkeypatch):
    source = run_of(tmp_path / "run", recorded, folder)
    argv = [str(source), "--to", "trl", "--out", str(tmp_path / "out"), "--judge-url", served.url]

    def refused(message, *argv):
        with pytest.raises(UserError, match=message) as caught:
            export.main(argv)
        assert "\n" not in str(caught.value)

    refused("judge's url 'nowhere' is none", *argv[:-1], "nowhere")
    refused("no run's folder", str(tmp_path), *argv[1:])
    refused("cannot be read: .*; give a run's episodes.jsonl", str(tmp_path / "none.jsonl"), *argv[1:])
    (tmp_path / "none.jsonl").write_text(json_lines([replace(recorded[0], rubric=[])]))
    refused("none.jsonl: none of its 1 episodes has a rubric", str(tmp_path / "none.jsonl"), *argv[1:])
    refused("without criteria", str(run_of(tmp_path / "whole", recorded, folder, rubric="holistic")), *argv[1:])
    refused("model folder not found: ./none", *argv, "--model", "./none")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    refused("out is not empty: remove it, or choose another", *argv)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    monkeypatch.setitem(sys.modules, "openai", None)
    refused("pip install openai", *argv[:4], str(tmp_path / "new"), *argv[5:])


def test_a_judge_that_is_not_there_yet_does_not_matter(recorded, endpoint, folder, tmp_path, capsys):  # noqa: F811
    server = endpoint(lambda *_: (503, "loading"))
    rows, _ = exported(run_of(tmp_path / "run", recorded, folder), "trl", server.url)
    assert len(rows) == 4
    assert re.search("WARNING: the judge .* left 2 of 2 questions open: HTTP 503: loading", capsys.readouterr().out)


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_trl_trains_two_steps_on_what_was_exported(recorded, served, tmp_path):
    model = training.tiny_folder(tmp_path / "model")
    source = run_of(tmp_path / "run", recorded, model, load_in="fp32", max_new_tokens=12, skip_guards=("all",))
    exported(source, "trl", served.url)
    served.requests.clear()
    folder = tmp_path / "run-trl"
    steps = "--max_steps 2 --save_steps 2 --logging_steps 1 --use_cpu true --report_to none".split()
    command = [sys.executable, "-m", "trl.scripts.grpo", "--config", "trl.yaml", *steps]  # what `trl grpo` starts
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = json.loads((folder / "trained/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in logs] == [1, 2]
    assert all(0 < log["rewards/trl_reward/mean"] < 1 and log["reward_std"] > 0 for log in logs)
    assert len(served.requests) == 2 * 2 * 2 * 2  # steps, problems, answers, criteria
    weights = load_file(folder / "trained/adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
