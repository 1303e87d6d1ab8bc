"""An experiment as one small JSON, from which its table and its plot are made again at any time.

    python -m lab.experiment docs/results/NAME.json --runs runs/A-0 runs/A-1 runs/B-0 --evals runs/eval-...
    python -m lab.experiment docs/results/NAME.json

The first collects what finished runs and evaluations (of eval.py, all of these runs) hold; a run's folder is named after
its arm and seed. Both then write the table between the lines `<!-- NAME -->` and `<!-- end -->` of README.md and of the
pages in docs/, there with all columns, and the plot to docs/images/NAME.png.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import estimate
from data import UserError, read_lines
from engine import stats
from engine.text import repeated
from lab import curves, report

CONTROL = "random"  # the arm that all others should beat
PLOTTED = {"reward_mean": "reward", "completion_length": "tokens of an answer", "kl": "KL to the base, nats a token"}
CORE = ("tokens", "reward", "reference_logp", "similarity", "strict_average")  # columns of the README
WANTED = ("grade", "reward", "reference_logp", "similarity", "win_rate", "length_controlled", "strict_average")
UNDER_JUDGE = ("grade", "reward", "win_rate", "length_controlled")  # named with the judge that gave them

Result = dict[str, Any]


def arm_of(name: str) -> str:
    """The arm of a run, or of an adapter's label, which ends in a part of its checksum: written of written-0."""
    return re.sub(r"-\d+(-[0-9a-f]{8})?$", "", name)


def collect(runs: Sequence[Path], evals: Sequence[Path]) -> Result:
    """Curves of the runs and, of each arm over its seeds, the numbers of the evaluations. Raises UserError."""
    found: Result = {"steps": {}, "curves": defaultdict(list), "columns": {}}
    for run in runs:
        metrics = report.Run(run).metrics
        found["steps"][run.name] = max(m["step"] for m in metrics)
        kept = {key: [[step, round(value, 4)] for step, value in curves.points(metrics, key)] for key in PLOTTED}
        found["curves"][arm_of(run.name)].append(kept)
    for folder in evals:
        if not (paths := sorted(folder.glob("results*.json"))):
            raise UserError(f"{folder}: no finished evaluation there (no results*.json)")
        for path in paths:
            add_columns(found["columns"], json.loads(path.read_text(encoding="utf-8")), folder)
    return found


def add_columns(columns: dict[str, Any], result: Result, folder: Path) -> None:
    """What one evaluation tells: each metric of the base, and each arm's paired difference to it over the same items."""
    scores, models = result["scores"], result["models"]
    arms: dict[str, list[str]] = defaultdict(list)
    for label in models:
        if label != "base":
            arms[arm_of(label)].append(label)
    for name in (name for name in WANTED if name in models["base"]["metrics"] and name != "win_rate"):
        tables = {label: np.array([s[name] for s in scores[label].values()], dtype=float) for label in models}
        if np.isnan(tables["base"]).all():
            continue
        column: dict[str, Any] = {"base": asdict(stats.interval(tables["base"]))}
        for arm, labels in arms.items():  # seeds side by side: their mean, and each item with all its seeds
            column[arm] = difference([tables["base"]] * len(labels), [tables[label] for label in labels])
        if CONTROL in arms:
            for arm, labels in arms.items():
                pairs = [(mine, theirs) for mine in labels for theirs in arms[CONTROL] if arm != CONTROL]
                if pairs:
                    column[f"{arm} - {CONTROL}"] = difference(
                        [tables[theirs] for _, theirs in pairs], [tables[mine] for mine, _ in pairs]
                    )
        columns[titled(name, result)] = column
    if result["judge"] and any("win_rate" in m["metrics"] for m in models.values()):
        wins = {arm: [np.array([s["win_rate"] for s in scores[x].values()], float) for x in of] for arm, of in arms.items()}
        if not all(np.isnan(w).all() for each in wins.values() for w in each):
            over = {arm: asdict(stats.interval(np.concatenate(each, 1))) for arm, each in wins.items()}
            columns[titled("win_rate", result)] = over
    if result["benchmark"] == "heldout":
        lengths = {arm: statistics.fmean(models[x]["mean_tokens"] for x in of) for arm, of in arms.items()}
        columns["tokens"] = {arm: {"value": v} for arm, v in {"base": models["base"]["mean_tokens"], **lengths}.items()}
        texts = {x: [r["text"] for r in read_lines(folder / f"answers-{x}.jsonl")] for x in models}
        again = {x: statistics.fmean(map(repeated, each)) for x, each in texts.items()}
        means = {arm: statistics.fmean(again[x] for x in of) for arm, of in {"base": ["base"], **arms}.items()}
        columns["repeated"] = {arm: {"value": v} for arm, v in means.items()}


