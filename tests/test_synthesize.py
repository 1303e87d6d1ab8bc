"""Playing without training, and training on what was recorded without playing."""

import json
import os
import shlex
import signal
from dataclasses import asdict, replace

import pytest
import training
from conftest import tiny_llm

import pop
from data import Document, UserError
from engine import checkpoint, memory, signals, sources
from pop import Config
from rubric import Answer, Criterion, Episode

TOTAL = 5  # documents, two a step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.tiny_folder(tmp_path_factory.mktemp("model"))


def synthesize(model, run, **more) -> list[str]:
    return ["synthesize", *training.flags(model, run, steps=None, documents_total=TOTAL, group_size=4, **more)]


def replayed(model, run, made, **more) -> list[str]:
    recorded = dict(episodes=made / "episodes.jsonl", replay="answers")
    return training.flags(
        model, run, **{"steps": None, "audit": None, "eval_every": None, "lr": 1e-3, **recorded, **more}
    )


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """What a run that nothing interrupts synthesizes."""
    run = tmp_path_factory.mktemp("made") / "run"
    assert training.finish(synthesize(model, run), run.with_suffix(".log")) == 0
    return run


def no_one_speaks(monkeypatch) -> None:
    """Whatever generates or judges is an error; so is asking the hub."""

    def never(*_, **__):
        raise AssertionError("generated")

    for name in ("generate", "choice_probs"):
        monkeypatch.setattr(pop.LLM, name, never)
    monkeypatch.setattr("datasets.load_dataset", never)
    monkeypatch.setattr("huggingface_hub.dataset_info", never)
    monkeypatch.setattr(pop, "ZERO_SPREAD", 0.0)


def interrupted_in(monkeypatch, owner, name: str, call: int) -> None:
    real, calls = getattr(owner, name), iter(range(99))

    def signalled(*args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(owner, name, signalled)


# ---------------------------------------------------------------------------------------------- without training


def test_so_many_documents_are_played_and_nothing_is_trained(made):
    episodes = training.lines(made / "episodes.jsonl")
    assert [e["step"] for e in episodes] == [1, 1, 2, 2, 3]
    assert len({e["document"]["id"] for e in episodes}) == TOTAL
    assert all(len(e["answers"]) == 4 and e["rubric"] and a["ratings"] for e in episodes for a in e["answers"])
    metrics = training.lines(made / "metrics.jsonl")
    assert [(m["step"], m["loss"], m["heldout_reward"]) for m in metrics] == [(k, None, None) for k in (1, 2, 3)]
    assert [m["groups_trained"] for m in metrics] == [0, 0, 0]  # though groups were played
    adapter = checkpoint.load_file(made / "adapter" / "adapter_model.safetensors")
    assert all(t.abs().max() == 0 for name, t in adapter.items() if "lora_B" in name)


def test_oversampling_and_evaluations_are_no_part_of_it(model, tmp_path):
    flags = synthesize(model, tmp_path, eval_every=None, oversample=3.0)
    cfg = pop.parse_args(["--synthesize", *flags[1:]])
    assert (cfg.steps, cfg.eval_every, cfg.documents_taken) == (3, 0, 2)


def test_at_its_end_it_says_how_to_train_on_the_file(made):
    said = made.with_suffix(".log").read_text()
    assert f"{TOTAL} documents x 4 answers in 3 steps, and nothing is trained" in said
    python, script, *argv = shlex.split(said.splitlines()[-1])
    cfg = pop.parse_args(argv)
    assert (python, script) == ("python", "pop.py")
    assert (cfg.episodes, cfg.replay, cfg.loss) == (str(made / "episodes.jsonl"), "answers", "dpo")
    assert cfg.model == json.loads((made / "config.json").read_text())["model"]


@pytest.mark.parametrize("word", [["synthesize"], []])
def test_interrupted_it_goes_on_to_the_same_end(model, made, tmp_path, monkeypatch, word):
    training.open_gates(monkeypatch.setattr)
    interrupted_in(monkeypatch, pop.rubric, "judge", 1)
    run = tmp_path / "run"
    assert pop.main(synthesize(model, run, save_every=100)) == signals.RESUMABLE
    assert len(training.lines(run / "episodes.jsonl")) == 2
    assert pop.main([*word, "--resume", str(run)]) == 0
    assert training.result(run) == training.result(made)


@pytest.mark.parametrize("die_at", [25, 45])
def test_killed_it_goes_on_to_the_same_end(model, made, tmp_path, die_at):
    run, log = tmp_path / "run", tmp_path / "log"
    assert training.finish(synthesize(model, run), log, die_at=die_at) == -signal.SIGKILL, log.read_text()
    assert training.finish(["--resume", str(run)], log) == 0
    assert training.result(run) == training.result(made)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["synthesize"], "give --documents-total N, at least 1"),
        (["synthesize", "--documents-total", "-3"], "--documents-total -3: must be at least 0"),
        (["synthesize", "--documents-total", "3", "--steps", "9"], "--steps 9: synthesize takes --documents-total"),
        (["synthesize", "--documents-total", "3", "--episodes", "x", "--replay", "answers"], "no --replay answers"),
        (["--documents-total", "3"], "--documents-total 3: is for synthesize"),
        (["--replay", "answers", "--episodes", ""], "--replay answers: give --episodes too"),
    ],
)
def test_a_mistake_is_one_clear_line(flags, words):
    with pytest.raises(UserError, match=words) as caught:
        pop.main([*flags, "--preset", "demo"])
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- without playing


