"""What each all-reduce costs: messages, bytes and alpha-beta seconds, for prediction beside measurement.

alpha is the seconds a message takes however small it is, beta the seconds a further byte takes. The formulas count the
critical path in rounds; they leave out the arithmetic of the reduction, which is cheap beside the links used here.

Source: Thakur, Rabenseifner & Gropp (2005), section 4; Section 4.4 of the book.
"""
from __future__ import annotations

from math import ceil, log2

from part1_foundations.ch04_communication_primitives.collectives import largest_power_of_two


def rounds_and_bytes(algorithm: str, workers: int, nbytes: float) -> tuple[int, float]:
    """(message latencies, bytes) on the critical path of one all-reduce of `nbytes` over `workers` ranks."""
    k, n = workers, nbytes
    if k == 1:
        return 0, 0.0
    core = largest_power_of_two(k)
    fold, log_core = (2 if k > core else 0), int(log2(core))
    match algorithm:
        case "naive":
            return 2 * (k - 1), 2 * (k - 1) * n
        case "tree":
            return 2 * ceil(log2(k)), 2 * ceil(log2(k)) * n
        case "ring":
            return 2 * (k - 1), 2 * (k - 1) * n / k
        case "recursive_doubling":
            return fold + log_core, (fold + log_core) * n
        case "halving_doubling":
            return fold + 2 * log_core, fold * n + 2 * n * (core - 1) / core
    raise ValueError(f"no cost formula for {algorithm!r}")


def seconds(algorithm: str, workers: int, nbytes: float, alpha: float, beta: float) -> float:
    """Predicted seconds of one all-reduce: alpha in seconds a message, beta in seconds a byte."""
    rounds, volume = rounds_and_bytes(algorithm, workers, nbytes)
    return rounds * alpha + volume * beta
