"""What runs look like: one HTML file with the run in words, its curves, and every episode to read.

    python report.py runs/x                              # writes runs/x/report.html
    python report.py runs/x runs/y --output both.html    # both in one set of curves

The page itself is report.html.jinja. It loads nothing, and only searching needs JavaScript. What models and documents
say is never more than escaped text in it. torch (with pop: 4 s) is not imported before there is a run to report on.
"""

import argparse
import base64
import functools
import hashlib
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup
from tqdm.auto import tqdm

from data import HUB_CORPORA, UserError, brief
from lab.curves import MANY, Metrics, number, plots, points, totals

BUDGET = 20_000_000  # bytes of episodes in one page: beyond that browsers, those of phones first, become slow
PICKS = 8  # groups in each list of highlights
FILES = ("config.json", "metrics.jsonl", "episodes.jsonl")

# ------------------------------------------------------------------------------------------------ reading a run


@dataclass
class Group:
    """Where an episode stands in episodes.jsonl and what decides whether it is shown, without its texts."""

    id: str  # in the page
    offset: int  # in the file, in bytes
    step: int
    place: int  # within its step, from 1
    problem: str
    rewards: list[float]
    tokens: int  # of its answers
    drop: str | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)

    @property
    def spread(self) -> float:
        return statistics.pstdev(self.rewards)


@dataclass
class Run:
    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is missing or damaged
    shown: dict[str, Markup] = field(default_factory=dict)  # id of a group -> HTML

    @property
    def rewards(self) -> dict[int, float]:
        return dict(points(self.metrics, "reward_mean"))


def read_run(path: Path, key: str = "g") -> Run:
    """A run as far as its files go; ids begin with `key`. Raises UserError if the folder holds none of them."""
    if not any((path / name).is_file() for name in FILES):
        raise UserError(f"{path} is no run: it has no {', '.join(FILES)}; name a folder that python pop.py has written")
    run = Run(path, path.resolve().name)
    run.config = read_json(path / "config.json", run.notes)
    run.audit = read_json(path / "audit.json", run.notes)
    run.metrics = [m for _, _, m in read_lines(path / "metrics.jsonl", run.notes) if isinstance(m.get("step"), int)]
    places: Counter[int] = Counter()
    strange = 0
    for line, offset, e in read_lines(path / "episodes.jsonl", run.notes):
        try:
            step, problem = int(e.get("step", 0)), shortened(e["problem"] or e["document"]["text"])
            rewards = [r for a in e["answers"] if (r := number(a["reward"])) is not None]
            tokens = sum(len(a["ids"]) for a in e["answers"])
        except (KeyError, TypeError, ValueError, AttributeError):
            strange += 1
            continue
        places[step] += 1
        run.groups.append(Group(f"{key}-{line}", offset, step, places[step], problem, rewards, tokens, e.get("drop")))
    if strange:
        run.notes.append(f"episodes.jsonl: lines that are no episodes, left out: {strange}")
    return run


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        notes.append(f"there is no {path.name}")
    except (OSError, ValueError, TypeError) as error:
        notes.append(f"{path.name} cannot be read ({brief(error)})")
    return {}


