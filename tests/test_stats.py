"""Statistics: intervals that hold the truth as often as they say, and differences that are told from chance."""

import math
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from scipy.special import expit

from engine import stats
from engine.stats import Difference, difference, interval, length_controlled, sentence


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def plain(values) -> np.ndarray:
    """Scores (items, 1, 2) whose metric is the mean of the values."""
    values = np.asarray(values, dtype=float)
    return np.stack([values, np.ones_like(values)], -1)[:, None]


def value(scores, clip=None) -> float:
    return interval(scores, clip, resamples=2).value


# ------------------------------------------------------------------------------------------ pairs with a known truth
# Both models share the difficulty p of each item, whose mean is 0.5; the other one's is moved towards 1.


def bounded(rng, n, effect):
    """Scores in [0, 1], and what the difference of their means is."""
    p = rng.beta(2, 2, n)
    base, other = (rng.beta(5 * q + 0.2, 5 * (1 - q) + 0.2) for q in (p, p + effect * (1 - p)))
    return plain(base), plain(other), effect * 0.5 * 5 / 5.4


def binary(rng, n, effect):
    p = rng.beta(2, 2, n)
    base, other = (rng.random(n) < q for q in (p, p + effect * (1 - p)))
    return plain(base), plain(other), effect * 0.5


def ratio(rng, n, effect):
    """1, 2 or 3 instructions in a prompt; each is followed with a chance of p (1 - their number / 10)."""
    count = rng.integers(1, 4, n)
    p = rng.beta(2, 2, n) * (1 - count / 10)
    base, other = (np.stack([rng.binomial(count, q), count], -1)[:, None] for q in (p, p + effect * (1 - p)))
    accuracy = sum(k * 0.5 * (1 - k / 10) for k in (1, 2, 3)) / sum((1, 2, 3))
    return base.astype(float), other.astype(float), effect * (1 - accuracy)


CASES = [(bounded, 16), (bounded, 200), (binary, 200), (ratio, 200)]


def differences(pairs, n, effect, simulations=400):
    rng = np.random.default_rng(0)
    for seed in range(simulations):
        base, other, truth = pairs(rng, n, effect)
        yield difference(base, other, seed=seed, resamples=500), truth


# ------------------------------------------------------------------------------------------------------- metrics


def test_a_plain_mean_has_weights_of_one():
    assert value(plain([0, 1, 1, 1])) == 0.75


def test_a_ratio_weighs_items_by_their_instructions():
    assert value(np.array([[[1, 1]], [[0, 3]]])) == 0.25  # and not the mean of 1 and 0


def test_columns_are_averaged():
    prompts = np.array([[[1, 1], [2, 2]], [[0, 1], [1, 2]]])  # strict accuracy: prompts 1/2, instructions 3/4
    assert value(prompts) == 0.625


def test_the_metric_is_clipped_and_not_its_items():
    assert value(plain([-0.5, -0.5, 0.4]), clip=(0, 1)) == 0
    assert value(plain([-0.5, 0.9, 0.8]), clip=(0, 1)) == pytest.approx(0.4)


def test_an_item_without_a_score_is_left_out():
    scores = np.array([[[1, 1], [2, 2]], [[np.nan, 1], [0, 2]], [[0, 1], [1, 2]]])
    assert value(scores) == 0.625
    assert interval(scores) == interval(scores[[0, 2]])


def test_a_pair_without_one_of_its_scores_is_left_out():
    base, other = plain([0, 1, np.nan, 0]), plain([1, np.nan, 1, 0])
    found = difference(base, other)
    assert (found.value, found.n) == (0.5, 2)


def test_without_items_there_is_no_value():
    nothing = plain([np.nan])
    assert math.isnan(value(nothing)) and math.isnan(interval(nothing).value)
    assert math.isnan(difference(nothing, nothing).value)


def test_one_item_has_a_value_and_no_interval():
    assert interval(plain([0.5])) == stats.Estimate(0.5, None, None, 1)
    assert difference(plain([0.5]), plain([0.75])) == Difference(0.25, None, None, 1, None)


