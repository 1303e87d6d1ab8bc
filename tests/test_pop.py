"""The method: advantages, the GRPO loss and its gradient, the update, and that the loop learns."""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
import json
import math
import random
import statistics
import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import tiny_llm

import config
import pop
from data import Document, UserError
from engine import checkpoint, memory, packing, runlog
from pop import Config
from rubric import Answer, Criterion, Episode

CFG = Config(skip_guards=("too_little_content",))  # the answers here are numbers without words
RUBRIC = [Criterion("n", "g", "d", 1.0)]


def group(llm, rewards, seed=0, prompt="Why?", lengths=None) -> Episode:
    """A graded group with random completions of different lengths."""
    rng = random.Random(seed)
    lengths = lengths or [rng.randint(1, 9) for _ in rewards]
    answers = [
        Answer("", [rng.randrange(256) for _ in range(n)], ratings=[r * 2], grade=r, reward=r)
        for n, r in zip(lengths, rewards, strict=True)
    ]
    for answer, advantage in zip(answers, pop.group_advantages(rewards), strict=True):
        answer.advantage = advantage
    return Episode(Document("d", ""), prompt, "r", answers, RUBRIC, llm.encode(prompt))


def gradients(llm, episodes, cfg) -> list[torch.Tensor]:
    """The gradient one update uses, caught where it would be clipped."""
    state = descending(llm, cfg, lr=0.0)
    caught: list[torch.Tensor] = []
    state.optimizer.register_step_pre_hook(lambda *_: caught.extend(p.grad.clone() for p in pop.trainable(llm)))
    pop.update(llm, state, episodes, replace(cfg, max_grad_norm=1e9))
    return caught


def descending(llm, cfg, lr) -> pop.State:
    """A run's state with plain gradient descent at a constant rate."""
    state = pop.new_state(llm, cfg)
    state.optimizer = torch.optim.SGD(pop.trainable(llm), lr=lr)
    state.scheduler = torch.optim.lr_scheduler.ConstantLR(state.optimizer, 1.0)
    return state


# --------------------------------------------------------------------------------------------------- advantages


def test_advantage_is_reward_minus_group_mean():
    assert pop.group_advantages([1.0, 0.0, 0.5, 0.5]) == [0.5, -0.5, 0.0, 0.0]


def test_std_scaling_divides_by_the_sample_standard_deviation():
    assert pop.group_advantages([1.0, 0.0], scale_by_std=True) == pytest.approx([0.70701, -0.70701], abs=1e-4)


def test_zero_spread_group_is_dropped_and_others_kept():
    flat = Episode(Document("a", ""), answers=[Answer("x", [1], ratings=[1.0]) for _ in range(3)], rubric=RUBRIC)
    mixed = Episode(Document("b", ""), answers=[Answer("x", [1], ratings=[r]) for r in (0.0, 2.0)], rubric=RUBRIC)
    pop.grade([flat, mixed], CFG)
    assert (flat.drop, mixed.drop) == ("group/zero spread", None)


def test_unreadable_grades_drop_the_answer_and_are_never_scored_zero():
    answers = [Answer("x", [1], ratings=[2.0]), Answer("y", [1], ratings=None), Answer("z", [1], ratings=[1.0])]
    episode = Episode(Document("a", ""), answers=answers, rubric=RUBRIC)
    pop.grade([episode], CFG)
    assert [a.text for a in episode.answers] == ["x", "z"]
    assert [a.advantage for a in episode.answers] == [0.25, -0.25]


def spread_out(*rewards) -> Episode:
    answers = [Answer("x", [1], reward=r) for r in rewards]
    return Episode(Document("d", ""), answers=answers)


def test_of_more_groups_those_with_the_widest_rewards_are_kept_in_the_order_of_documents():
    wide, flat, lost, wider, none = (
        *(spread_out(0.2, 0.8), spread_out(0.4, 0.6), spread_out(0.0, 1.0)),
        *(spread_out(0.0, 0.9, 0.0, 0.9), spread_out(0.5, 0.5)),
    )
    lost.drop = "rubric/no complete criterion"
    episodes = [wide, flat, lost, wider, none]
    pop.keep_widest(episodes, 2)
    assert pop.alive(episodes) == [wide, wider]
    assert [e.drop for e in (flat, lost, none)] == ["group/oversampled", lost.drop, "group/oversampled"]
    assert runlog.yields(episodes) == {"proposer": 1.0, "rubric": 0.8, "judge": 1.0}  # no role has failed on them


