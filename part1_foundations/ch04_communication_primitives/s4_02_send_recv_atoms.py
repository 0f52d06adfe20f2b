"""Section 4.2: sends and receives, the atoms of every collective.

Question   What does a message cost on each tier, and when does a careless order of sends and receives deadlock?
Method     Ping-pongs fit alpha and beta per tier; hops compose an all-reduce, its messages counted; every rank sends
           first through fixed socket buffers while a watchdog looks for a wait-for cycle.
Read       Same program, other tier, other price. Sending first works only while the kernel's buffers swallow the
           message: odd-even order or isend works at every size.
Source     Hockney (1994), The communication challenge for MPP; Coffman, Elphick & Shoshani (1971), System deadlocks.
"""
from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
import psutil

from part1_foundations.ch04_communication_primitives.collectives import Group
from part1_foundations.ch04_communication_primitives.timing import ping_pong, slowest, timed
from shared import Run, demo
from shared.errors import UsageError
from shared.fleet import Fleet, launch
from shared.measure import fit_alpha_beta, human_bytes, human_seconds
from shared.transport import FINISHED, RECEIVING, RUNNING, SENDING, Link


@demo("4.2", smoke=dict(workers=4, mebibytes=0.25, points=4, repeats=3),
      laptop=dict(workers=8, mebibytes=32, points=7, repeats=5), cluster=dict(workers=64, mebibytes=256, links="none"))
def main(run: Run, workers: int = 4, mebibytes: float = 4.0, points: int = 6, repeats: int = 5,
         links: str = "1gbe,400mbe", buffer: int = 16384, patience: float = 0.3, seed: int = 0) -> None:
    """Price the tiers, compose an all-reduce from hops, then deadlock and cure.

    Args:
        mebibytes: Largest message in MiB.
        points: Number of message sizes, from 8 bytes up.
        links: Paced links to price beside the three wires, by name, separated by commas.
        buffer: Bytes asked of the kernel for each socket buffer in the deadlock experiment.
        patience: Seconds that a wait-for cycle must stand still to count as a deadlock.
    """
    if workers < 2:
        raise UsageError("--workers must be at least 2: messages need a sender and a receiver")
    price_tiers(run, workers, message_sizes(mebibytes, points), repeats, links, seed)
    deadlock_and_cure(run, workers, buffer, patience)
    stay_inside_the_group(run, workers, seed)


def hop_all_reduce(net, x: np.ndarray) -> np.ndarray:
    """Sum `x` over all ranks, in place: a running sum walks up the ranks and the total walks back. 2(K-1) messages."""
    below, above = net.rank - 1, net.rank + 1
    if below >= 0:
        net.recv(below, x, reduce=np.add)
    if above < net.size:
        net.send(above, x)
        net.recv(above, x)
    if below >= 0:
        net.send(below, x)
    return x


