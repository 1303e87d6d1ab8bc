"""That the replayed step of lab/steps.py trains on the recorded tokens, and its figures by hand."""

import time

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer

from data import Answer, Criterion, Document, Episode, UserError
from engine import fast
from lab import bench, steps
from lab.plan import GIB
from lab.steps import Meter, Replay, Work, recorded

END = 256


def ids_of(episode: Episode) -> list[list[int]]:
    return [answer.ids for answer in episode.answers]


def test_answers_are_those_on_file_cut_or_stretched_to_the_limit():
    tokenizer = byte_tokenizer()
    short, long = (recorded(Work(problems=5, group_size=16, new_tokens=n), tokenizer, END) for n in (64, 1024))
    assert len(short) == 5 and short[0].problem == short[4].problem != short[1].problem
    assert all(len(e.answers) == 16 and len(e.rubric) == 2 for e in short)
    for group, stretched in zip(short, long, strict=True):
        for cut, whole in zip(ids_of(group), ids_of(stretched), strict=True):
            assert len(cut) <= 64 and len(whole) <= 1024
            assert cut[:-1] == whole[: len(cut) - 1]
            assert (END in whole) == (len(whole) < 1024 or whole[-1] == END)


def test_replayed_rows_have_no_choice_and_may_leave():
    replay = Replay([[5], [1, 2]], END)
    scores = torch.zeros(2, 259)
    assert replay(None, scores).argmax(-1).tolist() == [5, 1]
    assert replay(None, scores).argmax(-1).tolist() == [END, 2]
    replay = Replay([[5], [1, 2]], END)
    replay(None, scores)
    replay.keep([1])
    left = replay(None, scores[:1])
    assert left.argmax(-1).tolist() == [2] and left.isfinite().sum() == 1


def test_a_step_trains_on_the_recorded_tokens_and_nothing_else(llm, monkeypatch):
    side = steps.Ours(Work(problems=2, group_size=3, new_tokens=9, micro_rows=2), llm)
    criteria = [Criterion("a", "b c", "says d.", 1.0), Criterion("e", "f g", "says h.", 2.0)]
    answers = [[[65, 66, END], [67] * 9, [68, 69, 70, 71, END]], [[72, END], [73, END], [74] * 9]]
    side.recorded = [
        Episode(Document("", ""), problem, rubric=criteria, answers=[Answer("", ids) for ids in own])
        for problem, own in zip(("Why?", "How so?"), answers, strict=True)
    ]
    seen: list[int] = []
    real = llm.logps
    monkeypatch.setattr(
        llm, "logps", lambda ids, segments, *rest: seen.extend(ids[segments > 0].tolist()) or real(ids, segments, *rest)
    )
    decode = fast.decode
    result = side.step()
    tokens = sorted(token for own in answers for ids in own for token in ids)
    assert sorted(seen) == sorted(2 * tokens)  # once for the reference log-probs, once for the gradient
    assert result["tokens"] == {"rollout": len(tokens), "update": len(tokens)}
    assert set(result["seconds"]) == set(result["peak"]) == {"rollout", "judge", "update", "step"}
    assert 0 <= result["reward"] <= 1
    assert fast.decode is decode


def test_a_micro_batch_has_no_more_tokens_than_trls(llm):
    side = steps.Ours(Work(group_size=2, new_tokens=9, micro_rows=1), llm)
    assert side.cfg.update_tokens == max(len(llm.encode(e.problem)) for e in side.recorded) + 9


def test_the_meter_counts_a_phase_inside_another_for_the_inner_one_alone():
    meter = Meter()
    with meter("update"):
        time.sleep(0.05)
        with meter("judge"):
            time.sleep(0.2)
    assert 0.05 <= meter.seconds["update"] < 0.15 < 0.2 <= meter.seconds["judge"]


def test_the_meter_sees_memory_that_is_gone_again():
    before, meter = steps.memory_in_use(), Meter()
    with meter("update"):
        block = np.ones(2**26 // 8)
        for _ in range(20):
            block += 1  # long enough to be sampled
        del block
    assert meter.peak["update"] - before >= 60 * 2**20


def took(seconds: float, tokens: int = 7) -> dict:
    each = dict.fromkeys(("rollout", "judge", "update", "step"), seconds)
    peak = dict.fromkeys(each, seconds * GIB)
    return {"seconds": each, "peak": peak, "tokens": {"update": tokens}, "reward": seconds, "loss": -seconds}


def test_figures_leave_the_first_step_out_and_ratios_are_of_one_round():
    found = steps.figures({"ours": [took(9.0), took(1.0), took(2.0)], "trl": [took(0.5), took(3.0), took(4.0)]})
    assert (found["judge, ours: s"], found["judge, trl: s"]) == (1.5, 3.5)
    assert (found["step, ours: GiB"], found["step, trl: GiB"]) == (2.0, 4.0)
    names = [f"update: times as fast as TRL{word}" for word in ("", ", lowest", ", highest")]
    assert [found[name] for name in names] == [2.5, 2.0, 3.0]
    assert (found["loss of the first step, ours"], found["reward of the first step, trl"]) == (-9.0, 0.5)


def test_sides_that_trained_on_different_tokens_are_not_compared():
    with pytest.raises(UserError, match="not train on the same tokens"):
        steps.figures({"ours": [took(1.0, tokens=7)], "trl": [took(1.0, tokens=8)]})


class Side:
    def __init__(self, number: int) -> None:
        self.number, self.steps = number, 0

    def step(self) -> dict:
        if self.number < 0:
            import os

            os._exit(1)
        self.steps += 1
        return took(self.number + self.steps)


def test_sides_take_turns_in_processes_of_their_own(capsys):
    results = steps.alternate({"a": (Side, 10), "b": (Side, 20)}, rounds=2)
    assert {name: [r["reward"] for r in rounds] for name, rounds in results.items()} == {
        "a": [11, 12, 13],
        "b": [21, 22, 23],
    }
    lines = [line.split("  ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert [name.strip() for _, name in lines] == ["b", "a", "a", "b", "b", "a"]


def test_without_trl_the_comparison_ends_with_one_line(monkeypatch):
    monkeypatch.setattr(bench, "GRPOConfig", None)
    with pytest.raises(SystemExit, match=r"^error: TRL is not installed: pip install 'trl>=1.16'$"):
        bench.main(Work())


def test_micro_batches_that_do_not_divide_the_answers_are_an_error_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(bench, "GRPOConfig", dict)
    with pytest.raises(SystemExit, match=r"^error: --micro-rows 4: must divide the 6 answers of a step$"):
        bench.main(Work(problems=2, group_size=3, micro_rows=4))


def test_a_side_that_ends_is_a_user_error():
    with pytest.raises(UserError, match="ended"):
        steps.alternate({"a": (Side, -1)}, rounds=1)