def test_of_groups_with_equal_spread_the_first_are_kept():
    episodes = [spread_out(0.1, 0.9), spread_out(0.5, 0.6), spread_out(0.9, 0.1), spread_out(0.1, 0.9)]
    pop.keep_widest(episodes, 2)
    assert [e.drop is None for e in episodes] == [True, False, True, False]


def test_group_with_fewer_than_two_readable_answers_is_dropped():
    answers = [Answer("x", [1], ratings=[2.0]), Answer("y", [1], ratings=None)]
    episode = Episode(Document("a", ""), answers=answers, rubric=RUBRIC)
    pop.grade([episode], CFG)
    assert episode.drop == "judge/unreadable ratings"


def test_length_penalty_scales_the_reward_of_long_answers_only():
    cfg = replace(CFG, max_new_tokens=100, soft_length=0.6, length_floor=0.5)
    answers = [Answer("x", [1] * n, ratings=[2.0]) for n in (60, 80, 100)]
    episode = Episode(Document("a", ""), answers=answers, rubric=RUBRIC)
    pop.grade([episode], cfg)
    assert [a.reward for a in answers] == pytest.approx([1.0, 0.75, 0.5])
    assert [a.grade for a in answers] == [1.0, 1.0, 1.0]


# --------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.5, 1.0, 1), (1.5, -1.0, 0), (0.5, -1.0, 1), (0.5, 1.0, 0), (1.1, 1.0, 0), (1.5, 0.0, 0)],
)
def test_clipped_counts_the_tokens_whose_gradient_clipping_takes_away(ratio, advantage, clipped):
    logps = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, sums = pop.grpo_loss(logps, torch.zeros(1), None, torch.tensor([advantage]), 1, CFG)
    loss.backward()
    assert sums["clipped"] == clipped
    assert (logps.grad.item() == 0) == (clipped == 1 or advantage == 0)


@pytest.mark.parametrize(
    "flags",
    [
        *(
            "--temperature nan",
            "--lr inf",
            "--lr 0",
            "--kl-coef nan",
            "--kl-coef -1",
            "--max-grad-norm 0",
            "--lora-r 0",
        ),
        *("--max-grad-norm -1", "--max-new-tokens 0", "--max-new-tokens -5", "--problem-tokens 0", "--group-size 1"),
        *("--clip-low 1.5", "--length-floor nan", "--seed -1", "--oversample 0.5", "--steps 0", "--max-criteria 6"),
        *("--min-words 0", "--warmup-steps -1", "--dpo-beta 0", "--proposer-temperature -1", "--rollout-tokens 0"),
    ],
)
def test_a_number_out_of_its_range_is_one_clear_line_before_anything_is_loaded(flags):
    name, value = flags.split()
    with pytest.raises(UserError, match=rf"^{name} \S+: must be ") as error:
        pop.parse_args(["--preset", "demo", name, value])
    assert "\n" not in str(error.value)


def test_every_number_of_the_configuration_has_a_range():
    numbers = [f for f in dataclasses.fields(Config) if f.type in (int, float, "int", "float")]
    assert len(numbers) > 30 and [f.name for f in numbers if not f.metadata] == []


@pytest.mark.parametrize(("corrected", "slope"), [(True, -math.log(2.0)), (False, -1.0)])
def test_loss_and_gradient_of_a_hand_worked_case(corrected, slope):
    # Ratios 1.5, 0.5, 1.0 with clip range [0.8, 1.28]. Token 1, A=+1: min(1.5, 1.28) = 1.28, clipped, no gradient.
    # Token 2, A=-1: min(-0.5, -0.8) = -0.8, clipped, no gradient. Token 3, A=+2: 2.0, gradient of the loss -2.
    # k3 against ref = logp + ln 2 for token 3 only: 2 - ln 2 - 1; its gradient 1 - 2 = -1, and times the ratio, 1, that
    # of the ratio more: -1 + 1 - ln 2. Total 4 tokens.
    logps = torch.tensor([math.log(1.5), math.log(0.5), 0.0], dtype=torch.float64, requires_grad=True)
    old = torch.zeros(3, dtype=torch.float64)
    ref = logps.detach() + torch.tensor([0.0, 0.0, math.log(2.0)])
    cfg = replace(CFG, clip_low=0.2, clip_high=0.28, kl_coef=0.1, kl_correction=corrected)
    loss, sums = pop.grpo_loss(logps, old, ref, torch.tensor([1.0, -1.0, 2.0]), 4, cfg)
    loss.backward()
    kl = 1 - math.log(2.0)
    assert loss.item() == pytest.approx((-1.28 + 0.8 - 2.0 + 0.1 * kl) / 4)
    assert logps.grad.tolist() == pytest.approx([0.0, 0.0, (-2.0 + 0.1 * slope) / 4])
    assert sums["clipped"] == 2 and sums["kl"] == pytest.approx(kl)


