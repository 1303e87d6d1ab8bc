"""Arms of an experiment, one after another on the one GPU: `python pop.py sweep FILE`, resumable, ends in a table.

FILE has a line `name: flags` for each arm, flags of pop.py; `all: flags` come before those of every arm, and `{name}`
in flags is the run folder of an earlier arm with the same seed, whose problems an arm may replay:

    all: --preset demo --steps 12
    written:
    random: --reward random --episodes {written}/episodes.jsonl
"""

import argparse
import contextlib
import io
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import config
import pop
from benchmarks import results
from data import UserError, brief
from engine import checkpoint, stats
from engine.signals import RESUMABLE
from lab import report

MEASURES = {  # benchmark -> its metrics in the table, and the file with them
    "heldout": (("grade", "reward", "similarity"), "results-base.json"),
    "ifeval": (("strict_average",), "results.json"),
}


def read_arms(path: Path) -> dict[str, list[str]]:
    """name -> flags, in order. Raises UserError, naming the line, if one cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sweep {path} cannot be read ({brief(error)})") from None
    arms: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        name, colon, flags = text.partition(":")
        if not colon or not name.replace("-", "").replace("_", "").isalnum() or name in arms:
            raise UserError(f"{path}:{number}: want `name: flags`, each name once, not {line.strip()!r}")
        try:
            arms[name] = shlex.split(flags)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    shared = arms.pop("all", [])
    if not arms:
        raise UserError(f"{path}: no arm in it, a line such as `random: --reward random`")
    return {name: [*shared, *flags] for name, flags in arms.items()}


def check(arms: dict[str, list[str]], path: Path) -> None:
    """Parse every arm's flags before the first one runs for hours. Raises UserError."""
    for number, (name, flags) in enumerate(arms.items()):
        earlier = dict.fromkeys(list(arms)[:number], "earlier")
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                cfg = pop.parse_args([flag.format_map(earlier) for flag in flags])
        except KeyError as error:
            raise UserError(f"{path}: arm {name} names {error}, which is no earlier arm") from None
        except (ValueError, AttributeError, IndexError):
            raise UserError(f"{path}: arm {name}: braces are for the name of an earlier arm, as in {{name}}") from None
        except SystemExit:
            raise UserError(f"{path}: arm {name}, {' '.join(flags)}:\n{said.getvalue().strip()}") from None
        if cfg.output or cfg.resume or cfg.dry_run or cfg.seed:
            raise UserError(
                f"{path}: arm {name} must not have --output, --resume, --dry-run or --seed (but the sweep --seeds)"
            )


def finished(run: Path) -> bool:
    """Whether the last step is saved, and its adapter where evaluations look for it."""
    weights = Path("adapter") / "adapter_model.safetensors"
    try:
        last = run / "checkpoints" / f"step-{config.stored_config(run)['steps']:06d}"
        return checkpoint.sha256(last / weights) == checkpoint.sha256(run / weights)
    except (OSError, UserError):
        return False


def call(*command: str) -> None:
    """A program of this folder in a process of its own. Raises UserError unless it ends well."""
    script = Path(__file__).parents[1] / command[0]
    process, interrupted = subprocess.Popen([sys.executable, str(script), *command[1:]]), False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the terminal has told the program too, which now saves
            interrupted = True
    status = process.returncode
    if interrupted or status == RESUMABLE:
        raise UserError("stopped; the same command goes on with the sweep")
    if status:
        raise UserError(f"{shlex.join(command)} ended with status {status}: mend that, the same command goes on")


def commands(arms: dict[str, list[str]], seed: int, output: Path) -> dict[Path, list[str]]:
    """The run folder of each arm -> the flags that make the run. Raises UserError if another run is there."""
    runs = {name: output / f"{name}-{seed}" for name in arms}
    folders = {name: str(run) for name, run in runs.items()}
    made = {
        runs[name]: [*(flag.format_map(folders) for flag in flags), "--seed", str(seed), "--output", folders[name]]
        for name, flags in arms.items()
    }
    there = {name: run for name, run in runs.items() if (run / "config.json").exists()}
    for name, run in there.items():
        check_same(run, made[run])
        for other in arms:
            if any(f"{{{other}}}" in flag for flag in arms[name]) and other not in there:
                raise UserError(f"{run} was made from {runs[other]}, which is no longer there: remove {run} too")
    return made


