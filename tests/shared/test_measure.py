"""shared.measure against SciPy and NumPy, and against drifts that would fool a careless comparison."""
from __future__ import annotations

import math
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from shared import measure
from shared.measure import (
    Timing,
    fit_alpha_beta,
    fit_line,
    human_bytes,
    human_seconds,
    interleave,
    percentile,
    ratio,
    timed,
)

numbers = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 3))
positive = st.floats(1e-6, 1e6)
points = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30).filter(
    lambda pairs: np.ptp([x for x, _ in pairs]) > 1e-2
)


def test_timed_measures_a_known_wait():
    timing = timed(lambda: time.sleep(0.02), repeats=5, warmup=0)
    assert len(timing.samples) == 5
    assert 0.02 <= timing.median < 0.2
    assert min(timing.samples) <= timing.low <= timing.median <= timing.high <= max(timing.samples)


def test_warmup_calls_are_not_counted():
    pauses = iter([0.2, 0.0, 0.0, 0.0])
    assert timed(lambda: time.sleep(next(pauses)), repeats=3, warmup=1).median < 0.1
    assert next(pauses, "all used") == "all used"


def test_interleaving_alternates_and_reverses_every_other_round():
    calls: list[str] = []
    timings = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=2)
    assert "".join(calls) == "abcabc" + "abc" + "cba" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_samples_of_a_round_stay_paired_across_the_reversal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    rounds = {"a": iter([1.0, 2.0, 3.0]), "b": iter([10.0, 20.0, 30.0])}

    def work(name: str) -> None:
        clock[0] += next(rounds[name])

    timings = interleave({name: lambda name=name: work(name) for name in rounds}, repeats=3, warmup=0)
    assert timings["a"].samples == (1.0, 2.0, 3.0)
    assert ratio(timings["b"], timings["a"]).samples == (10.0, 10.0, 10.0)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (-1, 0), (3, -1)])
def test_a_senseless_number_of_repeats_is_refused(repeats, warmup):
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        timed(lambda: None, repeats=repeats, warmup=warmup)


def test_an_exception_in_a_contender_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        timed(lambda: 1 / 0)


def test_drift_fools_the_ratio_of_medians_but_not_the_ratio_of_pairs():
    """b takes 1.5 times as long as a in every round, while the machine slows down at an uneven pace.

    A comparison that first ran all of a and then all of b would see b take more than twice as long.
    """
    slowdown = np.array([1, 1.1, 1.3, 1.6, 2, 2.5, 3.1, 3.8, 4.6, 5.5])
    a, b = Timing(tuple(slowdown)), Timing(tuple(1.5 * slowdown))
    pairs = ratio(b, a)
    assert pairs.median == pytest.approx(1.5) and pairs.low == pytest.approx(1.5) and pairs.high == pytest.approx(1.5)

    block_a, block_b = Timing(tuple(slowdown[:5])), Timing(tuple(1.5 * slowdown[5:]))
    assert block_b.median / block_a.median > 2


def test_a_burst_that_hits_one_round_of_each_does_not_move_the_ratio_of_pairs():
    """Interference that moves each median by itself cancels in the pairs: half the rounds run 10 times slower."""
    a = Timing((1.0, 10.0, 1.0, 10.0, 1.0))
    b = Timing((2.0, 20.0, 20.0, 20.0, 2.0))  # one more slow round than a
    assert b.median / a.median == 20
    assert ratio(b, a).median == 2


def test_pairs_must_match():
    with pytest.raises(ValueError):
        ratio(Timing((1.0, 2.0)), Timing((1.0,)))


@pytest.mark.parametrize("size", [5, 20, 101])
def test_interval_agrees_with_scipy_bootstrap(size):
    samples = np.random.default_rng(size).lognormal(size=size)
    ours = Timing(tuple(samples))
    theirs = scipy.stats.bootstrap((samples,), np.median, method="percentile", n_resamples=5000, rng=1)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, rel=0.1)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, rel=0.1)


