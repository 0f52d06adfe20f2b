"""Section 4.4: naive, tree, ring, recursive-doubling and halving-doubling all-reduce.

Question   Five algorithms compute the same sum: which is fastest, and when does the answer flip?
Method     K processes on paced links run each algorithm on the same buffers, bytes and messages counted, every rank
           checked; alpha and beta come from a ping-pong and predict each cell.
Read       Small buffers go to the algorithm with the fewest rounds, large ones to those whose busiest rank moves
           least: ring and halving-doubling stay near 2n however many workers join.
Source     Thakur, Rabenseifner & Gropp (2005); Patarasuk & Yuan (2009), Bandwidth optimal all-reduce algorithms.
"""
from __future__ import annotations

from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives.collectives import ALL_REDUCE, chunks
from part1_foundations.ch04_communication_primitives.costs import seconds
from part1_foundations.ch04_communication_primitives.timing import fit_link, slowest, timed
from shared import Run, demo
from shared.fleet import launch
from shared.measure import human_bytes
from shared.transport import Link

FLOAT = 8  # bytes of a float64
SHORT = {name: name.removeprefix("recursive_").removesuffix("_doubling") for name in ALL_REDUCE}  # for table headings


@demo("4.4", smoke=dict(workers=4, mebibytes=0.125, points=3, repeats=3),
      laptop=dict(workers=8, mebibytes=8, points=7, repeats=3, link="800mbe"),
      cluster=dict(workers=64, mebibytes=64, link="none"))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 4, mebibytes: float = 2.0, points: int = 5,
         repeats: int = 3, link: str = "400mbe", seed: int = 0) -> None:
    """Race the five algorithms.

    Args:
        workers: Largest world; 2, 3 and the powers of two below it run too.
        mebibytes: Largest buffer in MiB.
        points: Number of buffer sizes, from 1 KiB up.
    """
    pace = Link.named(link)
    sizes = buffer_sizes(mebibytes, points)
    fit = fit_link(pace)
    run.table("one message, from a ping-pong", [(str(pace or "not paced"), f"{fit.alpha * 1e3:.3f} ms",
              f"{fit.bandwidth / 1e6:.1f} MB/s", f"{fit.r2:.4f}")], ["link", "alpha", "1/beta", "R2"])

    cells, worst_error, ring_deviation, loads = [], {"int64": 0.0, "float64": 0.0}, 0, {}
    for k in worlds(workers):
        ranks = launch(k, race, ALL_REDUCE, sizes, repeats, seed, fabric=pace, timeout=600)
        for size in sizes:
            measured = {name: slowest([rank[size, name]["seconds"] for rank in ranks]) for name in ALL_REDUCE}
            predicted = {name: seconds(name, k, size, fit.alpha, fit.beta) for name in ALL_REDUCE}
            cells.append({"workers": k, "bytes": size, "measured": measured, "predicted": predicted})
            for name in ALL_REDUCE:
                sent = [rank[size, name]["sent"] for rank in ranks]
                handled = [rank[size, name]["handled"] for rank in ranks]
                loads[k, name] = (max(m for m, _ in sent), max(b for _, b in sent) / size, max(handled) / size)
                for dtype in worst_error:
                    worst_error[dtype] = max(worst_error[dtype], *(rank[size, name][dtype] for rank in ranks))
                if name == "ring":
                    expected = [(2 * (k - 1), ring_bytes(size, k, rank)) for rank in range(k)]
                    ring_deviation += sum(got != want for got, want in zip(sent, expected))
        print_race(run, k, [cell for cell in cells if cell["workers"] == k])
    k = max(worlds(workers))
    run.table(f"what the busiest of {k} ranks does with the largest buffer (n bytes)",
              [(name, messages, f"{sent:.3f} n", f"{handled:.3f} n")
               for (world, name), (messages, sent, handled) in loads.items() if world == k],
              ["algorithm", "messages sent", "bytes sent", "sent + received"])
    run.table("auto-tuner: the fastest algorithm measured", [
        (f"K={k}", *(SHORT[winner(cell["measured"])] for cell in cells if cell["workers"] == k))
        for k in worlds(workers)], ["workers", *map(human_bytes, sizes)])
    record(run, cells, sizes)

    power = 1 << (workers.bit_length() - 1)
    messages, sent, _ = loads[power, "halving_doubling"]
    run.claim("each ring rank sends exactly its 2(K-1)/K of the buffer in 2(K-1) messages (ranks that deviate)",
              measured=ring_deviation, equals=0)
    run.claim(f"halving-doubling sends the ring's bytes in 2 log2 K messages (K={power})",
              measured=[messages, sent], equals=[2 * (power.bit_length() - 1), 2 * (power - 1) / power])
    run.claim(f"the naive root handles 2(K-1) buffers (K={k})", measured=loads[k, "naive"][2], equals=2 * (k - 1))
    run.claim(f"the ring's busiest rank sends under 2 (K={k})", measured=loads[k, "ring"][1], below=2.0)
    run.claim("every rank holds the exact integer sum, for every algorithm, K and size", equals=0,
              measured=worst_error["int64"])
    run.claim("float64 sums agree, relative error", measured=worst_error["float64"], at_most=1e-12)
    run.claim("the predicted winner is the measured one or within 25 % of it (share of cells)",
              measured=share(cells, lambda cell: choice_regret(cell) <= 1.25), at_least=0.8, timing=True)
    if pace:
        errors = [abs(cell["predicted"][name] / cell["measured"][name].median - 1)
                  for cell in cells for name in ALL_REDUCE]
        run.claim("alpha-beta predicts within 25 % of the measured time (share of cells)", at_least=0.8, timing=True,
                  measured=float(np.mean(np.array(errors) <= 0.25)))


