"""Section 4.9: rank order and hierarchy on nodes that share an uplink.

Question   The same all-reduce on the same machines: what do the order of the ranks and a hierarchy change?
Method     K processes on emulated nodes with one paced uplink each run a ring in three orders and two hierarchies.
Read       Interleaving loads an uplink G times; leaders gain most on small buffers; ping-pongs alone reveal the
           nodes.
Source     Thakur, Rabenseifner & Gropp (2005); Croes (1958), A method for solving traveling-salesman problems
           (2-opt).
"""
from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives.collectives import Group, hierarchical, hierarchical_leaders, ring
from part1_foundations.ch04_communication_primitives.costs import seconds as model
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo
from shared.errors import UsageError
from shared.fleet import check_workers, launch
from shared.measure import AlphaBeta, fit_alpha_beta, human_bytes, human_seconds, ratio
from shared.transport import Fabric, Link

PROBES, TRIPS = (8, 32 << 10), 6  # bytes of the ping-pong messages, and how often each goes to and fro
EXHAUSTIVE = 8  # ranks up to which every ring is tried: 7!/2 = 2,520 of them
CONTIGUOUS, INTERLEAVED, SEARCHED = "ring, contiguous", "ring, interleaved", "ring, searched order"
HIERARCHIES = LEADERS, SCATTERED = "leader hierarchy", "reduce-scatter hierarchy"


@demo("4.9", smoke=dict(shapes="2x2", mebibytes=0.25, points=2, link="0.2ms+1.8ms/8MBps"),
      laptop=dict(shapes="2x4,4x2", mebibytes=8, points=5, link="0.1ms+0.9ms/25MBps"))
def main(run: Run, shapes: str = "2x4", mebibytes: Annotated[float, Option(min=0.0625)] = 1.0,
         points: Annotated[int, Option(min=2)] = 4, repeats: int = 3, link: str = "100mbe", seed: int = 0) -> None:
    """Race orders and hierarchies.

    Args:
        shapes: Nodes x ranks on each node; several separated by commas.
        points: Number of buffer sizes, from 1 KiB up.
        link: Pace of each node's uplink, by name or like 0.1ms+0.9ms/25MBps.
    """
    uplink = Link.named(link)
    if uplink is None:
        raise UsageError("--link none leaves nothing to place ranks by: name a pace, such as 100mbe")
    races = [measure(*shape, mebibytes, points, repeats, uplink, seed) for shape in parse(shapes)]
    for race in races:
        report(run, race, uplink)
    run.record("races", [{"shape": race["shape"], "bytes": race["sizes"]} | {
        kind: {name: [gain(race, name, i, kind) for i in range(len(race["sizes"]))] for name in HIERARCHIES}
        for kind in ("measured", "predicted")} for race in races])
    judge(run, races)


