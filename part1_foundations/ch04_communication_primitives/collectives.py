"""Collectives from sends and receives: the library of Chapter 4, imported by every chapter that trains in parallel.

Each algorithm is a function `f(net, x, ...)` over anything with `rank`, `size`, `send`, `recv` and `isend`: a
Transport, or a `Group` of some of its ranks. Buffers are NumPy arrays of any shape, C-contiguous, and the same shape
and dtype on every rank. All-reduce works in place and returns `x`. K is the number of ranks, n the bytes of the buffer;
costs are given as messages and bytes sent by the busiest rank.

Errors: ValueError for a buffer that is not contiguous or an unknown name; PeerLost when a rank dies.

Sources: Thakur, Rabenseifner & Gropp (2005), Optimization of Collective Communication Operations in MPICH;
Patarasuk & Yuan (2009), Bandwidth optimal all-reduce algorithms; Bruck et al. (1997), Efficient algorithms for
all-to-all communications in multiport message-passing systems.
"""
from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np

from shared.transport import Stats, Work

OPS: dict[str, np.ufunc] = {"sum": np.add, "avg": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


def flat(x: np.ndarray) -> np.ndarray:
    """`x` as a one-dimensional view of the same memory."""
    if not x.flags.c_contiguous:
        raise ValueError("collectives work in place on contiguous buffers: pass np.ascontiguousarray(x)")
    return x.reshape(-1)


def chunks(x: np.ndarray, parts: int) -> list[np.ndarray]:
    """`parts` views of the flattened `x`, in order, whose sizes differ by at most one element (some may be empty)."""
    return np.array_split(flat(x), parts)


# --- all-reduce: five algorithms, one contract ------------------------------------------------------------------------


def naive(net, x: np.ndarray, op: np.ufunc = np.add) -> np.ndarray:
    """Everyone sends to rank 0, which reduces and sends back. Root: K-1 messages out and K-1 in, (K-1) n bytes each."""
    whole = flat(x)
    if net.rank == 0:
        for peer in range(1, net.size):
            net.recv(peer, whole, reduce=op)
        for peer in range(1, net.size):
            net.send(peer, whole)
    else:
        net.send(0, whole)
        net.recv(0, whole)
    return x


def tree(net, x: np.ndarray, op: np.ufunc = np.add) -> np.ndarray:
    """Reduce up a binomial tree to rank 0, then broadcast down it: 2 ceil(log2 K) rounds of the whole buffer."""
    reduce_binomial(net, x, op=op)
    return broadcast_binomial(net, x)


def ring(net, x: np.ndarray, op: np.ufunc = np.add) -> np.ndarray:
    """Reduce-scatter around the ring, then all-gather around it: 2(K-1) messages, 2 n (K-1)/K bytes from every rank."""
    ring_reduce_scatter(net, x, op)
    return ring_all_gather(net, x)


def recursive_doubling(net, x: np.ndarray, op: np.ufunc = np.add) -> np.ndarray:
    """Exchange the whole buffer with partners at distance 1, 2, 4, ...: log2 K messages, n log2 K bytes.

    When K is not a power of two, the ranks beyond the largest one first fold their buffer into a partner and get the
    result back at the end (two more rounds).
    """
    whole, incoming = flat(x), np.empty_like(flat(x))
    core = largest_power_of_two(net.size)
    if fold_in(net, whole, core, op):
        distance = 1
        while distance < core:
            exchange(net, net.rank ^ distance, whole, incoming)
            op(whole, incoming, out=whole)
            distance *= 2
    return fold_out(net, x, core)


def halving_doubling(net, x: np.ndarray, op: np.ufunc = np.add) -> np.ndarray:
    """Rabenseifner: halve the buffer with partners at distance K/2 ... 1, then double it back.

    2 log2 K messages and 2 n (K-1)/K bytes when K is a power of two, with the same folding as `recursive_doubling`
    otherwise. After the first half rank r holds chunk r, reduced.
    """
    core = largest_power_of_two(net.size)
    if fold_in(net, flat(x), core, op):
        parts, low, high = chunks(x, core), 0, core  # this rank is still responsible for chunks low..high
        distance = core // 2
        while distance:
            middle = (low + high) // 2
            upper = net.rank & distance
            keep, give = ((middle, high), (low, middle)) if upper else ((low, middle), (middle, high))
            work = net.isend(net.rank ^ distance, span(x, parts, *give))
            net.recv(net.rank ^ distance, span(x, parts, *keep), reduce=op)
            work.wait()
            low, high = keep
            distance //= 2
        distance = 1
        while distance < core:
            shift = -distance if net.rank & distance else distance  # the partner holds the chunks on that side
            theirs = span(x, parts, low + shift, high + shift)
            exchange(net, net.rank ^ distance, span(x, parts, low, high), theirs)
            low, high = min(low, low + shift), max(high, high + shift)
            distance *= 2
    return fold_out(net, x, core)


ALL_REDUCE: dict[str, Callable[..., np.ndarray]] = {
    "naive": naive, "tree": tree, "ring": ring, "recursive_doubling": recursive_doubling,
    "halving_doubling": halving_doubling,
}


# --- the halves of all-reduce -----------------------------------------------------------------------------------------


def ring_reduce_scatter(net, x: np.ndarray, op: np.ufunc = np.add) -> np.ndarray:
    """Each rank ends with one reduced chunk: rank r with `chunks(x, K)[r]`, a view into `x` (the rest is scratch).

    In step s a rank passes on the chunk that it has just added to, so that after K-1 steps every chunk has visited
    everyone and stops at its owner. K-1 messages, n (K-1)/K bytes.
    """
    parts, right, left = chunks(x, net.size), (net.rank + 1) % net.size, (net.rank - 1) % net.size
    for step in range(net.size - 1):
        outgoing = net.isend(right, parts[(net.rank - step - 1) % net.size])
        net.recv(left, parts[(net.rank - step - 2) % net.size], reduce=op)
        outgoing.wait()
    return parts[net.rank]


def ring_all_gather(net, x: np.ndarray) -> np.ndarray:
    """Complete `x` everywhere when rank r holds `chunks(x, K)[r]`. K-1 messages, n (K-1)/K bytes. In place."""
    parts, right, left = chunks(x, net.size), (net.rank + 1) % net.size, (net.rank - 1) % net.size
    for step in range(net.size - 1):
        outgoing = net.isend(right, parts[(net.rank - step) % net.size])
        net.recv(left, parts[(net.rank - step - 1) % net.size])
        outgoing.wait()
    return x


def bruck_all_gather(net, mine: np.ndarray) -> np.ndarray:
    """Stack the equal-shaped `mine` of all ranks, shape (K, *mine.shape), in ceil(log2 K) rounds for any K.

    In a round at distance d a rank has the blocks of itself and its d-1 successors, and fetches as many from the rank
    d further on: (K-1) blocks of bytes in all, like the ring, in far fewer messages.
    """
    blocks = np.empty((net.size, *mine.shape), mine.dtype)
    blocks[0] = mine
    have = 1
    while have < net.size:
        take = min(have, net.size - have)
        work = net.isend((net.rank - have) % net.size, blocks[:take])
        net.recv((net.rank + have) % net.size, blocks[have:have + take])
        work.wait()
        have += take
    return np.roll(blocks, net.rank, axis=0)  # block i is now that of rank i, not of rank + i


# --- one to all, all to one -------------------------------------------------------------------------------------------


def broadcast_linear(net, x: np.ndarray, root: int = 0) -> np.ndarray:
    """The root sends the buffer to each rank in turn: K-1 rounds. In place."""
    if net.rank == root:
        for peer in range(net.size):
            if peer != root:
                net.send(peer, flat(x))
    else:
        net.recv(root, flat(x))
    return x


def broadcast_binomial(net, x: np.ndarray, root: int = 0) -> np.ndarray:
    """Whoever has the buffer sends it on, at halving distances: ceil(log2 K) rounds, at most as many copies a rank."""
    place = (net.rank - root) % net.size  # the root is place 0
    distance = 1
    while distance < net.size and not place & distance:
        distance *= 2
    if place:  # the lowest set bit of a place points to its parent
        net.recv((net.rank - distance) % net.size, flat(x))
    distance //= 2
    while distance:
        if place + distance < net.size:
            net.send((net.rank + distance) % net.size, flat(x))
        distance //= 2
    return x


def broadcast_scatter_all_gather(net, x: np.ndarray, root: int = 0) -> np.ndarray:
    """van de Geijn: scatter chunks down a binomial tree, then ring all-gather: about 2n bytes from the root, any K."""
    parts = chunks(x, net.size)
    place, span_of = (net.rank - root) % net.size, 1
    rotated = np.concatenate([parts[(root + i) % net.size] for i in range(net.size)]) if net.rank == root else None
    sizes = [parts[(root + i) % net.size].size for i in range(net.size)]  # place i will hold the chunk of rank root + i
    starts = np.concatenate([[0], np.cumsum(sizes)])
    while span_of < net.size and not place & span_of:
        span_of *= 2
    end = min(place + span_of, net.size)
    if place:
        rotated = net.recv((net.rank - span_of) % net.size, np.empty(starts[end] - starts[place], x.dtype))
    first, distance = starts[place], span_of // 2
    while distance:
        if place + distance < net.size:
            low, high = starts[place + distance], starts[min(place + 2 * distance, net.size)]
            net.send((net.rank + distance) % net.size, rotated[low - first:high - first])
        distance //= 2
    parts[net.rank][:] = rotated[:sizes[place]]
    return ring_all_gather(net, x)


BROADCAST = {"linear": broadcast_linear, "binomial": broadcast_binomial,
             "scatter_all_gather": broadcast_scatter_all_gather}


def reduce_binomial(net, x: np.ndarray, root: int = 0, op: np.ufunc = np.add) -> np.ndarray:
    """Reduce up a binomial tree: ceil(log2 K) rounds. The root's `x` holds the result, the others' partial sums."""
    place, distance = (net.rank - root) % net.size, 1
    while distance < net.size:
        if place & distance:
            net.send((net.rank - distance) % net.size, flat(x))
            return x
        if place + distance < net.size:
            net.recv((net.rank + distance) % net.size, flat(x), reduce=op)
        distance *= 2
    return x


def gather(net, mine: np.ndarray, root: int = 0) -> list[np.ndarray] | None:
    """The root gets the list of every rank's array (shapes may differ), the others None. K-1 messages arrive at it."""
    if net.rank != root:
        net.send(root, mine)
        return None
    return [mine.copy() if peer == root else net.recv(peer) for peer in range(net.size)]


def gather_two_level(net, mine: np.ndarray, root: int = 0) -> list[np.ndarray] | None:
    """Like `gather`, for arrays of one shape and dtype, through leaders: the K-1 others form teams of about sqrt(K).

    A team's first rank stacks its team's arrays into one message. The root still receives (K-1) n bytes, but in
    ceil(sqrt(K-1)) messages; a leader receives as many messages at most, and each byte of its team travels twice.
    """
    others = [rank for rank in range(net.size) if rank != root]
    teams = [others[i::ceil(sqrt(len(others)))] for i in range(ceil(sqrt(len(others))))]
    if net.rank == root:
        gathered = {root: mine.copy()}
        for team in teams:
            gathered.update(zip(team, net.recv(team[0]), strict=True))
        return [gathered[rank] for rank in range(net.size)]
    team = next(team for team in teams if net.rank in team)
    if net.rank == team[0]:
        net.send(root, np.stack([mine, *map(net.recv, team[1:])]))
    else:
        net.send(team[0], mine)
    return None


def scatter(net, pieces: Sequence[np.ndarray] | None, root: int = 0) -> np.ndarray:
    """Rank i gets `pieces[i]` of the root (shapes may differ). K-1 messages leave the root."""
    if net.rank != root:
        return net.recv(root)
    for peer, piece in enumerate(pieces):
        if peer != root:
            net.send(peer, piece)
    return np.array(pieces[root])


# --- all to all -------------------------------------------------------------------------------------------------------


def all_to_all(net, outgoing: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rank r's `outgoing[d]` becomes rank d's result[r]: a distributed transpose, shapes may differ and be empty.

    Pairwise schedule: in step s everyone sends s places ahead and receives from s places behind, so that in each step
    every rank is the target of exactly one message. K-1 messages.
    """
    incoming: list[Any] = [None] * net.size
    incoming[net.rank] = np.array(outgoing[net.rank])
    for step in range(1, net.size):
        ahead, behind = (net.rank + step) % net.size, (net.rank - step) % net.size
        work = net.isend(ahead, outgoing[ahead])
        incoming[behind] = net.recv(behind)
        work.wait()
    return incoming


# --- hierarchies ------------------------------------------------------------------------------------------------------


def hierarchical(net, x: np.ndarray, node_of: Sequence[int], op: np.ufunc = np.add) -> np.ndarray:
    """Reduce-scatter inside each node, all-reduce each chunk across nodes, all-gather inside. Nodes of equal size.

    Each node's uplink carries 2 n (M-1)/M bytes for M nodes, whatever the number of ranks in it.
    """
    inside, across = node_groups(net, node_of)
    if across is None:
        raise ValueError("hierarchical all-reduce needs nodes of equal size: use hierarchical_leaders")
    mine = ring_reduce_scatter(inside, x, op)
    ring(across, mine, op)
    return ring_all_gather(inside, x)


def hierarchical_leaders(net, x: np.ndarray, node_of: Sequence[int], op: np.ufunc = np.add) -> np.ndarray:
    """Reduce to one leader a node, all-reduce among the leaders, broadcast inside. Nodes of any sizes.

    The same 2 n (M-1)/M bytes on the uplinks in fewer, larger messages; the leaders' memory does all the adding.
    """
    inside, _ = node_groups(net, node_of)
    leaders = [node_of.index(node) for node in sorted(set(node_of))]
    reduce_binomial(inside, x, op=op)
    if net.rank in leaders:
        ring(Group(net, leaders), x, op)
    return broadcast_binomial(inside, x)


def node_groups(net, node_of: Sequence[int]) -> tuple[Group, Group | None]:
    """The group of this rank's node, and the group of the ranks with its place in every node (None if sizes differ)."""
    nodes = [[rank for rank in range(net.size) if node_of[rank] == node] for node in sorted(set(node_of))]
    inside = next(node for node in nodes if net.rank in node)
    if len({len(node) for node in nodes}) > 1:
        return Group(net, inside), None
    return Group(net, inside), Group(net, [node[inside.index(net.rank)] for node in nodes])


# --- small pieces -----------------------------------------------------------------------------------------------------


def exchange(net, partner: int, outgoing: np.ndarray, incoming: np.ndarray) -> None:
    """Send to and receive from the same partner at once, which never deadlocks however small the buffers are."""
    work = net.isend(partner, outgoing)
    net.recv(partner, incoming)
    work.wait()


def largest_power_of_two(k: int) -> int:
    return 1 << (k.bit_length() - 1)


def fold_in(net, whole: np.ndarray, core: int, op: np.ufunc) -> bool:
    """Ranks from `core` on hand their buffer to rank - core. True for those who take part in the core algorithm."""
    if net.rank >= core:
        net.send(net.rank - core, whole)
        return False
    if net.rank + core < net.size:
        net.recv(net.rank + core, whole, reduce=op)
    return True


def fold_out(net, x: np.ndarray, core: int) -> np.ndarray:
    """Return the result to the ranks that were folded in."""
    if net.rank >= core:
        net.recv(net.rank - core, flat(x))
    elif net.rank + core < net.size:
        net.send(net.rank + core, flat(x))
    return x


def span(x: np.ndarray, parts: Sequence[np.ndarray], low: int, high: int) -> np.ndarray:
    """The view of `x` that covers chunks low..high-1."""
    start = sum(part.size for part in parts[:low])
    return flat(x)[start:start + sum(part.size for part in parts[low:high])]


# --- process groups ---------------------------------------------------------------------------------------------------


class Group:
    """Some ranks of a transport, renumbered 0..K-1 in the order given: a process group.

    Collectives run on it as on the whole world, and ranks outside it see none of their bytes. `net` may be a group.
    """

    def __init__(self, net, ranks: Sequence[int] | None = None) -> None:
        self.net, self.ranks = net, list(range(net.size) if ranks is None else ranks)
        if net.rank not in self.ranks:
            raise ValueError(f"rank {net.rank} is not a member of the group {self.ranks}")
        self.rank, self.size = self.ranks.index(net.rank), len(self.ranks)
        self._progress: Progress | None = None

    def send(self, dst: int, array: np.ndarray, tag: int = 0) -> None:
        self.net.send(self.ranks[dst], array, tag)

    def isend(self, dst: int, array: np.ndarray, tag: int = 0) -> Work:
        return self.net.isend(self.ranks[dst], array, tag)

    def recv(self, src: int, out: np.ndarray | None = None, tag: int = 0, **how: Any) -> np.ndarray:
        return self.net.recv(self.ranks[src], out, tag, **how)

    def stats(self) -> Stats:
        return self.net.stats()

    def all_reduce(self, x: np.ndarray, algo: str = "ring", op: str = "sum",
                   node_of: Sequence[int] | None = None) -> np.ndarray:
        """Reduce `x` over the group, in place, on every rank. `op`: sum, avg, max, min, prod; `avg` needs floats."""
        ufunc = _ufunc(op, x)
        if algo in ("hierarchical", "hierarchical_leaders"):
            {"hierarchical": hierarchical}.get(algo, hierarchical_leaders)(self, x, node_of, ufunc)
        elif algo in ALL_REDUCE:
            ALL_REDUCE[algo](self, x, ufunc)
        else:
            raise ValueError(f"unknown all-reduce {algo!r}: one of {', '.join(ALL_REDUCE)}, hierarchical")
        if op == "avg":
            x /= self.size
        return x

    def iall_reduce(self, x: np.ndarray, algo: str = "ring", op: str = "sum") -> Work:
        """Start an all-reduce in the group's progress thread. `x` must not be touched, nor the group used, before
        `wait()`, except for further `iall_reduce` calls, which run in the order they were made."""
        self._progress = self._progress or Progress()
        return self._progress.submit(self.all_reduce, x, algo, op)

    def reduce_scatter(self, x: np.ndarray, op: str = "sum") -> np.ndarray:
        """This rank's reduced chunk of `x`, a view into it; the rest of `x` is scratch."""
        mine = ring_reduce_scatter(self, x, _ufunc(op, x))
        if op == "avg":
            mine /= self.size
        return mine

    def all_gather(self, mine: np.ndarray, algo: str = "ring") -> np.ndarray:
        """Every rank's equal-shaped array, stacked: shape (K, *mine.shape)."""
        if algo == "bruck":
            return bruck_all_gather(self, mine)
        if algo != "ring":
            raise ValueError(f"unknown all-gather {algo!r}: one of ring, bruck")
        stacked = np.empty((self.size, *mine.shape), mine.dtype)
        stacked[self.rank] = mine
        return ring_all_gather(self, stacked)

    def all_to_all(self, outgoing: Sequence[np.ndarray]) -> list[np.ndarray]:
        return all_to_all(self, outgoing)

    def broadcast(self, x: np.ndarray, root: int = 0, algo: str = "binomial") -> np.ndarray:
        if algo not in BROADCAST:
            raise ValueError(f"unknown broadcast {algo!r}: one of {', '.join(BROADCAST)}")
        return BROADCAST[algo](self, x, root)

    def reduce(self, x: np.ndarray, root: int = 0, op: str = "sum") -> np.ndarray:
        reduce_binomial(self, x, root, _ufunc(op, x))
        if op == "avg" and self.rank == root:
            x /= self.size
        return x

    def gather(self, mine: np.ndarray, root: int = 0) -> list[np.ndarray] | None:
        return gather(self, mine, root)

    def scatter(self, pieces: Sequence[np.ndarray] | None, root: int = 0) -> np.ndarray:
        return scatter(self, pieces, root)

    def barrier(self) -> None:
        """Return when every member has called it (an all-gather of nothing)."""
        bruck_all_gather(self, np.empty(0, np.uint8))


def _ufunc(op: str, x: np.ndarray) -> np.ufunc:
    if op not in OPS or op == "avg" and x.dtype.kind not in "fc":
        raise ValueError(f"cannot {op} {x.dtype}: one of {', '.join(OPS)} (avg needs floats)")
    return OPS[op]


class Progress:
    """One thread that carries out submitted collectives in order, while the caller computes."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True, name="progress").start()

    def submit(self, job: Callable[..., np.ndarray], *args: Any) -> Work:
        done, outcome = threading.Event(), []

        def wait() -> np.ndarray:
            done.wait()
            if isinstance(outcome[0], BaseException):
                raise outcome[0]
            return outcome[0]

        self._jobs.put((job, args, done, outcome))
        return Work(wait)

    def _serve(self) -> None:
        while True:
            job, args, done, outcome = self._jobs.get()
            try:
                outcome.append(job(*args))
            except BaseException as error:  # handed to whoever waits
                outcome.append(error)
            done.set()
