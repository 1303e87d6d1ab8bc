"""How a model does on a benchmark, whether another does better, and how sure that is: the bootstrap over items.

A metric is an array `scores` (items, columns, 2) of numerators and weights: the mean over columns of sum(numerators) /
sum(weights), clipped to `clip` (low, high) if given. A plain mean is one column with weights 1; IFEval's accuracy over
instructions has (followed, instructions) of each prompt. An item without a score has NaN and is left out.

A resample is how often it draws each item, so a metric is a function of counts (resamples, items), and its value that
of counts 1. An interval lies between two quantiles of the resampled values, further out than the nominal ones:
Hesterberg's expanded percentile interval (2015, What Teachers Should Know About the Bootstrap). A 95% interval of 50
items or more holds the truth in 93 to 97 of 100 simulated cases; of fewer it does so less often if most of them score
the same, and where all of them do it has no width.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import norm, t

FEWEST = 6  # five items all lie on one side of the truth by luck in 1 of 16 samples: no 95% can rest on that
RIDGE = 0.01  # on the slope of length: bounds it where length decides every item, and moves it by far less than chance
CELLS = 1_000_000  # counts in memory at a time

Clip = tuple[float, float] | None
Statistic = Callable[[np.ndarray], np.ndarray]  # counts (resamples, items) -> values (resamples,)


@dataclass(frozen=True)
class Estimate:
    """A metric and its interval, None for fewer than two items. `n`: items with a score."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A metric of another model minus that of the base, and the two-sided p of no difference; None as in Estimate.

    p < 1 - level exactly where the interval excludes 0. `n`: items with both scores.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    level: float = 0.95


def value(scores: np.ndarray, clip: Clip = None) -> float:
    """The metric of scores (items, columns, 2); NaN if there is no item, or a column without weight.

    >>> followed = np.array([[[1, 3]], [[2, 2]], [[np.nan, 1]]])  # of three prompts; the last has no answer
    >>> value(followed)
    0.6
    """
    scores = scores[scored(scores)]
    return float(metric(np.ones((1, len(scores))), scores, clip)[0])


def interval(
    scores: np.ndarray, clip: Clip = None, *, seed: int = 0, level: float = 0.95, resamples: int = 10_000
) -> Estimate:
    """The metric of scores (items, columns, 2) with its bootstrap interval over items."""
    scores = scores[scored(scores)]
    return bootstrap(lambda counts: metric(counts, scores, clip), len(scores), seed, level, resamples)[0]


def difference(
    base: np.ndarray,
    other: np.ndarray,
    clip: Clip = None,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 10_000,
) -> Difference:
    """metric(other) - metric(base), paired: both are (items, columns, 2) of the same items in the same order.

    Every resample draws the same items for both. p is the smaller share of resamples on one side of 0, ties included,
    as a share beyond the end of an interval: 1 - level of the interval that ends at 0.
    """
    if base.shape != other.shape:
        raise ValueError(f"scores of shapes {base.shape} and {other.shape}: give the same items of both models")
    both = scored(base) & scored(other)
    base, other, n = base[both], other[both], int(both.sum())

    def statistic(counts: np.ndarray) -> np.ndarray:
        change = metric(counts, other, clip) - metric(counts, base, clip)
        return np.round(change, 12)  # sums of fractions differ in their last digits, but a tie at 0 must be one

    found, values = bootstrap(statistic, n, seed, level, resamples)
    if found.low is None:
        return Difference(found.value, None, None, None, n, level)
    tail = min(np.mean(values <= 0), np.mean(values >= 0), 0.5)
    p = 2 * t.sf(-norm.ppf(tail) / math.sqrt(n / (n - 1)), n - 1)  # expanded_tail, solved for 1 - level
    return Difference(found.value, found.low, found.high, max(float(p), 1 / (resamples + 1)), n, level)


def sentence(d: Difference) -> str:
    """What a difference says in plain words, where higher is better.

    >>> sentence(Difference(0.012, -0.01, 0.034, 0.29, 541))
    'no detectable change (+0.012, 95% interval -0.010 to +0.034, p = 0.29, 541 items)'
    >>> sentence(Difference(-0.041, -0.07, -0.012, 0.0002, 541))
    'worse by 0.041 (95% interval -0.070 to -0.012, p < 0.001, 541 items)'
    """
    if d.n < FEWEST or d.low is None or d.high is None or d.p is None:
        return "too few items to tell"
    p = f"p = {d.p:.2g}" if d.p >= 0.001 else "p < 0.001"
    details = f"{100 * d.level:g}% interval {d.low:+z.3f} to {d.high:+z.3f}, {p}, {d.n} items"
    if d.low <= 0 <= d.high:
        return f"no detectable change ({d.value:+z.3f}, {details})"
    return f"{'better' if d.low > 0 else 'worse'} by {abs(d.value):.3f} ({details})"