def price_tiers(run: Run, workers: int, sizes: list[int], repeats: int, links: str, seed: int) -> None:
    """Fit alpha and beta of every tier by ping-pong and run the all-reduce on it; claims its messages and its sums."""
    inputs = [draw_vectors(seed, workers, length) for length in (3, sizes[-1] // 128)]
    nbytes = inputs[-1][0].nbytes
    prices, hops, records, messages, worst = [], [], {}, set(), 0
    for name, (wire, link) in run.progress(tiers(links).items(), "tiers"):
        ranks = launch(workers, price, sizes, hop_all_reduce, inputs, repeats, wire=wire, fabric=link, timeout=600)
        seconds = ranks[0]["ping_pong"]
        fit = fit_alpha_beta(sizes, seconds)
        records[name] = {"seconds": seconds, "alpha": fit.alpha, "beta": fit.beta}
        prices.append((name, human_seconds(fit.alpha), f"{fit.bandwidth / 1e6:.0f} MB/s", f"{fit.r2:.3f}",
                       human_seconds(seconds[0]), human_seconds(seconds[-1])))
        messages |= {int(total) for total in np.sum([rank["messages"] for rank in ranks], axis=0)}
        worst = max(worst, *(rank["error"] for rank in ranks))
        took = slowest([rank["seconds"] for rank in ranks])
        hops.append((name, str(took), human_seconds(2 * (workers - 1) * fit.predict(nbytes))))
    run.record("bytes", sizes)
    run.record("tiers", records)
    run.table("one message, from a ping-pong", prices,
              ["tier", "alpha", "1/beta", "R2", human_bytes(sizes[0]), human_bytes(sizes[-1])],
              note="; ".join(f"{link} is paced over unix" for _, link in tiers(links).values() if link) or None)
    run.table(f"all-reduce of {human_bytes(nbytes)} over {workers} ranks by hops", hops,
              ["tier", "measured", "2(K-1)(alpha + beta n)"])
    run.note("  ".join(f"rank {i} {row}" for i, row in enumerate(inputs[0][:8])) + f"  sum {inputs[0].sum(axis=0)}")
    run.claim("all-reduce by hops sends exactly 2(K-1) messages (every tier, two sizes)",
              measured=sorted(messages), equals=[2 * (workers - 1)])
    run.claim("every rank holds the exact integer sum (largest difference)", measured=worst, equals=0)


def price(net, sizes: list[int], all_reduce: Callable, inputs: list[np.ndarray], repeats: int) -> dict:
    """On one rank: ping-pong seconds by size; messages, error and seconds of an all-reduce of an input's rows."""
    result = {"ping_pong": ping_pong(net, sizes, repeats), "messages": [], "error": 0}
    for vectors in inputs:
        net.reset_stats()
        x = all_reduce(net, vectors[net.rank].copy())
        result["messages"].append(net.stats().sent_to().messages)
        result["error"] = max(result["error"], int(np.abs(x - vectors.sum(axis=0)).max()))
    return result | {"seconds": [timed(net, lambda: all_reduce(net, x)) for _ in range(repeats)]}


def send_first(net, right: int, left: int, mine: np.ndarray, theirs: np.ndarray) -> None:
    """The careless order: everyone's send waits for room that only the neighbour's receive would make."""
    net.send(right, mine)
    net.recv(left, theirs)


def odd_even(net, right: int, left: int, mine: np.ndarray, theirs: np.ndarray) -> None:
    """Even ranks send first, odd ranks receive first: somebody always listens, also when K is odd."""
    if net.rank % 2 == 0:
        net.send(right, mine)
        net.recv(left, theirs)
    else:
        net.recv(left, theirs)
        net.send(right, mine)


def isend_first(net, right: int, left: int, mine: np.ndarray, theirs: np.ndarray) -> None:
    """A send that does not wait: the bytes leave while the receive is under way."""
    work = net.isend(right, mine)
    net.recv(left, theirs)
    work.wait()


def deadlock_and_cure(run: Run, workers: int, buffer: int, patience: float) -> None:
    """Pass a message round the ring in three orders, of sizes that double until the kernel's buffers are full."""
    send_buffer, receive_buffer = kernel_buffers(buffer)
    quarter, top = send_buffer // 4, 4 * (send_buffer + receive_buffer)
    sizes = [quarter << i for i in range(64) if quarter << i < top] + [top]
    rows, hung, ranks = [], False, "ranks in a wait-for cycle"

    def attempt(name: str, order: Callable, some: list[int]) -> int:
        """How many ranks end in a wait-for cycle: 0 when all come through."""
        with Fleet(workers, pass_right, order, some, socket_buffer=buffer) as fleet:
            if (cycle := watch(fleet, patience)) is None:
                fleet.results()
        outcome = "deadlock: " + " -> ".join(map(str, cycle)) if cycle else "completes"
        rows.append((name, " to ".join(map(human_bytes, sorted({some[0], some[-1]}))), some[-1] / send_buffer, outcome))
        return len(set(cycle or ()))

    small = attempt("send first", send_first, [quarter])
    for size in sizes[1:-1]:
        hung = hung or attempt("send first", send_first, [size]) > 0
    large = attempt("send first", send_first, [top])
    cured = {"odd-even order": attempt("odd-even", odd_even, sizes), "isend": attempt("isend", isend_first, sizes)}
    run.table(f"{workers} ranks pass a message right (SO_SNDBUF {send_buffer}, SO_RCVBUF {receive_buffer} bytes)", rows,
              ["order", "message", "of SO_SNDBUF", "outcome"], note="a -> b: rank a waits for b, as the watchdog saw")
    run.claim(f"send-first completes at a quarter of the send buffer ({ranks})", measured=small, equals=0)
    run.claim(f"send-first hangs at 4x send plus receive buffer ({ranks})", measured=large, equals=workers)
    for name, waiting in cured.items():
        run.claim(f"{name} never hangs, at {len(sizes)} sizes up to that ({ranks})", measured=waiting, equals=0)


def pass_right(net, order: Callable, sizes: list[int]) -> None:
    left = (net.rank - 1) % net.size
    for nbytes in sizes:
        theirs = np.empty(nbytes, np.uint8)
        order(net, (net.rank + 1) % net.size, left, np.full(nbytes, net.rank, np.uint8), theirs)
        if not (theirs == left).all():
            raise ValueError(f"rank {net.rank} did not get the bytes of rank {left}")


def watch(fleet: Fleet, patience: float) -> list[int] | None:
    """The watchdog: once nobody has moved for `patience` seconds, the cycle they wait in; None if they come through."""
    seen, since = None, 0.0
    while (fleet.board.status[:, 0] != FINISHED).any() and all(map(psutil.pid_exists, fleet.pids)):
        status = fleet.board.status.copy()
        if not np.array_equal(status, seen):
            seen, since = status, time.monotonic()
        elif time.monotonic() - since > patience and (status[:, 0] != RUNNING).all():
            return wait_for_cycle(status)
        time.sleep(0.005)
    return None


def wait_for_cycle(status: np.ndarray) -> list[int] | None:
    """Follow who waits for whom until a rank comes round again: [a, b, ..., a], or None if every chain ends.

    status: one row (state, peer, ...) a rank, as the workers write it when they block and when they go on.
    """
    waits_for = {rank: int(peer) for rank, (state, peer) in enumerate(status[:, :2]) if state in (SENDING, RECEIVING)}
    for start in waits_for:
        chain = [start]
        while (peer := waits_for.get(chain[-1])) is not None:
            chain.append(peer)
            if peer in chain[:-1]:
                return chain[chain.index(peer):]
    return None


def kernel_buffers(asked: int) -> tuple[int, int]:
    """SO_SNDBUF and SO_RCVBUF in bytes that the kernel grants who asks for `asked` (Linux doubles it)."""
    with socket.socket(socket.AF_UNIX) as sock:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, asked)
        return tuple(sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_SNDBUF, socket.SO_RCVBUF))


