"""Problems, optimizers and the ways to run them on many workers: the library of Chapter 10.

A `Problem` is an average of losses over examples. An optimizer turns a gradient into a change of the weights. A driver
such as `sync_sgd` decides which gradients, how fresh and how exact, reach the optimizer, and returns a `Trace`, so that
drivers can be compared by steps, rounds, bytes and seconds. K is the number of workers, d the number of weights.

Sources: Robbins & Monro (1951); Kingma & Ba (2015), Adam; Chen et al. (2016), Revisiting Distributed Synchronous SGD.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import ring
from shared.data import linear
from shared.errors import PeerLost, TransportError
from shared.fleet import paced

# --- problems ---------------------------------------------------------------------------------------------------------


class Problem(Protocol):
    """An average of losses over examples. `rows` are the numbers of some examples (None: all of them)."""

    examples: int

    def loss(self, weights: np.ndarray, rows: np.ndarray | None = None) -> float:
        """Mean loss over `rows`."""

    def gradient(self, weights: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Gradient (d,) of the mean loss over `rows`; zero over no rows."""


@dataclass(frozen=True)
class LeastSquares:
    """Mean of (x_i w - y_i)^2 / 2 over the rows of `x` (N, d) and `y` (N,)."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def planted(cls, examples: int, features: int, noise: float, seed: int) -> LeastSquares:
        return cls(*linear(examples, features, noise, seed)[:2])

    @property
    def examples(self) -> int:
        return len(self.y)

    def loss(self, weights: np.ndarray, rows: np.ndarray | None = None) -> float:
        x, y = self._of(rows)
        return float(np.mean((x @ weights - y) ** 2) / 2)

    def gradient(self, weights: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        x, y = self._of(rows)
        return x.T @ (x @ weights - y) / max(1, len(y))

    def _of(self, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return (self.x, self.y) if rows is None else (self.x[rows], self.y[rows])


def epoch_batches(examples: int, size: int, steps: int, seed: int, drop_last: bool = False) -> list[np.ndarray]:
    """Row numbers of each step's global batch: every epoch a new order, cut into batches of `size`.

    The last batch of an epoch is short unless `size` divides `examples`; `drop_last` leaves it out.
    """
    if drop_last and size > examples:
        raise ValueError(f"{examples} examples fill no batch of {size}")
    rng, batches = np.random.default_rng(seed), []
    while len(batches) < steps:
        order = rng.permutation(examples)
        whole = examples // size * size if drop_last else examples
        batches += [order[start:start + size] for start in range(0, whole, size)]
    return batches[:steps]


# --- optimizers: each changes `weights` in place and keeps its own state ----------------------------------------------


class Sgd:
    """Plain steps against the gradient; with `momentum`, against its running sum (heavy ball)."""

    def __init__(self, rate: float, momentum: float = 0.0) -> None:
        self.rate, self.momentum, self.velocity = rate, momentum, 0.0

    def step(self, weights: np.ndarray, gradient: np.ndarray) -> None:
        self.velocity = self.momentum * self.velocity + gradient
        weights -= self.rate * self.velocity


class Adam:
    """Kingma & Ba's Algorithm 1."""

    def __init__(self, rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.t, self.m, self.v = 0, 0.0, 0.0

    def step(self, weights: np.ndarray, gradient: np.ndarray) -> None:
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * gradient
        self.v = self.b2 * self.v + (1 - self.b2) * gradient**2
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        weights -= self.rate * m / (np.sqrt(v) + self.eps)


# --- drivers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """What one worker saw of a training run."""

    weights: np.ndarray  # (steps, d): after each step
    loss: np.ndarray  # (steps,): over all examples, with these weights
    seconds: np.ndarray  # (steps,): whole steps
    computing: np.ndarray  # (steps,): from a step's start to this worker's own gradient
    used: np.ndarray  # (steps,): gradients that entered the average
    rounds: int  # all-reduces
    bytes: int  # sent by this worker

    @property
    def steps(self) -> int:
        return len(self.weights)


def sgd(problem: Problem, optimizer: Sgd | Adam, weights: np.ndarray, batches: Sequence[np.ndarray]) -> np.ndarray:
    """One process, whole batches: the path (steps, d) that synchronous workers must trace."""
    path, weights = [], weights.copy()
    for rows in batches:
        optimizer.step(weights, problem.gradient(weights, rows))
        path.append(weights.copy())
    return np.array(path)


def size_weighted(net, gradient: np.ndarray, rows: int) -> np.ndarray:
    """Mean gradient of the union of everyone's rows: sums of row gradients over the number of rows, one all-reduce."""
    total = ring(net, np.append(gradient * rows, rows))
    return total[:-1] / total[-1]


def mean_of_means(net, gradient: np.ndarray, rows: int) -> np.ndarray:
    """What averaging over workers gives: the gradient of the union only if all have equally many rows."""
    return ring(net, gradient.copy()) / net.size


def sync_sgd(net, problem: Problem, optimizer: Sgd | Adam, weights: np.ndarray, batches: Sequence[np.ndarray],
             rows: int, pace: np.ndarray | None = None, backups: int = 0,
             average: Callable[..., np.ndarray] = size_weighted) -> Trace:
    """Synchronous data-parallel SGD on the worker `net`: everyone's gradient, one all-reduce, the same step everywhere.

    batches: row numbers of each step's global batch, of which this worker takes its `rows` (fewer, or none, of a short
    one). pace: seconds that each of this worker's gradients takes (its real arithmetic runs within).
    backups: gradients that a step does not wait for. The slowest workers give up and contribute zero rows, so that the
    weighted average is over the others; with backups, every global batch must be full.
    """
    weights, path, used = weights.copy(), [], []
    clock = np.empty((2, len(batches)))  # seconds of whole steps, and of this worker's gradients
    before = net.stats().sent_to().bytes
    for step, batch in enumerate(batches):
        begin = time.monotonic()
        mine = batch[net.rank * rows:(net.rank + 1) * rows]
        duration = pace[step] if pace is not None else 0.0
        with paced(0.0 if backups else duration):
            gradient = problem.gradient(weights, mine)
        chosen = np.ones(net.size, bool)
        if backups:
            chosen = first_finished(net, step, begin + duration, net.size - backups)
        clock[1, step] = time.monotonic() - begin
        optimizer.step(weights, average(net, gradient, len(mine) * chosen[net.rank]))
        clock[0, step] = time.monotonic() - begin
        path.append(weights.copy())
        used.append(int(chosen.sum()))
    sent = net.stats().sent_to().bytes - before
    losses = np.array([problem.loss(w) for w in path])
    return Trace(np.array(path), losses, *clock, np.array(used), len(batches), sent)


READY, GO = 1, 2  # tags: a worker has its gradient; rank 0 says whose gradients count
GLANCE = 2e-4  # seconds between two looks of rank 0 at its mail


def first_finished(net, step: int, deadline: float, wanted: int) -> np.ndarray:
    """Whose gradients count in this step, (K,) bool, the same on every rank: the first `wanted` that are ready.

    This rank is ready at `deadline` (monotonic clock) and then reports to rank 0, who works too and referees. Once
    enough are ready, rank 0 tells everyone, and whoever still computes stops waiting for its own gradient.
    """
    if net.rank:
        try:
            return net.recv(0, tag=GO, timeout=max(0.0, deadline - time.monotonic()))
        except TransportError:  # nobody interrupted: the gradient is ready
            net.send(0, np.array(step), tag=READY)
            return net.recv(0, tag=GO)
    ready = np.zeros(net.size, bool)
    while ready.sum() < wanted:
        for rank in np.flatnonzero(~ready):
            done = time.monotonic() >= deadline if rank == 0 else reported(net, rank, step)
            ready[rank] = done and ready.sum() < wanted
        time.sleep(GLANCE)
    for rank in range(1, net.size):
        net.send(rank, ready, tag=GO)
    return ready


def reported(net, rank: int, step: int) -> bool:
    """Whether `rank` says that it is ready in this step. Its report of an earlier step may have come too late."""
    try:
        return int(net.recv(rank, tag=READY, timeout=0.0)) == step
    except PeerLost:
        raise
    except TransportError:  # no message yet
        return False