def measure(nodes: int, per_node: int, mebibytes: float, points: int, repeats: int, uplink: Link, seed: int) -> dict:
    """Everything about one shape, whose ranks are on shuffled nodes, as a scheduler may hand them out."""
    workers, sizes = nodes * per_node, buffer_sizes(mebibytes, points, nodes * per_node)
    node_of = tuple((np.random.default_rng((nodes, per_node, seed)).permutation(workers) // per_node).tolist())
    fabric = Fabric(node_of, uplink)
    links = np.sum(launch(workers, measure_links, PROBES, TRIPS, fabric=fabric, timeout=600), axis=0)
    order, same = search(links[-1], seed), np.equal.outer(node_of, node_of)
    tiers = [fit_alpha_beta(PROBES, [np.median(probe[tier]) for probe in links])
             for tier in (same & ~np.eye(workers, dtype=bool), ~same)]  # inside a node, across nodes
    ranks = launch(workers, compete, layouts(node_of, order), node_of, sizes, repeats, seed, fabric=fabric, timeout=600)
    planted = [[rank for rank in range(workers) if node_of[rank] == node] for node in range(nodes)]
    return {"shape": f"{nodes}x{per_node}", "K": workers, "M": nodes, "G": per_node, "sizes": sizes, "tiers": tiers,
            "order": order, "found": groups(order, links[-1]), "planted": sorted(planted),
            "error": max(rank[name]["error"] for rank in ranks for name in rank),
            "measured": {name: [slowest([r[name]["seconds"][n] for r in ranks]) for n in sizes] for name in ranks[0]},
            "predicted": {name: [predict(nodes, per_node, n, *tiers)[name] for n in sizes] for name in ranks[0]},
            "sent": {name: np.array([[np.sum([ranks[rank][name]["away"][size] for rank in node], axis=0)
                                      for size in sizes] for node in planted])  # [node, size, messages or bytes]
                     for name in ranks[0]}}


def judge(run: Run, races: list[dict]) -> None:
    formulas = {CONTIGUOUS: ("2(K-1)/K", lambda k, m, g: 2 * (k - 1) / k),
                INTERLEAVED: ("G times 2(K-1)/K", lambda k, m, g: 2 * g * (k - 1) / k),
                SEARCHED: ("the contiguous 2(K-1)/K", lambda k, m, g: 2 * (k - 1) / k),
                LEADERS: ("2(M-1)/M", lambda k, m, g: 2 * (m - 1) / m),
                SCATTERED: ("2(M-1)/M", lambda k, m, g: 2 * (m - 1) / m)}
    for name, (text, formula) in formulas.items():
        expected = [formula(race["K"], race["M"], race["G"]) for race in races]
        sent = [(race["sent"][name][:, :, 1] / race["sizes"]).ravel() for race in races]  # of every uplink and size
        run.claim(f"{name}: exactly {text} of the buffer over each uplink", equals=expected,
                  measured=[max(s, key=lambda n: abs(n - e)) for s, e in zip(sent, expected)])
    run.claim("every rank always holds the exact sum", measured=max(race["error"] for race in races), equals=0)
    run.claim("the search finds the planted nodes from ping-pongs alone",
              measured=str([race["found"] for race in races]), equals=str([race["planted"] for race in races]))
    run.claim("the searched order takes no longer than the contiguous one at the largest size (ratio)", timing=True,
              measured=max(1 / gain(race, SEARCHED) for race in races), at_most=1.0, tolerance=0.1)
    run.claim("the interleaved order takes at least 1.5x the contiguous time at the largest size", timing=True,
              measured=min(1 / gain(race, INTERLEAVED) for race in races), at_least=1.5)
    run.claim("the leader hierarchy gains more at the smallest than at the largest size (gain over gain)", timing=True,
              measured=min(gain(race, LEADERS, 0) / gain(race, LEADERS) for race in races), above=1.0)


def layouts(node_of: Sequence[int], searched: list[int]) -> dict[str, tuple[Callable, Sequence[int]]]:
    """name -> (all-reduce, what it is told of the placement: an order of the ranks, or the node of each)."""
    ranks = range(len(node_of))
    place = [node_of[:rank].count(node_of[rank]) for rank in ranks]  # within its node
    return {CONTIGUOUS: (ring_in_order, sorted(ranks, key=lambda rank: node_of[rank])),
            INTERLEAVED: (ring_in_order, sorted(ranks, key=lambda rank: (place[rank], node_of[rank]))),
            SEARCHED: (ring_in_order, searched),
            LEADERS: (hierarchical_leaders, node_of), SCATTERED: (hierarchical, node_of)}


def ring_in_order(net, x: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Ring all-reduce in which rank order[i] sends to rank order[i + 1]."""
    return ring(Group(net, order), x)


def compete(net, placed: dict, node_of: Sequence[int], sizes: list[int], repeats: int, seed: int) -> dict[str, dict]:
    """On one rank, by layout: seconds of each size in turns, what it sent to other nodes, and its sum's worst error."""
    results: dict = {name: {"seconds": {size: [] for size in sizes}, "away": {}, "error": 0} for name in placed}
    for size in sizes:
        inputs = np.random.default_rng(seed).integers(-10**6, 10**6, (net.size, size // 8))
        for repeat in range(repeats + 1):  # the first one warms up, and is the one that is counted and checked
            for name, (all_reduce, placement) in list(placed.items())[::-1 if repeat % 2 else 1]:
                x = inputs[net.rank].copy()
                net.reset_stats()
                elapsed = timed(net, lambda: all_reduce(net, x, placement))
                if repeat:
                    results[name]["seconds"][size].append(elapsed)
                else:
                    away = [net.stats().sent_to(rank) for rank in range(net.size) if node_of[rank] != node_of[net.rank]]
                    results[name]["away"][size] = sum(c.messages for c in away), sum(c.bytes for c in away)
                    results[name]["error"] = max(results[name]["error"], int(np.abs(x - inputs.sum(axis=0)).max()))
    return results


def measure_links(net, sizes: Sequence[int], trips: int) -> np.ndarray:
    """One-way seconds by ping-pong between this rank and each later one, shape (sizes, K, K), zero elsewhere.

    One pair at a time, as pairs on one uplink would slow each other. The quickest trip counts: noise only delays.
    """
    seconds = np.zeros((len(sizes), net.size, net.size))
    for i, size in enumerate(sizes):
        message = np.zeros(size, np.uint8)
        for a, b in combinations(range(net.size), 2):
            net.barrier()
            times = []
            for _ in range(trips if net.rank in (a, b) else 0):
                begin = time.perf_counter()
                for sender, receiver in ((a, b), (b, a)):
                    net.send(receiver, message) if net.rank == sender else net.recv(sender, message)
                times.append(time.perf_counter() - begin)
            if net.rank == a:
                seconds[i, a, b] = seconds[i, b, a] = min(times) / 2
    return seconds


def search(seconds: np.ndarray, seed: int = 0) -> list[int]:
    """The order of the ranks whose ring costs least. seconds: what each link costs, symmetric, shape (K, K)."""
    ranks = len(seconds)
    if ranks > EXHAUSTIVE:
        return two_opt(seconds, np.random.default_rng(seed).permutation(ranks).tolist())
    rings = ([0, *rest] for rest in permutations(range(1, ranks)) if rest[0] <= rest[-1])  # up to rotation, reflection
    return min(rings, key=lambda order: sum(seconds[order[i - 1], order[i]] for i in range(ranks)))


def two_opt(seconds: np.ndarray, order: list[int]) -> list[int]:
    """Reverse a stretch of the ring for as long as some reversal shortens it. In place.

    With two tiers of links this cannot end with a node's ranks in two runs: reversing the second run together with what
    lies between them joins the two, and trades an edge that leaves the node for one that stays inside.
    """
    improved = True
    while improved:
        improved = False
        for i, j in combinations(range(len(order)), 2):
            a, b, c, d = order[i - 1], order[i], order[j], order[(j + 1) % len(order)]
            if a != c and seconds[a, c] + seconds[b, d] < seconds[a, b] + seconds[c, d] - 1e-12:
                order[i:j + 1], improved = order[i:j + 1][::-1], True
    return order


def groups(order: list[int], seconds: np.ndarray) -> list[list[int]]:
    """The ring cut at its slow edges: those above the geometric mean of the quickest and the slowest link."""
    limit = np.sqrt(seconds[seconds > 0].min() * seconds.max())
    first = max(range(len(order)), key=lambda i: seconds[order[i - 1], order[i]])
    around = order[first:] + order[:first]  # starts behind the slowest edge
    cuts = [i for i in range(1, len(around)) if seconds[around[i - 1], around[i]] > limit]
    return sorted(sorted(around[a:b]) for a, b in zip([0, *cuts], [*cuts, len(around)]))


def predict(nodes: int, per_node: int, nbytes: float, inside: AlphaBeta, across: AlphaBeta) -> dict[str, float]:
    """Alpha-beta seconds of each layout; where all G ranks of a node send at once, each waits for the other G - 1."""
    flat = model("ring", nodes * per_node, nbytes, across.alpha, across.beta)
    inner = model("ring", per_node, nbytes, inside.alpha, inside.beta)
    leaders, broadcast = model("ring", nodes, nbytes, across.alpha, across.beta), float(inside.predict(nbytes))
    scattered = per_node * model("ring", nodes, nbytes / per_node, across.alpha, across.beta)
    return {CONTIGUOUS: flat, INTERLEAVED: per_node * flat, SEARCHED: flat,
            LEADERS: inner + leaders + broadcast, SCATTERED: inner + scattered}


def gain(race: dict, name: str, size: int = -1, kind: str = "measured") -> float:
    """Time of the contiguous ring over that of another layout, at the size of this index."""
    base, other = race[kind][CONTIGUOUS][size], race[kind][name][size]
    return base / other if isinstance(base, float) else ratio(base, other).median


def parse(shapes: str) -> list[tuple[int, int]]:
    """"2x4,4x2" -> [(2, 4), (4, 2)]: nodes and ranks on each. Raises UsageError."""
    shape = r"([2-9]|[1-9]\d+)x([2-9]|[1-9]\d+)"
    if not re.fullmatch(f"{shape}(,{shape})*", shapes):
        raise UsageError(f"--shapes {shapes!r}: nodes x ranks on each, both at least 2, like 2x4 or 2x4,4x2")
    pairs = [(int(nodes), int(per_node)) for nodes, per_node in re.findall(shape, shapes)]
    check_workers(max(nodes * per_node for nodes, per_node in pairs))
    return pairs


def buffer_sizes(mebibytes: float, points: int, workers: int) -> list[int]:
    """Sizes in bytes from 1 KiB up, in multiples of 8 K, so that all chunks of every stage are equally long."""
    unit = 8 * workers
    return sorted({round(size / unit) * unit or unit for size in np.geomspace(1024, mebibytes * 2**20, points)})


def report(run: Run, race: dict, uplink: Link) -> None:
    rows = []
    for name, seconds in race["measured"].items():
        messages, nbytes = race["sent"][name][:, -1].max(axis=0)
        rows.append((name, f"{nbytes / race['sizes'][-1]:.3f} n", messages, *(
            f"{seconds[i].median * 1e3:.1f} ({race['predicted'][name][i] * 1e3:.1f}), "
            f"{gain(race, name, i):.2f}x" for i in (0, -1))))
    inside, across = race["tiers"]
    run.table(f"{race['M']} nodes of {race['G']} ranks, uplinks {uplink}; ms measured (predicted), gain", rows,
              ["layout", "per uplink", "messages", *(human_bytes(race["sizes"][i]) for i in (0, -1))],
              note=f"ping-pongs: {human_seconds(inside.alpha)} in a node; {human_seconds(across.alpha)}, "
                   f"{across.bandwidth / 1e6:.1f} MB/s across")
    run.note(f"searched ring {race['order']}, nodes found {race['found']}")


def draw(result: dict, axes) -> None:
    for race in result["records"]["races"]:
        for name, marker in zip(HIERARCHIES, "os"):
            [line] = axes.plot(race["bytes"], race["measured"][name], marker, label=f"{name}, {race['shape']}")
            axes.plot(race["bytes"], race["predicted"][name], "-", color=line.get_color(), linewidth=1)
    axes.axhline(1, color="#7d7d7d", linewidth=1, linestyle="--")
    axes.set(xscale="log", ylim=(0, None), xlabel="buffer (bytes)", ylabel="gain over the contiguous ring",
             title="What a hierarchy gains: points measured, lines predicted")
    axes.legend(title="nodes x ranks")


if __name__ == "__main__":
    main.cli()
