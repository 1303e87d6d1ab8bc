"""Killed, stopped or damaged, a run that goes on ends as one that was never interrupted: bit for bit."""

import dataclasses
import importlib.util
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import datasets
import pytest
import torch
import training
from conftest import tiny_llm
from safetensors.torch import load_file

import config
import pop
from data import Corpus, UserError
from engine import checkpoint, signals, sources


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.tiny_folder(tmp_path_factory.mktemp("model"))


WATCHED = dict(audit=2, eval_every=2, eval_documents=2, best_by="reward")


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """A run that nothing interrupts."""
    run = tmp_path_factory.mktemp("reference") / "run"
    assert training.finish(training.flags(model, run, **WATCHED), run.with_suffix(".log")) == 0
    return run


@pytest.fixture
def copy(reference, tmp_path):
    return shutil.copytree(reference, tmp_path / "copy")


def resume(run, **options) -> int:
    return training.finish(["--resume", str(run)], run.with_suffix(".log"), **options)


# ------------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("once", "now"),
    [
        ({"dequantize": "auto"}, {"dequantize": "auto"}),
        ({"task": "health"}, {"task": "health"}),
        ({"skip_guards": ["length"]}, {"skip_guards": ("length",)}),
    ],
)
def test_a_stored_configuration_is_read_as_it_was(tmp_path, once, now):
    (tmp_path / "config.json").write_text(json.dumps(once))
    assert config.stored_config(tmp_path) == now
    assert pop.parse_args(["--resume", str(tmp_path)]) == pop.Config(**now, resume=str(tmp_path))


def test_a_run_killed_twelve_times_equals_the_uninterrupted_one(model, reference, tmp_path):
    """SIGKILL at random moments: by the clock, and from inside at random system calls of a save or a resume."""
    run, log, rng = tmp_path / "run", tmp_path / "log", random.Random(time.time_ns())
    new, kills, calls = training.flags(model, run, **WATCHED), 0, []
    argv = new
    while kills < 12:
        if kills % 2:
            process = training.start(argv, log)
            time.sleep(rng.uniform(0.1, 1.5))
            process.kill()
            code = training.ended(process)
        else:
            calls.append(rng.randrange(55))
            code = training.finish(argv, log, die_at=calls[-1])
        if code == 0:  # it came to its end first: one more run to compare, and another to kill
            assert training.result(run) == training.result(reference), calls
            shutil.rmtree(run)
            argv, calls = new, []
            continue
        assert code == -signal.SIGKILL, (calls, log.read_text()[-2000:])
        kills += 1
        if (run / "config.json").exists():
            argv = ["--resume", str(run)]
    assert training.finish(argv, log) == 0, (calls, log.read_text()[-2000:])
    assert training.result(run) == training.result(reference), calls


def test_a_run_stopped_by_each_signal_equals_the_uninterrupted_one(model, reference, tmp_path):
    run, log, rng = tmp_path / "run", tmp_path / "log", random.Random(time.time_ns())
    argv = training.flags(model, run, **WATCHED, save_every=100)  # whatever is saved, the signals have saved
    steps = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process = training.start(argv, log)
        training.wait_for_steps(run, steps + 1)  # it trains: while it loads, a signal ends it at once
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, number)
        assert training.ended(process) == signals.RESUMABLE
        steps = len(training.lines(run / "metrics.jsonl"))
        printed = log.read_text()
        assert f"{number.name}: the run is saved and resumable with: python pop.py --resume {run}" in printed
        argv = ["--resume", str(run)]
    assert training.finish(argv, log) == 0
    assert training.result(run) == training.result(reference)


