"""Arms of an experiment, one after another on the one GPU: `python -m lab.sweep FILE`, resumable, ends in a table.

With --table it makes the table of the arms that are finished, also while another process is at work on the rest.

FILE has a line `name: flags` for each arm, flags of pop.py; `all: flags` come before those of every arm, and `{name}`
in flags is the run folder of an earlier arm with the same seed, whose problems an arm may replay:

    all: --preset demo --steps 12
    written:
    random: --reward random --episodes {written}/episodes.jsonl
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import results
from config import check_changes, parse_args, stored_config
from data import UserError, brief
from engine import checkpoint, stats
from lab import curves, report


def read_arms(path: Path) -> dict[str, str]:
    """name -> flags, in order. Raises UserError, naming the line, if one cannot be read, and OSError."""
    arms: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if text := line.partition("#")[0].strip():
            found = re.fullmatch(r"([\w-]+):(.*)", text)
            if not found or found[1] in arms:
                raise UserError(f"{path}:{number}: want `name: flags`, each name once, not {line.strip()!r}")
            arms[found[1]] = found[2]
    shared = arms.pop("all", "")
    if not arms:
        raise UserError(f"{path}: no arm in it, a line such as `random: --reward random`")
    return {name: shared + flags for name, flags in arms.items()}


def commands(arms: dict[str, str], seed: int, output: Path) -> dict[Path, list[str]]:
    """The run folder of each arm -> the flags that make the run. Raises UserError and SystemExit as pop.py would."""
    runs: dict[str, Path] = {}
    made = {}
    for name, flags in arms.items():
        run = output / f"{name}-{seed}"
        try:
            filled = [flag.format_map(runs) for flag in shlex.split(flags)]
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"arm {name}:{flags}: {brief(error)}; braces are for the name of an earlier arm") from None
        print(f"arm {name}: {shlex.join(filled)}", flush=True)
        cfg = parse_args(filled)
        if cfg.output or cfg.resume or cfg.dry_run or cfg.seed:
            raise UserError(f"arm {name} must not have --output, --resume, --dry-run or --seed (but the sweep --seeds)")
        if (run / "config.json").exists():
            for other, source in runs.items():
                if f"{{{other}}}" in flags and not (source / "config.json").exists():
                    raise UserError(f"{run} was made from {source}, which is no longer there: remove {run} too")
            stored = stored_config(run)
            check_changes(stored, replace(cfg, seed=seed, output=stored["output"], resume=str(run)))
        runs[name] = run
        made[run] = [*filled, "--seed", str(seed), "--output", str(run)]
    return made


def finished(run: Path) -> bool:
    """Whether the last step is saved, and its adapter where evaluations look for it."""
    weights = Path("adapter") / "adapter_model.safetensors"
    try:
        last = run / "checkpoints" / f"step-{stored_config(run)['steps']:06d}"
        return checkpoint.sha256(last / weights) == checkpoint.sha256(run / weights)
    except (OSError, UserError):
        return False


def call(*command: str) -> None:
    """A top-level program in a process of its own. Raises UserError unless it ends well."""
    script = Path(__file__).parents[1] / command[0]
    process, interrupted = subprocess.Popen([sys.executable, str(script), *command[1:]]), False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the terminal has told the program too, which now saves
            interrupted = True
    if interrupted or process.returncode:
        raise UserError(f"stopped: {shlex.join(command)} ended with {process.returncode}; the same command goes on")


Numbers = dict[str, dict[str, Any]]  # of a run: the name of each -> value, low, high


def measure(runs: Sequence[Path], folder: Path, documents: int, judge: str | None = None) -> list[Numbers]:
    """The numbers of each run: training reward and, on unseen documents, differences to the base model; with another
    judge than that its win rate over the base model's answers, too."""
    numbers: list[Numbers] = []
    for run in runs:
        rewards = [reward for _, reward in curves.points(report.Run(run).metrics, "reward_mean")]
        last = stats.mean(rewards[-max(1, len(rewards) // 4) :])
        numbers.append({"training reward": {"value": last, "low": None, "high": None}})
    if documents > 0 and runs:
        more = ["--judge", judge] if judge else []
        asked = ["--adapter", *map(str, runs), "--limit", str(documents), "--output", str(folder), *more]
        call("eval.py", "heldout", *asked)
        newest = max(folder.glob("results-*.json"), key=lambda path: path.stat().st_mtime_ns)
        found = json.loads(newest.read_text(encoding="utf-8"))
        _, *measured = found["models"].values()  # the base comes first
        for row, model in zip(numbers, measured, strict=True):
            row["tokens"] = {"value": model["mean_tokens"], "low": None, "high": None}
            wins = {"win_rate", "length_controlled"}
            row |= {f"{name} - base": d for name, d in model["difference"].items() if name not in wins}
            row |= {name: each for name, each in model["metrics"].items() if name in wins and judge}
    return numbers


def table(arms: Mapping[str, Sequence[Numbers]]) -> str:
    """arm -> the numbers of each of its seeds, as a table: of one seed with intervals over prompts, of several over
    seeds."""
    columns = list(dict.fromkeys(column for seeds in arms.values() for row in seeds for column in row))
    rows, most = [["arm", "seeds", *columns]], max(map(len, arms.values()))
    for name, seeds in arms.items():
        row = [name, str(len(seeds))]
        for column in columns:
            shown, *others = [each.get(column, {"value": None}) for each in seeds]
            if others:
                over = stats.t_interval([e["value"] for e in (shown, *others) if e["value"] is not None])
                shown = {**over, "value": over["mean"]}
            elif most > 1:  # an interval over prompts would stand among those over seeds
                shown = {**shown, "low": None}
            row.append(results.estimate(shown, "+" if column.endswith("base") else ""))
        rows.append(row)
    return stats.aligned(rows)


def train(made: Mapping[int, Mapping[Path, list[str]]]) -> None:
    """All arms with all seeds that are not finished, each from where it stopped."""
    for runs in made.values():
        for run, flags in runs.items():
            print(f"== {run}: {'done' if (done := finished(run)) else shlex.join(flags)}", flush=True)
            if not done:
                call("pop.py", *(["--resume", str(run)] if (run / "config.json").exists() else flags))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="the arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="default: runs/sweep-NAME-OF-FILE")
    parser.add_argument("--heldout", type=int, default=32, metavar="N", help="unseen documents to measure on; 0: none")
    parser.add_argument("--judge", metavar="MODEL", help="of the measurements; default: the base model")
    parser.add_argument("--table", action="store_true", help="train nothing: table and report of the finished arms")
    args = parser.parse_args(argv)
    arms = read_arms(args.file)
    output = args.output or Path("runs") / f"sweep-{args.file.stem}"
    made = {seed: commands(arms, seed, output) for seed in args.seeds}
    if not args.table:
        with checkpoint.locked(output):
            train(made)
    found: dict[str, list[Numbers]] = {}
    for seed, runs in made.items():
        ready = {run: name for run, name in zip(runs, arms, strict=True) if finished(run)}
        measured = measure(list(ready), output / f"heldout-{seed}", args.heldout, args.judge)
        for name, numbers in zip(ready.values(), measured, strict=True):
            found.setdefault(name, []).append(numbers)
    if not found:
        raise UserError(f"{output}: no arm is finished yet")
    shown = table(found)
    (output / "table.md").write_text(shown + "\n", encoding="utf-8")
    page = report.write([run for runs in made.values() for run in runs if finished(run)], output / "report.html")
    print(f"\n{shown}\n\ntable in {output / 'table.md'}, all runs side by side in {page}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