def test_different_items_cannot_be_paired():
    with pytest.raises(ValueError, match="give the same items of both models"):
        difference(plain([0, 1]), plain([0, 1, 1]))


# ----------------------------------------------------------------------------------------------------- intervals


def test_of_many_normal_scores_it_is_students_interval():
    values = np.random.default_rng(0).normal(0.3, 1, 2_000)
    found = interval(plain(values), resamples=20_000)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, values.mean(), scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


@pytest.mark.parametrize("n", [16, 40])
def test_of_few_normal_scores_it_is_as_wide_as_students(n):
    rng, widths = np.random.default_rng(n), []
    for seed in range(50):
        values = rng.normal(size=n)
        found = interval(plain(values), seed=seed, resamples=2_000)
        low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
        widths.append((found.high - found.low) / (high - low))
    assert np.mean(widths) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("clip", [None, (0, 0.52)])
def test_it_is_scipys_percentile_interval_at_the_expanded_level(clip, monkeypatch):
    base, other, _ = ratio(np.random.default_rng(0), 300, 0.1)
    n = len(base)

    def change(b, b_weights, o, o_weights, axis):
        metrics = [x.sum(axis) / w.sum(axis) for x, w in ((b, b_weights), (o, o_weights))]
        return np.subtract(*reversed([m if clip is None else np.clip(m, *clip) for m in metrics]))

    columns = (base[:, 0, 0], base[:, 0, 1], other[:, 0, 0], other[:, 0, 1])
    level = 1 - 2 * scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.95, n - 1))
    kinds = dict(paired=True, vectorized=True, method="percentile", confidence_level=level)
    theirs = scipy.stats.bootstrap(columns, change, n_resamples=20_000, batch=1_000, rng=1, **kinds)
    low, high = theirs.confidence_interval
    monkeypatch.setattr(stats, "LEVEL", 0.9)
    found = difference(base, other, clip, resamples=20_000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03 * (high - low))


@pytest.mark.parametrize(("pairs", "n"), CASES)
def test_95_percent_intervals_hold_the_truth_in_95_of_100_cases(pairs, n):
    held = [d.low <= truth <= d.high for d, truth in differences(pairs, n, effect=0.1)]
    assert 0.93 < np.mean(held) < 0.97


def test_intervals_of_one_model_hold_the_truth_too(monkeypatch):
    monkeypatch.setattr(stats, "LEVEL", 0.8)
    rng, held = np.random.default_rng(0), []
    for seed in range(500):
        found = interval(binary(rng, 100, 0)[0], seed=seed, resamples=500)
        held.append(found.low <= 0.5 <= found.high)
    assert 0.77 < np.mean(held) < 0.83


def test_pairing_narrows_the_interval_of_correlated_scores():
    base, other, _ = bounded(np.random.default_rng(0), 200, 0.1)
    paired = difference(base, other)
    unpaired = difference(base, other[np.random.default_rng(1).permutation(200)])
    assert unpaired.value == pytest.approx(paired.value)
    r = np.corrcoef(base[:, 0, 0], other[:, 0, 0])[0, 1]
    narrower = (paired.high - paired.low) / (unpaired.high - unpaired.low)
    assert narrower == pytest.approx(math.sqrt(1 - r), abs=0.06) and narrower < 0.9


