"""Injected faults: each ends as it should, and nothing is lost."""

import errno
import gc
import importlib
import importlib.machinery
import json
import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training
from conftest import tiny_llm
from test_pop import group

import eval as evaluation
import model as model_module
import pop
from config import Config
from data import Document, UserError
from engine import checkpoint, fast, loading, memory, runlog, signals
from engine.constrained import Field
from engine.prefill import last_states
from model import LLM
from rubric import Answer, Criterion, Episode

ROOT = Path(__file__).resolve().parents[1]
OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_OOM = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried ..."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def played(model, tmp_path, monkeypatch):
    """Flags of a short run in this process; its folder is tmp_path / "run"."""
    training.open_gates(monkeypatch.setattr)
    return lambda **more: training.flags(model, tmp_path / "run", **{"steps": 2, **more})


def metrics(tmp_path):
    return training.lines(tmp_path / "run" / "metrics.jsonl")


# -------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def limit(monkeypatch):
    """limit(rows, error): memory for so many rows only, in generation, choices and training; returns the rows tried."""

    def limited(rows, error=OOM):
        tried = []

        def checked(real, count):
            def call(*args, **named):
                tried.append(count(*args))
                if tried[-1] > rows:
                    torch.rand(1)  # a failed try has drawn random numbers
                    raise error
                return real(*args, **named)

            return call

        for module in (model_module, memory):
            monkeypatch.setattr(module, "prefill", checked(module.prefill, lambda llm, rows, new: len(rows)))
        monkeypatch.setattr(model_module, "last_states", checked(last_states, lambda llm, rows: len(rows)))
        monkeypatch.setattr(LLM, "logps", checked(LLM.logps, lambda llm, ids, *_: len(ids)))
        return tried

    return limited


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),  # from a kernel or a graph; torch.AcceleratorError is one
        (RuntimeError("CUDA driver error: out of memory"), True),  # from an expandable segment
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (CPU_OOM, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA driver error: invalid argument"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_told_from_other_errors(error, full):
    assert memory.out_of_memory(error) is full
    try:
        try:
            raise error
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as another:
        assert memory.out_of_memory(another) is full


FORM = [Field("a: ", choices=("0", "1", "12")), Field("b:", 6, min_tokens=2)]


def generated(llm):
    prompts = [llm.text_ids(text) for text in ("Why?", "How so?", "Why not, then?")]
    options = dict(n=4, max_new_tokens=20, temperature=1.0, templates=[FORM] * 12, watch=("0", "1"), desc="solve")
    return llm.generate(prompts, **options)


def chosen(llm):
    rows = [llm.text_ids(text + mark) for text in ("Why", "How") for mark in ".,!?"]
    return llm.choice_probs(rows, [48, 49, 50], desc="solve").tolist()


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(("work", "rows"), [(generated, 5), (generated, 1), (chosen, 2)])
@pytest.mark.parametrize("error", [OOM, CPU_OOM], ids=["CUDA", "CPU"])
def test_a_batch_that_does_not_fit_gives_what_a_small_budget_from_the_start_gives(
    limit, capsys, work, rows, cuda_graph, error
):
    """Same random states, fresh templates: failed tries leave no trace but the lower budget."""
    tried, results, budget = limit(rows, error), [], 32_768
    for _ in range(2):
        llm = tiny_llm(cuda_graph=cuda_graph, token_budget=budget)
        torch.manual_seed(5)
        results.append((work(llm), torch.rand(1)))
        budget = llm.token_budget
        failed = [n for n in tried if n > rows]
        tried.clear()
        assert bool(failed) == (len(results) == 1)
    assert results[0] == results[1] and budget < 32_768
    assert "out of memory in solve with " in capsys.readouterr().out


def test_batches_before_one_that_does_not_fit_are_not_done_again(limit):
    llm = tiny_llm(token_budget=120)
    tried = limit(1)
    llm.generate(
        [[letter] * n for letter, n in zip(b"abcd", (60, 20, 20, 5), strict=True)], max_new_tokens=10, temperature=0
    )
    assert tried == [1, 3, 1, 1, 1] and llm.token_budget == 45  # half of 3 rows of 30 tokens


def test_a_run_goes_on_where_memory_runs_out(played, tmp_path, limit, monkeypatch, capsys):
    """In each role, the update, the audit and on the held-out set; the rehearsal is left alone."""
    monkeypatch.setattr(memory, "rehearse", lambda llm, cfg, update_tokens: update_tokens)
    tried = limit(1)
    flags = played(judge="generate", tries=2, audit=2, eval_every=1, eval_documents=2, steps=1)
    assert pop.main(flags) == 0
    assert max(tried) > 1 and "out of memory in " in capsys.readouterr().out
    assert (tmp_path / "run" / "audit.json").exists()
    assert metrics(tmp_path)[0]["heldout_length"] is not None
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-000001" / "state.json").read_text())
    budgets = metrics(tmp_path)[-1]["token_budgets"]
    started = pop.parse_args(flags)
    assert 0 < budgets["rollout"] < started.rollout_tokens and 0 < budgets["update"] < started.update_tokens
    assert saved["progress"]["budgets"] == budgets
    for e in training.lines(tmp_path / "run" / "episodes.jsonl"):
        assert len(e["answers"]) <= 2 and len(e["rubric"]) <= 2


def test_the_failed_try_has_released_its_tensors_before_the_next():
    held = []

    def work():
        if held:
            gc.disable()
            assert held[0]() is None
            gc.enable()
            return
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("fresh: one that is kept elsewhere keeps its frames")

    memory.within_memory(work, lambda: None)
    assert len(held) == 1


def test_one_row_that_does_not_fit_ends_with_a_clear_error(llm, limit):
    limit(0)
    with pytest.raises(UserError, match=r"out of memory in judge, even with one row \(900 tokens\): lower"):
        llm.generate([[65] * 890], max_new_tokens=10, temperature=0, desc="judge")
    with pytest.raises(UserError, match=r"out of memory in judge, even with one row \(900 tokens\): lower"):
        llm.choice_probs([[65] * 900], [48, 49], desc="judge")


def test_other_errors_are_not_retried():
    calls = []

    def work():
        calls.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        memory.within_memory(work, lambda: None)
    assert len(calls) == 1


@pytest.mark.parametrize("work", [generated, chosen])
def test_where_a_dequantized_copy_of_the_weights_does_not_fit_it_is_given_up_for_good(monkeypatch, capsys, work):
    """Before the batch is made smaller: what is sampled does not change."""
    results = []
    usual = fast.prepared_forwards

    def full(model, dtype, adapted, dequantize):
        if dequantize:
            torch.rand(1)
            raise OOM
        return usual(model, dtype, adapted, dequantize)

    for fail in (False, True):
        llm = tiny_llm(dequantize=fail)
        if fail:
            monkeypatch.setattr(fast, "prepared_forwards", full)
        torch.manual_seed(5)
        results.append((work(llm), torch.rand(1), llm.token_budget, llm.dequantize))
    assert results[0] == results[1] and results[1][2:] == (32_768, False)
    assert "from now on without a dequantized copy of the weights" in capsys.readouterr().out


def test_the_dequantized_copy_is_let_go_before_the_batch_that_did_not_fit_beside_it(limit):
    llm = tiny_llm(dequantize=True)
    llm.generate([[65, 66]], max_new_tokens=2, temperature=0)
    copies = [weakref.ref(forward) for forward in llm._forwards[1].values()]
    limit(0)
    with pytest.raises(UserError, match="one row"):
        llm.generate([[65, 66]], max_new_tokens=2, temperature=0)
    assert llm._forwards is None and not any(copy() for copy in copies)


@pytest.mark.parametrize(("updates", "fails_at"), [(1, 1), (1, 3), (3, 1), (3, 3), (3, 5), (3, 7), (3, 9)])
def test_an_update_that_ran_out_of_memory_trains_as_if_it_had_not(monkeypatch, updates, fails_at):
    """Half-accumulated gradients are gone, and old log-probs stay those of the policy that answered."""
    trained = []
    for fail in (True, False):
        llm = tiny_llm()
        cfg = replace(pop.Config(), updates_per_batch=updates, lr=0.01, warmup_steps=0, kl_coef=0.1, update_tokens=60)
        episodes = [group(llm, [1.0, 0.0, 0.5, 0.2], seed=s, prompt="Why" + "?" * s) for s in range(2)]
        state = pop.new_state(llm, cfg)
        real, calls = llm.logps, iter(range(1000))

        def logps(*args, real=real, calls=calls, fail=fail):
            result = real(*args)
            if next(calls) == fails_at and fail:
                raise OOM
            return result

        monkeypatch.setattr(llm, "logps", logps)
        values = pop.update(llm, state, episodes, cfg)
        assert (state.progress["budgets"]["update"] < 60) == fail
        trained.append((values, [p.detach().clone() for p in pop.trainable(llm)]))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-4, abs=1e-6)
    for a, b in zip(trained[0][1], trained[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- rehearsals


def test_the_rehearsal_leaves_weights_and_random_states_untouched(llm, capsys):
    cfg = replace(pop.Config(), max_words=100, max_new_tokens=16, documents=2)
    weights = {name: p.clone() for name, p in llm.model.state_dict().items()}
    rng = torch.get_rng_state()
    assert memory.rehearse(llm, cfg, cfg.update_tokens) == cfg.update_tokens and llm.token_budget == 32_768
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(p, weights[name]) for name, p in llm.model.state_dict().items())
    assert all(p.grad is None for p in llm.model.parameters())
    assert len(llm.model.get_base_model().get_decoder().layers) == 2
    assert "the longest batch of each phase fits in memory" in capsys.readouterr().out


def test_the_rehearsal_halves_the_budgets_of_what_does_not_fit(llm, limit):
    cfg = replace(pop.Config(), max_words=100, max_new_tokens=16, documents=4, rubric_answers=1)
    tried = limit(2)
    assert memory.rehearse(llm, cfg, cfg.update_tokens) == 32 * 87 // 2  # 4 rows of 8 answers, the prompt shared
    assert max(tried) > 2 and llm.token_budget < cfg.rollout_tokens


def test_the_rehearsal_gives_up_a_dequantized_copy_before_it_halves_a_budget(limit, monkeypatch):
    llm, real = tiny_llm(dequantize=True), memory.rehearse_rollout

    def rehearse_rollout(llm, batch):
        if llm.dequantize:
            raise OOM
        real(llm, batch)

    monkeypatch.setattr(memory, "rehearse_rollout", rehearse_rollout)
    cfg = replace(pop.Config(), max_words=100, max_new_tokens=16, documents=2)
    assert memory.rehearse(llm, cfg, cfg.update_tokens) == cfg.update_tokens
    assert not llm.dequantize and llm.token_budget == 32_768


def test_the_rehearsal_decodes_behind_a_cache_of_the_final_length(llm):
    def lengths(kwargs):
        return [tuple(layer.keys.shape[::2]) for layer in kwargs["past_key_values"].layers]

    seen = []
    llm.model.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs, lengths(kwargs))), with_kwargs=True
    )
    memory.rehearse_rollout(llm, memory.Batch(prompts=2, prompt=30, new=10, n=3))
    kwargs, after = seen[-1]
    assert kwargs["input_ids"].shape == (6, 1)
    assert after == [(6, 40), (6, 39)]  # only the first layer is run: the token just decoded is in its cache


