"""Several processes train one adapter: as one process would, on each document once, and together or not at all."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import training
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data import Answer, Criterion, Document, Episode, UserError
from engine import parallel

GROUPS = 12
RUBRIC = [Criterion("It", "not applicable", "Says what it is.", 1.0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """Groups of 2 to 5 answers; the rewards of two are all the same, so that these are dropped."""
    tokenizer, episodes = AutoTokenizer.from_pretrained(model), []

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for i in range(GROUPS):
        texts = [f"It is {'a' * (3 * k + i)} number {k}." for k in range(2 + i % 4)]
        ratings = [1.0 if i in (1, 6) else 2 * k / len(texts) for k in range(len(texts))]
        answers = [
            Answer(t, [*ids(t), tokenizer.eos_token_id], True, ratings=[r]) for t, r in zip(texts, ratings, strict=True)
        ]
        document = Document(f"d{i}", f"Document {i}.")
        episodes.append(
            Episode(document, "What is it?", "It.", rubric=RUBRIC, answers=answers, prompt_ids=ids(f"What is {i}?"))
        )
    path = tmp_path_factory.mktemp("recorded") / "episodes.jsonl"
    path.write_text("".join(json.dumps(asdict(e)) + "\n" for e in episodes))
    return path


def replay(model: Path, recorded: Path, run: Path, **more: object) -> list[str]:
    given = dict(episodes=recorded, replay="answers", documents=4, steps=3, lr=1e-2, warmup_steps=0, eval_every=None)
    return training.flags(model, run, **{**given, "audit": None, "skip_guards": None, "max_new_tokens": 64, **more})


def one_of(rank: int, processes: int, port: int, argv: list[str], output: str, played=False, **options) -> None:
    """pop.py as a launcher starts each of its processes."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not played:  # groups without spread are to be dropped as in earnest
        training.open_gates = lambda setattr: None
    training.run_pop(argv, output, **options)


def launch(processes: int, argv: list[str], output: Path, **options) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        training.SERVER.Process(target=one_of, args=(i, processes, port, argv, f"{output}.{i}"), kwargs=options)
        for i in range(processes)
    ]
    for process in started:
        process.start()
    return started


def finish(processes: int, argv: list[str], output: Path, **options) -> list[int]:
    return [training.ended(process) for process in launch(processes, argv, output, **options)]


def weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def documents(run: Path) -> list[str]:
    return [e["document"]["id"] for e in training.lines(run / "episodes.jsonl")]


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dpo"])
def test_two_and_four_processes_train_the_adapter_that_one_trains(model, recorded, tmp_path, loss):
    """Groups differ in size, some are dropped, and with four processes one has none left in the first step."""
    runs = {n: tmp_path / f"run-{n}" for n in (1, 2, 4)}
    for n, run in runs.items():
        assert finish(n, replay(model, recorded, run, loss=loss, kl_coef=0.1), tmp_path / f"log-{n}") == [0] * n
    expected = weights(runs[1])
    for n in (2, 4):
        assert (weights(runs[n]) - expected).norm() <= 1e-5 * expected.norm()
        assert documents(runs[n]) == documents(runs[1]) == [f"d{i}" for i in range(GROUPS)]
        for mine, alone in zip(*(training.lines(runs[k] / "metrics.jsonl") for k in (n, 1)), strict=True):
            for name in ("loss", "kl", "entropy", "grad_norm", "trained_tokens", "reward_mean", "groups_trained"):
                assert mine[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-7)
    assert weights(runs[1]).norm() > 0 and training.lines(runs[1] / "metrics.jsonl")[0]["groups_trained"] == 3


def test_each_process_plays_its_own_documents_and_the_first_writes_all_of_it_down(model, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    argv = training.flags(model, run, steps=2, documents=3, audit=2, eval_every=1, eval_documents=2, save_every=2)
    assert finish(2, argv, log, played=True) == [0, 0]
    episodes = training.lines(run / "episodes.jsonl")
    assert len(episodes) == 6 == len({e["document"]["text"] for e in episodes})
    assert [m["step"] for m in training.lines(run / "metrics.jsonl")] == [0, 1, 2]
    assert [m["heldout_reward"] is None for m in training.lines(run / "metrics.jsonl")] == [False] * 3
    assert "step 2/2" in Path(f"{log}.0").read_text() and Path(f"{log}.1").read_text() == ""
    assert (run / "audit.json").exists() and (run / "report.html").exists()


@pytest.mark.parametrize("processes", [1, 4])
def test_after_a_kill_the_others_end_and_any_number_of_processes_goes_on(model, recorded, tmp_path, processes):
    run, log = tmp_path / "run", tmp_path / "log"
    started = launch(2, replay(model, recorded, run, steps=6, save_every=2), log, pause=0.01)
    training.wait_for_steps(run, 3)
    started[1].kill()
    assert training.ended(started[0]) == 75
    assert "another process has ended" in Path(f"{log}.0").read_text()
    resumed = ["--resume", str(run)]
    assert finish(processes, resumed, tmp_path / "again") == [0] * processes
    whole = replay(model, recorded, tmp_path / "whole", steps=6, save_every=2)
    assert finish(1, whole, tmp_path / "log-whole") == [0]
    assert documents(run) == documents(tmp_path / "whole") and len(documents(run)) == 24
    expected = weights(tmp_path / "whole")
    assert (weights(run) - expected).norm() <= 1e-5 * expected.norm()


def test_a_signal_to_all_processes_ends_them_where_they_can_be_resumed(model, recorded, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    started = launch(2, replay(model, recorded, run, steps=6, save_every=6), log, pause=0.01)
    training.wait_for_steps(run, 2)
    for process in started:
        os.kill(process.pid, signal.SIGTERM)
    assert [training.ended(process) for process in started] == [75, 75]
    done = len(documents(run))
    assert done >= 8 and (run / "checkpoints" / f"step-{done // 4:06d}").is_dir()  # nothing played is lost
    assert finish(2, ["--resume", str(run)], tmp_path / "again") == [0, 0]
    assert documents(run) == [f"d{i % GROUPS}" for i in range(24)]


def test_each_process_draws_numbers_of_its_own_and_the_same_ones_again(monkeypatch):
    drawn = []
    for rank in (1, 2, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        rng = random.Random(5)
        parallel.own_randomness(rng, seed=0, step=3)
        drawn.append((rng.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[2] and drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]
    rng, before = random.Random(5), torch.get_rng_state()
    monkeypatch.setattr(parallel, "rank", lambda: 0)
    parallel.own_randomness(rng, seed=0, step=3)  # the first one's are in the checkpoints
    assert rng.getstate() == random.Random(5).getstate() and torch.equal(torch.get_rng_state(), before)


def test_processes_that_cannot_be_joined_are_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"cannot be joined \(ValueError: .*RANK.*\): start them by accelerate launch"):
        parallel.start()


def test_more_processes_than_documents_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 5)
    with pytest.raises(UserError, match="5 processes for 4 documents a step: start fewer, or raise --documents"):
        parallel.check(4)


def test_accelerate_launches_it(model, recorded, tmp_path):
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "pop.py"]
    made = subprocess.run(
        [sys.executable, *command, *replay(model, recorded, tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("step 3/3") == 1 and documents(tmp_path / "run") == [f"d{i}" for i in range(GROUPS)]