@pytest.mark.parametrize("corrected", [True, False])
def test_the_expected_gradient_of_the_kl_term_is_that_of_the_kl_it_estimates(corrected):
    """Exact: the mean over all tokens of a small vocabulary, each as probable as the policy makes it."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    p, ref = logits.log_softmax(-1), torch.randn(7, dtype=torch.float64).log_softmax(-1)
    cfg = replace(CFG, kl_coef=1.0, kl_correction=corrected)
    none, expected = torch.zeros(1, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        logp = p[token : token + 1]
        loss, _ = pop.grpo_loss(logp, logp.detach(), ref[token : token + 1], none, 1, cfg)
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected += p[token].exp().item() * slope
    exact = (p.exp() * (p - ref)).sum() if corrected else (ref.exp() * (ref - p)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(expected, wanted)


@pytest.mark.parametrize("seed", range(10))
def test_update_equals_a_naive_float64_version(seed):
    """Random shapes: loss and gradient of the whole update against autograd through full logits, row by row."""
    rng = random.Random(seed)
    llm = tiny_llm(seed)
    cfg = replace(CFG, temperature=rng.choice([0.7, 1.0, 1.3]), kl_coef=rng.choice([0.0, 0.05]), update_tokens=10_000)
    cfg = replace(cfg, kl_correction=rng.random() < 0.5)
    episodes = [
        group(llm, [rng.random() for _ in range(rng.randint(2, 5))], seed=seed * 10 + i, prompt="Why" + "?" * i)
        for i in range(rng.randint(1, 3))
    ]
    got = gradients(llm, episodes, cfg)

    llm.model.double()
    total = sum(len(a.ids) for e in episodes for a in e.answers)
    loss = torch.zeros((), dtype=torch.float64)
    for e in episodes:
        for a in e.answers:
            row = torch.tensor([e.prompt_ids + a.ids])

            def completion_logps(row=row, ids=a.ids):
                logits = llm.model(input_ids=row).logits[0, -len(ids) - 1 : -1] / cfg.temperature
                return logits.log_softmax(-1)[range(len(ids)), ids]

            logps = completion_logps()
            loss = loss - a.advantage * (logps - logps.detach()).exp().sum() / total
            if cfg.kl_coef:
                with torch.no_grad(), llm.adapters_off():
                    ref = completion_logps()
                k3 = (ref - logps).exp() - (ref - logps) - 1
                if cfg.kl_correction:
                    k3 = k3 * (logps - logps.detach()).exp()
                loss = loss + cfg.kl_coef * k3.sum() / total
    wanted = torch.autograd.grad(loss, pop.trainable(llm))
    for mine, naive in zip(got, wanted, strict=True):
        assert (mine - naive).norm() < 1e-4 * naive.norm() + 1e-9


def test_micro_batch_size_does_not_change_the_gradient(llm):
    episodes = [group(llm, [1.0, 0.0, 0.5, 0.2], seed=s, prompt="Why" + "?" * s) for s in range(3)]
    one_by_one, all_at_once = (gradients(llm, episodes, replace(CFG, update_tokens=n)) for n in (1, 100_000))
    assert [len(packing.micro_batches(llm, pop.groups_of(episodes, CFG), n, CFG)) for n in (1, 100_000)] == [12, 1]
    for a, b in zip(one_by_one, all_at_once, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_zero_spread_group_gives_zero_gradient(llm):
    episode = group(llm, [0.5, 0.5, 0.5])
    assert all(g.abs().max() == 0 for g in gradients(llm, [episode], replace(CFG, kl_coef=0.0)))


def test_end_token_is_trained_on_even_where_it_is_the_pad_token(llm):
    end = llm.tokenizer.eos_token_id
    assert end == llm.pad_id
    episode = group(llm, [1.0, 0.0], lengths=[3, 5])
    for answer in episode.answers:
        answer.ids[-1] = end
    seen = []
    real = llm.logps
    llm.logps = lambda ids, segments, *rest: seen.append(ids[segments > 0].tolist()) or real(ids, segments, *rest)
    gradients(llm, [episode], replace(CFG, kl_coef=0.0))
    (trained,) = seen
    assert sorted(trained) == sorted(t for a in episode.answers for t in a.ids)
    assert trained.count(end) == 2


def test_several_updates_on_one_batch_leave_the_ratio_and_clip(llm):
    episode = group(llm, [1.0, 0.0, 1.0, 0.0], lengths=[6, 6, 6, 6])
    cfg = replace(CFG, updates_per_batch=4, lr=0.05, steps=1, warmup_steps=0)
    state = pop.new_state(llm, cfg)
    assert pop.update(llm, state, [episode], cfg)["clipped"] > 0


def test_kl_is_zero_before_training_and_positive_after():
    llm = tiny_llm(trained=False)
    episode = group(llm, [1.0, 0.0, 1.0, 0.0])
    cfg = replace(CFG, lr=0.05, steps=2, warmup_steps=0)
    state = pop.new_state(llm, cfg)
    first = pop.update(llm, state, [episode], cfg)["kl"]
    second = pop.update(llm, state, [episode], cfg)["kl"]
    assert first == pytest.approx(0.0, abs=1e-9) and second > 1e-6


def test_learning_rate_rises_then_falls_and_is_never_zero():
    factors = [pop.lr_factor(u, warmup=3, total=10) for u in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(a > b > 0 for a, b in pairwise(factors[3:]))


# ----------------------------------------------------------------------------------------------------- learning


def test_the_loop_learns_a_rewarded_behaviour():
    """A random model is rewarded for the share of vowels in its answers, under the trainer's own functions."""
    llm = tiny_llm(trained=False)
    cfg = replace(CFG, steps=40, lr=0.02, warmup_steps=2, max_new_tokens=12, group_size=16, kl_coef=0.0)
    state = pop.new_state(llm, cfg)
    torch.manual_seed(0)
    rewards = []
    for _ in range(cfg.steps):
        episodes = [Episode(Document(p, ""), p, rubric=RUBRIC) for p in ("Say something.", "And now?")]
        pop.rubric.solve(llm, episodes, cfg)
        for answer in (a for e in episodes for a in e.answers):
            answer.ratings = [2.0 * sum(chr(t) in "aeiou" for t in map(int_of(llm), answer.ids)) / len(answer.ids)]
        rewards.append(sum(a.ratings[0] / 2 for e in episodes for a in e.answers) / 32)
        pop.grade(episodes, replace(cfg, length_floor=1.0))
        pop.update(llm, state, pop.alive(episodes), cfg)
    before, after = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    assert before < 0.1 and after > 0.6, (before, after)