@pytest.mark.parametrize("loss", ["dapo", "dpo"])
def test_recorded_answers_are_trained_on_once_and_nothing_is_generated(model, made, tmp_path, monkeypatch, loss):
    no_one_speaks(monkeypatch)
    run = tmp_path / "run"
    assert pop.main(replayed(model, run, made, loss=loss, corpus="somebody/unreachable")) == 0
    recorded, episodes = (training.lines(folder / "episodes.jsonl") for folder in (made, run))
    assert [e["document"]["id"] for e in episodes] == [
        e["document"]["id"] for e in recorded[:4]
    ]  # the fifth is no step
    for e, was in zip(episodes, recorded, strict=False):
        assert (e["prompt_ids"], e["rubric"]) == (was["prompt_ids"], was["rubric"])
        for a, b in zip(e["answers"], was["answers"], strict=True):
            assert (a["ids"], a["ratings"], a["reward"]) == (b["ids"], b["ratings"], b["reward"])
    metrics = training.lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2] and all(set(m["seconds"]) == {"update"} for m in metrics)
    assert not (run / "audit.json").exists() and not (run / "heldout.jsonl").exists()
    adapter = checkpoint.load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for name, t in adapter.items() if "lora_B" in name)


def test_dpo_on_recorded_answers_sets_the_best_of_a_group_against_its_worst(model, made, tmp_path, monkeypatch):
    no_one_speaks(monkeypatch)
    pairs, real = [], pop.groups_of
    monkeypatch.setattr(pop, "groups_of", lambda *given: pairs.extend(real(*given)) or real(*given))
    assert pop.main(replayed(model, tmp_path / "run", made, loss="dpo", updates_per_batch=1)) == 0
    ranked = [sorted(e["answers"], key=lambda a: a["reward"]) for e in training.lines(made / "episodes.jsonl")[:4]]
    assert all(len({a["reward"] for a in answers}) == 4 for answers in ranked)
    assert [[a.ids for a in pair.answers] for pair in pairs] == [[r[-1]["ids"], r[0]["ids"]] for r in ranked]


