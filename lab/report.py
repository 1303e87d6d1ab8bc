"""Runs as one HTML file that loads and runs nothing: each run in words, its curves, and episodes to read.

python -m lab.report runs/x                              # writes runs/x/report.html
python -m lab.report runs/x runs/y --output both.html    # both in one set of curves
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from tqdm.auto import tqdm

from config import PRESETS, Config
from data import HUB_CORPORA, UserError, brief
from engine import audit, checkpoint
from lab.curves import MANY, Metrics, number, plots, points

BUDGET = 20_000_000  # bytes of episodes in one page: beyond that browsers, those of phones first, become slow
PICKS = 8  # groups in each list of highlights
FILES = ("config.json", "metrics.jsonl", "episodes.jsonl")

# All texts are escaped. A field that a record lacks is shown as nothing.
PAGE = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=ChainableUndefined
)
PAGE.filters["number"] = number
PAGE.filters["show"] = lambda value, form=".3f": "–" if number(value) is None else format(value, form)
MACROS: Any = PAGE.get_template("report.html.jinja").module


@dataclass
class Group:
    step: int
    title: str
    rewards: list[float]  # of the answers that have one
    episode: dict[str, Any]  # its answers best first, with a number of tokens instead of their ids
    id: str = ""  # in the page


class Run:
    """What the files of a run hold, as far as they go. Raises UserError if the folder has none of them."""

    def __init__(self, path: Path, key: str = "g") -> None:
        if not any((path / name).is_file() for name in FILES):
            raise UserError(f"{path} is no run: it has no {', '.join(FILES)}; name a folder written by python pop.py")
        self.path, self.name = path, path.resolve().name
        self.notes: list[str] = []  # what is missing or damaged
        self.config: dict[str, Any] = dict(*read(path / "config.json", self.notes))
        self.metrics = read(path / "metrics.jsonl", self.notes, lambda m: {**m, "step": int(m["step"])})
        self.groups: list[Group] = read(path / "episodes.jsonl", self.notes, group_of)
        self.audit: dict[str, Any] = dict(*read(path / "audit.json", self.notes))
        for i, group in enumerate(self.groups, 1):
            group.id = f"{key}-{i}"
        graded = [g for g in reversed(self.groups) if g.rewards]  # the newest of equal ones comes first
        self.highlights = {
            "Best answers": sorted(graded, key=lambda g: max(g.rewards), reverse=True)[:PICKS],
            "Worst answers": sorted(graded, key=lambda g: min(g.rewards))[:PICKS],
        }
        self.shown: dict[str, str] = {}  # id of a group -> HTML


def read(path: Path, notes: list[str], make: Callable[[Any], Any] = dict) -> list[Any]:
    """The record in a .json, or those in a .jsonl, each passed through `make`; what is missing or damaged is noted."""
    if not path.is_file():
        notes.append(f"there is no {path.name}")
        return []
    records, damaged = [], 0
    with path.open("rb") as file:
        for text in file if path.suffix == ".jsonl" else [file.read()]:
            try:
                records.append(make(json.loads(text)))
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += 1
    if damaged:
        notes.append(f"{path.name}: damaged records, left out: {damaged}")
    return records


def group_of(e: dict[str, Any]) -> Group:
    for answer in e["answers"]:
        answer["tokens"] = len(answer.pop("ids"))  # the ids are most of the file
    e["answers"].sort(key=lambda a: -math.inf if (r := number(a["reward"])) is None else r, reverse=True)
    rewards = [r for a in e["answers"] if (r := number(a["reward"])) is not None]
    return Group(int(e.get("step", 0)), " ".join((e["problem"] or e["document"]["text"])[:200].split()), rewards, e)


def facts(run: Run) -> dict[str, list[str]]:
    """The run in words: heading -> paragraphs."""
    cfg = run.config
    corpus = cfg.get("corpus") or HUB_CORPORA.get(cfg.get("task", ""), ["unknown"])[0]
    replayed = [f"problems and rubrics of {cfg['episodes']}"] if cfg.get("episodes") else []
    drops = Counter(str(reason) for g in run.groups if (reason := g.episode.get("drop")))
    dropped = [f"{n:,} dropped: {reason}" for reason, n in drops.most_common()]
    phases = sum((Counter(m.get("seconds")) for m in run.metrics), Counter[str]())
    shares = [f"{seconds / phases.total():.0%} {phase}" for phase, seconds in phases.items()]
    trained = sum(tokens for _, tokens in points(run.metrics, "trained_tokens"))
    done = sum(m["step"] > 0 for m in run.metrics)  # step 0 is what was measured before training
    return {
        "Model": [f"{cfg.get('model', 'unknown')}, {cfg.get('load_in', 'unknown')}"],
        "Documents": [f"{corpus}, task {cfg.get('task', 'unknown')}", *replayed],
        "Preset": changes(cfg),
        "Steps": [f"{done:,} done of {cfg.get('steps', 'unknown')} planned, {trained:,} tokens trained on"],
        "Reward": [reward_in_words(run.metrics)],
        "Best step": [best_step(run)],
        "Audit": verdict(run.audit),
        "Groups": [f"{len(run.groups):,} played", *dropped],
        "Time": [f"{timedelta(seconds=round(phases.total()))} h in steps", *shares],
        "Files": run.notes or ["all there, all whole"],
    }


def changes(cfg: Mapping[str, Any]) -> list[str]:
    """The preset, and each setting that differs from it."""
    preset = cfg.get("preset")
    if preset not in PRESETS:
        return ["unknown"]
    usual = json.loads(json.dumps(asdict(Config(**{**PRESETS[preset], "preset": preset}))))
    changed = [name for name in usual if name not in ("output", "resume") and cfg.get(name, usual[name]) != usual[name]]
    told = [f"{name} {json.dumps(cfg[name])} instead of {json.dumps(usual[name])}" for name in changed]
    return [preset, *told] if told else [f"{preset}, nothing changed"]


def reward_in_words(metrics: Metrics) -> str:
    """The means of the first and the last tenth of the steps: single steps are noise."""
    values = [value for _, value in points(metrics, "reward_mean")]
    if not values:
        return "no answer was graded"
    n = max(1, len(values) // 10)
    first, last = statistics.fmean(values[:n]), statistics.fmean(values[-n:])
    return f"{first:.3f} in the first {n} of {len(values)} steps, {last:.3f} in the last {n}"


def best_step(run: Run) -> str:
    """The step of the adapter in best/, chosen as heldout.watch does."""
    for key in (f"heldout_{run.config.get('best_by', 'similarity')}", "heldout_reward"):
        if scores := points(run.metrics, key):
            step, score = max(scores, key=lambda p: p[1])  # the first of equal ones
            return f"{step or '0, before training'}: {key.replace('heldout_', 'held-out ')} {score:.3f}"
    return "none: nothing was measured on held-out documents"


def verdict(found: dict[str, Any]) -> list[str]:
    """What audit.json says of the reward."""
    try:
        told = [*audit.verdict(found), *audit.warnings(found)] if found else []
    except (KeyError, TypeError) as error:
        return [f"audit.json is not as an audit writes it ({brief(error)})"]
    return told or ["none: whether the reward can be gamed is not known"]


def embed(run: Run, budget: int) -> None:
    """Write `run.shown`: the highlights and the newest step, and as many other groups as a budget of bytes allows."""
    picked = {g.id for picks in run.highlights.values() for g in picks}
    picked |= {g.id for g in run.groups if g.step == run.groups[-1].step}
    # Multiples of the golden ratio, modulo 1, lie evenly: wherever the budget ends, an even sample is shown.
    order = sorted(range(len(run.groups)), key=lambda i: (run.groups[i].id not in picked, i * (5**0.5 - 1) / 2 % 1))
    for group in (run.groups[i] for i in order):
        html = MACROS.group(group, group.episode)
        budget -= len(html.encode(errors="replace"))
        if budget < 0 and group.id not in picked:
            return
        run.shown[group.id] = html


def write(paths: Sequence[Path], output: Path | None = None) -> Path:
    """A page on one run or several; by default in the run's folder, or here for several. Returns where it is.

    Raises UserError for a folder that is no run, and for a file that cannot be written.
    """
    runs = [Run(path, f"r{i}") for i, path in enumerate(dict.fromkeys(map(Path, paths)))]
    names = Counter(run.name for run in runs)
    for run in runs:
        run.name = run.name if names[run.name] == 1 else str(run.path)
        embed(run, BUDGET // len(runs))
    html = MACROS.page(runs, list(map(facts, runs)), plots([run.metrics for run in runs]), MANY)
    output = output or (runs[0].path / "report.html" if len(runs) == 1 else Path("report.html"))
    try:
        checkpoint.replace_file(output, html.encode(errors="replace"))  # JSON may hold half a surrogate pair
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; choose another place with --output") from None
    return output


def refresh(run: Path) -> None:
    """Write the report of a run so far and print where it is, or why there is none. Raises nothing."""
    try:
        tqdm.write(f"report in {write([run])}")
    except (Exception, KeyboardInterrupt) as error:  # no report is worth a run
        tqdm.write(f"no report ({brief(error)}); to try again: python -m lab.report {run}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.report", description="Write an HTML page on runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that python pop.py has written")
    parser.add_argument("--output", type=Path, help="default: report.html in the run's folder; for several runs, here")
    args = parser.parse_args(argv)
    print(f"report in {write(args.runs, args.output)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
