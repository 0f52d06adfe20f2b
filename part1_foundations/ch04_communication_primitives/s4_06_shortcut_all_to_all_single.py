"""Section 4.6 with torch: all_to_all_single with split sizes beside our dispatch and combine.

Question   What does the library's all-to-all take off our hands, and does it return the same tokens?
Method     The same K processes route the same tokens through our layer over shared memory and through three calls of
           gloo over loopback TCP, in turns, with one and the same expert.
Read       The tokens that come back are the same. Ours is a little faster because shared memory spares the copies
           through the kernel and a hand-over to gloo's threads for each of three calls; the sorting and the expert
           cost both the same.
Source     torch.distributed, gloo backend; Lepikhin et al. (2021) for the layer.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import all_to_all
from part1_foundations.ch04_communication_primitives.s4_06_moe_dispatch import (
    Case,
    Tagged,
    combine,
    dispatch,
    exchange_counts,
    make_choices,
    make_plan,
    moe_layer,
)
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.measure import human_bytes, ratio


@demo("4.6", library="torch.distributed", needs=("torch",),
      handles=("transport and its schedule", "autograd through functional collectives", "NCCL on GPUs", "time-outs"),
      smoke=dict(workers=2, tokens=512, repeats=5), laptop=dict(workers=4, tokens=16384, repeats=21))
def main(run: Run, workers: int = 4, tokens: int = 4096, width: int = 64, skew: float = 1.0, repeats: int = 9,
         wire: str = "shm", seed: int = 0) -> None:
    """Time our layer against torch's.

    Args:
        tokens: Largest number of tokens on each worker; 1/8 and 1/64 of it run too.
        width: Numbers in a token, float32.
        skew: Expert e is picked with weight (e + 1) ** -skew.
        wire: Transport of our layer: shm, unix or tcp.
    """
    sizes = sorted({max(1, tokens // divisor) for divisor in (1, 8, 64)})
    ranks = torch_world.launch(workers, both, sizes, width, skew, repeats, seed, wire=wire, timeout=600)
    rows, faster = [], []
    for n in sizes:
        ours, library = (slowest([rank[n][side] for rank in ranks]) for side in ("ours", "library"))
        pairs = ratio(library, ours)
        faster += [n] if pairs.median > 1 else []
        kept = ranks[0][n]["kept"]
        rows.append((n, human_bytes(n * width * 4), kept, str(ours), str(library), f"{pairs.median:.2f}"))
    run.table(f"one layer over {workers} processes, skew {skew:g}", rows,
              ["tokens a rank", "bytes a rank", "stay on rank 0", f"ours on {wire}", "gloo", "gloo / ours"])
    run.compare(f"dispatch and combine, {sizes[-1]} tokens, {workers} processes", ours, library, pairs)
    run.lines_of_code(ours=[moe_layer, make_plan, exchange_counts, dispatch, combine, Tagged, all_to_all],
                      library=[library_layer])
    run.note(f"ours is the faster one at {', '.join(map(str, faster)) or 'no number of'} tokens a rank")
    run.record("tokens", sizes)
    run.record("seconds", {side: [slowest([rank[n][side] for rank in ranks]).median for n in sizes]
                           for side in ("ours", "library")})
    run.claim("torch's combined outputs equal ours (largest relative difference)", at_most=1e-6,
              measured=max(rank[n]["difference"] for rank in ranks for n in sizes))
    run.claim("torch's receive counts equal ours (ranks that differ)", equals=0,
              measured=sum(rank[n]["counts_differ"] for rank in ranks for n in sizes))


def library_layer(tokens, routed, expert: Callable, size: int):
    """The same layer in torch: tokens (n, width), routed (n,); returns outputs (n, width) and receive counts."""
    import torch
    import torch.distributed as dist

    order, sent = torch.argsort(routed, stable=True), torch.bincount(routed, minlength=size)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    splits = received.tolist(), sent.tolist()
    arrived = tokens.new_empty(sum(splits[0]), tokens.shape[1])
    dist.all_to_all_single(arrived, tokens[order], *splits)
    returned = torch.empty_like(tokens)
    dist.all_to_all_single(returned, expert(arrived), *reversed(splits))
    return torch.empty_like(tokens).index_copy_(0, order, returned), received


def both(net, sizes: list[int], width: int, skew: float, repeats: int, seed: int) -> dict[int, dict]:
    """On one rank: both layers in turns on the same tokens, the order reversed in every other repeat."""
    import torch

    results = {}
    weights = np.random.default_rng((seed, 1, net.rank)).standard_normal((width, width)).astype(np.float32)
    for n in sizes:
        x = np.random.default_rng((seed, 0, net.rank)).standard_normal((n, width)).astype(np.float32)
        choices = make_choices(Case(skew), net.rank, net.size, n, seed)
        tokens, routed = torch.from_numpy(x), torch.from_numpy(choices[:, 0].copy())
        calls = {"ours": partial(moe_layer, net, x, choices, lambda rows: rows @ weights), "library": partial(
            library_layer, tokens, routed, lambda rows: torch.from_numpy(rows.numpy() @ weights), net.size)}
        seconds: dict = {name: [] for name in calls}
        for repeat in range(repeats + 1):
            for name in list(calls)[::-1 if repeat % 2 else 1]:
                seconds[name].append(timed(net, calls[name]))
        (y, _, plan), (z, received) = calls["ours"](), calls["library"]()
        results[n] = {name: s[1:] for name, s in seconds.items()} | {
            "difference": float(np.abs(y - z.numpy()).max() / np.abs(y).max()), "kept": int(plan.sent[net.rank]),
            "counts_differ": not np.array_equal(plan.received, received.numpy())}
    return results


def draw(result: dict, axes) -> None:
    records = result["records"]
    for side, label in (("ours", "our all-to-all, shared memory"), ("library", "torch, gloo")):
        axes.plot(records["tokens"], records["seconds"][side], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens on a rank", ylabel="seconds",
             title="One expert layer, ours and gloo's")
    axes.legend()


if __name__ == "__main__":
    main.cli()