def even_ranks_sum(net, x: np.ndarray) -> None:
    """All-reduce over the even ranks alone; the odd ones have nothing to call."""
    if net.rank % 2 == 0:
        hop_all_reduce(Group(net, range(0, net.size, 2)), x)


def stay_inside_the_group(run: Run, workers: int, seed: int) -> None:
    vectors = draw_vectors(seed, workers, 1000)
    handled = launch(workers, bytes_handled, even_ranks_sum, vectors)
    run.table("all-reduce by hops among the even ranks", [
        ("members (even)", len(handled[::2]), human_bytes(sum(handled[::2]))),
        ("others (odd)", len(handled[1::2]), human_bytes(sum(handled[1::2])))], ["ranks", "", "sent + received"])
    run.claim("a collective on the even ranks moves no byte through the odd ones", measured=sum(handled[1::2]),
              equals=0, unit="bytes")


def bytes_handled(net, collective: Callable, vectors: np.ndarray) -> int:
    """Bytes that this rank sends and receives in a collective of the even ranks, which must get their sum."""
    x = vectors[net.rank].copy()
    collective(net, x)
    if not np.array_equal(x, vectors[net.rank] if net.rank % 2 else vectors[::2].sum(axis=0)):
        raise ValueError(f"rank {net.rank} holds a wrong vector")
    return net.stats().sent_to().bytes + net.stats().received_from().bytes


def draw_vectors(seed: int, workers: int, length: int) -> np.ndarray:
    """One vector of small integers a rank, shape (workers, length)."""
    return np.random.default_rng(seed).integers(1, 10, (workers, max(1, length)))


def message_sizes(mebibytes: float, points: int) -> list[int]:
    """`points` sizes in bytes, evenly spaced on a logarithmic scale from 8 bytes to the largest."""
    return [int(size) // 8 * 8 for size in np.geomspace(8, max(16, mebibytes * 2**20) + 0.5, max(2, points))]


def tiers(links: str) -> dict[str, tuple[str, Link | None]]:
    """What to price, by name: a wire, and the link that paces it."""
    paced = {name: ("unix", Link.named(name)) for name in links.split(",") if name != "none"}
    return {wire: (wire, None) for wire in ("unix", "tcp", "shm")} | paced


def draw(result: dict, axes) -> None:
    sizes = result["records"]["bytes"]
    between = np.geomspace(sizes[0], sizes[-1], 100)
    for name, tier in result["records"]["tiers"].items():
        [points] = axes.plot(sizes, tier["seconds"], "o", label=name)
        axes.plot(between, tier["alpha"] + tier["beta"] * between, "-", color=points.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="message (bytes)", ylabel="seconds one way",
             title="One message per tier: points measured, lines alpha + beta n")
    axes.legend()


if __name__ == "__main__":
    main.cli()