def test_interval_covers_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    timings = [Timing(tuple(rng.exponential(size=25))) for _ in range(200)]
    covered = np.mean([timing.low <= math.log(2) <= timing.high for timing in timings])
    assert 0.88 <= covered <= 1


@given(st.lists(positive, min_size=1, max_size=20))
def test_interval_is_repeatable_ordered_and_inside_the_samples(samples):
    timing = Timing(tuple(samples))
    assert timing == Timing(tuple(samples))
    assert min(samples) <= timing.low <= timing.high <= max(samples)
    assert timing.median == np.median(samples)


def test_one_sample_is_its_own_interval_and_none_is_an_error():
    only = Timing((0.5,))
    assert (only.low, only.median, only.high, only.spread) == (0.5, 0.5, 0.5, 0.0)
    with pytest.raises(ValueError, match="no samples"):
        Timing(())


def test_spread_is_the_interquartile_range_over_the_median():
    samples = (1.0, 2.0, 3.0, 4.0, 10.0)
    assert Timing(samples).spread == pytest.approx(scipy.stats.iqr(samples) / 3)


@given(points)
def test_line_agrees_with_linregress(pairs):
    x, y = np.array(pairs).T
    line, oracle = fit_line(x, y), scipy.stats.linregress(x, y)
    size = np.abs(y).max() + 1e-9
    assert line.predict(x) == pytest.approx(oracle.slope * x + oracle.intercept, abs=1e-6 * size)
    if np.ptp(y) > 1e-3:
        assert line.r2 == pytest.approx(oracle.rvalue**2, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0.5, 1e3)), min_size=3, max_size=30))
def test_relative_line_agrees_with_polyfit(pairs):
    x, y = np.array(pairs).T
    if np.ptp(x) < 1:
        return
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    assert fit_line(x, y, relative=True).predict(x) == pytest.approx(slope * x + intercept, rel=1e-6, abs=1e-6)


@given(points, st.floats(1e-3, 1e3), st.booleans())
def test_fits_follow_a_change_of_units(pairs, scale, relative):
    """Metres instead of feet: the slope scales, the quality of the fit does not."""
    x, y = np.array(pairs).T
    y = np.abs(y) + 1.0
    line, stretched, taller = (fit_line(*xy, relative=relative) for xy in ((x, y), (x * scale, y), (x, y * scale)))
    tolerance = dict(rel=1e-6, abs=1e-6 * y.max())
    assert stretched.predict(x * scale) == pytest.approx(line.predict(x), **tolerance)
    assert taller.predict(x) / scale == pytest.approx(line.predict(x), **tolerance)
    assert stretched.r2 == pytest.approx(line.r2, abs=1e-6) and taller.r2 == pytest.approx(line.r2, abs=1e-6)


def test_relative_fit_sees_the_small_values_that_an_absolute_fit_ignores():
    x = np.array([1.0, 10.0, 1e3, 1e6])
    y = 5e-5 + 1e-9 * x
    y[-1] *= 1.3
    assert fit_line(x, y, relative=True).intercept == pytest.approx(5e-5, rel=0.02)


def test_constant_values_are_fully_explained():
    for relative in (False, True):
        line = fit_line([1, 2, 3], [0.1, 0.1, 0.1], relative)
        assert (line.r2, line.slope, line.intercept) == (1.0, pytest.approx(0, abs=1e-15), pytest.approx(0.1))
    assert fit_line([1, 2, 3], [0, 0, 0]).r2 == 1.0


@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1, 2, 3]), ([1, 2], [1, math.nan]), ([[1, 2]], [[1, 2]])],
)
def test_points_that_define_no_line_are_refused(x, y):
    with pytest.raises(ValueError, match="a line needs"):
        fit_line(x, y)


def test_relative_fit_through_zero_is_refused():
    with pytest.raises(ValueError, match="every y"):
        fit_line([1, 2], [0, 1], relative=True)