def int_of(llm):
    """Token id -> the byte it stands for (special tokens: 0)."""

    def byte(token: int) -> int:
        text = llm.tokenizer.decode([token], skip_special_tokens=True)
        return ord(text) if len(text) == 1 else 0

    return byte


# --------------------------------------------------------------------------------------------- the run, its files


@pytest.fixture
def played(monkeypatch):
    """Self-play with a random model: the quality gates, which its noise cannot pass, are opened."""
    for gate in ("problem_fault", "reference_fault", "criterion_fault"):
        monkeypatch.setattr(pop.rubric, gate, lambda *_: None)
    monkeypatch.setattr(pop, "load", lambda *_, **__: tiny_llm())
    short = ["--preset", "demo", "--steps", "2", "--documents", "2", "--max-new-tokens", "16"]
    return [*short, "--skip-guards", "too_little_content", "--audit", "0", "--eval-every", "0"]


def test_a_run_leaves_config_metrics_episodes_and_an_adapter(played, tmp_path, capsys):
    run = tmp_path / "run"
    assert pop.main([*played, "--output", str(run)]) == 0
    config = json.loads((run / "config.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert config["steps"] == 2 and config["model"] == "smollm2"
    assert [m["step"] for m in metrics] == [1, 2] and len(episodes) == 4
    assert {"propose", "solve", "rubric", "judge", "update"} == set(metrics[0]["seconds"])
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    for e in episodes:
        for a in e["answers"]:
            rating = sum(c["weight"] * r for c, r in zip(e["rubric"], a["ratings"], strict=True))
            assert a["grade"] == pytest.approx(rating / sum(2 * c["weight"] for c in e["rubric"]))
    printed = capsys.readouterr().out
    assert "step 2/2" in printed and "criterion" in printed


def test_an_oversampled_step_plays_more_documents_than_it_trains_on(played, tmp_path, monkeypatch, capsys):
    trained, real = [], pop.update
    monkeypatch.setattr(runlog, "MIN_YIELD", 1)  # the groups that are left out count against no role
    monkeypatch.setattr(pop, "update", lambda *given: trained.append([e.problem for e in given[2]]) or real(*given))
    run = tmp_path / "run"
    assert pop.main([*played, "--oversample", "1.7", "--output", str(run)]) == 0
    episodes = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())["progress"]
    assert state["documents"] == len(episodes) == 2 * 4  # 2 x 1.7 is 3.4
    for step in (1, 2):
        mine = [e for e in episodes if e["step"] == step]
        spreads = [statistics.pstdev([a["reward"] for a in e["answers"]]) for e in mine]
        kept = [e for e, spread in zip(mine, spreads, strict=True) if spread in sorted(spreads)[-2:]]
        assert trained[step - 1] == [e["problem"] for e in kept] and len(kept) == 2
        assert all(e["drop"] == (None if e in kept else "group/oversampled") for e in mine)
    printed = capsys.readouterr().out
    assert "2 steps x 4 documents x 4 answers = 32 answers, of which each step trains on 2 groups" in printed
    assert "groups 2/2" in printed


@pytest.mark.parametrize(("documents", "times", "taken"), [(16, 1.5, 24), (2, 1.0, 2), (3, 1.1, 4), (50, 1.1, 55)])
def test_a_step_takes_the_product_rounded_up(documents, times, taken):
    assert Config(documents=documents, oversample=times).documents_taken == taken


def test_same_seed_same_run(played, tmp_path):
    runs = []
    for name in ("a", "b"):
        pop.main([*played, "--output", str(tmp_path / name)])
        runs.append((tmp_path / name / "episodes.jsonl").read_text())
    assert runs[0] == runs[1]


# ---------------------------------------------------------------------------------------------- a user's mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "12gb"], "12gb"),
        (["--group-size", "1"], "--group-size 1"),
        (["--corpus", "./nowhere"], "nowhere"),
        (["--model", "./nowhere"], "nowhere"),
        (["--max-criteria", "9"], "--max-criteria 9"),
        (["--steps", "0"], "--steps 0"),
        (["--oversample", "0.5"], "--oversample 0.5: must be at least 1"),
        (["--oversample", "nan"], "--oversample nan: must be at least 1"),
        (["--oversample", "inf"], "--oversample inf: must be at least 1"),
    ],
)
def test_a_mistake_is_one_clear_line(flags, words):
    with pytest.raises(UserError, match=words) as caught:
        pop.main(["--preset", "demo", *flags] if flags[0] != "--preset" else flags)
    assert "\n" not in str(caught.value)