def test_batches_bound_the_memory_and_change_nothing(monkeypatch):
    scores = bounded(np.random.default_rng(0), 50, 0)[0]
    whole = interval(scores, resamples=999)
    monkeypatch.setattr(stats, "CELLS", 120)  # two resamples at a time
    batched = interval(scores, resamples=999)
    assert (batched.low, batched.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_a_seed_fixes_the_interval():
    scores = bounded(np.random.default_rng(0), 50, 0)[0]
    assert interval(scores, seed=3) == interval(scores, seed=3) != interval(scores, seed=4)


def test_resamples_without_weight_are_left_out():
    scores = np.array([[[0, 0]], [[0, 0]], [[0, 0]], [[1, 2]]], dtype=float)
    assert interval(scores) == stats.Estimate(0.5, 0.5, 0.5, 4)
    assert math.isnan(interval(scores[:3]).value)


# ------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("pairs", [bounded, binary, ratio])
def test_identical_models_show_no_change(pairs):
    scores = pairs(np.random.default_rng(0), 541, 0)[0]
    found = difference(scores, scores.copy())
    assert found == Difference(0.0, 0.0, 0.0, 541, 1.0)
    expected = "no detectable change (+0.000, 95% interval +0.000 to +0.000, p = 1, 541 items)"
    assert sentence(found) == expected


def test_sums_in_another_order_are_a_tie():
    base = np.random.default_rng(0).random((40, 3, 2))
    found = difference(base, base[:, ::-1])  # the same columns: the same metric, but for rounding
    assert (found.low, found.high, found.p) == (0, 0, 1)


@pytest.mark.parametrize(("pairs", "n"), CASES)
def test_models_that_do_not_differ_do_so_in_5_of_100_cases(pairs, n):
    assert 0.03 < np.mean([d.p < 0.05 for d, _ in differences(pairs, n, effect=0)]) < 0.07


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_p_is_below_the_level_exactly_where_the_interval_excludes_zero(level, monkeypatch):
    monkeypatch.setattr(stats, "LEVEL", level)
    rng, excluded = np.random.default_rng(0), []
    for seed in range(300):
        base, other, _ = (bounded, binary, ratio)[seed % 3](rng, int(rng.integers(2, 60)), rng.uniform(0, 0.5))
        found = difference(*((base, other) if seed % 2 else (other, base)), seed=seed, resamples=400)
        excluded.append(found.low > 0 or found.high < 0)
        assert excluded[-1] == (found.p < 1 - level)
    assert 60 < sum(excluded) < 240


def test_p_is_that_of_students_paired_test():
    rng = np.random.default_rng(0)
    for n in (12, 50, 400):
        base, change = rng.normal(size=n), scipy.stats.zscore(rng.normal(size=n)) + 2 / math.sqrt(n)
        expected = scipy.stats.ttest_rel(base + change, base).pvalue
        assert 0.04 < expected < 0.09
        assert difference(plain(base), plain(base + change), resamples=40_000).p == pytest.approx(expected, abs=0.01)


def test_p_does_not_claim_more_than_the_resamples_show():
    assert difference(plain([0.0] * 50), plain([1.0] * 50), resamples=999) == Difference(1, 1, 1, 50, 0.001)


def test_exchanging_the_models_turns_the_difference_round():
    base, other, _ = ratio(np.random.default_rng(0), 541, 0.1)
    there, back = difference(base, other), difference(other, base)
    assert (there.low, there.value, there.high, there.p) == pytest.approx((-back.high, -back.value, -back.low, back.p))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((0.041, 0.01, 0.072, 541, 0.008), "better by 0.041 (95% interval +0.010 to +0.072, p = 0.008, 541 items)"),
        ((-0.041, -0.072, -0.01, 80, 0.0001), "worse by 0.041 (95% interval -0.072 to -0.010, p < 0.001, 80 items)"),
        ((0.04, 0, 0.08, 9, 0.06), "no detectable change (+0.040, 95% interval +0.000 to +0.080, p = 0.06, 9 items)"),
        ((0.5, 0.4, 0.6, 5, 0.001), "too few items to tell"),
        ((0.5, None, None, 1, None), "too few items to tell"),
        ((math.nan, None, None, 0, None), "too few items to tell"),
        ((math.nan, None, None, 50, None), "too few items to tell"),
    ],
)
def test_a_difference_in_plain_words(found, said):
    assert sentence(Difference(*found)) == said


# ------------------------------------------------------------------------------------------- controlled for length


def judged(n, quality, liking, seed=0):
    """Wins, lengths and lengths of the base: the chance of a win is expit(quality + liking * tanh(gap / std))."""
    rng = np.random.default_rng(seed)
    lengths, base = rng.gamma(8, 200, n).round(), rng.gamma(8, 150, n).round()
    gaps = lengths - base
    return (rng.random(n) < expit(quality + liking * np.tanh(gaps / gaps.std()))).astype(float), lengths, base


