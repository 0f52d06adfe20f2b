"""Section 4.3 with torch: DistributedDataParallel beside our flat gradient and ring.

Question   What does DDP do around its all-reduce, and what does it cost or save against one flat gradient and a ring?
Method     The same processes train the same MLP on the same rows both ways in turns, in float32; then once more with
           a last rank that runs out of rows halfway.
Read       Both end with the same bits. Our step is the faster one on small models: one message through shared memory
           against a hook for each parameter, bucket copies and loopback TCP; a longer backward closes the gap.
Source     Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training.
"""
from __future__ import annotations

import copy
from typing import Annotated

import numpy as np
import typer

from part1_foundations.ch04_communication_primitives.collectives import (
    broadcast_binomial,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
)
from part1_foundations.ch04_communication_primitives.s4_03_mini_ddp import (
    RATE,
    as_tensors,
    average,
    flat_model,
    mlp,
    shard,
    size_weighted,
    train_step,
    union_batches,
)
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.data import digits
from shared.fleet import preload
from shared.measure import Timing


@demo("4.3", library="torch (DistributedDataParallel, join context; gloo)", needs=("torch", "sklearn"),
      handles=("initial broadcast", "hooks that start each bucket during backward", "buckets", "uneven inputs (join)",
               "unused parameters"),
      smoke=dict(steps=20, repeats=3), laptop=dict(steps=100, repeats=9))
def main(run: Run, workers: Annotated[int, typer.Option(min=2)] = 2, steps: Annotated[int, typer.Option(min=2)] = 50,
         hidden: int = 256, repeats: int = 5, seed: int = 0) -> None:
    """Train with DDP and with our own data parallelism.

    Args:
        workers: Worker processes, at least 2.
        steps: Training steps of each repeat, at least 2.
        hidden: Units in the MLP's hidden layer.
    """
    preload("torch", "sklearn", "scipy")
    ranks = torch_world.launch(workers, both, steps, hidden, repeats, seed, wire="shm", timeout=600)
    ours, library = (Timing(tuple(s / steps for s in slowest([rank["seconds"][side] for rank in ranks]).samples))
                     for side in ("ours", "library"))
    apart = {rows: max(float(np.abs(rank[rows, "ours"] - rank[rows, "library"]).max()) for rank in ranks)
             for rows in ("even", "uneven")}
    run.table(f"final weights after {steps} steps, {ranks[0]['even', 'ours'].size} parameters, float32", [
        ("equal batches", "mean of means", "DDP", f"{apart['even']:.1e}"),
        ("last rank out of rows halfway", "weighted by rows", "DDP under join()", f"{apart['uneven']:.1e}")],
        ["rows", "ours", "library", "largest difference"])
    run.compare(f"one step of {workers} processes, {hidden} hidden units", ours, library)
    run.lines_of_code(ours=[train_ours, train_step, flat_model, average, broadcast_binomial, ring, ring_reduce_scatter,
                            ring_all_gather], library=[build_library, train_library])
    run.claim("DDP's final weights equal ours, largest difference over ranks", measured=apart["even"], at_most=1e-6)
    run.claim("DDP's join equals weighting by rows when a rank runs out, largest difference",
              measured=apart["uneven"], at_most=1e-6)


def train_ours(net, model, weights: np.ndarray, gradient: np.ndarray, batches: list[tuple], update=average) -> None:
    for step, (x, y) in enumerate(batches):
        train_step(net, model, weights, gradient, x, y, step, update)


def build_library(hidden: int, seed: int) -> tuple:
    import torch

    model = torch.nn.parallel.DistributedDataParallel(mlp(hidden, seed, "float32"))  # broadcasts rank 0's weights
    return model, torch.optim.SGD(model.parameters(), lr=RATE)


def train_library(model, optimizer, batches: list[tuple]) -> None:
    import torch

    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def both(net, steps: int, hidden: int, repeats: int, seed: int) -> dict:
    """On one rank: seconds of both trainings in turns, always from the same weights, and the final weights."""
    data = as_tensors(*digits(), "float32")
    first, last = shard(net.rank, net.size)
    unions = union_batches(len(data[1]), net.size, steps, seed)
    batches = [(data[0][mine], data[1][mine]) for mine in unions[:, first:last]]
    model, weights, gradient = flat_model(hidden, seed + net.rank, "float32")
    broadcast_binomial(net, weights)
    ddp, optimizer = build_library(hidden, seed + net.rank)
    start, state = weights.copy(), copy.deepcopy(ddp.state_dict())
    runs = {"ours": lambda: train_ours(net, model, weights, gradient, batches),
            "library": lambda: train_library(ddp, optimizer, batches)}
    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    for repeat in range(repeats + 1):  # the first one warms up
        weights[:] = start
        ddp.load_state_dict(state)
        for side in list(runs)[::-1 if repeat % 2 else 1]:
            seconds[side].append(timed(net, runs[side]))
    final = {("even", "ours"): weights.copy(), ("even", "library"): vector(ddp)}

    weights[:] = start
    ddp.load_state_dict(state)
    mine = batches[:steps // 2] if net.rank == net.size - 1 else batches
    nothing = (data[0][:0], data[1][:0])
    train_ours(net, model, weights, gradient, mine + [nothing] * (steps - len(mine)), size_weighted)
    with ddp.join(divide_by_initial_world_size=False):
        train_library(ddp, optimizer, mine)
    final |= {("uneven", "ours"): weights, ("uneven", "library"): vector(ddp)}
    return final | {"seconds": {side: s[1:] for side, s in seconds.items()}}


def vector(model) -> np.ndarray:
    import torch

    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy().copy()


if __name__ == "__main__":
    main.cli()
