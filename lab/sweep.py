"""Arms of an experiment, one after another on the one GPU: `python -m lab.sweep FILE`, resumable, ends in a table.

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
from collections.abc import Iterable, Sequence
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


def measure(runs: Iterable[Path], folder: Path, documents: int) -> list[dict[str, Any]]:
    """The numbers of each run: training reward and, on unseen documents, differences to the base model."""
    numbers = []
    for run in runs:
        rewards = [reward for _, reward in curves.points(report.Run(run).metrics, "reward_mean")]
        last = stats.mean(rewards[-max(1, len(rewards) // 4) :])
        numbers.append({"training reward": {"value": last, "low": None, "high": None}})
    if documents > 0:
        call("eval.py", "heldout", "--adapter", *map(str, runs), "--limit", str(documents), "--output", str(folder))
        result = json.loads((folder / "results-base.json").read_text(encoding="utf-8"))
        _, *measured = result["models"].values()  # the base comes first
        for row, found in zip(numbers, measured, strict=True):
            row["tokens"] = {"value": found["mean_tokens"], "low": None, "high": None}
            row |= {f"{name} - base": found["difference"][name] for name in ("grade", "reward", "similarity")}
    return numbers


def table(arms: Iterable[str], seeds: Sequence[Sequence[dict[str, Any]]]) -> str:
    """The numbers of each arm by seed -> a table: of one seed with intervals over prompts, of several over seeds."""
    rows = [["arm", "seeds", *seeds[0][0]]]
    for name, *numbers in zip(arms, *seeds, strict=True):
        row = [name, str(len(seeds))]
        for column in seeds[0][0]:
            shown, *others = [each[column] for each in numbers]
            if others:
                over = stats.t_interval([e["value"] for e in (shown, *others) if e["value"] is not None])
                shown = {**over, "value": over["mean"]}
            row.append(results.estimate(shown, "+" if column.endswith("base") else ""))
        rows.append(row)
    return stats.aligned(rows)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, help="the arms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, help="default: runs/sweep-NAME-OF-FILE")
    parser.add_argument("--heldout", type=int, default=32, metavar="N", help="unseen documents to measure on; 0: none")
    args = parser.parse_args(argv)
    arms = read_arms(args.file)
    output = args.output or Path("runs") / f"sweep-{args.file.stem}"
    made = {seed: commands(arms, seed, output) for seed in args.seeds}
    for runs in made.values():
        for run, flags in runs.items():
            print(f"== {run}: {'done' if (done := finished(run)) else shlex.join(flags)}", flush=True)
            if not done:
                call("pop.py", *(["--resume", str(run)] if (run / "config.json").exists() else flags))
    shown = table(arms, [measure(runs, output / f"heldout-{seed}", args.heldout) for seed, runs in made.items()])
    (output / "table.md").write_text(shown + "\n", encoding="utf-8")
    page = report.write([run for runs in made.values() for run in runs], output / "report.html")
    print(f"\n{shown}\n\ntable in {output / 'table.md'}, all runs side by side in {page}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