def race(net, algorithms: dict, sizes: list[int], repeats: int, seed: int) -> dict[tuple[int, str], dict]:
    """On one rank: seconds, counts and errors of every algorithm at every size, in interleaved repeats."""
    results = {}
    for size in sizes:
        mine = {dtype: make(seed, net.rank, size, dtype) for dtype in ("int64", "float64")}
        exact = {dtype: sum(make(seed, rank, size, dtype) for rank in range(net.size)) for dtype in mine}
        for repeat in range(repeats + 1):  # the first one warms up, and is the one that is counted and checked
            for name, all_reduce in algorithms.items():
                x = mine["float64"].copy()
                net.reset_stats()
                elapsed = timed(net, lambda: all_reduce(net, x))
                if repeat:
                    results[size, name]["seconds"].append(elapsed)
                    continue
                sent, received = net.stats().sent_to(), net.stats().received_from()
                whole = all_reduce(net, mine["int64"].copy())
                results[size, name] = {
                    "seconds": [], "sent": (sent.messages, sent.bytes), "handled": sent.bytes + received.bytes,
                    "int64": float(np.abs(whole - exact["int64"]).max()),
                    "float64": float(np.abs(x - exact["float64"]).max() / np.abs(exact["float64"]).max())}
    return results


def make(seed: int, rank: int, nbytes: int, dtype: str) -> np.ndarray:
    """Rank `rank`'s buffer of `nbytes`, the same wherever it is made."""
    rng = np.random.default_rng((seed, rank))
    return rng.integers(-10**6, 10**6, nbytes // FLOAT) if dtype == "int64" else rng.standard_normal(nbytes // FLOAT)


def buffer_sizes(mebibytes: float, points: int) -> list[int]:
    """`points` sizes in bytes, multiples of 8: 1 KiB, then factors of four up to the largest."""
    largest = int(mebibytes * 2**20)
    return sorted({max(1024, largest // 4**i) // FLOAT * FLOAT for i in range(points - 1)} | {1024})


def worlds(workers: int) -> list[int]:
    """The world sizes to run: `workers`, 3, and the powers of two up to it."""
    return sorted({k for k in (2, 3, 4, 8, 16, 32, 64) if k <= workers} | {workers})


def ring_bytes(nbytes: int, workers: int, rank: int) -> int:
    """Bytes that one ring rank sends: everything but its own chunk, then everything but its successor's."""
    parts = [part.nbytes for part in chunks(np.empty(nbytes // FLOAT), workers)]
    return 2 * nbytes - parts[rank] - parts[(rank + 1) % workers]


def winner(times: dict) -> str:
    return min(times, key=lambda name: getattr(times[name], "median", times[name]))


def choice_regret(cell: dict) -> float:
    """How much longer the predicted winner took than the measured one (1 = it was the winner)."""
    measured = cell["measured"]
    return measured[winner(cell["predicted"])].median / measured[winner(measured)].median


def share(cells: list[dict], holds) -> float:
    return sum(map(holds, cells)) / len(cells)


def print_race(run: Run, k: int, cells: list[dict]) -> None:
    rows = [(human_bytes(cell["bytes"]),
             *(f"{digits(cell['measured'][name].median)} ({digits(cell['predicted'][name])})" for name in SHORT),
             SHORT[winner(cell["measured"])], SHORT[winner(cell["predicted"])]) for cell in cells]
    run.table(f"all-reduce over {k} processes, ms measured (predicted)", rows,
              ["buffer", *SHORT.values(), "fastest", "predicted"])


def digits(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{1e3 * seconds:.{2 if seconds < 0.01 else 1 if seconds < 0.1 else 0}f}"


def record(run: Run, cells: list[dict], sizes: list[int]) -> None:
    largest = [cell for cell in cells if cell["workers"] == max(c["workers"] for c in cells)]
    run.record("workers", largest[0]["workers"])
    run.record("bytes", sizes)
    for kind in ("measured", "predicted"):
        run.record(kind, {name: [getattr(cell[kind][name], "median", cell[kind][name]) for cell in largest]
                          for name in ALL_REDUCE})


def draw(result: dict, axes) -> None:
    records = result["records"]
    for name in records["measured"]:
        [line] = axes.plot(records["bytes"], records["measured"][name], "o", label=name.replace("_", " "))
        axes.plot(records["bytes"], records["predicted"][name], "-", color=line.get_color(), linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="buffer (bytes)", ylabel="seconds",
             title=f"All-reduce over {records['workers']} processes: points measured, lines predicted")
    axes.legend()


if __name__ == "__main__":
    main.cli()
