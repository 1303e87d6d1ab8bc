"""What bench.py counts, by hand, and that its replayed step trains on the recorded tokens."""

import pytest
import torch
from conftest import byte_tokenizer

import config
import pop
from engine import fast
from lab import bench, plan
from lab.bench import Group, Replay, Work, groups_of
from lab.plan import Shapes
from rubric import Criterion

END = 256


def test_groups_are_those_on_file_cut_or_stretched_to_the_limit():
    tokenizer = byte_tokenizer()
    short, long = (groups_of(Work(problems=5, group_size=16, new_tokens=n), tokenizer, END) for n in (64, 1024))
    assert len(short) == 5 and short[0].problem == short[4].problem != short[1].problem
    assert all(len(group.answers) == 16 and len(group.rubric) == 2 for group in short)
    for group, stretched in zip(short, long, strict=True):
        for cut, whole in zip(group.answers, stretched.answers, strict=True):
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


def test_the_least_time_of_decoding_is_the_longer_of_reading_and_multiplying():
    shapes = Shapes(hidden=4, layers=1, heads=1, kv_heads=1, head_dim=4, intermediate=8, vocab=10, tied=True)
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 10 * 4  # q, k, v, o; gate, up, down; head
    read = 4 * weights + 3 * 5 * 2 * 4 * 4  # three rows with five tokens in the cache
    multiplied = 3 * (2 * weights + 5 * 4 * 4)
    assert bench.decode_seconds(shapes, [(3, 5)], products=1e30, read=2.0) == read / 2
    assert bench.decode_seconds(shapes, [(3, 5), (3, 5)], products=3.0, read=1e30) == pytest.approx(2 * multiplied / 3)


def test_growth_is_the_exponent_between_the_last_two_points():
    assert bench.growth([1, 4, 8], [0, 5, 20]) == pytest.approx(2.0)


def tiny_side(llm, judge: str) -> bench.Ours:
    """Ours without loading: a random model, two groups of recorded answers."""
    side = bench.Ours.__new__(bench.Ours)
    side.work, side.meter, side.llm = Work(judge=judge, micro_rows=2), bench.Meter(), llm
    side.cfg = pop.Config(
        **{**config.PRESETS["demo"], "judge": judge, "group_size": 3, "max_new_tokens": 9, "update_tokens": 90}
    )
    criteria = [Criterion("a", "b c", "says d.", 1.0), Criterion("e", "f g", "says h.", 2.0)]
    answers = [[[65, 66, END], [67] * 9, [68, 69, 70, 71, END]], [[72, END], [73, END], [74] * 9]]
    side.groups = [Group(problem, criteria, own) for problem, own in zip(("Why?", "How so?"), answers, strict=True)]
    side.optimizer, side.scheduler = pop.make_optimizer(llm, side.cfg)
    side.count_positions()
    return side


@pytest.mark.parametrize("judge", ["logits", "generate"])
def test_a_step_trains_on_the_recorded_tokens_and_nothing_else(llm, judge, monkeypatch):
    side = tiny_side(llm, judge)
    seen: list[int] = []
    real = llm.logps
    monkeypatch.setattr(
        llm, "logps", lambda ids, segments, *rest: seen.extend(ids[segments > 0].tolist()) or real(ids, segments, *rest)
    )
    decode = fast.decode
    result = side.step()
    recorded = sorted(token for group in side.groups for answer in group.answers for token in answer)
    assert sorted(seen) == sorted(2 * recorded)  # once for the reference log-probs, once for the gradient
    assert result["tokens"] == {"rollout": len(recorded), "update": len(recorded)}
    assert set(result["seconds"]) == {"rollout", "judge", "update", "total"}
    assert fast.decode is decode
    # Of six rows two end in step 2, one of the other four in step 3, one of the other three in step 5.
    assert [rows for rows, _ in result["decode_steps"]] == [6, 6, 4, 3, 3, 2, 2, 2, 2]


def test_padding_is_what_went_through_the_model_beyond_the_tokens_needed(llm, monkeypatch):
    side = tiny_side(llm, "logits")
    shapes = Shapes(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=64, vocab=259)
    monkeypatch.setattr(plan, "shapes_of", lambda name: shapes)
    result, needed = side.step(), side.operations()
    # Both problems' prompts once and their answers, in rows of one problem each, for the reference and the gradient.
    rows = [len(side.prompt(g)) + sum(map(len, g.answers)) for g in side.groups]
    assert needed["update"]["tokens"] == 2 * sum(rows)
    together = sum(rows) * 2 if max(rows) * 2 > side.update_tokens() else 2 * max(rows) * 2
    assert result["positions"]["update"] == together
    assert result["positions"]["judge"] >= needed["judge"]["tokens"]


def test_operations_of_an_update_by_hand(llm, monkeypatch):
    side = tiny_side(llm, "generate")
    shapes = Shapes(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=64, vocab=259)
    monkeypatch.setattr(plan, "shapes_of", lambda name: shapes)
    side.groups = [Group("Why?", side.groups[0].rubric, [[65, 66, END]])]
    prompt = len(side.prompt(side.groups[0]))
    linear, lora, head, pair = 2 * shapes.linear_params, 2 * shapes.lora_params(32), 2 * 259 * 32, 4 * 2 * 4 * 8
    tokens, pairs = prompt + 3, prompt**2 / 2 + 3 * prompt + 9 / 2
    expected = tokens * (3 * linear + 3 * lora) + 4 * pairs * pair + 3 * 3 * head
    assert side.operations()["update"]["operations"] == pytest.approx(expected)