def check_same(run: Path, flags: Sequence[str]) -> None:
    """Raises UserError if the run that is there is not the one that the flags would make."""
    with contextlib.redirect_stdout(io.StringIO()):
        asked = asdict(pop.parse_args(flags))
    stored = config.stored_config(run)
    names = sorted((asked.keys() | stored.keys()) - config.SAFE - {"output", "resume"})
    changed = [
        f"{name}: {stored.get(name)} -> {asked.get(name)}" for name in names if stored.get(name) != asked.get(name)
    ]
    if changed:
        raise UserError(
            f"{run} was made with other flags ({', '.join(changed)}): remove it, or give the sweep another --output"
        )


def play(made: dict[Path, list[str]]) -> None:
    """Run each arm, or go on with it, or leave it if it is done."""
    for run, flags in made.items():
        done = finished(run)
        print(f"== {run}: {'done' if done else shlex.join(flags)}", flush=True)
        if done:
            continue
        if (run / "config.json").exists():
            call("pop.py", "--resume", str(run))
        else:
            call("pop.py", *flags)


def measure(runs: dict[str, Path], seed: int, output: Path, limits: dict[str, int]) -> dict[str, dict[str, Any]]:
    """arm -> its numbers: training reward and, from each benchmark, differences to the base model."""
    numbers: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rewards = [r for line in lines if (r := json.loads(line).get("reward_mean")) is not None]
        last = rewards[-max(1, len(rewards) // 4) :]
        numbers[name] = {
            "training reward": {"value": statistics.fmean(last) if last else None, "low": None, "high": None}
        }
    for benchmark, limit in limits.items():
        folder = output / "eval" / f"{benchmark}-{seed}"
        metrics, file = MEASURES[benchmark]
        adapters = [str(run) for run in runs.values()]
        call("eval.py", benchmark, "--adapter", *adapters, "--limit", str(limit), "--output", str(folder))
        result = json.loads((folder / file).read_text(encoding="utf-8"))
        _, *measured = result["models"].values()  # the base comes first
        for arm, found in zip(numbers.values(), measured, strict=True):
            arm[f"{benchmark} tokens"] = {"value": found["mean_tokens"], "low": None, "high": None}
            arm |= {f"{metric} - base": found["difference"][metric] for metric in metrics}
    return numbers


def table(seeds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """arm -> numbers of each seed -> a table: over one seed the interval over prompts, over several that over seeds."""
    columns = list(dict.fromkeys(column for arms in seeds for numbers in arms.values() for column in numbers))
    rows = [["arm", "seeds", *columns]]
    for name in seeds[0]:
        row = [name, str(len(seeds))]
        for column in columns:
            each = [arms[name][column] for arms in seeds]
            shown = each[0]
            if len(each) > 1:
                over = stats.t_interval([e["value"] for e in each if e["value"] is not None])
                shown = {"value": over["mean"], "low": over["low"], "high": over["high"]}
            row.append(results.estimate(shown, "+" if column.endswith("base") else ""))
        rows.append(row)
    return stats.aligned(rows)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="default: runs/sweep-NAME-OF-FILE")
    parser.add_argument("--heldout", type=int, default=32, metavar="N", help="unseen documents to measure on; 0: none")
    parser.add_argument("--ifeval", type=int, default=0, metavar="N", help="prompts of IFEval to measure on")
    args = parser.parse_args(argv)
    if min(args.heldout, args.ifeval) < 0:
        raise UserError("--heldout and --ifeval must be 0 (off) or more")
    arms = read_arms(args.file)
    check(arms, args.file)
    output = args.output or Path("runs") / f"sweep-{args.file.stem}"
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    limits = {name: n for name, n in (("heldout", args.heldout), ("ifeval", args.ifeval)) if n}
    made = {seed: commands(arms, seed, output) for seed in args.seeds}
    for each in made.values():
        play(each)
    played = {seed: dict(zip(arms, each, strict=True)) for seed, each in made.items()}
    shown = table([measure(runs, seed, output, limits) for seed, runs in played.items()])
    (output / "table.md").write_text(shown + "\n", encoding="utf-8")
    page = report.write([run for runs in played.values() for run in runs.values()], output / "report.html")
    print(f"\n{shown}\n\ntable in {output / 'table.md'}, all runs side by side in {page}")
    return 0
