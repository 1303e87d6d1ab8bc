"""What lab/scaling.py promises: formulas that give back what was measured, a simulation with answers known by hand."""

import itertools
import random
import statistics
from pathlib import Path

import pytest
import torch

import model
from engine import memory
from lab import gpu, plan, scaling, steps
from lab.scaling import (
    CPU,
    CPU_DOCUMENTS,
    SEVEN,
    Group,
    decoding_step,
    drawn,
    on_cpu,
    on_gpu,
    predicted,
    settings,
    simulate,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"


def by_length(groups):
    """Seconds in proportion to the groups' tokens."""
    size = sum(g.length for g in groups)
    return {"solve": 2 * size, "judge": size, "update": 3 * size}


def alike() -> Group:
    return Group()


@pytest.mark.parametrize("table", scaling.TABLES)
def test_the_page_has_the_tables_that_the_script_prints(table):
    assert f"\n\n{table()}\n" in (DOCS / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_without_spread_n_processes_take_an_nth_of_the_time(processes):
    seconds = simulate(by_length, taken=6, trained=6, processes=processes, draw=alike)
    assert seconds["step"] == pytest.approx(36 / processes)
    assert seconds["waiting"] == pytest.approx(0, abs=1e-9)
    assert seconds["solve"] == pytest.approx(12 / processes)


def test_the_gradients_are_summed_once_a_step():
    alone, joined = (simulate(by_length, 6, 6, 3, alike, meeting) for meeting in (0, 0.5))
    assert joined["step"] - alone["step"] == pytest.approx(0.5)
    assert joined["waiting"] - alone["waiting"] == pytest.approx(0.5)


def test_the_process_with_one_document_more_is_waited_for():
    seconds = simulate(by_length, taken=5, trained=4, processes=2, draw=alike)
    assert seconds["step"] == pytest.approx(3 * 3 + 3 * 2)  # three of five documents are played, two of four trained on
    assert seconds["solve"] == pytest.approx(2 * 5 / 2)


def test_what_takes_as_long_for_any_number_of_groups_does_not_get_faster():
    def fixed(groups):
        return {"solve": 7.0, "update": 0.0}

    assert [simulate(fixed, 8, 8, n, alike)["step"] for n in (1, 2, 8)] == pytest.approx([7, 7, 7])


def test_processes_meet_twice_a_step_and_not_after_every_role():
    """One is slow at solving and fast at judging, and then fast at the update: two waits, of 4 for 1 and of 5 for 2."""

    def cost(groups):
        slow = groups[0].length == 2
        return {"solve": 3.0 if slow else 1.0, "judge": 1.0 if slow else 2.0, "update": 2.0 if slow else 5.0}

    lengths = itertools.cycle([2.0, 1.0])
    seconds = simulate(cost, 2, 2, 2, lambda: Group(next(lengths)), steps=4)
    assert seconds["step"] == pytest.approx(4 + 5)  # after every role it would be 3 + 2 + 5
    assert seconds["waiting"] == pytest.approx((4 - 3) / 2 + (5 - 2) / 2)


def test_draws_have_the_spread_that_was_measured():
    rng = random.Random(1)
    lengths = [drawn(rng).length for _ in range(20_000)]
    assert statistics.fmean(lengths) == pytest.approx(1, abs=0.01)
    assert statistics.pstdev(lengths) == pytest.approx(scaling.SPREAD, abs=0.01)
    assert {drawn(rng, spread=0).length for _ in range(9)} == {1.0}


def test_the_formulas_give_back_what_they_were_fitted_to():
    assert decoding_step(SEVEN, 4, 264, dequantized=True) == pytest.approx(10.0e-3)
    assert decoding_step(SEVEN, 4, 264, dequantized=False) == pytest.approx(14.7e-3)
    assert decoding_step(SEVEN, 64, 264, dequantized=False) == pytest.approx(19.9e-3)
    assert min(scaling.LAYER, scaling.NF4, scaling.NF4_ROW) > 0
    assert scaling.FORWARD * SEVEN.linear_params * scaling.JUDGE_TOKENS == pytest.approx(1.30)
    assert scaling.UPDATE * SEVEN.linear_params * scaling.UPDATE_TOKENS == pytest.approx(1.77)


def test_the_measurements_are_those_of_the_other_pages():
    speed, evaluation = ((DOCS / f"{page}.md").read_text(encoding="utf-8") for page in ("speed", "evaluation"))
    decoding = speed[speed.index("| 5.24 | NF4 |") :]
    for name, rows in (("NF4", (scaling.NF4_4_ROWS, scaling.NF4_64_ROWS)), ("dequantized", (scaling.DEQUANTIZED,))):
        line = next(row for row in decoding.splitlines() if f"| {name}, by CUDA graph" in row)
        assert all(f"{1e3 * seconds:.1f} ms" in line for seconds in rows)
    assert (
        f"| judge | {scaling.JUDGE_SECONDS:.2f} |" in decoding and f"| update | {scaling.UPDATE_SECONDS} |" in decoding
    )
    assert "{} of {} documents give a group".format(*scaling.YIELD["0.5B"]) in evaluation
    assert f"{scaling.TRIES.count(1)} of 12; 12 of 12" in evaluation  # at the first try; within six


def test_the_tokens_of_the_measured_step_are_counted(monkeypatch):
    """That of `python -m lab.gpu`, with the sharing of prompts and the padding of a 7B on a GPU."""
    monkeypatch.setitem(memory.PREFILL_TOKENS, "cpu", memory.PREFILL_TOKENS["cuda"])
    monkeypatch.setitem(model.MASKED, "cpu", model.MASKED["cuda"])
    tiny = plan.Shapes(16, 1, 2, 1, 8, 16, 4_096, qkv_bias=True)
    llm = gpu.random_llm(tiny, torch.device("cpu"), torch.float32)
    llm.token_budget = 49_152  # the preset's at that time
    pairs = 2 * SEVEN.linear_params / (4 * SEVEN.layers * SEVEN.heads * SEVEN.head_dim)
    llm.__dict__["pairs_a_token"] = pairs
    side, passed = steps.Ours(gpu.FULL.work, llm), {"judge": 0, "update": 0, "rollout": 0}

    def count(module, given, named):
        ids = given[0] if given else named["input_ids"]
        if not (side.meter.phase == "update" and torch.is_grad_enabled()):  # it scores the same tokens before
            passed[side.meter.phase] += ids.numel()

    llm.model.get_base_model().model.register_forward_pre_hook(count, with_kwargs=True)
    side.step()
    assert (passed["judge"], passed["update"]) == (scaling.JUDGE_TOKENS, scaling.UPDATE_TOKENS)


def test_tokens_are_those_of_the_dry_run():
    """With all attempts used, at every text's limit."""
    cfg = settings(16)
    worst = [Group(1.0, cfg.tries, 3)] * cfg.documents_taken
    seconds, counted = on_gpu(SEVEN, cfg, dequantized=True)(worst), plan.tokens_of(cfg)
    read = sum(counted[role][0] for role in ("propose", "solve", "rubric"))
    assert seconds["reading"] == pytest.approx(scaling.FORWARD * SEVEN.linear_params * read)
    assert seconds["judge"] == pytest.approx(scaling.FORWARD * SEVEN.linear_params * counted["judge"][0])
    kept = on_gpu(SEVEN, cfg, dequantized=True)(worst[: cfg.documents])["update"]
    assert kept == pytest.approx(scaling.UPDATE * SEVEN.linear_params * counted["update"][0])


def test_decoding_does_not_share_and_judging_does():
    cost = on_gpu(SEVEN, settings(64), dequantized=True)
    two, one = (cost([Group(1.0, 2, 1)] * n) for n in (2, 1))
    assert two["judge"] == pytest.approx(2 * one["judge"])
    assert one["solve"] < two["solve"] < 1.1 * one["solve"]


def test_more_gpus_are_faster_and_each_does_less():
    for name in scaling.NAMES:
        rates = [scaling.groups_per_hour(name, gpus, 64) for gpus in (1, 8, 64)]
        assert rates == sorted(rates, reverse=True)  # of one GPU
        assert rates[0] < 8 * rates[1] < 64 * rates[2]
        assert scaling.groups_per_hour(name, 64, 512) > 2 * rates[2]  # enough documents for all


def test_groups_that_differ_are_waited_for():
    drawn_as_measured, lengths, attempts = (predicted("7B", 64, 512, kind) for kind in ("", "lengths", "attempts"))
    assert drawn_as_measured["waiting"] > max(lengths["waiting"], attempts["waiting"])
    assert min(lengths["waiting"], attempts["waiting"]) > 1  # seconds, of which summing the gradients takes 0.03


def test_the_prediction_for_two_processes_starts_from_what_one_took():
    one, two = (simulate(on_cpu, CPU_DOCUMENTS, CPU_DOCUMENTS, n, alike) for n in (1, 2))
    assert one == pytest.approx({**CPU[1], "step": sum(CPU[1].values()) - CPU[1]["step"]}, abs=1e-9)
    for phase in ("judge", "update"):
        assert two[phase] == pytest.approx(one[phase] / 2)
    for phase in scaling.CPU_ROWS:  # a decoding step of half the rows takes more than half as long
        assert 0.55 * one[phase] < two[phase] < one[phase]
    assert abs(two["step"] / CPU[2]["step"] - 1) < 0.1  # of the measured one