def test_a_judge_that_likes_length_only_is_seen_through():
    wins, lengths, base = judged(4_000, quality=0, liking=3)
    found = length_controlled(wins, lengths, base, resamples=200)
    assert wins.mean() > 0.65
    assert found.value == pytest.approx(0.5, abs=0.03) and found.low < 0.5 < found.high


def test_a_judge_that_likes_quality_only_leaves_the_rate_as_it_is():
    wins, lengths, base = judged(4_000, quality=1, liking=0)
    found = length_controlled(wins, lengths, base, resamples=200)
    assert found.value == pytest.approx(wins.mean(), abs=0.015)
    assert found.low < expit(1) < found.high


def test_intervals_at_equal_lengths_hold_the_truth():
    held = []
    for seed in range(200):
        found = length_controlled(*judged(100, quality=0.5, liking=1.5, seed=seed), seed=seed, resamples=200)
        held.append(found.low <= expit(0.5) <= found.high)
    assert 0.92 < np.mean(held) < 0.98


@pytest.mark.parametrize("gap", [0, 120, 0.1])
def test_equal_gaps_give_the_rate_as_it_is(gap):
    wins = np.array([1, 0, 0.5, 1, 0.3, 1, 1, 0, 0.5, 1])
    lengths = np.full(10, 300.0)
    found = length_controlled(wins, lengths + gap, lengths, resamples=2_000)
    raw = interval(plain(wins), resamples=2_000)
    assert (found.value, found.low, found.high) == pytest.approx((raw.value, raw.low, raw.high), abs=1e-6)


@pytest.mark.parametrize("kind", ["whole wins", "shares", "decided by length", "nearly all"])
@pytest.mark.parametrize("n", [6, 60, 600])
def test_the_fit_is_that_of_the_likelihood_written_out(kind, n):
    wins, lengths, base = judged(n, quality=0.3, liking=1)
    gaps = lengths - base
    if kind == "shares":
        wins = (wins + np.random.default_rng(1).random(n)) / 2
    elif kind == "decided by length":
        wins = (gaps > np.median(gaps)).astype(float)
    elif kind == "nearly all":
        wins = (np.arange(n) != 1).astype(float)
    x = np.tanh(gaps / gaps.std())

    def loss(weights):
        p = expit(weights[0] + weights[1] * x)
        return -np.sum(wins * np.log(p) + (1 - wins) * np.log1p(-p)) + stats.RIDGE / 2 * weights[1] ** 2

    expected = expit(scipy.optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options=dict(xatol=1e-8)).x[0])
    assert length_controlled(wins, lengths, base, resamples=2).value == pytest.approx(expected, abs=1e-5)


def test_each_resample_is_fitted_like_a_sample_of_its_own():
    wins, lengths, base = judged(30, quality=0.3, liking=1)
    resamples = np.random.default_rng(0).integers(30, size=(20, 30))
    rates = stats.rate_at_equal_lengths(wins[resamples], (lengths - base)[resamples])
    for items, rate in zip(resamples, rates, strict=True):
        drawn = (a[items] for a in (wins, lengths, base))
        assert length_controlled(*drawn, resamples=2).value == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_wins_or_losses_alone_stay_finite(outcome):
    _, lengths, base = judged(50, quality=0, liking=0)
    found = length_controlled(np.full(50, outcome), lengths, base, resamples=200)
    assert (found.value, found.low, found.high) == pytest.approx((outcome,) * 3, abs=1e-8)


def test_items_without_a_judgement_or_a_length_are_left_out():
    wins, lengths, base = judged(20, quality=0, liking=1)
    expected = length_controlled(wins, lengths, base)
    holes = np.append(wins, [np.nan, 1.0, 1.0]), np.append(lengths, [9.0, np.nan, 9.0]), np.append(base, [9, 9, np.nan])
    assert length_controlled(*holes) == expected


def test_without_judgements_there_is_no_rate():
    found = length_controlled(np.array([np.nan]), np.array([5]), np.array([6]))
    assert math.isnan(found.value) and (found.low, found.high, found.n) == (None, None, 0)