@pytest.mark.parametrize("role", ["propose", "update"])
def test_a_run_that_cannot_fit_fails_before_its_first_step(played, tmp_path, monkeypatch, role):
    owner = "rehearse_update" if role == "update" else "rehearse_rollout"
    monkeypatch.setattr(memory, owner, lambda *_: (_ for _ in ()).throw(OOM))
    with pytest.raises(UserError, match=f"out of memory in {role}, even with one row"):
        pop.main(played())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.undo()
    checkpoint.run_folder(Config(output=str(tmp_path / "run")))  # with smaller flags the same --output is taken


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("config.parse_args", lambda argv: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as exit:
        runpy.run_path("pop.py", run_name="__main__")
    assert (
        exit.value.code == 130 and capsys.readouterr().out.strip() == "stopped before training began: nothing is lost"
    )


# --------------------------------------------------------------------------------------------- numbers not finite


def poison(monkeypatch, bad_updates):
    """The loss is NaN in these updates, counted from 0."""
    real, calls = pop.grpo_loss, iter(range(1000))

    def loss(*args):
        value, sums = real(*args)
        return (value * float("nan") if next(calls) in bad_updates else value), sums

    monkeypatch.setattr(pop, "grpo_loss", loss)


def test_an_update_without_a_finite_loss_is_skipped_and_counted(played, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    assert pop.main(played(updates_per_batch=1, steps=3)) == 0
    assert [m["skipped_updates"] for m in metrics(tmp_path)] == [0, 1, 0]
    assert [m["loss"] is None for m in metrics(tmp_path)] == [False, True, False]
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert all(t.isfinite().all() for t in checkpoint.load_file(adapter).values())


def test_a_skipped_update_leaves_weights_optimizer_and_schedule_alone(llm, monkeypatch):
    cfg = replace(pop.Config(), lr=0.1, warmup_steps=5)
    state = pop.new_state(llm, cfg)
    poison(monkeypatch, {0})
    before = [p.detach().clone() for p in pop.trainable(llm)]
    pop.update(llm, state, [group(llm, [1.0, 0.0])], cfg)
    assert all(torch.equal(a, b) for a, b in zip(before, pop.trainable(llm), strict=True))
    assert (len(state.optimizer.state), state.scheduler.last_epoch, state.progress["nonfinite"]) == (0, 0, 1)
    pop.update(llm, state, [group(llm, [1.0, 0.0])], cfg)
    assert (state.scheduler.last_epoch, state.progress["nonfinite"]) == (1, 0)


def test_a_gradient_that_is_not_finite_is_skipped_too(llm):
    cfg = pop.Config()
    state = pop.new_state(llm, cfg)
    pop.trainable(llm)[0].register_hook(lambda grad: grad * float("inf"))
    assert pop.update(llm, state, [group(llm, [1.0, 0.0])], cfg)["skipped_updates"] == 1


def test_three_skipped_updates_in_a_row_stop_the_run_with_the_episodes_at_hand(played, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(UserError, match="not finite in 3 updates in a row"):
        pop.main(played(updates_per_batch=1, steps=9))
    run = tmp_path / "run"
    assert [m["skipped_updates"] for m in metrics(tmp_path)] == [0, 1, 1, 1]
    episodes = json.loads((run / "nonfinite.json").read_text())
    assert [e["answers"] for e in episodes] == [e["answers"] for e in training.lines(run / "episodes.jsonl")[-2:]]
    assert checkpoint.newest(run).name == "step-000004"


# ---------------------------------------------------------------------------------------------------------- disk


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_is_whole(played, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = checkpoint.sha256

    def full(path):
        if ".step-000002.tmp" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", full)
    with pytest.raises(UserError, match=f"step-000002: No space left on device. Make room .* --resume {run}"):
        pop.main(played())
    assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.newest(run).name == "step-000001"
    monkeypatch.undo()
    training.open_gates(monkeypatch.setattr)
    assert pop.main(["--resume", str(run)]) == 0
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2]


def test_the_systems_own_refusal_to_write_a_tensor_file_is_a_clear_error(tmp_path):
    """A limit on the size of files, set in the kernel: safetensors reports it in its own way."""
    llm = tiny_llm()
    state = pop.new_state(llm, pop.Config())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*step-000000.*File too large"):
            checkpoint.save(tmp_path, state, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_log_that_cannot_be_written_is_a_clear_error():
    with pytest.raises(UserError, match=r"cannot write /dev/full: No space left"):
        runlog.append(pop.Path("/dev/full"), {"a": 1})


# ------------------------------------------------------------------------------------------------------ trackers


def refusing(error):
    def call(**_):
        raise error

    return call


@pytest.fixture
def service(monkeypatch):
    """service(name, **functions): a module of that name, with the functions of wandb that it is given."""

    def stand_in(name, **functions):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    return stand_in


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])"),
            "api_key not configured",
        ),
        (ValueError("API key verification failed.\nMake sure that it is valid."), "API key verification failed."),
    ],
)
def test_a_missing_login_of_wandb_is_found_before_anything_is_loaded(
    played, tmp_path, monkeypatch, service, error, said
):
    service("wandb", login=refusing(error), init=lambda **_: pytest.fail("a run is begun"))
    monkeypatch.setattr(pop, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.setattr(pop.sources, "open_corpus", lambda _: pytest.fail("a corpus is opened"))
    with pytest.raises(
        UserError, match=rf"^--tracker wandb: \w+: {re.escape(said)}.*; run `wandb login`, set "
    ) as caught:
        pop.main(played(tracker="wandb"))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_key_of_wandb_is_verified_and_asked_for_once(service):
    asked = []
    service("wandb", login=lambda **given: asked.append(given))
    runlog.check_tracker(pop.Config(tracker="wandb"))
    assert asked == [{"verify": True}]


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard"])
def test_a_tracker_whose_package_is_broken_is_found_before_anything_is_loaded(played, monkeypatch, service, tracker):
    def broken(name, real=importlib.import_module):
        if tracker in name:
            raise ImportError("its parts do not fit together\nand so on")
        return real(name)

    service(tracker)
    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(pop, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(UserError, match=f"^--tracker {tracker}: ImportError: its parts do not fit together; "):
        pop.main(played(tracker=tracker))


def test_a_tracker_that_needs_no_login_is_asked_for_none(service):
    service("trackio")
    for tracker in ("none", "trackio"):
        runlog.check_tracker(pop.Config(tracker=tracker))


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_cannot_begin_a_run_is_one_line(service, tmp_path, tracker):
    service(tracker, init=refusing(ConnectionError("no route to host\nin 90 seconds")))
    with pytest.raises(UserError, match=f"^--tracker {tracker}: ConnectionError: no route to host; .*choose another$"):
        runlog.tracker(pop.Config(tracker=tracker), tmp_path)


# ------------------------------------------------------------------------------------------- the evaluation's start


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("audit --output {file}/x.json", "--output {file}/x.json cannot be written: File exists"),
        ("audit --documents 1", "--documents 1: must be 2 or more"),
        ("heldout --output {file}/x", "--output {file}/x cannot be used: .*Not a directory"),
        ("heldout --temperature nan", "--temperature nan: must be 0"),
        ("heldout --temperature inf", "--temperature inf: must be 0"),
        ("heldout --max-new-tokens 0", "--max-new-tokens 0: must be 1 or more"),
        ("heldout --seed -1", "--seed -1: must be"),
        ("heldout --judge big --judge-url localhost", "the judge's url 'localhost' is none"),
    ],
)
def test_what_an_evaluation_cannot_do_is_found_before_a_model_is_loaded(tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(evaluation.model, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    command, *more = words.format(file=tmp_path / "file").split()
    with pytest.raises(UserError, match="^" + said.format(file=tmp_path / "file")):
        evaluation.main([command, "--preset", "demo", *more])


# --------------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("role", ["proposer", "rubric", "judge"])
def test_a_role_that_writes_rubbish_stops_the_run_and_is_quoted(played, tmp_path, monkeypatch, role):
    if role == "proposer":
        monkeypatch.setattr(pop.rubric, "problem_fault", lambda *_: "too short")
    elif role == "rubric":
        monkeypatch.setattr(pop.rubric, "criterion_fault", lambda *_: "description too short")
        monkeypatch.setattr(pop.rubric, "parse_rubric", lambda _: [Criterion("n", "g", "d", 1.0)])
    else:
        monkeypatch.setattr(pop.rubric, "parse_ratings", lambda *_: None)
    with pytest.raises(UserError) as caught:
        pop.main(played(judge="generate", tries=3, steps=10))
    first, *quotes = str(caught.value).splitlines()
    assert f"the {role} failed on more than 90% of its work for 3 steps" in first
    failures = [f for e in training.lines(tmp_path / "run" / "episodes.jsonl") for f in e["failures"]]
    raw = [f["raw"] for f in failures if f["role"] == role]
    assert len(quotes) == 3 and all(repr(text[:300]) in quote for text, quote in zip(raw[-3:], quotes, strict=True))
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2, 3]
    assert checkpoint.newest(tmp_path / "run").name == "step-000003"


def test_steps_in_which_everything_was_dropped_are_logged_and_train_nothing(played, tmp_path, monkeypatch):
    monkeypatch.setattr(pop, "ZERO_SPREAD", 9.0)
    assert pop.main(played(steps=4)) == 0
    assert [m["drops"] for m in metrics(tmp_path)] == [{"group/zero spread": 2}] * 4
    assert all(m["loss"] is None and m["lr"] is None for m in metrics(tmp_path))
    adapter = checkpoint.load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(t.abs().max() == 0 for name, t in adapter.items() if "lora_B" in name)


def test_yields_are_shares_of_what_came_to_each_role():
    drops = ["proposer/too short", None, "rubric/no fact", "judge/unreadable ratings", "group/zero spread"]
    episodes = [Episode(Document("", ""), drop=drop) for drop in drops]
    assert runlog.yields(episodes) == {"proposer": 0.8, "rubric": 0.75, "judge": pytest.approx(2 / 3)}
    assert runlog.yields(episodes[:1]) == {"proposer": 0.0}


def test_low_yields_count_only_in_a_row():
    cfg, progress = pop.Config(), {"low_yield": {}, "nonfinite": 0}
    bad = [Episode(Document("", ""), failures=[{"role": "proposer", "reason": "r", "raw": "x"}], drop="proposer/r")]
    good = [Episode(Document("", ""), answers=[Answer("")])]
    stops = [runlog.trouble(episodes, cfg, progress) for episodes in (bad, bad, good, bad, bad, bad)]
    assert [bool(stop) for stop in stops] == [False] * 5 + [True]


# ----------------------------------------------------------------------------------------- documents and signals


def test_a_file_that_becomes_unreadable_in_mid_stream_is_skipped_and_counted(played, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    notes.mkdir()
    for i in range(12):
        (notes / f"{i}.txt").write_text(f"word{i} " * 60)
    real = pop.rubric.propose

    def propose(*args):
        for i in range(12):
            if i % 3 == 0:
                (notes / f"{i}.txt").unlink(missing_ok=True)
        return real(*args)

    monkeypatch.setattr(pop.rubric, "propose", propose)
    assert pop.main(played(corpus=notes, steps=5)) == 0
    last = metrics(tmp_path)[-1]
    assert last["documents_skipped"]["unreadable"] >= 1 and last["step"] == 5


def test_a_lost_connection_ends_the_run_resumably(played, tmp_path, monkeypatch, capsys):
    real = pop.documents_from

    def breaking(*args):
        documents = real(*args)
        yield from (next(documents) for _ in range(3))
        raise pop.Unreachable("cannot read 'org/name' from the hub (reset by peer)")

    monkeypatch.setattr(pop, "documents_from", breaking)
    assert pop.main(played()) == signals.RESUMABLE
    assert "reset by peer): the run is saved and resumable with: python pop.py --resume" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path / "run").name == "step-000001"
    monkeypatch.setattr(pop, "documents_from", real)
    assert pop.main(["--resume", str(tmp_path / "run")]) == 0
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2]