def test_a_second_ctrl_c_ends_a_slow_save_at_once_and_corrupts_nothing(model, reference, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    process = training.start(training.flags(model, run, **WATCHED, save_every=100), log, pause=0.3)
    training.wait_for_steps(run, 2)
    os.kill(process.pid, signal.SIGINT)
    while not list((run / "checkpoints").glob(".*.tmp")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert training.ended(process) == 130
    assert not list((run / "checkpoints").glob("step-*"))
    assert training.finish(["--resume", str(run)], log) == 0
    assert training.result(run) == training.result(reference)


def test_a_closed_terminal_is_survived(model, tmp_path):
    """SIGHUP comes when a terminal closes, and whatever is printed from then on fails."""
    controller, terminal = os.openpty()
    run = tmp_path / "run"
    process = training.start(training.flags(model, run, **WATCHED), os.ttyname(terminal))
    printed = b""
    while b"step 1/" not in printed:
        printed += os.read(controller, 1000)
    os.close(terminal)
    os.close(controller)
    assert training.ended(process) == signals.RESUMABLE
    assert checkpoint.newest(run)


def test_in_4_bits_an_interrupted_run_equals_the_uninterrupted_one(model, tmp_path, monkeypatch):
    training.open_gates(monkeypatch.setattr)
    flags = dict(load_in="4bit", steps=3, save_every=100)
    assert pop.main(training.flags(model, tmp_path / "a", **flags)) == 0
    real, calls = pop.rubric.judge, iter(range(9))

    def interrupted(*args):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(*args)

    monkeypatch.setattr(pop.rubric, "judge", interrupted)
    assert pop.main(training.flags(model, tmp_path / "b", **flags)) == signals.RESUMABLE
    assert len(training.lines(tmp_path / "b" / "metrics.jsonl")) == 1
    assert pop.main(["--resume", str(tmp_path / "b")]) == 0
    assert training.result(tmp_path / "a") == training.result(tmp_path / "b")


# -------------------------------------------------------------------------------------------------------- damage


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.safetensors", truncate),
        ("adapter/adapter_model.safetensors", flip),
        ("state.json", os.remove),
        ("manifest.json", os.remove),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(copy, reference, name, harm):
    harm(copy / "checkpoints" / "step-000008" / name)
    assert resume(copy) == 0
    printed = copy.with_suffix(".log").read_text()
    assert f"step-000008 is skipped: {name.rpartition('/')[2]}" in printed.replace("adapter/", "")
    assert "step 8/8" in printed and "step 7/8" not in printed
    assert training.result(copy) == training.result(reference)


def test_one_flipped_bit_anywhere_is_noticed(copy):
    folder = copy / "checkpoints" / "step-000008"
    assert checkpoint.damage(folder, copy) is None
    rng = random.Random(0)
    for file in [f for f in folder.rglob("*") if f.is_file()] * 5:
        content = file.read_bytes()
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        assert checkpoint.damage(folder, copy), (file, at)
        file.write_bytes(content)
    assert checkpoint.damage(folder, copy) is None


def test_a_log_that_lost_lines_rules_out_the_checkpoint_that_counts_them(copy):
    truncate(copy / "episodes.jsonl")
    reason = checkpoint.damage(copy / "checkpoints" / "step-000008", copy)
    assert reason == "episodes.jsonl is shorter than it was then"


def test_without_one_whole_checkpoint_nothing_is_overwritten(copy):
    for folder in (copy / "checkpoints").iterdir():
        truncate(folder / "state.json")
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest(copy)


def test_only_the_newest_checkpoints_are_kept(reference):
    assert sorted(f.name for f in (reference / "checkpoints").iterdir()) == ["step-000007", "step-000008"]


def test_a_checkpoint_holds_no_pickle(reference):
    files = [f for f in (reference / "checkpoints" / "step-000008").rglob("*") if f.is_file()]
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md"}


# ---------------------------------------------------------------------------------------------- save, then load


def test_what_is_loaded_is_what_was_saved(tmp_path):
    cfg = pop.Config(lr=0.01, warmup_steps=0)

    def state(seed):
        llm = tiny_llm(seed)
        return replace(pop.new_state(llm, cfg), rng=random.Random(seed))

    def step(s):
        """Some change of everything; returns numbers that depend on all of it."""
        for p in pop.trainable(s.llm):
            p.grad = torch.rand_like(p) - 0.5
        s.optimizer.step()
        s.scheduler.step()
        return s.rng.random(), torch.rand(3), s.optimizer.param_groups[0]["lr"]

    old = state(0)
    step(old)
    old.progress.update(step=3, best={"score": 0.1 + 0.2}, budgets={"rollout": 9, "update": 7})
    checkpoint.save(tmp_path, old, keep=1)
    wanted = step(old)
    new = state(1)
    checkpoint.load(tmp_path / "checkpoints" / "step-000003", new)
    got = step(new)
    assert (got[0], got[1].tolist(), got[2]) == (wanted[0], wanted[1].tolist(), wanted[2])
    assert new.progress == old.progress and new.llm.token_budget == 9
    for mine, theirs in zip(pop.trainable(new.llm), pop.trainable(old.llm), strict=True):
        assert torch.equal(mine, theirs)


def test_the_adapter_folder_is_the_newest_checkpoints(reference):
    saved = load_file(reference / "checkpoints" / "step-000008" / "adapter" / "adapter_model.safetensors")
    published = load_file(reference / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == published.keys() and all(torch.equal(saved[k], published[k]) for k in saved)
    assert not list(reference.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------- configuration


def test_a_changed_configuration_is_shown_and_refused(copy):
    with pytest.raises(UserError, match=r"\(steps: 8 -> 9, lr: 0.0001 -> 2e-05\)"):
        pop.parse_args(["--resume", str(copy), "--lr", "2e-5", "--steps", "9"])


def test_a_field_that_changes_no_result_may_change(copy, capsys):
    cfg = pop.parse_args(["--resume", str(copy), "--save-every", "5"])
    assert (cfg.save_every, cfg.steps, cfg.load_in) == (5, 8, "fp32")
    assert "changed on resume: save_every: 1 -> 5" in capsys.readouterr().out


def test_a_run_goes_on_without_the_tracker_that_it_had_elsewhere(copy, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "trackio" else known(name, *of))
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(stored | {"tracker": "trackio"}))
    assert pop.parse_args(["--resume", str(copy), "--tracker", "none"]).tracker == "none"


def test_every_safe_field_exists():
    assert {field.name for field in dataclasses.fields(pop.Config)} >= config.SAFE


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="no run there"):
        pop.main(["--resume", str(tmp_path / "nowhere")])


def test_a_configuration_of_another_version_is_refused(copy):
    stored = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**stored, "momentum": 1}))
    with pytest.raises(UserError, match="unknown fields: momentum"):
        pop.parse_args(["--resume", str(copy)])