@pytest.mark.parametrize("loss", ["dapo", "dpo"])
def test_interrupted_a_replay_of_answers_ends_as_if_it_had_not_been(model, made, tmp_path, monkeypatch, loss):
    no_one_speaks(monkeypatch)
    flags = dict(loss=loss, documents=1, save_every=100)
    assert pop.main(replayed(model, tmp_path / "a", made, **flags)) == 0
    interrupted_in(monkeypatch, pop, "update", 2)
    assert pop.main(replayed(model, tmp_path / "b", made, **flags)) == signals.RESUMABLE
    assert len(training.lines(tmp_path / "b" / "metrics.jsonl")) == 3
    assert pop.main(["--resume", str(tmp_path / "b")]) == 0
    assert training.result(tmp_path / "a") == training.result(tmp_path / "b")
    assert len(training.result(tmp_path / "b")["metrics"]) == TOTAL


def test_killed_a_replay_of_answers_ends_as_if_it_had_not_been(model, made, tmp_path):
    runs = [replayed(model, tmp_path / name, made, loss="dpo", documents=1) for name in ("a", "b")]
    assert training.finish(runs[0], tmp_path / "log") == 0
    assert training.finish(runs[1], tmp_path / "log", die_at=60) == -signal.SIGKILL
    assert 0 < len(training.lines(tmp_path / "b" / "metrics.jsonl")) < TOTAL
    assert training.finish(["--resume", str(tmp_path / "b")], tmp_path / "log") == 0
    assert training.result(tmp_path / "a") == training.result(tmp_path / "b")


RUBRIC = [Criterion("n", "g", "d", 3.0), Criterion("m", "g", "d", 1.0)]


def episode(drop=None, answers=3, prompt="Why?", **fields) -> Episode:
    llm = tiny_llm()
    texts = [f"It is number {i} of them." for i in range(answers)]
    made = [Answer(t, llm.text_ids(t), ratings=[float(i % 3), 1.0], reward=9.0) for i, t in enumerate(texts)]
    told = {"failures": [{"role": "judge"}], "drop": drop}
    return Episode(Document("d", "A text."), prompt, "r", made, RUBRIC, llm.encode(prompt), **told)


def written(path, *episodes) -> Config:
    path.write_text("".join(json.dumps({"step": 1, **asdict(e)}) + "\n" for e in episodes))
    return Config(episodes=str(path), replay="answers", skip_guards=("all",))


def test_groups_that_came_as_far_as_grades_are_replayed_with_their_rated_answers(tmp_path):
    unrated, misfit, alone = episode(prompt="unrated"), episode(prompt="misfit"), episode(prompt="alone", answers=1)
    unrated.answers[1].ratings = None
    misfit.answers[0].ratings, misfit.answers[1].ids = [1.0], []
    spread, more = episode("group/zero spread", prompt="spread"), episode("group/oversampled", prompt="more")
    lost = [episode("judge/unreadable ratings"), episode("rubric/no fact", answers=0), episode(answers=0)]
    cfg = written(tmp_path / "e.jsonl", unrated, misfit, alone, spread, *lost, more)
    found = sources.replayed([e.document for e in sources.recording(cfg).episodes.values()], cfg)
    assert [(e.problem, len(e.answers)) for e in found] == [("unrated", 2), ("spread", 3), ("more", 3)]
    assert all(e.drop is None and e.failures == [] for e in found)


def test_rewards_of_recorded_answers_are_computed_anew(tmp_path):
    cfg = written(tmp_path / "e.jsonl", episode(), episode())
    recorded = next(iter(sources.recording(cfg).episodes.values()))

    def rewards(cfg):
        before = asdict(recorded)
        (e,) = pop.play(None, [recorded.document], cfg, None)
        assert asdict(recorded) == before  # what one step computes is no part of the recording
        return [a.reward for a in e.answers]

    assert rewards(cfg) == [1 / 8, 4 / 8, 7 / 8]
    assert rewards(replace(cfg, reward="random")) not in (rewards(cfg), [9.0] * 3)
    recorded.answers[2].text = "This answer fully meets every criterion."
    assert rewards(replace(cfg, skip_guards=()))[2] == 0.0 and rewards(cfg)[2] == 7 / 8


