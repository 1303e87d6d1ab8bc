"""Sweeps: arms from a file, run once, gone on with, and put into one table."""

import json
import math
import shutil
from dataclasses import asdict
from itertools import pairwise

import pytest

import config
from data import UserError
from lab import sweep

ARMS = """
# problems are written once
all: --preset demo --steps 3
written:
random: --reward random --episodes {written}/episodes.jsonl  # a control
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "arms.txt"
    path.write_text(ARMS)
    return path


@pytest.fixture
def calls(monkeypatch):
    """The programs that a sweep calls; pop.py leaves a finished run, eval.py a result, unless `stop` says otherwise."""
    made = []

    def call(*command):
        made.append(list(command))
        if command[0] == "pop.py":
            given = dict(pairwise(command))
            run = sweep.Path(given.get("--output") or given["--resume"])
            run.mkdir(parents=True, exist_ok=True)
            if "--resume" not in given:
                (run / "config.json").write_text(json.dumps(asdict(config.parse_args(command[1:]))))
            if call.stop(run):
                raise UserError("stopped")
            for folder in (run, run / "checkpoints" / "step-000003"):
                (folder / "adapter").mkdir(parents=True, exist_ok=True)
                (folder / "adapter" / "adapter_model.safetensors").write_text(run.name)
            rewards = [0.1, None, 0.3] if "written" in run.name else [0.5, 0.5, 0.7]
            steps = [
                {"step": 0, "heldout_reward": 0.5},
                *({"step": n, "reward_mean": r} for n, r in enumerate(rewards, 1)),
            ]
            lines = map(json.dumps, steps)
            (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        else:
            folder = sweep.Path(command[command.index("--output") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            runs = command[command.index("--adapter") + 1 : command.index("--limit")]
            metrics, length = ("grade", "reward", "similarity", "reference_logp", "win_rate"), 20.0
            judge = command[command.index("--judge") + 1].replace("/", "-") if "--judge" in command else "base"
            models = {"base": {"mean_tokens": 10.0, "difference": {}}}
            for k, run in enumerate(runs, 1):
                shift = k / 10 + int(run[-1])  # of the arm and its seed
                difference = {m: {"value": shift, "low": shift - 1, "high": shift + 1} for m in metrics}
                wins = {"win_rate": {"value": 0.5 + k / 10, "low": None, "high": None}}
                models[run] = {"mean_tokens": length * k, "difference": difference, "metrics": wins}
            (folder / f"results-{judge}.json").write_text(json.dumps({"models": models}))

    call.stop = lambda run: False
    monkeypatch.setattr(sweep, "call", call)
    call.made = made
    return call


def test_arms_have_the_shared_flags_and_then_their_own(file):
    assert sweep.read_arms(file) == {
        "written": " --preset demo --steps 3",
        "random": " --preset demo --steps 3 --reward random --episodes {written}/episodes.jsonl",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--steps 3\n", r"arms.txt:1: want `name: flags`"),
        ("a: --steps 3\na: --steps 4\n", r"arms.txt:2: want `name: flags`, each name once"),
        ("../a: --steps 3\n", r"arms.txt:1: want `name: flags`"),
        ('a: "--steps\n', r"arm a: \"--steps: ValueError: No closing quotation"),
        ("all: --steps 3\n", r"no arm in it"),
        ("a: --steps 0\n", r"--steps 0: must be at least 1"),
        ("a: --output x\n", r"arm a must not have --output"),
        ("all: --seed 7\na: --steps 3\n", r"arm a must not .*but the sweep --seeds"),
        ("a: --dry-run\n", r"arm a must not have .*--dry-run"),
        ("a: --steps 3\nb: --episodes {a/episodes.jsonl\n", r"arm b: .*; braces are for the name of an earlier arm"),
        ("all: --steps 3\nall: --steps 4\na:\n", r"arms.txt:2: want `name: flags`, each name once"),
        (
            "a: --episodes {b}/episodes.jsonl\nb: --steps 3\n",
            r"arm a: .*KeyError: 'b'; braces are for the name of an earlier arm",
        ),
    ],
)
def test_a_mistake_in_the_file_is_found_before_anything_runs(text, said, tmp_path, calls):
    path = tmp_path / "arms.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        sweep.main([str(path), "--output", str(tmp_path / "out")])
    assert calls.made == [] and not (tmp_path / "out").exists()


def test_a_flag_that_pop_does_not_know_is_found_too_with_its_arm(tmp_path, calls, capsys):
    path = tmp_path / "arms.txt"
    path.write_text("a: --steps 3\nb: --no-such-flag 4\n")
    with pytest.raises(SystemExit):
        sweep.main([str(path), "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "no-such-flag" in said.err and said.out.splitlines()[-2].startswith("arm b:") and calls.made == []


def test_each_arm_runs_with_each_seed_and_replays_the_run_of_its_own_seed(file, tmp_path, calls):
    out = tmp_path / "out"
    sweep.main([str(file), "--seeds", "1", "2", "--output", str(out)])
    ran = [command for command in calls.made if command[0] == "pop.py"]
    assert [command[-1] for command in ran] == [
        str(out / name) for name in ("written-1", "random-1", "written-2", "random-2")
    ]
    assert ran[3][ran[3].index("--episodes") + 1] == f"{out}/written-2/episodes.jsonl"
    assert ran[3][ran[3].index("--seed") + 1] == "2"


def test_a_sweep_goes_on_where_it_stopped(file, tmp_path, calls):
    out = tmp_path / "out"
    calls.stop = lambda run: run.name == "random-0"
    with pytest.raises(UserError, match="stopped"):
        sweep.main([str(file), "--output", str(out)])
    calls.made.clear()
    calls.stop = lambda run: False
    sweep.main([str(file), "--output", str(out)])
    ran = [command for command in calls.made if command[0] == "pop.py"]
    assert ran == [["pop.py", "--resume", str(out / "random-0")]]  # the first arm is done


def test_an_arm_whose_adapter_was_not_saved_before_the_end_is_not_done(file, tmp_path, calls):
    out = tmp_path / "out"
    sweep.main([str(file), "--output", str(out)])
    (out / "random-0" / "adapter" / "adapter_model.safetensors").write_text("of an earlier step")
    calls.made.clear()
    sweep.main([str(file), "--output", str(out)])
    assert [command for command in calls.made if command[0] == "pop.py"] == [["pop.py", "--resume", f"{out}/random-0"]]


def test_an_arm_does_not_outlive_the_run_whose_problems_it_had(file, tmp_path, calls):
    out = tmp_path / "out"
    sweep.main([str(file), "--output", str(out)])
    shutil.rmtree(out / "written-0")
    with pytest.raises(UserError, match=r"random-0 was made from .*written-0, which is no longer there: remove"):
        sweep.main([str(file), "--output", str(out)])


def test_the_shared_flags_may_stand_below_the_arms_and_what_may_change_on_resume_may_change(file, tmp_path, calls):
    sweep.main([str(file), "--output", str(tmp_path / "out")])
    calls.made.clear()
    shared = "all: --preset demo --steps 3\n"
    file.write_text(ARMS.replace(shared, "") + shared.replace("3", "3 --save-every 5"))
    sweep.main([str(file), "--output", str(tmp_path / "out")])
    assert [command[0] for command in calls.made] == ["eval.py"]


def program(folder, monkeypatch, source):
    monkeypatch.setattr(sweep, "__file__", str(folder / "lab" / "sweep.py"))
    (folder / "pop.py").write_text(source)


@pytest.mark.parametrize("status", [75, 3])
def test_a_program_that_does_not_end_well_ends_the_sweep(tmp_path, monkeypatch, status):
    program(tmp_path, monkeypatch, f"raise SystemExit({status})")
    with pytest.raises(UserError, match=f"stopped: pop.py ended with {status}; the same command goes on"):
        sweep.call("pop.py")


def test_on_ctrl_c_a_sweep_waits_for_the_run_to_save(tmp_path, monkeypatch):
    program(
        tmp_path,
        monkeypatch,
        "import os, pathlib, signal, sys, time\nos.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(1)\npathlib.Path(sys.argv[1]).touch()\nsys.exit(75)",
    )
    with pytest.raises(UserError, match=r"stopped: .* ended with 75"):
        sweep.call("pop.py", str(tmp_path / "saved"))
    assert (tmp_path / "saved").exists()


def test_an_arm_that_is_there_with_other_flags_is_not_taken_for_the_one_asked_for(file, tmp_path, calls):
    sweep.main([str(file), "--output", str(tmp_path / "out")])
    calls.made.clear()
    file.write_text(ARMS.replace("--reward random", "--reward judge --lr 2e-4"))
    with pytest.raises(UserError, match=r"random-0: not the .*\(reward: random -> judge, lr: 0.0001 -> 0.0002"):
        sweep.main([str(file), "--output", str(tmp_path / "out")])
    assert calls.made == []


def test_the_table_over_one_seed_has_the_intervals_of_the_evaluation(file, tmp_path, calls, capsys):
    sweep.main([str(file), "--output", str(tmp_path / "out"), "--heldout", "5"])
    evaluated = [
        [command[1], command[command.index("--limit") + 1]] for command in calls.made if command[0] == "eval.py"
    ]
    assert evaluated == [["heldout", "5"]]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], lines[3])]
    row = dict(zip(*cells, strict=True))
    assert row == {
        "arm": "random",
        "seeds": "1",
        "training reward": "0.700",  # the last quarter of three steps
        "tokens": "40.000",
        "grade - base": "+0.200 [-0.800, +1.200]",
        "reward - base": "+0.200 [-0.800, +1.200]",
        "similarity - base": "+0.200 [-0.800, +1.200]",
        "reference_logp - base": "+0.200 [-0.800, +1.200]",
    }
    assert "\n".join(lines) in capsys.readouterr().out


def test_a_sweep_leaves_a_report_of_all_runs_side_by_side(file, tmp_path, calls, capsys):
    sweep.main([str(file), "--output", str(tmp_path / "out"), "--seeds", "3", "4"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in ("written-3", "random-3", "written-4", "random-4"))
    assert f"side by side in {tmp_path}/out/report.html" in capsys.readouterr().out


def test_the_table_over_several_seeds_has_means_and_intervals_over_them():
    each = [{"grade - base": {"value": v, "low": 0.0, "high": 9.0}} for v in (0.1, 0.2, 0.6)]
    half = 4.302653 * math.sqrt(((0.2) ** 2 + 0.1**2 + 0.3**2) / 2) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    row = sweep.table({"a": each}).splitlines()[2]
    assert f"+0.300 [{0.3 - half:+.3f}, {0.3 + half:+.3f}]" in row and "| 3 " in row


def test_another_judge_is_handed_on_and_adds_the_win_rate(file, tmp_path, calls):
    sweep.main([str(file), "--output", str(tmp_path / "out"), "--judge", "other/judge"])
    (evaluated,) = [command for command in calls.made if command[0] == "eval.py"]
    assert evaluated[-2:] == ["--judge", "other/judge"]
    head, _, written, random = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "| win_rate |" in head and "| 0.600 " in written and "| 0.700 " in random


def test_a_judge_that_is_the_base_model_is_found_under_the_name_of_its_results(file, tmp_path, calls, monkeypatch):
    call = sweep.call

    def by_the_base(*command):
        call(*(command[: command.index("--judge")] if "--judge" in command else command))

    monkeypatch.setattr(sweep, "call", by_the_base)
    sweep.main([str(file), "--output", str(tmp_path / "out"), "--judge", "smollm2"])
    assert "| grade - base" in (tmp_path / "out" / "table.md").read_text()


def test_an_arm_of_one_seed_beside_arms_of_several_has_no_interval():
    one = {"grade - base": {"value": 0.5, "low": 0.1, "high": 0.9}}
    *_, several, alone = sweep.table({"a": [one, one], "b": [one]}).splitlines()
    assert "[" in several and "+0.500 " in alone and "[" not in alone


def test_a_table_of_what_is_finished_can_be_had_while_the_sweep_is_at_work(file, tmp_path, calls):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no arm is finished yet"):
        sweep.main([str(file), "--output", str(out), "--table"])
    calls.stop = lambda run: "random" in run.name
    with pytest.raises(UserError, match="stopped"):
        sweep.main([str(file), "--output", str(out)])
    calls.made.clear()
    with sweep.checkpoint.locked(out):  # as the process that trains has it
        sweep.main([str(file), "--output", str(out), "--table"])
        assert [command[0] for command in calls.made] == ["eval.py"]
        rows = (out / "table.md").read_text().splitlines()
        assert len(rows) == 3 and "written" in rows[2]
        with pytest.raises(UserError, match=f"another process is at work in {out}"):
            sweep.main([str(file), "--output", str(out)])
