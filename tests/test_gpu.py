"""The script for a card's first ten minutes, rehearsed where there is none."""

import json
import sys

import pytest

from lab import gpu


@pytest.mark.parametrize("part", ["attention", "same", "memory", "decoding"])
def test_a_rehearsal_finds_figures_and_writes_them_down(tmp_path, part):
    gpu.main(["--rehearse", "--output", str(tmp_path / "out"), "--parts", part])
    found = json.loads((tmp_path / f"out-{part}.json").read_text())
    assert len(found["figures"]) > 1 and not [name for name in found["figures"] if "failed" in name], found
    if part == "same":
        assert not [goal for goal in found["goals"].values() if "missed" in goal]
    if part == "memory":
        phases = {f"{phase}: GiB planned" for phase in ("propose", "solve", "rubric", "judge", "update")}
        assert phases <= set(found["figures"])
    if part == "decoding":
        assert "NF4 by graph, 8 rows: tokens/s" in found["figures"]


def test_without_a_card_it_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: no CUDA card found \(--rehearse .*\)$"):
        gpu.main(["--output", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_keeps_what_it_had_found(tmp_path, monkeypatch, capsys):
    def bad(s):
        s.note("a figure before", 1.5, most=1)
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(gpu.PARTS, "same", bad)
    gpu.main(["--rehearse", "--output", str(tmp_path / "out"), "--parts", "same"])
    found = json.loads((tmp_path / "out-same.json").read_text())
    assert found["figures"].pop("machine")["card"] == "none"
    assert found["figures"] == {"a figure before": 1.5, "same failed": "RuntimeError: no such kernel"}
    assert found["goals"] == {"a figure before": "at most 1: missed"}
    printed = capsys.readouterr()
    assert "Traceback" in printed.err and "a figure before: 1.5  at most 1: missed\n" in printed.out


SCRIPT = """
import json, os, signal, sys, time
part, output = sys.argv[2], sys.argv[sys.argv.index("--output") + 1]
found = {"figures": {"a figure of " + part: 1}}
open(f"{output}-{part}.json", "w").write(json.dumps(found))
if part == "attention":
    os.kill(os.getpid(), signal.SIGKILL)  # as a card can end a process
if part == "memory":
    time.sleep(60)
"""


def test_no_part_stops_another_and_their_time_has_an_end(tmp_path, monkeypatch, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(gpu, "COMMAND", [sys.executable, str(tmp_path / "script.py")])
    monkeypatch.setattr(gpu, "LIMIT", 3)
    parts = ["attention", "same", "memory", "decoding"]
    (tmp_path / "out-decoding.json").write_text("{}")
    gpu.main(["--rehearse", "--output", str(tmp_path / "out"), "--parts", *parts])
    found = [json.loads((tmp_path / f"out-{part}.json").read_text()) for part in parts[:3]]
    assert found == [{"figures": {f"a figure of {part}": 1}} for part in parts[:3]]
    assert not (tmp_path / "out-decoding.json").exists()  # nor what an earlier run had left there
    assert capsys.readouterr().out.splitlines() == [
        "attention ended with -9",
        "memory was stopped, as 3 seconds were over",
        "decoding was stopped, as 3 seconds were over",
        f"all figures in {tmp_path}/out-PART.json",
    ]
