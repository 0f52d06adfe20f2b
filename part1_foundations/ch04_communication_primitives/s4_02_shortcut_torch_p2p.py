"""Section 4.2 with torch: send, recv, isend and new_group beside our own.

Question   What do torch's point-to-point calls take off our hands, and what does a message through them cost?
Method     The same K processes run the hop all-reduce, the ring exchange and the even-ranks sum through our transport
           and through gloo in turns, on the same integers.
Read       Ours wins large messages: it adds each piece as it arrives, still in cache, where torch receives the whole
           message first and adds then.
Source     torch.distributed, gloo backend.
"""
from __future__ import annotations

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import Group
from part1_foundations.ch04_communication_primitives.s4_02_send_recv_atoms import (
    draw_vectors,
    even_ranks_sum,
    hop_all_reduce,
    isend_first,
    message_sizes,
)
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world, transport
from shared.measure import human_bytes, ratio


@demo("4.2", library="torch (send, isend, new_group; gloo)", needs=("torch",),
      handles=("rendezvous", "tag matching", "group bookkeeping"),
      smoke=dict(workers=4, mebibytes=0.25, points=3, repeats=5),
      laptop=dict(workers=4, mebibytes=32, points=6, repeats=11))
def main(run: Run, workers: int = 4, mebibytes: float = 4.0, points: int = 5, repeats: int = 9, wire: str = "shm",
         seed: int = 0) -> None:
    """Run the same messages through our transport and through torch.

    Args:
        mebibytes: Largest message in MiB.
        points: Number of message sizes, from 8 bytes up.
        wire: Transport of our side: shm, unix or tcp.
    """
    sizes = message_sizes(mebibytes, points)
    ranks = torch_world.launch(workers, both, sizes, repeats, seed, wire=wire, timeout=600)
    rows, seconds = [], {"ours": [], "library": []}
    for size in sizes:
        ours, library = (slowest([rank[size][side] for rank in ranks]) for side in ("ours", "library"))
        pairs = ratio(library, ours)
        rows.append((human_bytes(size), str(ours), str(library), f"{pairs.median:.2f}"))
        seconds["ours"].append(ours.median)
        seconds["library"].append(library.median)
    run.table(f"all-reduce of int64 by hops over {workers} processes", rows,
              ["message", f"ours on {wire}", "gloo", "gloo / ours"])
    run.compare(f"all-reduce by hops, {human_bytes(sizes[-1])}, {workers} processes", ours, library, pairs)
    run.lines_of_code(ours=[transport, Group, hop_all_reduce, isend_first, even_ranks_sum],
                      library=[torch_hops, torch_exchange, torch_even_sum])
    run.record("bytes", sizes)
    run.record("seconds", seconds)

    results = {name: [rank[size][name] for rank in ranks for size in sizes] for name in ("sum", "exchange", "group")}
    run.claim("torch's hops give our integer sum (largest difference)", measured=max(results["sum"]), equals=0)
    run.claim("batch_isend_irecv brings what our isend brings (largest difference)", measured=max(results["exchange"]),
              equals=0)
    run.claim("a sum in new_group(even ranks) equals ours and leaves odd ranks' buffers alone (largest difference)",
              measured=max(results["group"]), equals=0)


def torch_hops(x) -> None:
    import torch
    import torch.distributed as dist

    rank, incoming = dist.get_rank(), torch.empty_like(x)
    if rank > 0:
        dist.recv(incoming, rank - 1)
        x += incoming
    if rank + 1 < dist.get_world_size():
        dist.send(x, rank + 1)
        dist.recv(x, rank + 1)
    if rank > 0:
        dist.send(x, rank - 1)


def torch_exchange(mine, theirs, right: int, left: int) -> None:
    import torch.distributed as dist

    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, theirs, left)]):
        work.wait()


def torch_even_sum(x) -> None:
    import torch.distributed as dist

    evens = dist.new_group(range(0, dist.get_world_size(), 2))
    if dist.get_rank() % 2 == 0:
        dist.all_reduce(x, group=evens)


def both(net, sizes: list[int], repeats: int, seed: int) -> dict[int, dict]:
    """On one rank: both sides in turns on the same values, the order reversed in every other repeat."""
    import torch

    results = {}
    right, left = (net.rank + 1) % net.size, (net.rank - 1) % net.size
    for size in sizes:
        values = draw_vectors(seed, net.size, size // 8)[net.rank]
        x, y = values.copy(), torch.from_numpy(values.copy())
        calls = {"ours": lambda: hop_all_reduce(net, x), "library": lambda: torch_hops(y)}
        seconds: dict = {name: [] for name in calls}
        for repeat in range(repeats + 1):
            x[:] = y.numpy()[:] = values
            for name in list(calls)[::-1 if repeat % 2 else 1]:
                seconds[name].append(timed(net, calls[name]))
        differences = {"sum": distance(x, y)}
        x, y = np.zeros_like(values), torch.zeros(len(values), dtype=torch.int64)
        isend_first(net, right, left, values, x)
        torch_exchange(torch.from_numpy(values), y, right, left)
        differences["exchange"] = distance(x, y)
        x, y = values.copy(), torch.from_numpy(values.copy())
        even_ranks_sum(net, x)
        torch_even_sum(y)
        differences["group"] = max(distance(x, y), int(np.abs(x - values).max()) if net.rank % 2 else 0)
        results[size] = {name: s[1:] for name, s in seconds.items()} | differences
    return results


def distance(ours: np.ndarray, library) -> int:
    return int(np.abs(ours - library.numpy()).max())


def draw(result: dict, axes) -> None:
    records = result["records"]
    for side, label in {"ours": "our transport", "library": "torch, gloo"}.items():
        axes.plot(records["bytes"], records["seconds"][side], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="message (bytes)", ylabel="seconds",
             title="One all-reduce by hops, ours and gloo's")
    axes.legend()


if __name__ == "__main__":
    main.cli()
