"""How a model does on a benchmark, whether another does better, and how sure that is: the bootstrap over items.

A metric is an array `scores` (items, columns, 2) of numerators and weights: the mean over columns of sum(numerators) /
sum(weights), clipped to `clip` (low, high) if given. A plain mean is one column with weights 1; IFEval's accuracy over
instructions has (followed, instructions) of each prompt. An item without a score has NaN and is left out.

Intervals are Hesterberg's expanded percentile intervals (2015, What Teachers Should Know About the Bootstrap). Of 50
items or more they hold the truth in 93 to 97 of 100 simulated cases, of fewer less often if most score the same.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import norm, t

LEVEL = 0.95  # of every interval
FEWEST = 6  # five items all lie on one side of the truth by luck in 1 of 16 samples: no 95% can rest on that
RIDGE = 0.01  # on the slope of length: bounds it where length decides every item, and moves it by far less than chance
CELLS = 1_000_000  # resampled items in memory at a time

Clip = tuple[float, float] | None


@dataclass(frozen=True)
class Estimate:
    """A metric and its interval, None for fewer than two items. `n`: items with a score."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A metric of another model minus that of the base, over the `n` items with both scores.

    `p` of no difference is two-sided, None without an interval, and below 1 - LEVEL exactly where that excludes 0.
    """

    p: float | None


def interval(scores: np.ndarray, clip: Clip = None, *, seed: int = 0, resamples: int = 10_000) -> Estimate:
    """The metric of scores (items, columns, 2), NaN where they have no weight, and its interval over items."""
    scores = scores[scored(scores)]
    return bootstrap(lambda items: metric(scores, items, clip), len(scores), seed, resamples)[0]


def difference(
    base: np.ndarray, other: np.ndarray, clip: Clip = None, *, seed: int = 0, resamples: int = 10_000
) -> Difference:
    """metric(other) - metric(base), both (items, columns, 2) of the same items: a resample draws the same for both."""
    if base.shape != other.shape:
        raise ValueError(f"scores of shapes {base.shape} and {other.shape}: give the same items of both models")
    both = scored(base) & scored(other)
    base, other, n = base[both], other[both], int(both.sum())

    def change(items: np.ndarray) -> np.ndarray:
        found = metric(other, items, clip) - metric(base, items, clip)
        return np.round(found, 12)  # sums of fractions differ in their last digits, but a tie at 0 must be one

    found, values = bootstrap(change, n, seed, resamples)
    if found.low is None:
        return Difference(found.value, None, None, n, None)
    # p is 1 - level of the interval that would end at 0: bootstrap's expanded tail, solved for the level.
    tail = min(np.mean(values <= 0), np.mean(values >= 0), 0.5)
    p = 2 * t.sf(-norm.ppf(tail) / math.sqrt(n / (n - 1)), n - 1)
    return Difference(found.value, found.low, found.high, n, max(float(p), 1 / (resamples + 1)))


def sentence(d: Difference) -> str:
    """What a difference says in plain words, where higher is better."""
    if d.n < FEWEST or d.low is None or d.high is None or d.p is None:
        return "too few items to tell"
    p = f"p = {d.p:.2g}" if d.p >= 0.001 else "p < 0.001"
    details = f"{100 * LEVEL:g}% interval {d.low:+z.3f} to {d.high:+z.3f}, {p}, {d.n} items"
    if d.low <= 0 <= d.high:
        return f"no detectable change ({d.value:+z.3f}, {details})"
    return f"{'better' if d.low > 0 else 'worse'} by {abs(d.value):.3f} ({details})"


def length_controlled(
    wins: np.ndarray, lengths: np.ndarray, base_lengths: np.ndarray, *, seed: int = 0, resamples: int = 1_000
) -> Estimate:
    """The share of wins if the answers were as long as the base's. All (items,); wins in [0, 1], a tie is 0.5.

    As in AlpacaEval 2 (arXiv 2404.04475), a logistic model of the wins with an intercept and a slope on tanh(difference
    in length / its standard deviation), read off at equal lengths. Not comparable with its leaderboard: here no term
    says how hard an instruction is, no other model's answers are added, and a small ridge replaces an L1 penalty.
    """
    gaps = lengths - base_lengths
    known = ~np.isnan(wins + gaps)
    wins, gaps = wins[known], gaps[known]
    return bootstrap(lambda items: rate_at_equal_lengths(wins[items], gaps[items]), len(wins), seed, resamples)[0]


def scored(scores: np.ndarray) -> np.ndarray:
    return ~np.isnan(scores).any(axis=(1, 2))


def metric(scores: np.ndarray, items: np.ndarray, clip: Clip) -> np.ndarray:
    """Of the scored items of each resample, (resamples, items) -> (resamples,); NaN where a column has no weight."""
    numerators, weights = np.moveaxis(scores[items].sum(1), -1, 0)  # (resamples, columns) each
    ratios = np.divide(numerators, weights, out=np.full(weights.shape, np.nan), where=weights != 0)
    return ratios.mean(-1) if clip is None else np.clip(ratios.mean(-1), *clip)


def rate_at_equal_lengths(wins: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(resamples, items) each -> (resamples,): the fit of length_controlled, by Newton's method on all at once."""
    std = gaps.std(-1, keepdims=True)
    x = np.tanh(np.divide(gaps, std, out=np.zeros(gaps.shape), where=std > 0))  # all equal: the ridge keeps slope 0
    design = np.stack([np.ones_like(x), x], -1)  # (resamples, items, 2)
    ridge = np.diag([0, RIDGE])
    weights = np.zeros((len(wins), 2, 1))  # intercept, slope
    for _ in range(100):
        p = expit(design @ weights)  # (resamples, items, 1)
        gradient = design.mT @ (wins[..., None] - p) - ridge @ weights
        curvature = design.mT @ (p * (1 - p) * design) + ridge + 1e-9 * np.eye(2)  # where all are wins, it vanishes
        step = np.clip(np.linalg.solve(curvature, gradient), -2, 2)  # whole steps may overshoot
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    return expit(weights[:, 0, 0])


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int, resamples: int
) -> tuple[Estimate, np.ndarray]:
    """The statistic of n items with its interval, and its values on resamples, if it has an interval.

    statistic: indices of the items in each resample, (resamples, n) -> its values (resamples,).
    """
    center = float(statistic(np.arange(n)[None])[0]) + 0.0 if n else math.nan
    if n < 2 or math.isnan(center):
        return Estimate(center, None, None, n), np.array([])
    rng, batch = np.random.default_rng(seed), max(1, CELLS // n)
    sizes = [min(batch, resamples - done) for done in range(0, resamples, batch)]
    values = np.concatenate([statistic(rng.integers(n, size=(size, n))) for size in sizes])
    values = values[~np.isnan(values)] + 0.0  # no -0.0
    tail = norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.5 + LEVEL / 2, n - 1))  # below (1 - LEVEL) / 2 for few items
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")  # not interpolated, to agree with p
    return Estimate(center, float(low), float(high), n), values


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, ignoring None; None if there is nothing else."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def t_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its 95% interval by Student's t; None where there are too few values."""
    n = len(values)
    if n < 2:
        return {"mean": mean(values), "low": None, "high": None}
    center, half = statistics.fmean(values), float(t.ppf(0.5 + LEVEL / 2, n - 1)) * statistics.stdev(values) / n**0.5
    return {"mean": center, "low": center - half, "high": center + half}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
