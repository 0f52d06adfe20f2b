"""What the workers of test_ch04_collectives.py run: lists of cases in one fleet, and broken variants of algorithms."""
from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np

from part1_foundations.ch04_communication_primitives import collectives as c
from part1_foundations.ch04_communication_primitives.collectives import Group
from shared.transport import Transport


class Case(NamedTuple):
    """One collective on one set of buffers, made of the bytes `values` or, without them, drawn by `seed`."""

    what: str
    algo: str
    shape: tuple[int, ...]
    dtype: str
    op: str = "sum"
    root: int = 0
    seed: int = 0
    node_of: tuple[int, ...] | None = None
    values: bytes | None = None


class Outcome(NamedTuple):
    result: Any
    returned_x: bool
    messages: int
    nbytes: int
    received: int
    across: int  # bytes sent to ranks of other nodes
    digest: bytes | None  # of the result, where all ranks must have the same: only rank 0 returns it itself


@functools.lru_cache(maxsize=2)
def inputs(case: Case, size: int) -> list[np.ndarray]:
    """Every rank's buffer: all bit patterns for whole numbers, four orders of magnitude for the others."""
    dtype, rng = np.dtype(case.dtype), np.random.default_rng([case.seed, size])
    count = size * int(np.prod(case.shape, dtype=int))
    if case.values is not None:
        raw = np.resize(np.frombuffer(case.values or b"\0", np.uint8), count * dtype.itemsize)
        whole = (raw[:count] % 2).astype(bool) if dtype.kind == "b" else raw.view(dtype)
    elif dtype.kind in "biu":
        raw = rng.integers(0, 256, count * dtype.itemsize, np.uint8)
        whole = raw % 2 == 1 if dtype.kind == "b" else raw.view(dtype)
    else:
        whole = (rng.standard_normal(count) * 10.0 ** rng.integers(-2, 3, count)).astype(dtype)
        if dtype.kind == "c":
            whole += 1j * rng.standard_normal(count).astype(whole.real.dtype)
    return [np.asarray(part) for part in whole.reshape(size, *case.shape)]


def pieces(case: Case, size: int, rank: int) -> list[np.ndarray]:
    """Arrays of different shapes, some empty, one for each destination."""
    rng = np.random.default_rng([case.seed, size, rank])
    return [rng.integers(0, 99, (int(rng.integers(0, 4)), *case.shape)).astype(case.dtype) for _ in range(size)]


def carry_out(net: Transport, case: Case) -> tuple[Any, bool]:
    """(what this rank has in the end, whether the algorithm returned the very buffer that it was given)."""
    world, x = Group(net), inputs(case, net.size)[net.rank].copy()
    given = x
    match case.what:
        case "all_reduce":
            back = world.all_reduce(x, case.algo, case.op, node_of=case.node_of)
        case "broken":
            back = BROKEN[case.algo](net, x)
        case "reduce":
            world.reduce(x, case.root, case.op)
            return (x if net.rank == case.root else None), True
        case "broadcast":
            back = world.broadcast(x, case.root, case.algo)
        case "reduce_scatter":
            mine = world.reduce_scatter(x, case.op)
            return mine.copy(), mine.size == 0 or np.shares_memory(mine, given)
        case "all_gather":
            return (BROKEN[case.algo](net, x) if case.algo in BROKEN else world.all_gather(x, case.algo)), True
        case "all_to_all":
            return world.all_to_all(pieces(case, net.size, net.rank)), True
        case "gather":
            return world.gather(pieces(case, net.size, net.rank)[0], case.root), True
        case "scatter":
            sent = pieces(case, net.size, case.root) if net.rank == case.root else None
            return world.scatter(sent, case.root), True
    return back, back is given


def run(net: Transport, cases: list[Case]) -> list[Outcome]:
    outcomes = []
    for case in cases:
        net.barrier()
        net.reset_stats()
        result, returned_x = carry_out(net, case)
        stats = net.stats()
        here = case.node_of or [0] * net.size
        across = sum(stats.sent_to(peer).bytes for peer in range(net.size) if here[peer] != here[net.rank])
        digest = hashlib.sha256(result).digest() if case.what in ("all_reduce", "broken") else None
        outcomes.append(Outcome(result if net.rank == 0 or not digest else None, returned_x, stats.sent_to().messages,
                                stats.sent_to().bytes, stats.received_from().messages, across, digest))
    return outcomes


# --- variants that are wrong (law 4) ----------------------------------------------------------------------------------


def short_ring(net: Transport, x: np.ndarray) -> np.ndarray:
    """A ring all-reduce whose reduce-scatter is one step short."""
    parts, right, left = c.chunks(x, net.size), (net.rank + 1) % net.size, (net.rank - 1) % net.size
    for step in range(net.size - 2):
        work = net.isend(right, parts[(net.rank - step - 1) % net.size])
        net.recv(left, parts[(net.rank - step - 2) % net.size], reduce=np.add)
        work.wait()
    return c.ring_all_gather(net, x)