def read_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(line from 1, offset in bytes, record) of each whole line; what a crash has cut is noted and left out."""
    if not path.is_file():
        notes.append(f"there is no {path.name}")
        return
    offset, damaged = 0, 0
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            try:
                yield i, offset, dict(json.loads(line))
            except (ValueError, TypeError):
                damaged += 1
            offset += len(line)
    if damaged:
        notes.append(f"{path.name}: damaged lines, left out: {damaged}")


def shortened(text: str, limit: int = 110) -> str:
    text = " ".join(text[: 4 * limit].split())
    return text if len(text) <= limit else text[:limit] + " …"


# --------------------------------------------------------------------------------------------- the run in words


def facts(run: Run) -> dict[str, list[str]]:
    """What there is to say of a run: a heading, and a paragraph or more."""
    cfg = run.config
    corpus = cfg.get("corpus") or HUB_CORPORA.get(cfg.get("task", ""), ["unknown"])[0]
    trained = sum(number(m.get("trained_tokens")) or 0 for m in run.metrics)
    drops = Counter(g.drop for g in run.groups if g.drop)
    return {
        "Model": [f"{cfg.get('model', 'unknown')}, {cfg.get('load_in', 'unknown')}"],
        "Documents": [f"{corpus}, task {cfg.get('task', 'unknown')}"]
        + ([f"problems and rubrics of {cfg['episodes']}"] if cfg.get("episodes") else []),
        "Preset": changes(cfg),
        "Steps": [f"{sum(m['step'] > 0 for m in run.metrics):,} done of {cfg.get('steps', 'unknown')} planned"],
        "Reward": [reward_in_words(run.metrics)],
        "Best step": [best_step(run)],
        "Audit": verdict(run.audit),
        "Groups": [f"{len(run.groups):,} played, {drops.total():,} dropped"]
        + [f"{count:,} {reason}" for reason, count in drops.most_common()],
        "Tokens": [f"{trained:,} trained on, {sum(g.tokens for g in run.groups):,} in answers written down"],
        "Time": [time_in_words(run.metrics)],
        "Files": run.notes or ["all there, all whole"],
    }


def changes(cfg: Mapping[str, Any]) -> list[str]:
    """The preset and what flags have changed of it."""
    from config import PRESETS, Config

    preset = cfg.get("preset")
    if preset not in PRESETS:
        return ["unknown"]
    usual = asdict(Config(**PRESETS[preset]))
    of_the_method = usual.keys() & cfg.keys() - {"preset", "output", "resume", "dry_run"}
    changed = [name for name in usual if name in of_the_method and cfg[name] != usual[name]]
    return [preset if changed else f"{preset}, nothing changed"] + [
        f"{name} {json.dumps(cfg[name])} instead of {json.dumps(usual[name])}" for name in changed
    ]


def reward_in_words(metrics: Metrics) -> str:
    """The means of the first and the last tenth of the steps: single steps are noise."""
    values = [value for _, value in points(metrics, "reward_mean")]
    if not values:
        return "no answer was graded"
    n = max(1, len(values) // 10)
    which = "step" if n == 1 else f"{n} steps"
    return f"{statistics.fmean(values[:n]):.3f} in the first {which}, {statistics.fmean(values[-n:]):.3f} in the last"


def best_step(run: Run) -> str:
    """The step of the adapter in best/."""
    keys = f"heldout_{run.config.get('best_by', 'similarity')}", "heldout_reward"  # as in heldout.watch
    key = next((key for key in keys if points(run.metrics, key)), None)
    if key is None:
        return "none: nothing was measured on held-out documents"
    step, score = max(points(run.metrics, key), key=lambda p: p[1])  # of equal ones the first, as in heldout.watch
    return f"{step or '0, before training'}: {key.replace('heldout_', 'held-out ')} {score:.3f}"


def verdict(audit: dict[str, Any]) -> list[str]:
    """What audit.json says the reward can be had by."""
    from engine.audit import warnings

    if not audit:
        return ["none: what the reward can be had by is not known"]
    try:
        by = f"{audit['judge']} judge, {len(audit['documents'])} held-out documents"
        found = [warning.removeprefix("WARNING: ") for warning in warnings(audit)]
    except (KeyError, TypeError) as error:
        return [f"audit.json is not as heldout.py writes it ({brief(error)})"]
    return [*found, f"({by})"] if found else [f"nothing was found that the reward can be had by ({by})"]


def time_in_words(metrics: Metrics) -> str:
    seconds = totals(metrics, "seconds")
    shares = ", ".join(f"{phase} {s / seconds.total():.0%}" for phase, s in seconds.items())
    return f"{timedelta(seconds=round(seconds.total()))} h in steps" + (f": {shares}" if shares else "")


# ----------------------------------------------------------------------------------------------------- episodes


def highlights(groups: Sequence[Group]) -> dict[str, list[tuple[float, Group]]]:
    """(value, group) of those to look at first; of equal ones the newest."""
    graded = [g for g in reversed(groups) if g.rewards]

    def first(value: Callable[[Group], float], reverse: bool) -> list[tuple[float, Group]]:
        return [(value(g), g) for g in sorted(graded, key=value, reverse=reverse)[:PICKS]]

    return {
        "Best answers": first(lambda g: max(g.rewards), True),
        "Worst answers": first(lambda g: min(g.rewards), False),
        "Most disagreed on (± reward)": first(lambda g: g.spread, True),
    }


def by_importance(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """(highlights and the newest step, the rest in an order of which every beginning is an even sample)."""
    newest = {g.id for g in groups if g.step == groups[-1].step}
    picked = newest | {g.id for picks in highlights(groups).values() for _, g in picks}
    rest = [g for g in groups if g.id not in picked]
    # The multiples of the golden ratio, modulo 1, lie evenly, and so do those below any bound.
    order = sorted(range(len(rest)), key=lambda i: i * (math.sqrt(5) - 1) / 2 % 1)
    return [g for g in groups if g.id in picked], [rest[i] for i in order]


def embed(run: Run, budget: int) -> None:
    """Write `run.shown`: all groups, or the most important ones within a budget of bytes."""
    if not run.groups:
        return
    always, rest = by_importance(run.groups)
    with (run.path / "episodes.jsonl").open("rb") as file:
        for i, group in enumerate([*always, *rest]):
            file.seek(group.offset)
            record = json.loads(file.readline())
            html = template().module.group(record, group, ordered(record["answers"]))
            budget -= len(html.encode(errors="replace"))
            if budget < 0 and i >= len(always):
                return
            run.shown[group.id] = html


def ordered(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best first, those without a reward last."""
    return sorted(answers, key=lambda a: -math.inf if (r := number(a["reward"])) is None else r, reverse=True)


