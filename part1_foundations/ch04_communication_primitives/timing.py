"""Timing of messages and collectives across ranks, as every section of the chapter does it."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from shared.fleet import launch
from shared.measure import AlphaBeta, Timing, fit_alpha_beta
from shared.transport import Fabric, Link


def timed(net, operation: Callable[[], object]) -> float:
    """Seconds of one collective `operation` on this rank, started together with all others."""
    net.barrier()
    begin = time.perf_counter()
    operation()
    return time.perf_counter() - begin


def slowest(per_rank: Sequence[Sequence[float]]) -> Timing:
    """Timing of a collective from its repeats on every rank, shape (K, repeats): the last rank ends it."""
    return Timing(tuple(np.max(np.asarray(per_rank), axis=0)))


def ping_pong(net, sizes: Sequence[int], repeats: int) -> list[float]:
    """Median one-way seconds of a message of each of `sizes` bytes between ranks 0 and 1 (half a round trip)."""
    medians = []
    for size in sizes:
        message = np.zeros(size, np.uint8)

        def round_trip() -> None:
            for turn in (0, 1):
                if net.rank == turn:
                    net.send(1 - turn, message)
                elif net.rank == 1 - turn:
                    net.recv(turn, message)

        medians.append(float(np.median([timed(net, round_trip) for _ in range(repeats + 1)][1:])) / 2)
    return medians


def fit_link(fabric: Fabric | Link | None, wire: str = "unix", repeats: int = 9,
             sizes: Sequence[int] = (8, 1 << 10, 16 << 10, 128 << 10, 512 << 10)) -> AlphaBeta:
    """alpha (seconds a message) and beta (seconds a byte) of a link, from a ping-pong between two processes."""
    seconds = launch(2, ping_pong, sizes, repeats, wire=wire, fabric=fabric)[0]
    return fit_alpha_beta(sizes, seconds)
