"""An experiment's table says what its runs and evaluations hold, and the pages say what its JSON holds."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from config import parse_args
from data import UserError
from engine import stats
from lab import experiment, sweep

ROOT = Path(__file__).parents[1]
KEPT = sorted((ROOT / "docs" / "results").glob("*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_the_tables_of_the_pages_are_those_of_the_json(file):
    found = json.loads(file.read_text())
    pages = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    marked = {page: text for page, text in pages.items() if f"<!-- {file.stem} -->" in text}
    assert ROOT / "README.md" in marked and len(marked) > 1
    for page, text in marked.items():
        (shown,) = re.findall(rf"(?s)<!-- {re.escape(file.stem)} -->\n(.*?)\n<!-- end -->", text)
        assert shown == experiment.table(found, core=page.name == "README.md")


def test_an_experiment_is_kept():
    assert KEPT


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


SCORES = {  # of six items each: the reference's log-probability, and whether the answer won
    "base": ([-2.0, -1.5, -1.0, -2.5, -3.0, -1.0], None),
    "written-0-aaaaaaaa": ([-1.5, -1.1, -0.4, -2.1, -2.4, -0.7], [1, 1, 1, 0, 1, 0.5]),
    "written-1-bbbbbbbb": ([-1.7, -1.2, -0.9, -2.2, -2.6, -0.6], [1, 0, 1, 1, 1, 1]),
    "random-0-cccccccc": ([-2.1, -1.4, -1.2, -2.4, -3.1, -1.1], [0.5, 0, 0.5, 1, 0.5, 0.5]),
}


@pytest.fixture
def made(tmp_path):
    """Three runs of two arms and an evaluation of them all."""
    for run, steps in (("written-0", 3), ("written-1", 2), ("random-0", 1)):
        records = [{"step": s, "reward_mean": 0.1 * s, "completion_length": 9.0} for s in range(steps + 1)]
        write(tmp_path / run / "metrics.jsonl", *records)
    folder = tmp_path / "eval"
    scores, models = {}, {}
    for label, (logps, wins) in SCORES.items():
        wins = wins or [None] * 6
        scores[label] = {
            str(i): {"reference_logp": [[logp, 1.0]], "win_rate": [[win, 1.0 if win is not None else None]]}
            for i, (logp, win) in enumerate(zip(logps, wins, strict=True))
        }
        models[label] = {"mean_tokens": 100.0 if label == "base" else 50.0 + len(models)}
        write(folder / f"answers-{label}.jsonl", {"text": "one two three four " * (4 if label == "base" else 1)})
    result = {"benchmark": "heldout", "data": "packaged", "judge": "M", "models": models, "scores": scores}
    write(folder / "results-M.json", result)
    return tmp_path, folder


def collected(made):
    runs, folder = made
    return experiment.collect([runs / name for name in ("written-0", "written-1", "random-0")], [folder])


def test_an_arm_is_the_mean_over_its_seeds_paired_with_the_base(made):
    column = collected(made)["columns"]["reference_logp"]
    base, one, two, control = (np.array(logps) for logps, _ in SCORES.values())
    assert column["base"]["value"] == pytest.approx(base.mean())
    assert column["written"]["value"] == pytest.approx(((one + two) / 2 - base).mean())
    assert column["random"]["value"] == pytest.approx((control - base).mean())
    assert column["written - random"]["value"] == pytest.approx(((one + two) / 2 - control).mean())


def test_the_interval_is_over_items_of_which_each_counts_once(made):
    column = collected(made)["columns"]["reference_logp"]
    base, one, two, _ = (np.array(logps) for logps, _ in SCORES.values())
    alone = stats.difference(*(np.stack([x, np.ones(6)], -1)[:, None] for x in (base, (one + two) / 2)))
    assert (column["written"]["low"], column["written"]["high"]) == pytest.approx((alone.low, alone.high))
    assert column["written"]["n"] == 6


def test_wins_are_shares_named_with_their_judge(made):
    column = collected(made)["columns"]["win_rate (M)"]
    assert column["written"]["value"] == pytest.approx((4.5 + 5) / 12)
    assert column["random"]["value"] == pytest.approx(3 / 6)
    assert "base" not in column


def test_lengths_and_repetition_are_means_over_seeds(made):
    columns = collected(made)["columns"]
    assert {arm: v["value"] for arm, v in columns["tokens"].items()} == {"base": 100, "written": 51.5, "random": 53}
    assert columns["repeated"]["base"]["value"] > 0.5 > columns["repeated"]["written"]["value"] == 0


def test_the_table_has_steps_and_marks_what_is_clear_of_nothing(made):
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in experiment.table(collected(made)).splitlines()]
    rows = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert list(rows) == ["base", "written", "random", "written - random"]
    assert (rows["written"]["steps"], rows["random"]["steps"], rows["base"]["steps"]) == ("3, 2", "1", "")
    assert rows["written"]["reference_logp"].startswith("**+0.383 ")
    assert rows["random"]["reference_logp"].startswith("-0.050 ")
    assert rows["written"]["win_rate (M)"].startswith("**0.79")
    assert rows["random"]["win_rate (M)"].startswith("0.500 [0.")
    assert not rows["base"]["reference_logp"].startswith("**")


def test_curves_are_kept_of_a_run(made):
    assert collected(made)["curves"]["written-1"]["reward_mean"] == [[0, 0.0], [1, 0.1], [2, 0.2]]


def test_a_run_on_recorded_answers_has_steps_and_no_curves(made):
    (made[0] / "written-1" / "config.json").write_text('{"replay": "answers"}')
    found = collected(made)
    assert found["steps"]["written-1"] == 2 and set(found["curves"]) == {"written-0", "random-0"}


def test_one_command_writes_table_and_plot_to_the_pages_that_have_the_marks(made, monkeypatch, capsys):
    runs, folder = made
    monkeypatch.setattr(experiment, "ROOT", runs)
    (runs / "docs" / "images").mkdir(parents=True)
    (runs / "README.md").write_text("before\n<!-- it -->\nold\n<!-- end -->\nafter\n<!-- other -->\nx\n<!-- end -->\n")
    (runs / "docs" / "page.md").write_text("no marks\n")
    flags = ["--runs", *(str(runs / r) for r in ("written-0", "random-0")), "--evals", str(folder)]
    experiment.main([str(runs / "it.json"), *flags])
    printed = capsys.readouterr().out
    text = (runs / "README.md").read_text()
    core = experiment.table(json.loads((runs / "it.json").read_text()), core=True)
    assert text == f"before\n<!-- it -->\n{core}\n<!-- end -->\nafter\n<!-- other -->\nx\n<!-- end -->\n"
    assert "repeated" in printed and "repeated" not in core
    assert (runs / "docs" / "page.md").read_text() == "no marks\n"
    assert (runs / "docs" / "images" / "it.png").stat().st_size > 1000
    experiment.main([str(runs / "it.json")])
    assert capsys.readouterr().out == printed and (runs / "README.md").read_text() == text


def test_what_is_missing_is_named(made):
    runs, _ = made
    with pytest.raises(UserError, match="no finished evaluation there"):
        experiment.collect([], [runs])
    with pytest.raises(UserError, match=r"none\.json cannot be read .*--runs and --evals"):
        experiment.main([str(runs / "none.json")])


def test_the_prepared_arms_are_runs_that_differ_in_their_own_flags_alone():
    arms = sweep.read_arms(ROOT / "docs" / "experiment.txt")
    made = {name: asdict(parse_args(shlex.split(flags))) for name, flags in arms.items()}
    changed = {name: {f for f in cfg if cfg[f] != made["written"][f]} for name, cfg in made.items()}
    assert changed == {
        "written": set(),
        "random": {"reward"},
        "generic": {"rubric"},
        "no-gold": {"rubric_gold"},
        "no-guards": {"skip_guards"},
        "mild-guard": {"length_floor"},
        "dpo": {"loss", "replay", "lr"},
    }