@given(st.floats(1e-7, 1e-2), st.floats(1e-12, 1e-6))
def test_alpha_beta_recovers_a_planted_link(alpha, beta):
    nbytes = 4.0 ** np.arange(3, 13)
    fit = fit_alpha_beta(nbytes, alpha + beta * nbytes)
    assert fit.predict(nbytes) == pytest.approx(alpha + beta * nbytes, rel=1e-6)
    assert fit.r2 == pytest.approx(1, abs=1e-6)
    if beta * nbytes[-1] > 1e-2 * alpha:
        assert fit.bandwidth == pytest.approx(1 / beta, rel=1e-6)
    if alpha > 1e-2 * beta * nbytes[0]:
        assert fit.alpha == pytest.approx(alpha, rel=1e-6)


@given(st.lists(positive, min_size=3, max_size=12), st.randoms(use_true_random=False))
def test_alpha_beta_is_the_best_fit_without_negative_times(seconds, random):
    """Oracle: SciPy's non-negative least squares on the same relative residuals, however noisy the times."""
    nbytes = np.array([1e3 * i + random.uniform(0, 900) for i in range(len(seconds))])
    design = np.stack([1 / np.array(seconds), nbytes / seconds], axis=1)
    _, best = scipy.optimize.nnls(design, np.ones(len(seconds)))
    fit = fit_alpha_beta(nbytes, seconds)
    assert fit.alpha >= 0 and fit.beta >= 0
    assert np.linalg.norm(design @ [fit.alpha, fit.beta] - 1) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_time_that_does_not_grow_means_infinite_bandwidth():
    assert fit_alpha_beta([1, 10, 100], [3.0, 2.0, 1.0]).bandwidth == math.inf


@given(st.lists(numbers, min_size=1), st.floats(0, 100))
def test_percentile_is_bounded_and_monotone(samples, q):
    rounding = 1e-9 * (1 + max(map(abs, samples)))
    assert min(samples) - rounding <= percentile(samples, q) <= max(samples) + rounding
    assert percentile(samples, q / 2) <= percentile(samples, q) + rounding
    assert (percentile(samples, 0), percentile(samples, 100)) == (min(samples), max(samples))


def test_percentile_of_known_samples():
    assert percentile(range(101), 99) == 99
    assert percentile([1, 2], 50) == 1.5
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ns"), (3e-9, "3.00 ns"), (42e-6, "42.0 µs"), (0.00342, "3.42 ms"), (0.25, "250 ms"), (1, "1.00 s"),
     (59.4, "59.4 s"), (90, "1.50 min"), (7200, "2.00 h"), (-0.002, "-2.00 ms"), (math.nan, "nan ns")],
)
def test_seconds_for_people(seconds, text):
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1000, "1000 B"), (1024, "1.00 KiB"), (4 << 20, "4.00 MiB"), (1536 << 20, "1.50 GiB")],
)
def test_bytes_for_people(nbytes, text):
    assert human_bytes(nbytes) == text


def test_timings_and_ratios_print_median_and_interval():
    timing = Timing((0.0033, 0.0034, 0.0035))
    assert str(timing) == f"{timing}" == "3.40 ms [3.30, 3.50]"
    assert f"{timing:>30}" == str(timing).rjust(30)
    assert str(ratio(Timing((3.0, 3.0)), Timing((2.0, 2.0)))) == "1.50x [1.50, 1.50]"


def test_peak_memory_rises_with_an_allocation_and_adds_the_largest_fleet():
    """In a process of its own: what this one has held before would hide the rise."""
    script = """
import numpy as np
from shared import measure
before = measure.peak_memory()
ballast = np.ones(8 << 20)
print(before, measure.peak_memory())
del ballast
measure.note_fleet_memory(3 << 30)
measure.note_fleet_memory(1 << 30)
print(measure.peak_memory())
"""
    before, own, with_fleet = map(int, subprocess.check_output([sys.executable, "-c", script]).split())
    assert 10 << 20 < before < 1 << 30
    assert 60 << 20 <= own - before < 80 << 20
    assert with_fleet == pytest.approx(own + (3 << 30), abs=16 << 20)
