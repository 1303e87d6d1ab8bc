"""An experiment as one small JSON, from which its table and its plot are made again at any time.

    python -m lab.experiment docs/results/NAME.json --runs runs/A-0 runs/A-1 runs/B-0 --evals runs/eval-...
    python -m lab.experiment docs/results/NAME.json

The first collects what runs, whose folders are named ARM-SEED, and evaluations of them by eval.py hold. Both write the
table to the pages of docs/ that have the lines `<!-- NAME -->` and `<!-- end -->`, its main rows and columns to
README.md, and the plot to docs/images/NAME.png.
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

from benchmarks.results import estimate, finished
from data import UserError, read_lines
from engine import stats
from engine.text import repeated
from lab import curves, report

ROOT = Path(__file__).parents[1]
SUBJECT, CONTROL = "written", "random"  # the arm that the experiment is about, and that which all should beat
CURVES = {"reward_mean": "reward", "completion_length": "tokens of an answer", "truncated_share": "share cut off"}
MEASURES = ("grade", "reward", "win_rate", "similarity", "reference_logp", "strict_average")
OF_JUDGE = ("grade", "reward", "win_rate")  # named with the judge that gave them
# The columns of the README.
CORE = ("tokens", "grade", "reward", "similarity", "reference_logp", "win_rate", "strict_average")


def arm_of(name: str) -> str:
    """The arm of a run, such as written-0, or of an adapter's label, which ends in a part of its checksum."""
    return re.sub(r"-\d+(-[0-9a-f]{8})?$", "", name)


def collect(runs: Sequence[Path], evals: Sequence[Path]) -> dict[str, Any]:
    """Steps and curves of the runs and, of each arm over its seeds, what the evaluations measured. Raises UserError."""
    found: dict[str, Any] = {"steps": {}, "curves": {}, "columns": {}}
    for run in runs:
        kept = report.Run(run)
        found["steps"][run.name] = kept.metrics[-1]["step"] if kept.metrics else 0
        if kept.config.get("replay") != "answers":  # with them the curves would be those of the recording
            points = {key: curves.points(kept.metrics, key) for key in CURVES}
            found["curves"][run.name] = {key: [[s, round(v, 4)] for s, v in of] for key, of in points.items()}
    for folder in evals:
        for result in finished(folder):
            found["columns"] |= columns_of(result, folder)
    return found


def columns_of(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Each measure: of the base its value, of each arm the paired difference to it (wins: their share), then each arm's
    difference to the control. Seeds of an arm stand side by side: an item counts once, with the mean over them."""
    arms: dict[str, list[str]] = defaultdict(list)
    for label in result["models"]:
        arms[arm_of(label)].append(label)
    columns: dict[str, Any] = {}
    for name in (name for name in MEASURES if name in next(iter(result["scores"]["base"].values()))):
        of = {label: np.array([s[name] for s in each.values()], float) for label, each in result["scores"].items()}
        if all(np.isnan(scores).all() for scores in of.values()):
            continue
        column = {"base": asdict(stats.interval(of["base"]))} if name != "win_rate" else {}
        for arm in (arm for arm in arms if arm != "base"):
            mine = [of[label] for label in arms[arm]]
            if name == "win_rate":
                column[arm] = asdict(stats.interval(np.concatenate(mine, 1)))
                continue
            column[arm] = apart([(scores, of["base"]) for scores in mine])
            if arm != CONTROL and CONTROL in arms:
                pairs = [(scores, of[label]) for scores in mine for label in arms[CONTROL]]
                column[f"{arm} - {CONTROL}"] = apart(pairs)
        columns[f"{name} ({result['judge']})" if name in OF_JUDGE else name] = column
    if result["benchmark"] == "heldout":
        texts = {label: read_lines(folder / f"answers-{label}.jsonl") for label in result["models"]}
        again = {label: [repeated(row["text"]) for row in rows] for label, rows in texts.items()}
        for title, value in (
            ("tokens", lambda label: result["models"][label]["mean_tokens"]),
            ("repeated", lambda label: statistics.fmean(again[label])),
        ):
            columns[title] = {arm: {"value": statistics.fmean(map(value, labels))} for arm, labels in arms.items()}
    return columns


def apart(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The mean difference of pairs of scores, each (items, columns, 2)."""
    mine, others = (np.concatenate(side, 1) for side in zip(*pairs, strict=True))
    return asdict(stats.difference(others, mine))


def table(found: Mapping[str, Any], core: bool = False) -> str:
    """Differences whose interval leaves out 0, and shares of wins whose interval leaves out a half, are in bold."""
    columns = {name: c for name, c in found["columns"].items() if not core or name.partition(" ")[0] in CORE}
    order = sorted(columns, key=lambda name: (name not in ("tokens", "repeated"), list(columns).index(name)))
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    if core:
        rows = [row for row in rows if row in ("base", SUBJECT, CONTROL, f"{SUBJECT} - {CONTROL}")]
    rows.sort(key=lambda row: (f" - {CONTROL}" in row, row != "base"))  # the base first, these last
    lines = [["arm", "steps", *order]]
    for row in rows:
        steps = ", ".join(str(n) for run, n in found["steps"].items() if arm_of(run) == row)
        lines.append([row, steps, *(cell(columns[name].get(row), name, row == "base") for name in order)])
    return stats.aligned(lines)


def cell(value: Mapping[str, Any] | None, column: str, base: bool) -> str:
    if value is None or "low" not in value:
        return "" if value is None else f"{value['value']:.0f}" if column == "tokens" else f"{value['value']:.0%}"
    wins = column.startswith("win_rate")
    shown = estimate(value, "" if base or wins else "+")
    clear = not base and value["low"] is not None and not value["low"] <= (0.5 if wins else 0) <= value["high"]
    return f"**{shown}**" if clear else shown


def plot(found: Mapping[str, Any], path: Path) -> None:
    """The curves of all runs, those of an arm in one colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    arms = list(dict.fromkeys(map(arm_of, found["curves"])))
    for axes, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for run, of in found["curves"].items():
            if key == "reward_mean" and arm_of(run) == CONTROL:  # a random reward says nothing
                continue
            look = {"label": arm_of(run)} if run == next(r for r in found["curves"] if arm_of(r) == arm_of(run)) else {}
            axes.plot(*np.array(of[key]).T, color=f"C{arms.index(arm_of(run))}", linewidth=1.2, **look)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def rewrite(page: Path, name: str, text: str) -> None:
    """Put a text between the page's marks of that name, if it has them."""
    whole = page.read_text(encoding="utf-8")
    marked = rf"(?s)(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
    if (new := re.sub(marked, lambda m: f"{m[1]}{text}\n{m[2]}", whole)) != whole:
        page.write_text(new, encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser("python -m lab.experiment", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", type=Path, metavar="NAME.json")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="RUN")
    parser.add_argument("--evals", type=Path, nargs="+", default=[], metavar="FOLDER")
    args = parser.parse_args(argv)
    if args.runs:
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text(json.dumps(collect(args.runs, args.evals)) + "\n", encoding="utf-8")
    try:
        found = json.loads(args.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{args.file} cannot be read ({error}): collect it by --runs and --evals") from None
    plot(found, ROOT / "docs" / "images" / f"{args.file.stem}.png")
    rewrite(ROOT / "README.md", args.file.stem, table(found, core=True))
    for page in (ROOT / "docs").glob("*.md"):
        rewrite(page, args.file.stem, table(found))
    print(table(found))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