def forgetful_tree(net: Transport, x: np.ndarray) -> np.ndarray:
    """A tree all-reduce whose root hears its first child and does not add what it says."""
    distance = 1
    while distance < net.size:
        if net.rank & distance:
            net.send(net.rank - distance, x)
            break
        if net.rank + distance < net.size:
            skipped = net.rank == 0 and distance == 1
            net.recv(net.rank + distance, x.copy() if skipped else x, reduce=np.add)
        distance *= 2
    return c.broadcast_binomial(net, x)


def wrong_roll(net: Transport, mine: np.ndarray) -> np.ndarray:
    """Bruck's all-gather turned the wrong way at the end."""
    return np.roll(c.bruck_all_gather(net, mine), -2 * net.rank, axis=0)


def chatty_ring(net: Transport, x: np.ndarray) -> np.ndarray:
    """Right, but the whole buffer goes around instead of one chunk of it."""
    total, passing = x.copy(), x.copy()
    for _ in range(net.size - 1):
        work = net.isend((net.rank + 1) % net.size, passing)
        arrived = net.recv((net.rank - 1) % net.size)
        work.wait()
        total, passing = total + arrived, arrived
    x[...] = total
    return x


def own_order(net: Transport, x: np.ndarray) -> np.ndarray:
    """Everyone adds up everything in its own order: ranks differ in the last bits."""
    gathered = Group(net).all_gather(x)
    x[...] = functools.reduce(np.add, [gathered[(net.rank + i) % net.size] for i in range(net.size)])
    return x


BROKEN = {broken.__name__: broken for broken in (short_ring, forgetful_tree, wrong_roll, chatty_ring, own_order)}


# --- groups, errors, progress -----------------------------------------------------------------------------------------


def two_groups(net: Transport, members: list[list[int]]) -> tuple[list, dict[int, int], tuple[int, int]] | None:
    """Disjoint groups work at the same time; those in neither look on. (results, bytes by peer, place in the group)"""
    mine = next((ranks for ranks in members if net.rank in ranks), None)
    results, place = [], (-1, 0)
    if mine:
        group = Group(net, mine)
        for algo in c.ALL_REDUCE:
            results.append(group.all_reduce(np.full(10, 2.0 ** net.rank), algo))
        results.append(group.all_gather(np.array([net.rank]))[:, 0])
        results.append(group.broadcast(np.array([net.rank]), root=1))
        results.append(group.all_to_all([np.array([net.rank, peer]) for peer in range(group.size)]))
        group.barrier()
        inner = Group(group, [group.size - 1, 0]) if group.rank in (0, group.size - 1) else None
        results.append(inner.all_reduce(np.array([net.rank])) if inner else None)
        place = group.rank, group.size
    return results, {peer: net.stats().sent_to(peer).bytes for peer in range(net.size)}, place


def errors(net: Transport) -> dict[str, tuple[str, str]]:
    world, x = Group(net), np.zeros((4, 4))
    attempts = {
        "not contiguous": lambda: world.all_reduce(x[:, ::2]),
        "not contiguous tree": lambda: world.all_reduce(x.T[1:], "tree"),
        "algorithm": lambda: world.all_reduce(x, "telepathy"),
        "operation": lambda: world.all_reduce(x, op="median"),
        "average": lambda: world.all_reduce(np.zeros(4, int), op="avg"),
        "average scattered": lambda: world.reduce_scatter(np.zeros(4, int), op="avg"),
        "average reduced": lambda: world.reduce(np.zeros(4, int), op="avg"),
        "operation reduced": lambda: world.reduce(x, op="median"),
        "gather": lambda: world.all_gather(x, "telepathy"),
        "broadcast": lambda: world.broadcast(x, algo="telepathy"),
        "broadcast of a view": lambda: world.broadcast(x[:, :2]),
        "member": lambda: Group(net, [rank for rank in range(net.size) if rank != net.rank]),
        "nodes": lambda: c.hierarchical(net, x, [0] * (net.size - 1) + [1]),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except Exception as error:
            said[name] = type(error).__name__, str(error)
    net.barrier()
    return said


def background(net: Transport) -> tuple[list[float], list[str], list[float]]:
    """Three all-reduces in the background, waited for backwards; then a bad one between two good ones."""
    world = Group(net)
    buffers = [np.full(50_000, float(10**i * (net.rank + 1))) for i in range(3)]
    works = [world.iall_reduce(x, algo) for x, algo in zip(buffers, ("ring", "tree", "halving_doubling"), strict=True)]
    sums = [float(work.wait()[-1]) for work in reversed(works)]
    first, bad, last = (world.iall_reduce(np.full(3, 1.0 + i), "telepathy" if i == 1 else "ring") for i in range(3))
    messages = []
    for _ in range(2):  # again and again, if asked again
        try:
            bad.wait()
        except ValueError as error:
            messages.append(str(error))
    return sums, messages, [float(first.wait()[0]), float(last.wait()[0])]


def lost(net: Transport) -> None:
    """One rank leaves in the middle of an all-reduce in the background."""
    if net.rank == 2:
        raise KeyError("left")
    Group(net).iall_reduce(np.zeros(1000)).wait()
