"""The script for a card's first ten minutes, rehearsed where there is none."""

import json

import pytest
import torch

import bench_gpu

WITHOUT_A_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


@WITHOUT_A_CARD
def test_a_rehearsal_finds_figures_in_every_part_and_writes_them_down(tmp_path, capsys):
    parts = ["attention", "same", "memory", "decoding"]
    bench_gpu.main(["--rehearse", "--output", str(tmp_path / "out"), "--parts", *parts])
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert list(found) == parts
    assert all(part["figures"] and not part["failed"] for part in found.values()), found
    assert not [goal for goal in found["same"]["goals"].values() if "missed" in goal]
    assert {f"{phase}: GiB planned" for phase in ("propose", "solve", "rubric", "judge", "update")} <= set(
        found["memory"]["figures"]
    )
    table = (tmp_path / "out.md").read_text()
    assert "| decoding | NF4 by graph, 4 rows: tokens/s |" in table and table in capsys.readouterr().out + "\n"


@WITHOUT_A_CARD
def test_without_a_card_it_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: no CUDA card found \(--rehearse .*\)$"):
        bench_gpu.main(["--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    def bad(s):
        s.note("a figure before", 1.5, most=1)
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(bench_gpu.PARTS, "attention", bad)
    monkeypatch.setitem(bench_gpu.PARTS, "same", lambda s: s.note("a figure after", 2, least=2))
    bench_gpu.main(["--rehearse", "--output", str(tmp_path / "out"), "--parts", "attention", "same"])
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert found["attention"]["figures"] == {"a figure before": 1.5}
    assert found["attention"]["goals"] == {"a figure before": "at most 1: missed"}
    assert found["attention"]["failed"] == ["attention failed: RuntimeError: no such kernel"]
    assert found["same"]["figures"] == {"a figure after": 2} and not found["same"]["failed"]
    assert "attention failed: RuntimeError: no such kernel" in (tmp_path / "out.md").read_text()
    assert "Traceback" in capsys.readouterr().err


def test_when_its_time_is_up_the_figures_so_far_are_in_the_table(tmp_path, monkeypatch):
    def long(s):
        s.note("a figure before", 1)
        torch.zeros(1)
        while True:
            pass

    monkeypatch.setattr(bench_gpu, "LIMIT", 1)
    monkeypatch.setitem(bench_gpu.PARTS, "attention", long)
    bench_gpu.main(["--rehearse", "--output", str(tmp_path / "out"), "--parts", "attention", "same"])
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert list(found) == ["attention"] and "seconds were over" in found["attention"]["failed"][0]
    assert "| attention | a figure before | 1 |" in (tmp_path / "out.md").read_text()