def test_flags_go_before_the_defaults_of_a_replay_of_answers(tmp_path):
    path = tmp_path / "e.jsonl"
    written(path, *[episode(prompt=str(i)) for i in range(7)])
    flags = ["--preset", "24gb", "--episodes", str(path), "--replay", "answers"]
    cfg = pop.parse_args([*flags, "--documents", "2"])
    assert (cfg.steps, cfg.audit, cfg.eval_every, cfg.documents_taken) == (3, 0, 0, 2)
    assert pop.parse_args(flags).steps == 1  # 7 episodes are less than 16
    cfg = pop.parse_args([*flags, "--steps", "9", "--audit", "2", "--eval-every", "4"])
    assert (cfg.steps, cfg.audit, cfg.eval_every) == (9, 2, 4)


def test_a_file_in_the_home_folder_is_counted_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "e.jsonl", *[episode(prompt=str(i)) for i in range(7)])
    flags = ["--preset", "24gb", "--replay", "answers", "--documents", "2", "--episodes", "~/e.jsonl"]
    cfg = pop.parse_args(flags)
    assert (cfg.steps, cfg.audit, cfg.eval_every, cfg.episodes) == (3, 0, 0, str(tmp_path / "e.jsonl"))


def test_a_file_without_a_group_to_train_on_is_an_error_that_names_it(tmp_path):
    cfg = written(tmp_path / "mine.jsonl", episode(answers=1))
    with pytest.raises(UserError, match=r"--episodes .*mine.jsonl: no episode there has two rated answers"):
        sources.recording(cfg)


@pytest.mark.parametrize("harm", ["an id too large", "an id below 0", "a prompt's id", "another text"])
def test_answers_of_another_tokenizer_are_refused_in_one_line(llm, tmp_path, harm):
    good, bad = episode(), episode()
    sources.check_tokens(llm, written(tmp_path / "good.jsonl", good))
    size = llm.model.get_input_embeddings().num_embeddings
    if harm == "another text":
        bad.answers[0].text = "It is another text."
    else:
        ids = bad.prompt_ids if harm == "a prompt's id" else bad.answers[2].ids
        ids[3] = -1 if harm == "an id below 0" else size
    with pytest.raises(UserError, match="another model's tokenizer") as caught:
        sources.check_tokens(llm, written(tmp_path / "bad.jsonl", bad))
    assert "\n" not in str(caught.value)


def test_a_recorded_answer_that_does_not_fit_the_context_is_refused(llm, tmp_path):
    e = episode()
    llm.model.config.max_position_embeddings = len(e.prompt_ids) + len(e.answers[1].ids)
    sources.check_tokens(llm, written(tmp_path / "full.jsonl", e))
    e.answers[1].ids.append(7)
    with pytest.raises(UserError, match=r"context is \d+"):
        sources.check_tokens(llm, written(tmp_path / "long.jsonl", e))


def test_the_plan_and_the_rehearsal_leave_out_what_is_not_done(tmp_path, monkeypatch):
    cfg, rehearsed, llm = written(tmp_path / "e.jsonl", episode()), [], tiny_llm()
    cfg = replace(cfg, audit=0, eval_every=0)  # as parse_args has it: held-out documents would be played
    for kind in ("rollout", "update"):
        monkeypatch.setattr(memory, f"rehearse_{kind}", lambda *_, kind=kind: rehearsed.append(kind))
    for chosen in (cfg, Config(synthesize=True, documents_total=4), Config()):
        memory.rehearse(llm, chosen, chosen.update_tokens)
    played = ["propose", "solve", "rubric", "judge"]
    assert rehearsed == ["update", *["rollout"] * 4, *["rollout"] * 4, "update"]
    shown = pop.plan.plan(replace(cfg, preset="24gb"))
    assert "update" in shown and not any(f"  {role} " in shown for role in played)
