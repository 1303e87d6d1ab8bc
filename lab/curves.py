"""The curves of one run or several, drawn by matplotlib as SVG with the colours and fonts of the page around it.

Here a run is its name and the records of its metrics.jsonl.
"""

import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metrics = Sequence[Mapping[str, Any]]


class Plot(NamedTuple):
    title: str
    svg: Markup
    legend: list[tuple[int, str]]  # number of a colour, name


CURVES = (  # the key in metrics.jsonl, the title, the vertical axis
    ("reward_mean", "Reward, ± spread within groups", "mean over answers"),
    ("heldout_reward", "Held-out reward", "mean over answers"),
    ("heldout_similarity", "Held-out similarity to references", "cosine"),
    ("completion_length", "Length of answers", "tokens"),
    ("zero_spread_share", "Groups without spread", "share of graded groups"),
    ("kl", "KL to the base model", "nats a token"),
    ("entropy", "Entropy", "nats a token"),
    ("grad_norm", "Gradient before clipping", "L2 norm"),
)
STACKS = (("drops", "Dropped groups", "groups a step"), ("seconds", "Time by phase", "seconds a step"))
MANY = 60  # beyond so many points a curve is smoothed; bars at most

# matplotlib draws in colours that stand for variables of the page, which knows light from dark: --c0 to --c7 ...
COLOURS = [f"#0000c{i}" for i in range(8)]
INK, FAINT = "#0000f0", "#0000f1"  # ... --dim and --line
STYLE: dict[Any, Any] = {
    **dict.fromkeys("text.color axes.labelcolor xtick.labelcolor ytick.labelcolor".split(), INK),
    **dict.fromkeys("axes.edgecolor grid.color xtick.color ytick.color".split(), FAINT),
    **dict.fromkeys("axes.spines.top axes.spines.right axes.formatter.useoffset".split(), False),
    **dict.fromkeys("axes.grid axes.axisbelow".split(), True),
    **{"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 8},  # text stays text, ids stay the same
}


def plots(runs: Mapping[str, Metrics]) -> list[Plot]:
    """All that have something to show: the curves of all runs on each other, then the stacks of each run."""
    drawn = [curve(runs, *labels) for labels in CURVES]
    for name, metrics in runs.items():
        of = f" of {name}" if len(runs) > 1 else ""
        drawn += [stack(metrics, key, title + of, unit) for key, title, unit in STACKS]
    return [plot for plot in drawn if plot]


def curve(runs: Mapping[str, Metrics], key: str, title: str, unit: str) -> Plot | None:
    """A line a run; where there are many points, these faintly and what they come to."""
    curves = [(i % len(COLOURS), metrics, points(metrics, key)) for i, metrics in enumerate(runs.values())]

    def draw(axes: "Axes") -> None:
        for i, metrics, values in curves:
            steps, means = [step for step, _ in values], [value for _, value in values]
            look: dict[str, Any] = dict(color=COLOURS[i], clip_on=False)  # a line along 0 keeps its lower half
            if len(values) > MANY:
                axes.plot(steps, means, linewidth=0.6, alpha=0.35, **look)
                axes.plot(steps, smoothed(means), linewidth=1.5, **look)
            else:
                axes.plot(steps, means, linewidth=1.3, marker="o", markersize=3, **look)
            spread = dict(points(metrics, "reward_spread")) if key == "reward_mean" else {}
            if spread:
                low, high = ([mean + sign * spread.get(step, 0.0) for step, mean in values] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color=COLOURS[i], alpha=0.12, linewidth=0)

    legend = [(i, name) for name, (i, _, values) in zip(runs, curves, strict=True) if values]
    steps = sorted(m["step"] for metrics in runs.values() for m in metrics)
    return Plot(title, svg_of(draw, unit, steps), legend if len(runs) > 1 else []) if legend else None


def stack(metrics: Metrics, key: str, title: str, unit: str) -> Plot | None:
    """Named numbers on top of each other in bars. Names for which there is no colour are one."""
    metrics = [m for m in metrics if m["step"] > 0]  # step 0: what was measured before the first
    starts, means = bars(metrics, key)
    summed = totals(metrics, key)
    names = [name for name, _ in summed.most_common(len(COLOURS) - 1)]
    layers = {name: [bar.get(name, 0.0) for bar in means] for name in summed if name in names}
    if len(summed) > len(names):
        layers["all else"] = [sum(v for name, v in bar.items() if name not in names) for bar in means]

    def draw(axes: "Axes") -> None:
        edges = [step - 0.5 for step in starts] + [metrics[-1]["step"] + 0.5]
        base = [0.0] * len(means)
        for i, layer in enumerate(layers.values()):
            top = [b + v for b, v in zip(base, layer, strict=True)]
            axes.stairs(top, edges, baseline=base, fill=True, color=COLOURS[i], linewidth=0)
            base = top

    return Plot(title, svg_of(draw, unit, [m["step"] for m in metrics]), list(enumerate(layers))) if layers else None


def svg_of(draw: Callable[["Axes"], None], unit: str, steps: Sequence[int]) -> Markup:
    """The SVG of one plot. Nothing that a run says is in it, so nothing in it needs escaping."""
    import matplotlib  # takes a second, which training should not wait for before there is a curve
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure, file = Figure(figsize=(4.4, 2.5), layout="constrained"), io.StringIO()
        axes = figure.add_subplot(xlabel="step", ylabel=unit)
        draw(axes)
        axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
        if axes.dataLim.y0 >= 0 > axes.get_ylim()[0]:  # a margin below 0 would suggest that there are such values
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue().partition("<svg")[2]
    svg = "<svg" + re.sub(r"(?s)<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg)  # would style the page
    svg = re.sub(r'(?s)<svg .*?(viewBox="[^"]*").*?>', r'<svg \1 role="img">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in all plots
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg).replace("xlink:href", "href")
    return Markup(re.sub(r"#0000c(\d)", r"var(--c\1)", svg).replace(INK, "var(--dim)").replace(FAINT, "var(--line)"))


# ------------------------------------------------------------------------------------------------------ numbers


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def points(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """(step, value) where there is one."""
    return [(m["step"], value) for m in metrics if (value := number(m.get(key))) is not None]


def totals(metrics: Metrics, key: str) -> Counter[str]:
    """The named numbers of all steps added up, in a fixed order for drops, in that of the phases for seconds."""
    summed: Counter[str] = Counter()
    for m in metrics:
        summed.update(m.get(key) or {})
    return Counter(dict(sorted(summed.items()))) if key == "drops" else summed


def bars(metrics: Metrics, key: str) -> tuple[list[int], list[dict[str, float]]]:
    """(first step, named numbers) of each bar: a step, or the mean of as many as it takes to have MANY bars at most."""
    width = max(1, math.ceil(len(metrics) / MANY))
    parts = [metrics[i : i + width] for i in range(0, len(metrics), width)]
    means = [{name: value / len(part) for name, value in totals(part, key).items()} for part in parts]
    return [part[0]["step"] for part in parts], means


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of what lies around each value, 4% of them all."""
    half = max(1, len(values) // 50)
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
