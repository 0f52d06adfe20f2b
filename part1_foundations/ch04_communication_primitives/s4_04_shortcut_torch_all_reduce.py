"""Section 4.4 with torch: dist.all_reduce beside our ring.

Question   What does one call to a tuned library buy over our ring, and where does it lose?
Method     The same K processes run our ring over shared memory and gloo's all_reduce over loopback TCP in turns, on
           the same buffers; a parallel memory copy gives the floor.
Read       The ratio: above 1 our ring is ahead, as it is on large buffers, where shared memory
           spares the two copies through the kernel that loopback TCP makes.
Source     torch.distributed, gloo backend; Patarasuk & Yuan (2009) for the ring.
"""
from __future__ import annotations

from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives.collectives import (
    chunks,
    flat,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
)
from part1_foundations.ch04_communication_primitives.s4_04_all_reduce_algorithms import buffer_sizes
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.measure import human_bytes, ratio


@demo("4.4", library="torch.distributed", needs=("torch",),
      handles=("choice of algorithm", "pipelined chunks", "rendezvous", "time-outs and asynchronous errors"),
      smoke=dict(workers=2, mebibytes=0.5, points=3, repeats=5),
      laptop=dict(workers=4, mebibytes=16, points=7, repeats=21))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 4, mebibytes: float = 16.0, points: int = 5,
         repeats: int = 9, wire: str = "shm", seed: int = 0) -> None:
    """Time our ring against torch's all_reduce.

    Args:
        mebibytes: Largest buffer in MiB.
        points: Number of buffer sizes, from 1 KiB up.
        wire: Transport of our ring: shm, unix or tcp.
    """
    sizes = buffer_sizes(mebibytes, points)
    ranks = torch_world.launch(workers, both, sizes, repeats, seed, wire=wire, timeout=600)
    rows, faster = [], []
    for size in sizes:
        ours, library, copy = (slowest([rank[size][side] for rank in ranks]) for side in ("ours", "library", "copy"))
        pairs = ratio(library, ours)
        rows.append((human_bytes(size), str(ours), str(library), f"{pairs.median:.2f}",
                     f"{ours.median / copy.median:.1f}"))
        faster += [size] if pairs.median > 1 else []
    run.table(f"all-reduce of float32 over {workers} processes", rows,
              ["buffer", f"our ring on {wire}", "gloo", "gloo / ours", "ours / copy floor"],
              note="copy floor: each rank copies 2(K-1)/K of the buffer in its own memory, all at once")
    run.compare(f"all-reduce, {human_bytes(sizes[-1])}, {workers} processes", ours, library, pairs)
    run.lines_of_code(ours=[ring, ring_reduce_scatter, ring_all_gather, chunks, flat],
                      library=[library_all_reduce])
    run.note(f"our ring is the faster one at {', '.join(map(human_bytes, faster)) or 'no size'}")
    run.record("bytes", sizes)
    run.record("seconds", {side: [slowest([rank[size][side] for rank in ranks]).median for size in sizes]
                           for side in ("ours", "library", "copy")})

    run.claim("torch's sum equals our ring's, largest relative difference", at_most=1e-6,
              measured=max(rank[size]["difference"] for rank in ranks for size in sizes))
    if wire == "shm" and sizes[-1] >= 16 << 20:
        run.claim(f"our ring over shared memory is at least as fast as gloo at {human_bytes(sizes[-1])} (gloo / ours)",
                  measured=pairs.median, at_least=1.0, timing=True)


def library_all_reduce(x) -> None:
    import torch.distributed as dist

    dist.all_reduce(x)


def both(net, sizes: list[int], repeats: int, seed: int) -> dict[int, dict]:
    """On one rank: both all-reduces in turns on the same values, the order reversed in every other repeat."""
    import torch

    results = {}
    for size in sizes:
        values = np.random.default_rng((seed, net.rank)).standard_normal(size // 4).astype(np.float32)
        x, y = values.copy(), torch.from_numpy(values.copy())
        source = np.empty(2 * (net.size - 1) * size // (4 * net.size), np.float32)
        target = np.ones_like(source)
        calls = {"ours": lambda: ring(net, x), "library": lambda: library_all_reduce(y),
                 "copy": lambda: np.copyto(target, source)}
        seconds: dict = {name: [] for name in calls}
        for repeat in range(repeats + 1):
            x[:] = y.numpy()[:] = values
            for name in list(calls)[::-1 if repeat % 2 else 1]:
                seconds[name].append(timed(net, calls[name]))
        difference = float(np.abs(x - y.numpy()).max() / np.abs(x).max())
        results[size] = {name: s[1:] for name, s in seconds.items()} | {"difference": difference}
    return results


def draw(result, axes) -> None:
    records = result["records"]
    labels = {"ours": "our ring, shared memory", "library": "torch, gloo", "copy": "memory copy (floor)"}
    for side, label in labels.items():
        axes.plot(records["bytes"], records["seconds"][side], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="buffer (bytes)", ylabel="seconds",
             title="One all-reduce, ours and gloo's")
    axes.legend()


if __name__ == "__main__":
    main.cli()