def test_an_unknown_flag_exits_with_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        pop.main(["--preset", "demo", "--grup-size", "4"])
    assert caught.value.code == 2 and "--grup-size" in capsys.readouterr().err


def test_an_output_folder_with_a_run_in_it_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        checkpoint.run_folder(replace(CFG, output=str(tmp_path)))


def test_a_prompt_that_cannot_fit_the_context_is_refused_before_training(llm):
    with pytest.raises(UserError, match="context is 8192"):
        memory.check_fits(llm, replace(CFG, max_words=5000))


SHORT = replace(CFG, audit=0, eval_every=0, problem_tokens=100, reference_tokens=200)


@pytest.mark.parametrize(
    ("role", "flags"),
    [
        ("propose", dict(rubric="generic", max_words=4_900)),
        ("rubric", dict(max_words=3_500)),
        ("rubric", dict(rubric="generic", max_words=3_500, eval_every=20)),  # for the held-out documents
        ("rubric", dict(rubric_answers=0, max_words=3_000, max_new_tokens=500, eval_every=20)),  # there it sees answers
        ("rubric", dict(episodes="recorded", rubric_answers=0, max_words=4_300)),
        ("judge", dict(judge="generate", max_new_tokens=6_200, rubric="generic", max_criteria=1)),  # four all the same
        ("judge", dict(judge="logits", max_new_tokens=7_500, rubric="generic")),
        ("judge", dict(max_words=300, max_new_tokens=300, reference_tokens=2_600, audit=2)),  # padded references
    ],
)
def test_the_longest_prompt_of_any_role_in_use_must_fit_the_context(llm, monkeypatch, role, flags):
    cfg = replace(SHORT, **flags)
    with pytest.raises(UserError, match="context is 8192"):
        memory.check_fits(llm, cfg)
    usual = memory.work_of(cfg)
    monkeypatch.setattr(memory, "work_of", lambda cfg: {**usual, role: memory.Batch(1, 0)})  # all others fit
    memory.check_fits(llm, cfg)