def difference(base: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> dict[str, Any]:
    return asdict(stats.difference(np.concatenate(base, 1), np.concatenate(other, 1)))


def titled(name: str, result: Result) -> str:
    return f"{name} ({result['judge']})" if name in UNDER_JUDGE else name


def table(found: Result, core: bool = False) -> str:
    """A row for the base with its values, one for each arm with differences to it, those that leave out 0 in bold, and
    at the end each arm against the control."""
    columns = found["columns"]
    if core:
        columns = {name: c for name, c in columns.items() if name.partition(" ")[0] in CORE}
    rows = ["base", *found["curves"], *(r for r in next(iter(columns.values())) if f" - {CONTROL}" in r)]
    head = ["arm", "steps", *columns]
    lines = [head]
    for row in rows:
        ran = [str(n) for run, n in found["steps"].items() if arm_of(run) == row]
        lines.append([row, ", ".join(ran), *(cell(column.get(row), row, name) for name, column in columns.items())])
    return stats.aligned(lines)


def cell(value: Mapping[str, Any] | None, row: str, column: str) -> str:
    if value is None:
        return ""
    if column in ("tokens", "repeated"):
        return f"{value['value']:.0f}" if column == "tokens" else f"{value['value']:.0%}"
    absolute = row == "base" or column.startswith("win_rate")
    shown = estimate(value, "" if absolute else "+")
    at = 0.5 if column.startswith("win_rate") else 0.0
    clear = row != "base" and value["low"] is not None and not value["low"] <= at <= value["high"]
    return f"**{shown}**" if clear else shown


def plot(found: Result, path: Path) -> None:
    """The curves of all arms; of several seeds each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(PLOTTED)), PLOTTED.items(), strict=True):
        for i, (arm, runs) in enumerate(found["curves"].items()):
            for k, run in enumerate(r for r in runs if r[key]):
                axes.plot(*zip(*run[key], strict=True), color=f"C{i}", linewidth=1.2, label=arm if k == 0 else None)
        axes.set(xlabel="step", title=title)
        axes.title.set_size(9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].set_yscale("linear")
    figure.axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def rewrite(page: Path, name: str, text: str) -> None:
    """Put the text between the page's marks of that name, if it has them."""
    whole = page.read_text(encoding="utf-8")
    new = re.sub(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{text}\n{m[2]}", whole, flags=re.S)
    if new != whole:
        page.write_text(new, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.experiment", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="NAME.json")
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    parser.add_argument("--evals", type=Path, nargs="+", default=[])
    args = parser.parse_args(argv)
    if args.runs:
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text(json.dumps(collect(args.runs, args.evals), indent=1) + "\n", encoding="utf-8")
    try:
        found = json.loads(args.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{args.file} cannot be read: {error}") from None
    root = Path(__file__).parents[1]
    plot(found, root / "docs" / "images" / f"{args.file.stem}.png")
    rewrite(root / "README.md", args.file.stem, table(found, core=True))
    for page in (root / "docs").glob("*.md"):
        rewrite(page, args.file.stem, table(found))
    print(table(found))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