def length_controlled(
    wins: np.ndarray,
    lengths: np.ndarray,
    base_lengths: np.ndarray,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1_000,
) -> Estimate:
    """The share of wins if the answers were as long as the base's. All (items,); wins in [0, 1], a tie is 0.5.

    In the manner of AlpacaEval 2 (arXiv 2404.04475): a logistic model of the wins with an intercept and a slope on
    tanh(difference in length / standard deviation of these), read off at equal lengths. Unlike there, no term says how
    hard each instruction is (many models' answers are needed to know), no answers of other models are added to the
    data, and a small ridge on the slope alone stands for an L1 penalty chosen by cross-validation; so the rate is not
    to be held against its leaderboard. The interval refits the model to each resample. If one side is always longer,
    by many standard deviations, the wins tell nothing of equal lengths, and the rate stays near the plain one.
    """
    gaps = lengths - base_lengths
    known = ~np.isnan(wins + gaps)
    wins, gaps = wins[known], gaps[known]
    return bootstrap(lambda counts: rate_at_equal_lengths(counts, wins, gaps), len(wins), seed, level, resamples)[0]


# ----------------------------------------------------------------------------------- of the items in each resample


def scored(scores: np.ndarray) -> np.ndarray:
    return ~np.isnan(scores).any(axis=(1, 2))


def metric(counts: np.ndarray, scores: np.ndarray, clip: Clip) -> np.ndarray:
    """(resamples,); NaN where a column has no weight."""
    sums = np.tensordot(counts, scores, 1)  # (resamples, columns, 2)
    numerators, weights = sums[..., 0], sums[..., 1]
    ratios = np.divide(numerators, weights, out=np.full_like(weights, np.nan), where=weights != 0)
    return ratios.mean(-1) if clip is None else np.clip(ratios.mean(-1), *clip)


def rate_at_equal_lengths(counts: np.ndarray, wins: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(resamples,): the fit of length_controlled, by Newton's method on all resamples at once."""
    n = max(1, len(gaps))
    mean = (counts @ gaps / n)[:, None]
    std = np.sqrt((counts * (gaps - mean) ** 2).sum(1, keepdims=True) / n)
    x = np.tanh(np.divide(gaps, std, out=np.zeros_like(counts), where=std > 0))  # all equal: the ridge keeps slope 0
    design = np.stack([np.ones_like(x), x], -1)  # (resamples, items, 2)
    ridge = np.diag([0, RIDGE])
    floor = 1e-9 * np.eye(2)  # under the curvature only: of wins alone, whose intercept grows for ever, nothing is left
    weights = np.zeros((len(counts), 2, 1))  # intercept, slope
    for _ in range(100):
        p = expit(design @ weights)  # (resamples, items, 1)
        gradient = design.mT @ (counts[..., None] * (wins[:, None] - p)) - ridge @ weights
        curvature = design.mT @ (counts[..., None] * p * (1 - p) * design) + ridge + floor
        before = weights
        weights = before + np.clip(np.linalg.solve(curvature, gradient), -2, 2)  # whole steps may overshoot
        if np.abs(weights - before).max() < 1e-9:
            break
    return expit(weights[:, 0, 0])


# ---------------------------------------------------------------------------------------------------- the bootstrap


def bootstrap(statistic: Statistic, n: int, seed: int, level: float, resamples: int) -> tuple[Estimate, np.ndarray]:
    """The statistic of n items with its interval, and its values on resamples, where it has one."""
    center = float(statistic(np.ones((1, n)))[0]) + 0.0 if n else math.nan
    if n < 2 or math.isnan(center):
        return Estimate(center, None, None, n), np.array([])
    rng = np.random.default_rng(seed)
    batch = max(1, CELLS // n)
    values = np.concatenate(
        [statistic(draw(n, min(batch, resamples - done), rng)) for done in range(0, resamples, batch)]
    )
    values = values[~np.isnan(values)] + 0.0  # no -0.0
    tail = expanded_tail(n, level)
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")  # not interpolated, to agree with p
    return Estimate(center, float(low), float(high), n), values


def draw(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, n): how often each of n items is drawn in n draws with replacement."""
    items = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(items.ravel(), minlength=resamples * n).reshape(resamples, n).astype(float)


def expanded_tail(n: int, level: float) -> float:
    """The share of resamples beyond each end of the interval: (1 - level) / 2 or less, the fewer items the less."""
    return float(norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf(0.5 + level / 2, n - 1)))


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that there are."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def t_interval(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and its 95% interval (Student's t); None where there are too few values."""
    n = len(values)
    if n < 2:
        return {"mean": mean(values), "low": None, "high": None}
    from scipy.special import stdtrit  # scipy.stats, which has it as t.ppf, takes a second to import

    t = float(stdtrit(n - 1, 0.975))
    center, half = statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)
    return {"mean": center, "low": center - half, "high": center + half}


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
