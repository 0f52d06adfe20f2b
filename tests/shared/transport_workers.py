"""What the workers of test_transport.py run. A plain module, so that a worker starts without importing pytest."""
from __future__ import annotations

import time

import numpy as np

from shared.errors import PeerLost, TransportError
from shared.transport import DTYPES, INLINE, SLOT, SLOTS, Stats, Transport


def arrays() -> dict[str, np.ndarray]:
    """Every dtype, every number of dimensions, memory orders, and sizes on both sides of each boundary of the wire."""
    rng = np.random.default_rng(4)
    cases = {}
    for dtype in DTYPES:
        raw = rng.integers(0, 2 if dtype.kind == "b" else 256, 12 * dtype.itemsize, dtype=np.uint8)
        cases[f"dtype {dtype}"] = raw.view(dtype).reshape(3, 4)
        cases[f"scalar {dtype}"] = raw.view(dtype)[0].reshape(())
        cases[f"empty {dtype}"] = np.empty((0, 3), dtype)
    for dimensions in range(9):
        cases[f"{dimensions} dimensions"] = rng.random((2, 1, 3, 1, 2, 1, 1, 2)[:dimensions])
    square = rng.random((40, 50))
    cases |= {"every other": square[::2, ::3], "reversed": square[::-1], "transposed": square.T,
              "fortran": np.asfortranarray(square), "broadcast": np.broadcast_to(square[0], (5, 50)),
              "big and strided": rng.random((2 * SLOT // 8, 2))[:, 0]}
    for name, boundary in {"inline": INLINE, "slot": SLOT, "slots": SLOTS * SLOT, "twice": 2 * SLOTS * SLOT}.items():
        for dtype in (np.uint8, np.float64, np.complex128):
            for extra in (-1, 0, 1):
                size = boundary // np.dtype(dtype).itemsize + extra
                cases[f"{name}{extra:+d} {np.dtype(dtype)}"] = np.arange(size).astype(dtype)
    return cases


def round_trips(net: Transport) -> dict[str, tuple[bool, bool, bool]] | None:
    """Rank 0 sends each array; rank 1 says whether shape, dtype and bytes are right."""
    cases = arrays()
    if net.rank == 0:
        for tag, array in enumerate(cases.values()):
            net.send(1, array, tag % 3)
        return None
    verdicts = {}
    for tag, (name, sent) in enumerate(cases.items()):
        got = net.recv(0, tag=tag % 3)
        verdicts[name] = got.shape == sent.shape, got.dtype == sent.dtype, got.tobytes() == sent.tobytes()
    return verdicts


def reductions(net: Transport) -> dict[str, bool]:
    """Each rank reduces the other's buffer into its own, both ways at once, and compares with NumPy."""
    verdicts = {}
    for boundary in (1, INLINE, SLOT, SLOTS * SLOT, 3 * SLOTS * SLOT):
        for dtype in (np.int64, np.float32, np.complex128):
            for op in (np.add, np.multiply) if dtype == np.complex128 else (np.add, np.maximum):
                for extra in (-1, 0, 1):
                    size = max(0, boundary // np.dtype(dtype).itemsize + extra)
                    both = np.random.default_rng(size).integers(-99, 99, (2, size)).astype(dtype)
                    mine = both[net.rank].copy()
                    work = net.isend(1 - net.rank, both[net.rank])
                    result = net.recv(1 - net.rank, mine, reduce=op)
                    work.wait()
                    verdicts[f"{op.__name__} of {size} {np.dtype(dtype)}"] = (
                        result is mine and mine.tobytes() == op(*both).tobytes())
    return verdicts


def out_of_order(net: Transport) -> list[list[float]] | None:
    """Messages of five tags, two each, large and small mixed, are received in another order of tags."""
    if net.rank == 0:
        for i in range(2):
            for tag in range(5):
                net.send(1, np.full(1 + tag * 30_000, 10.0 * tag + i), tag)
        return None
    return [[float(net.recv(0, tag=tag)[-1]) for _ in range(2)] for tag in (3, 0, 4, 1, 2)]


def to_itself(net: Transport) -> tuple[list[int], str, Stats]:
    box = np.arange(3)
    net.send(net.rank, box, 7)
    net.send(net.rank, box + 10, 8)
    box[:] = -1  # a message is a copy
    got = [*net.recv(net.rank, tag=8), *net.recv(net.rank, np.zeros(3, box.dtype), 7)]
    try:
        net.recv(net.rank)
        complaint = ""
    except TransportError as error:
        complaint = str(error)
    return [int(x) for x in got], complaint, net.stats()


def follow_plan(net: Transport, plan: list[tuple[int, int, int, int]]) -> tuple[Stats, int, int]:
    """Send and receive the (source, destination, tag, bytes) of the plan that concern this rank; barriers between."""
    net.barrier()
    works = [net.isend(dst, np.zeros(n, np.uint8), tag) for src, dst, tag, n in plan if src == net.rank]
    for src, dst, tag, _ in sorted(plan):
        if dst == net.rank:
            net.recv(src, tag=tag)
    for work in works:
        work.wait()
    net.barrier()
    stats = net.stats()
    net.reset_stats()
    return stats, net.stats().sent_to().messages, net.stats().received_from().messages


def time_out_then_receive(net: Transport) -> tuple[str, float, float] | None:
    if net.rank == 0:
        net.recv(1)
        net.send(1, np.array(42.0), 5)
        return None
    began = time.monotonic()
    try:
        net.recv(0, tag=5, timeout=0.1)
    except TransportError as error:
        message, waited = str(error), time.monotonic() - began
    net.send(0, np.zeros(1))
    return message, waited, float(net.recv(0, tag=5, timeout=10))


def exchange(net: Transport, nbytes: int, cure: bool) -> int:
    """Both ranks send first and receive then: a deadlock if the wire cannot hold the message, unless sent by isend."""
    array = np.full(nbytes, net.rank, np.uint8)
    if cure:
        work = net.isend(1 - net.rank, array)
        got = net.recv(1 - net.rank)
        work.wait()
    else:
        net.send(1 - net.rank, array)
        got = net.recv(1 - net.rank)
    return int(got.sum())


def flows(net: Transport, pairs: list[tuple[int, int]], nbytes: int, repeats: int) -> list[tuple[float, float]]:
    """(when the rank began, when its last message had arrived or left) for messages that all start together."""
    times = []
    for _ in range(repeats):
        net.barrier()
        began = time.monotonic()
        works = [net.isend(dst, np.zeros(nbytes, np.uint8)) for src, dst in pairs if src == net.rank]
        for src, dst in pairs:
            if dst == net.rank:
                net.recv(src)
        for work in works:
            work.wait()
        times.append((began, time.monotonic()))
    return times


def barrier_overtakes(net: Transport) -> float | None:
    """Seconds that a paced message took with a barrier behind it, which is not paced."""
    if net.rank == 0:
        began = time.monotonic()
        work = net.isend(1, np.array([began]))
        net.barrier()
        work.wait()
        return None
    net.barrier()
    return -float(net.recv(0)[0]) + time.monotonic()  # in this order: the clock after the message


def late_by_the_link(net: Transport) -> tuple[bool, float] | None:
    """A time-out counts on a paced link too: the bytes are here, the message is not."""
    if net.rank == 0:
        net.send(1, np.array([time.monotonic()]))
        return None
    try:
        net.recv(0, timeout=0.05)
        timed_out = False
    except TransportError:
        timed_out = True
    sent = float(net.recv(0)[0])
    return timed_out, time.monotonic() - sent


def outlive(net: Transport) -> str:
    """Rank 1 closes its connections at once; rank 0 loses it and still hears from rank 2."""
    if net.rank == 1:
        net.close()
        return "gone"
    if net.rank == 2:
        net.send(0, np.array(2))
        return "sent"
    try:
        net.send(1, np.zeros(64 << 20, np.uint8))
        return "not lost"
    except PeerLost:
        return f"lost 1, heard {net.recv(2)}"