def test_the_command_that_a_run_is_resumed_with_can_be_pasted_whatever_its_folder_is_called(
    played, tmp_path, monkeypatch, capsys
):
    signal_in_update(monkeypatch, signal.SIGINT)
    run = tmp_path / "my run; 'really' $HOME"
    assert pop.main([*played(), "--output", str(run)]) == signals.RESUMABLE
    said = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(said.partition("resumable with: ")[2]) == ["python", "pop.py", "--resume", str(run)]
    with pytest.raises(UserError) as caught:
        pop.main([*played(), "--output", str(run)])
    assert shlex.quote(str(run)) in str(caught.value)


def test_a_run_whose_folder_was_moved_goes_on_where_it_is_to_the_same_end(played, tmp_path, monkeypatch):
    flags = played(steps=3, eval_every=1, eval_documents=2, audit=2)
    assert pop.main([*flags, "--output", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        signal_in_update(patch, signal.SIGINT)
        assert pop.main(flags) == signals.RESUMABLE
    elsewhere = tmp_path / "archive" / "moved"
    elsewhere.parent.mkdir()
    (tmp_path / "run").rename(elsewhere)
    monkeypatch.chdir(elsewhere.parent)
    assert pop.main(["--resume", "moved"]) == 0
    assert training.result(elsewhere) == training.result(tmp_path / "whole")
    assert not (tmp_path / "run").exists()


def test_numbers_out_of_range_in_a_runs_configuration_are_refused_on_resume(played, tmp_path):
    pop.main(played(steps=1))
    path = tmp_path / "run" / "config.json"
    for name, value in {"max_grad_norm": -1.0, "kl_coef": float("nan"), "lora_r": 0}.items():
        config = json.loads(path.read_text())
        (tmp_path / "edited").mkdir(exist_ok=True)
        (tmp_path / "edited" / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} {value}: must be "):
            pop.main(["--resume", str(tmp_path / "edited")])


def test_a_file_of_weights_that_was_written_anew_is_converted_anew(tmp_path, monkeypatch):
    """By its content: a copy keeps its time, and versions of a model have the same size."""
    folders = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        loading.AutoTokenizer,
        "from_pretrained",
        lambda *_, **__: types.SimpleNamespace(save_pretrained=lambda folder: folders.append(Path(folder).parent)),
    )
    monkeypatch.setattr(
        loading.AutoModelForCausalLM,
        "from_pretrained",
        lambda *_, **__: types.SimpleNamespace(save_pretrained=lambda folder: None),
    )
    made = []
    for content in (b"one", b"two", b"one"):
        (tmp_path / "m.gguf").write_bytes(content)
        os.utime(tmp_path / "m.gguf", (1, 1))
        made.append(loading.converted(tmp_path / "m.gguf"))
    assert made[0] == made[2] != made[1] and len(folders) == 2


def signal_in_update(monkeypatch, number: signal.Signals) -> None:
    real = pop.update

    def signalled(*args):
        os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(pop, "update", signalled)


def test_a_signal_within_an_update_waits_for_the_end_of_the_step(played, tmp_path, monkeypatch):
    signal_in_update(monkeypatch, signal.SIGINT)
    assert pop.main(played()) == signals.RESUMABLE
    assert [m["step"] for m in metrics(tmp_path)] == [1] and metrics(tmp_path)[0]["loss"] is not None
    assert checkpoint.newest(tmp_path / "run").name == "step-000001"


def test_a_signal_in_the_very_last_update_is_no_interruption(played, tmp_path, monkeypatch):
    signal_in_update(monkeypatch, signal.SIGTERM)
    assert pop.main(played(steps=1)) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_lost_in_a_destructor_ends_the_run_at_the_next_occasion():
    class Fragile:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10):
                pass

    with pytest.raises(signals.Interrupted, match="SIGTERM"), signals.Signals() as held:
        thing = Fragile()
        del thing
        with held.deferred():
            pytest.fail("the step goes on")


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_given_back():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with signals.Signals():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_output_that_nobody_reads_any_more_is_no_error():
    read, write = os.pipe()
    stream = signals.Unbreakable(os.fdopen(write, "w", buffering=1))
    os.close(read)
    for _ in range(3):
        print("step 1", file=stream, flush=True)
    stream.close()  # as Python does at its end


