"""One answer to each exercise of Chapter 4. Try yours first: `scalable check 4`."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, log2

import numpy as np


def halving_doubling(rank: int, workers: int, x: np.ndarray, send: Callable[[int, np.ndarray], None],
                     recv: Callable[[int], np.ndarray]) -> np.ndarray:
    """Rabenseifner's algorithm, with the fold for any number of workers."""
    x, core = x.copy(), 1 << (workers.bit_length() - 1)
    if rank >= core:  # folded in: hand over, wait for the result
        send(rank - core, x)
        return recv(rank - core)
    if rank + core < workers:
        x += recv(rank + core)

    bounds = np.linspace(0, len(x), core + 1).astype(int)  # rank r will own x[bounds[r]:bounds[r + 1]]
    low, high, distance = 0, core, core // 2
    while distance:
        middle = (low + high) // 2
        keep, give = ((middle, high), (low, middle)) if rank & distance else ((low, middle), (middle, high))
        send(rank ^ distance, x[bounds[give[0]]:bounds[give[1]]])
        x[bounds[keep[0]]:bounds[keep[1]]] += recv(rank ^ distance)
        (low, high), distance = keep, distance // 2
    distance = 1
    while distance < core:
        send(rank ^ distance, x[bounds[low]:bounds[high]])
        if rank & distance:
            x[bounds[low - distance]:bounds[low]] = recv(rank ^ distance)
            low -= distance
        else:
            x[bounds[high]:bounds[high + distance]] = recv(rank ^ distance)
            high += distance
        distance *= 2

    if rank + core < workers:
        send(rank + core, x)
    return x


def choose_algorithm(nbytes: float, workers: int, alpha: float, beta: float) -> str:
    """The five costs as (messages, buffers) on the critical path, and the smallest."""
    core = 1 << (workers.bit_length() - 1)
    fold, doublings = (2 if workers > core else 0), int(log2(core))
    costs = {
        "naive": (2 * (workers - 1), 2 * (workers - 1)),
        "tree": (2 * ceil(log2(workers)), 2 * ceil(log2(workers))),
        "ring": (2 * (workers - 1), 2 * (workers - 1) / workers),
        "recursive_doubling": (fold + doublings, fold + doublings),
        "halving_doubling": (fold + 2 * doublings, fold + 2 * (core - 1) / core),
    }
    return min(costs, key=lambda name: costs[name][0] * alpha + costs[name][1] * nbytes * beta)


def all_to_all_v(outgoing: Sequence[np.ndarray], transport) -> list[np.ndarray]:
    """Pairwise exchange: in step s send s places ahead while receiving from s places behind."""
    incoming = [np.empty(0)] * transport.size
    for step in range(transport.size):
        ahead, behind = (transport.rank + step) % transport.size, (transport.rank - step) % transport.size
        work = transport.isend(ahead, outgoing[ahead])
        incoming[behind] = transport.recv(behind)
        work.wait()
    return incoming


def schedule_buckets(layers: Sequence[tuple[float, float]], cap: float, alpha: float, beta: float) -> float:
    """One clock for the backward pass, one for the link."""
    clock = link_free = held = 0.0
    for index, (seconds, nbytes) in reversed(list(enumerate(layers))):
        clock += seconds
        held += nbytes
        if held >= cap or index == 0:
            link_free = max(clock, link_free) + alpha + beta * held
            held = 0.0
    return max(clock, link_free)