def test_resuming_a_finished_run_changes_nothing(copy, reference):
    assert resume(copy) == 0
    assert training.result(copy) == training.result(reference)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with checkpoint.locked(tmp_path), pytest.raises(UserError, match="another process"), checkpoint.locked(tmp_path):
        pass


# ----------------------------------------------------------------------------------------------------- documents


def streamed(monkeypatch, broken_at=()):
    """A hub data set of 40 rows, whose connection breaks once at each of these rows of a pass."""
    breaks = list(broken_at)

    def rows():
        for i in range(40):
            if breaks and i == breaks[0]:
                breaks.pop(0)
                raise ConnectionError("reset by peer")
            yield {"text": f"row number {i} of the stream"}

    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.IterableDataset.from_generator(rows))
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *_, **__: None)
    return Corpus("org/name", min_words=1, seed=3, buffer_size=8)


def first(documents, n):
    return [next(documents) for _ in range(n)]


@pytest.mark.parametrize("consumed", [0, 5, 39, 40, 55])
def test_a_shuffled_stream_goes_on_after_the_documents_consumed(monkeypatch, consumed):
    wanted = first(iter(streamed(monkeypatch)), 70)
    assert first(sources.documents_from(streamed(monkeypatch), consumed), 70 - consumed) == wanted[consumed:]


def test_a_broken_stream_is_opened_again_without_losing_or_repeating_a_document(monkeypatch, capsys):
    monkeypatch.setattr(sources, "PAUSES", (0, 0))
    wanted = first(iter(streamed(monkeypatch)), 70)
    assert first(sources.documents_from(streamed(monkeypatch, broken_at=[20, 25, 30]), 0), 70) == wanted
    assert capsys.readouterr().out.count("reset by peer") == 3


def test_a_stream_that_stays_broken_is_given_up(monkeypatch):
    monkeypatch.setattr(sources, "PAUSES", (0, 0))
    with pytest.raises(pop.Unreachable):
        first(sources.documents_from(streamed(monkeypatch, broken_at=[20, 20, 20]), 0), 70)


def test_a_corpus_that_changed_meanwhile_is_refused():
    corpus = Corpus("samples")
    document = first(iter(corpus), 3)[-1]
    assert next(sources.documents_from(corpus, 3, document.identity)) == first(iter(corpus), 4)[-1]
    for other in (replace(document, id="gone.txt"), replace(document, text="Another text by the same name.")):
        with pytest.raises(UserError, match=f"has changed: document 3 was {other.identity} and is now"):
            next(sources.documents_from(corpus, 3, other.identity))


def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(pop, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"--output .*file/run.* cannot be written"):
        pop.main(["--preset", "demo", "--output", str(tmp_path / "file" / "run")])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        pop.main(["--preset", "demo", "--output", str(tmp_path / "old")])


def test_to_ask_whether_a_file_can_be_written_leaves_nothing_behind(tmp_path):
    checkpoint.check_writable(tmp_path / "runs" / "x" / "config.json")
    assert list(tmp_path.iterdir()) == []


def test_local_files_are_stored_by_their_whole_paths(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pop.parse_args(["--preset", "demo", "--corpus", "notes"]).corpus == str(tmp_path / "notes")
    assert pop.parse_args(["--preset", "demo"]).corpus == "samples"


def test_the_packaged_model_s_name_means_it_beside_a_folder_of_that_name_too(tmp_path, monkeypatch):
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert pop.parse_args(["--preset", "demo"]).model == "smollm2"
    assert pop.parse_args(["--preset", "demo", "--model", "./smollm2"]).model == str(tmp_path / "smollm2")


def test_an_output_folder_with_a_run_in_it_points_to_resume(copy):
    with pytest.raises(UserError, match=f"--resume {copy}"):
        checkpoint.run_folder(replace(pop.Config(), output=str(copy)))