def test_a_character_that_a_terminal_cannot_show_is_replaced(tmp_path):
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        print("reward 0.5 ±0.1", file=signals.Unbreakable(file))
    assert (tmp_path / "log").read_text() == "reward 0.5 ?0.1\n"


@pytest.mark.parametrize("output", [">&-", ">&- 2>&-", ">/dev/full", "| head -n 1"])
def test_a_program_whose_output_cannot_be_written_ends_as_it_would(output):
    program = shlex.join([sys.executable, "-W", "ignore", "pop.py", "--preset", "demo", "--dry-run"])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{program} {output}"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_run_goes_on_where_its_output_knows_few_characters(played, tmp_path, monkeypatch):
    with (tmp_path / "log").open("w", encoding="ascii") as file:
        monkeypatch.setattr("sys.stdout", file)
        assert pop.main(played()) == 0
        monkeypatch.undo()
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2]
    assert re.search(r"step 2/2  reward 0\.\d+ \?\d", (tmp_path / "log").read_text())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_goes_on_where_its_output_is_closed(played, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr("sys.stdout", os.fdopen(write, "w", buffering=1))
    assert pop.main(played()) == 0
    assert [m["step"] for m in metrics(tmp_path)] == [1, 2]


def test_progress_is_plain_json():
    progress = pop.new_state(tiny_llm(), pop.Config()).progress
    assert json.loads(json.dumps(progress)) == progress