# --------------------------------------------------------------------------------------------------- the report


@functools.cache
def template() -> Any:
    """The macros of the page. All that is put into it is escaped, save Markup."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=ChainableUndefined,  # a field that a record lacks is shown as nothing
    )
    env.filters |= {"number": number, "highlights": highlights}
    env.filters["show"] = lambda value, form=".3f": "–" if number(value) is None else format(value, form)
    return env.get_template("report.html.jinja")


def write(runs: Sequence[Path], output: Path | None = None) -> Path:
    """A page on one run or several; by default in the run's folder, or here for several. Returns where it is.

    Raises UserError for a folder that is no run, and for a file that cannot be written.
    """
    from engine import checkpoint

    read = [read_run(path, f"r{i}") for i, path in enumerate(dict.fromkeys(map(Path, runs)))]
    names = Counter(run.name for run in read)
    for run in read:
        run.name = run.name if names[run.name] == 1 else str(run.path)
        embed(run, BUDGET // len(read))
    told = [facts(run) for run in read]
    side_by_side = {heading: [each[heading] for each in told] for heading in told[0]}
    html = template().module.page(
        read, side_by_side, plots({run.name: run.metrics for run in read}), MANY, script_hash()
    )
    output = output or (read[0].path / "report.html" if len(read) == 1 else Path("report.html"))
    try:
        checkpoint.replace_file(output, html.encode(errors="replace"))  # JSON may hold half a surrogate pair
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; choose another place with --output") from None
    return output


def script_hash() -> str:
    """Of the page's only script: its Content-Security-Policy runs no other."""
    source = Path(template().filename).read_text(encoding="utf-8")
    script = source.partition("<script>")[2].partition("</script>")[0]
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def refresh(run: Path) -> None:
    """The report of a run as far as it has come, and a line on where it is, or why there is none. Raises nothing."""
    try:
        tqdm.write(f"report in {write([run])}")
    except (Exception, KeyboardInterrupt) as error:  # no report is worth a run
        tqdm.write(f"no report ({brief(error)}); to try again: python report.py {run}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Write an HTML page on a run, or on several side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that python pop.py has written")
    parser.add_argument("--output", type=Path, help="default: report.html in the run's folder; for several runs, here")
    args = parser.parse_args(argv)
    print(f"report in {write(args.runs, args.output)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
