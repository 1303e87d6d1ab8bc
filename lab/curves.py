"""The curves of one run or several as SVG, drawn by matplotlib in the colours and fonts of the page around them."""

import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

Metrics = Sequence[Mapping[str, Any]]  # the records of metrics.jsonl

CURVES = (  # the key in metrics.jsonl, the title, the vertical axis
    ("reward_mean", "Reward, ± spread within groups", "mean over answers"),
    ("grade_mean", "Grade before guards, ± spread within groups", "mean over answers"),
    ("heldout_reward", "Held-out reward", "mean over answers"),
    ("heldout_similarity", "Held-out similarity to references", "cosine"),
    ("heldout_reference_logp", "Held-out log-probability of references", "nats a token"),
    ("completion_length", "Length of answers", "tokens"),
    ("zero_spread_share", "Groups without spread", "share of graded groups"),
    ("kl", "KL to the base model", "nats a token"),
    ("entropy", "Entropy", "nats a token"),
    ("grad_norm", "Gradient before clipping", "L2 norm"),
)
SPREADS = {"reward_mean": "reward_spread", "grade_mean": "grade_spread"}  # drawn as a band around the curve
MANY = 60  # beyond so many points a curve is smoothed

# Colours stand for CSS variables of the page, which alone knows whether it is light or dark.
COLOURS = [f"#0000c{i}" for i in range(8)]
VARIABLES = {**{c: f"var(--c{i})" for i, c in enumerate(COLOURS)}, "#000000": "var(--dim)", "#b0b0b0": "var(--line)"}
STYLE: dict[Any, Any] = {
    **dict.fromkeys("axes.spines.top axes.spines.right axes.formatter.useoffset".split(), False),
    **{"axes.grid": True, "font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "report"},  # text stays text
}


def plots(runs: Sequence[Metrics]) -> dict[str, Markup]:
    """title -> SVG for each number that a run has, with the curves of all runs on each other."""
    return {title: svg_of(runs, key, unit) for key, title, unit in CURVES if any(points(run, key) for run in runs)}


def svg_of(runs: Sequence[Metrics], key: str, unit: str) -> Markup:
    """The SVG of one plot. No text of a run is in it, so nothing in it needs escaping."""
    import matplotlib  # takes a second, which training should not wait for before there is a curve
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure, file = Figure(figsize=(4.4, 2.5), layout="constrained"), io.StringIO()
        axes = figure.add_subplot(xlabel="step", ylabel=unit)
        for i, metrics in enumerate(runs):
            draw(axes, metrics, key, COLOURS[i % len(COLOURS)])
        axes.locator_params("x", nbins=6, integer=True)
        figure.savefig(file, format="svg", transparent=True)
    svg = "<svg" + file.getvalue().partition("<svg")[2]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg)  # would style the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same ids in all plots
    return Markup(re.sub("|".join(VARIABLES), lambda colour: VARIABLES[colour[0]], svg))


def draw(axes: Any, metrics: Metrics, key: str, colour: str) -> None:
    """The curve of one run: its points or, where they are many, these faintly and their running mean."""
    values = points(metrics, key)
    steps, means = [step for step, _ in values], [value for _, value in values]
    look: dict[str, Any] = dict(color=colour, clip_on=False)  # a line along 0 keeps its lower half
    if len(values) > MANY:
        axes.plot(steps, means, linewidth=0.6, alpha=0.35, **look)
        axes.plot(steps, smoothed(means), linewidth=1.5, **look)
    else:
        axes.plot(steps, means, linewidth=1.3, marker="o", markersize=3, **look)
    if key in SPREADS:
        spread = dict(points(metrics, SPREADS[key]))
        low, high = ([mean + sign * spread.get(step, 0.0) for step, mean in values] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)


def number(value: Any) -> float | None:
    """The value if it is a finite number."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def points(metrics: Metrics, key: str) -> list[tuple[int, float]]:
    """(step, value) where there is one."""
    return [(m["step"], value) for m in metrics if (value := number(m.get(key))) is not None]


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a window around each value, 4% of all values wide."""
    half = max(1, len(values) // 50)
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