@pytest.mark.parametrize(
    "flags",
    [
        dict(rubric="generic", max_words=4_000),
        dict(rubric="holistic", max_words=4_000),
        dict(episodes="recorded", max_words=5_000),
        dict(episodes="recorded", rubric="generic", rubric_answers=0, max_words=5_000),
    ],
)
def test_no_run_is_refused_for_a_role_that_it_does_not_have(llm, flags):
    memory.check_fits(llm, replace(SHORT, **flags))
    assert memory.rehearse(llm, replace(SHORT, documents=1, oversample=1.0, group_size=2, **flags), 4_096) == 4_096
    with pytest.raises(UserError, match="context is 8192"):  # all roles play the held-out documents
        memory.check_fits(llm, replace(SHORT, **flags, audit=2))


def card_of(monkeypatch, gib: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    properties = types.SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.parametrize(
    ("gib", "preset"),
    [(14.6, "16gb"), (15.9, "16gb"), (22.1, "24gb"), (23.6, "24gb"), (31.4, "24gb"), (44.4, "48gb"), (79.1, "48gb")],
)
def test_the_preset_follows_the_memory_that_cards_report(monkeypatch, gib, preset):
    card_of(monkeypatch, gib)
    assert config.pick_preset()[0] == preset


def test_a_card_too_small_for_the_default_model_is_told_so_in_one_line_but_not_when_help_is_asked(monkeypatch, capsys):
    card_of(monkeypatch, 11.8)
    with pytest.raises(UserError, match=r"a card has 12 GiB.*--preset 16gb.*--preset demo") as error:
        pop.parse_args([])
    assert "\n" not in str(error.value)
    assert pop.parse_args(["--preset", "16gb", "--model", "small"]).rollout_tokens == 32_768
    with pytest.raises(SystemExit) as exit:
        pop.parse_args(["--help"])
    assert exit.value.code == 0


def test_the_preset_that_was_picked_is_named_in_the_settings_whether_or_not_auto_is_asked_for():
    assert pop.parse_args(["--preset", "auto"]).preset == pop.parse_args([]).preset == "demo"


def test_preset_flags_on_top_of_a_preset(capsys):
    cfg = pop.parse_args(["--preset", "24gb", "--lr", "3e-5"])
    assert (cfg.model, cfg.lr, cfg.judge) == ("Qwen/Qwen2.5-7B-Instruct", 3e-5, "logits")
    assert "preset 24gb" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_given_the_configuration_and_each_step_s_numbers(name, played, tmp_path, monkeypatch):
    said = []
    service = types.ModuleType(name)
    service.__spec__ = importlib.machinery.ModuleSpec(name, None)
    service.init = lambda **given: said.append(given)
    service.log = lambda numbers, step: said.append((step, numbers))
    service.login = lambda verify: True
    monkeypatch.setitem(sys.modules, name, service)
    pop.main([*played, "--tracker", name, "--output", str(tmp_path / "run")])
    start, *steps = said
    assert start["name"] == "run" and start["config"]["model"] == "smollm2"
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in steps] == [1, 2]
    for (_, numbers), written in zip(steps, metrics, strict=True):
        assert numbers["reward_mean"] == written["reward_mean"]
        assert numbers["seconds/solve"] == written["seconds"]["solve"]
        assert all(isinstance(number, int | float) for number in numbers.values())


def test_tensorboard_files_hold_each_step_s_numbers(played, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pop.main([*played, "--tracker", "tensorboard", "--output", str(tmp_path / "run")])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = {event.step: event.value for event in events.Scalars("reward_mean")}
    assert rewards == pytest.approx({m["step"]: m["reward_mean"] for m in metrics})


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_is_loaded(monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "wandb" else known(name, *of))
    monkeypatch.setattr(pop, "load", None)
    with pytest.raises(UserError, match=r"--tracker wandb: not installed; pip install wandb"):
        pop.main(["--preset", "demo", "--tracker", "wandb"])
