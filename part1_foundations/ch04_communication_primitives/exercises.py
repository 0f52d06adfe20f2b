"""Exercises of Chapter 4. Replace each `raise NotImplementedError`, then run `scalable check 4`.

The graders run your functions on real processes, count what they send, and try more inputs than the docstrings name.
`solutions.py` holds one answer to each, `scalable check 4 --solutions` grades it.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def halving_doubling(rank: int, workers: int, x: np.ndarray, send: Callable[[int, np.ndarray], None],
                     recv: Callable[[int], np.ndarray]) -> np.ndarray:
    """The sum of `x` (one-dimensional, as long on every rank) over all `workers` ranks, on every rank (Section 4.4).

    First halve: with partners at distance workers/2, workers/4, ..., 1 exchange the half of your current range that you
    give up for the half that you keep, and add. Then double: with the same partners in reverse, exchange the ranges.
    `send(rank, array)` never blocks; `recv(rank)` returns the next array from that rank.

    Graded: the sum for workers = 2, 4, 8, 16 and lengths that workers does not divide; 2 log2(workers) messages and at
    most 2 (workers-1)/workers of the buffer sent by each rank, each step rounded up to whole elements. Then, as a grade
    of its own, workers = 3, 5, 6: fold the ranks beyond the largest power of two into partners, return the result.
    """
    raise NotImplementedError


def choose_algorithm(nbytes: float, workers: int, alpha: float, beta: float) -> str:
    """The all-reduce with the least alpha-beta time: naive, tree, ring, recursive_doubling or halving_doubling.

    alpha: seconds a message. beta: seconds a byte. Write the five costs down yourself (Section 4.4), for any `workers`
    of at least 2. Graded: 1000 random cells against the cost table; a tie may go either way.
    """
    raise NotImplementedError


def all_to_all_v(outgoing: Sequence[np.ndarray], transport) -> list[np.ndarray]:
    """Deliver `outgoing[d]` to rank d; return by source rank what came to this one (Section 4.6). Sizes may be 0.

    `transport` has rank, size, send, isend, recv. Graded: random ragged sizes (every element must arrive exactly once
    and at the right place), and sockets of 4 KB, on which sending everything before receiving anything hangs.
    """
    raise NotImplementedError


def schedule_buckets(layers: Sequence[tuple[float, float]], cap: float, alpha: float, beta: float) -> float:
    """Seconds of one backward pass whose gradients are all-reduced in buckets while it runs (Section 4.10).

    layers: (backward seconds, gradient bytes) from the first layer to the last; the backward pass visits them from the
    last to the first. A layer joins the open bucket when its backward is done; the bucket closes once it holds `cap`
    bytes or more, or with the first layer. Closed buckets are all-reduced one after another, each in
    alpha + beta * bytes seconds. The step ends when the backward pass and the last all-reduce have ended.

    Graded: 200 random models against an event simulation, and that a slower link never shortens the step.
    """
    raise NotImplementedError
