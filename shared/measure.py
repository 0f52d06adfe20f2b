"""Clocks, interleaved repeats, intervals, line fits and peak memory: how every number of the book is measured.

A timing is its samples, reported as the median with a bootstrap 95 % confidence interval. Two programs are compared by
running them in turn and taking the ratio of each pair (Georges, Buytaert & Eeckhout, 2007, on Java performance).
"""
from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
TIME_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTE_UNITS = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_largest_fleet = 0


@dataclass(frozen=True)
class _Sampled:
    """Samples in the order taken, their median and its 95 % interval by a seeded percentile bootstrap."""

    samples: tuple[float, ...]
    median: float = field(init=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("no samples: at least one repeat is needed")
        resampled = np.random.default_rng(0).choice(self.samples, size=(RESAMPLES, len(self.samples)))
        low, high = np.percentile(np.median(resampled, axis=1), (2.5, 97.5))
        for name, value in (("median", np.median(self.samples)), ("low", low), ("high", high)):
            object.__setattr__(self, name, float(value))

    @property
    def spread(self) -> float:
        """Interquartile range over the median, a fraction: 0.1 means that half the samples lie within about 10 %."""
        return float(np.subtract(*np.percentile(self.samples, (75, 25))) / self.median)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass(frozen=True)
class Timing(_Sampled):
    """Wall-clock seconds of repeated runs of one function."""

    def __str__(self) -> str:
        scale, unit = _unit(self.median, TIME_UNITS)
        return f"{_digits(self.median / scale)} {unit} [{_digits(self.low / scale)}, {_digits(self.high / scale)}]"


@dataclass(frozen=True)
class Ratio(_Sampled):
    """Quotients of paired samples, a_i / b_i: above 1 means that a took longer."""

    def __str__(self) -> str:
        return f"{_digits(self.median)}x [{_digits(self.low)}, {_digits(self.high)}]"


def timed(fn: Callable[[], object], repeats: int = 5, warmup: int = 1) -> Timing:
    """Seconds of `repeats` calls of `fn`, after `warmup` calls that do not count."""
    return interleave({"it": fn}, repeats, warmup)["it"]


def interleave(contenders: Mapping[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> dict[str, Timing]:
    """Time several functions in turn: each round calls each once, and every other round in reversed order.

    What drifts (clock, neighbours, caches) then hits all alike, and none always goes first. Sample i is from round i.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    for fn in list(contenders.values()) * warmup:
        fn()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats):
        for name in list(contenders)[:: -1 if i % 2 else 1]:
            begin = time.perf_counter()
            contenders[name]()
            samples[name].append(time.perf_counter() - begin)
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def ratio(a: Timing, b: Timing) -> Ratio:
    """The quotients a_i / b_i of samples taken in the same round of `interleave`."""
    return Ratio(tuple(x / y for x, y in zip(a.samples, b.samples, strict=True)))


@dataclass(frozen=True)
class Line:
    """y = slope * x + intercept, and the share `r2` of the (weighted) variance of y that it explains."""

    slope: float
    intercept: float
    r2: float

    def predict(self, x: ArrayLike) -> float | np.ndarray:
        return self.slope * np.asarray(x, dtype=float) + self.intercept


def fit_line(x: ArrayLike, y: ArrayLike, relative: bool = False) -> Line:
    """Least squares through points (x, y); `relative` minimises residuals as fractions of y: small times count too.

    ValueError unless x and y are finite, 1-D and equally long, two x distinct and, if `relative`, no y is 0.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or np.unique(x).size < 2 or not np.isfinite([x, y]).all():
        raise ValueError(f"a line needs finite, equally long x and y, two x distinct; got shapes {x.shape}, {y.shape}")
    if relative and not y.all():
        raise ValueError("a relative fit needs every y to differ from 0")
    weights = (np.abs(y).max() / y) ** 2 if relative else np.ones_like(y)
    x_mean, y_mean = np.average(x, weights=weights), np.average(y, weights=weights)
    slope = np.sum(weights * (x - x_mean) * (y - y_mean)) / np.sum(weights * (x - x_mean) ** 2)
    intercept = y_mean - slope * x_mean
    return Line(float(slope), float(intercept), _explained(y, slope * x + intercept, weights))


@dataclass(frozen=True)
class AlphaBeta:
    """Time of one message: `alpha` seconds of latency plus `beta` seconds for each byte (Hockney, 1994)."""

    alpha: float
    beta: float
    r2: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second, infinite when the time did not grow with the size."""
        return 1 / self.beta if self.beta else float("inf")

    def predict(self, nbytes: ArrayLike) -> float | np.ndarray:
        return self.alpha + self.beta * np.asarray(nbytes, dtype=float)


def fit_alpha_beta(nbytes: ArrayLike, seconds: ArrayLike) -> AlphaBeta:
    """Latency and inverse bandwidth of least relative error, both at least 0 however noisy the seconds."""
    line = fit_line(nbytes, seconds, relative=True)
    alpha, beta = line.intercept, line.slope
    x, y = np.array(nbytes, dtype=float), np.array(seconds, dtype=float)
    if alpha < 0:
        alpha, beta = 0.0, np.sum(x / y) / np.sum((x / y) ** 2)
    elif beta < 0:
        alpha, beta = np.sum(1 / y) / np.sum(1 / y**2), 0.0
    return AlphaBeta(float(alpha), float(beta), _explained(y, alpha + beta * x, 1 / y**2))


def _explained(y: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> float:
    """R2 against the best constant. A constant y (up to rounding) has nothing to explain: 1."""
    deviation = y - np.average(y, weights=weights)
    if np.abs(deviation).max() <= 1e-13 * np.abs(y).max():
        return 1.0
    return float(1 - np.sum(weights * (y - predicted) ** 2) / np.sum(weights * deviation**2))


def percentile(samples: ArrayLike, q: float) -> float:
    """The q-th percentile, 0 <= q <= 100, linear between order statistics. ValueError if there are no samples."""
    if not np.size(samples):
        raise ValueError("no samples: a percentile of nothing is undefined")
    return float(np.percentile(samples, q))


def human_seconds(seconds: float) -> str:
    """Three digits and a unit: 0.00342 -> "3.42 ms"."""
    scale, unit = _unit(seconds, TIME_UNITS)
    return f"{_digits(seconds / scale)} {unit}"


def human_bytes(nbytes: float) -> str:
    """Three digits and a binary unit: 4194304 -> "4.00 MiB"; whole bytes below 1 KiB."""
    scale, unit = _unit(nbytes, BYTE_UNITS)
    return f"{nbytes:.0f} B" if unit == "B" else f"{_digits(nbytes / scale)} {unit}"


def _unit(value: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    return next((unit for unit in units if abs(value) >= unit[0]), units[-1])


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 99.95 or not size else f"{value:.1f}" if size >= 9.995 else f"{value:.2f}"


def peak_memory() -> int:
    """Bytes: the most this process ever held, plus the largest total that a fleet it ran reported."""
    if sys.platform == "linux":  # where ru_maxrss starts at the size of the process that started this one
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024 + _largest_fleet
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + _largest_fleet


def note_fleet_memory(nbytes: int) -> None:
    """Called by shared.fleet with the sum of its workers' peaks, in bytes."""
    global _largest_fleet
    _largest_fleet = max(_largest_fleet, int(nbytes))
