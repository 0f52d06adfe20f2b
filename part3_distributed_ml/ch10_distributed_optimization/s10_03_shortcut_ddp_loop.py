"""Section 10.3 with torch: DistributedDataParallel beside our synchronous loop.

Question   Does DDP take the same steps as our loop, also with momentum, with Adam and with a short last batch?
Method     The same ranks train the same least squares on the same batches both ways, in turns; the one-process path is
           the reference of both.
Read       DDP divides by K, so each rank scales its loss by its share of the batch; then both end at the weights of one
           process. On so small a model the time of a step is overhead: hooks and loopback TCP against one message.
Source     Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training.
"""
from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
import typer

from part1_foundations.ch04_communication_primitives.collectives import ring, ring_all_gather, ring_reduce_scatter
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from part3_distributed_ml.ch10_distributed_optimization.optim import (
    Adam,
    LeastSquares,
    Sgd,
    epoch_batches,
    sgd,
    size_weighted,
    sync_sgd,
)
from part3_distributed_ml.ch10_distributed_optimization.s10_03_sync_equals_big_batch import FEATURES, NOISE, ROWS, RUNS
from shared import Run, demo, torch_world
from shared.fleet import preload
from shared.measure import Timing

OURS = {name: optimizer for name, (optimizer, average) in RUNS.items() if average is size_weighted}


@demo("10.3", library="torch (DistributedDataParallel; gloo)", needs=("torch",),
      handles=("autograd", "initial broadcast", "hooks that start each bucket during backward", "buckets and overlap"),
      smoke=dict(steps=20, repeats=3), laptop=dict(steps=200, repeats=15))
def main(run: Run, workers: Annotated[int, typer.Option(min=2)] = 2, steps: Annotated[int, typer.Option(min=6)] = 50,
         repeats: int = 7, seed: int = 0) -> None:
    """Train with DDP and with our own synchronous loop.

    Args:
        workers: Worker processes, at least 2.
        steps: Training steps of each repeat; every fifth batch is short.
    """
    preload("torch")
    problem = LeastSquares.planted(4 * ROWS * workers + ROWS + ROWS // 8, FEATURES, NOISE, seed)
    batches = epoch_batches(problem.examples, ROWS * workers, steps, seed)
    ranks = torch_world.launch(workers, both, problem, batches, repeats, wire="shm", timeout=600)
    alone = {name: sgd(problem, optimizer(), np.zeros(FEATURES), batches)[-1] for name, optimizer in OURS.items()}
    apart = {(side, name): max(float(np.abs(rank[side, name] - alone[name]).max()) for rank in ranks)
             for side in ("ours", "library") for name in OURS}
    run.table(f"final weights after {steps} steps on {workers} processes, largest distance from one process", [
        (name, f"{apart['ours', name]:.1e}", f"{apart['library', name]:.1e}") for name in OURS],
        ["optimizer", "ours", "DDP"], note=f"float64; every fifth batch has {ROWS + ROWS // 8} rows instead of "
        f"{ROWS * workers}: DDP's ranks scale their losses")
    ours, library = (Timing(tuple(s / steps for s in slowest([rank["seconds"][side] for rank in ranks]).samples))
                     for side in ("ours", "library"))
    run.compare(f"one SGD step of {workers} processes, {FEATURES} weights", ours, library)
    run.lines_of_code(ours=[sync_sgd, size_weighted, LeastSquares, Sgd, Adam, ring, ring_reduce_scatter,
                            ring_all_gather], library=[build_library, train_library])
    for name in OURS:
        run.claim(f"DDP with {name} ends at the weights of one process, largest difference",
                  measured=apart["library", name], at_most=1e-10)
        run.claim(f"and so do ours with {name}", measured=apart["ours", name], at_most=1e-10)


def build_library(optimizer: Sgd | Adam) -> tuple:
    import torch

    model = torch.nn.Linear(FEATURES, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    model = torch.nn.parallel.DistributedDataParallel(model)
    if isinstance(optimizer, Adam):
        return model, torch.optim.Adam(model.parameters(), lr=optimizer.rate)
    return model, torch.optim.SGD(model.parameters(), lr=optimizer.rate, momentum=optimizer.momentum)


def train_library(model, optimizer, x, y, batches: list, rank: int, size: int) -> None:
    for batch in batches:
        mine = batch[rank * ROWS:(rank + 1) * ROWS]
        optimizer.zero_grad()
        loss = ((model(x[mine])[:, 0] - y[mine]) ** 2).sum() / (2 * len(batch))  # this rank's part of the batch's mean
        (loss * size).backward()  # DDP will divide by the number of ranks
        optimizer.step()


def both(net, problem: LeastSquares, batches: list[np.ndarray], repeats: int) -> dict:
    """On one rank: final weights of each optimizer on both sides, and seconds of SGD in turns, from the same start."""
    import torch

    x, y = torch.from_numpy(problem.x), torch.from_numpy(problem.y)
    rows = [torch.from_numpy(batch) for batch in batches]
    final, seconds = {}, {"ours": [], "library": []}

    def ours(optimizer) -> np.ndarray:
        return sync_sgd(net, problem, optimizer, np.zeros(FEATURES), batches, ROWS).weights[-1]

    for name, make in OURS.items():
        final["ours", name] = ours(make())
        model, optimizer = build_library(make())
        train_library(model, optimizer, x, y, rows, net.rank, net.size)
        final["library", name] = model.module.weight.detach().numpy()[0].copy()
    for repeat in range(repeats):
        model, optimizer = build_library(OURS["SGD"]())
        sides = {"ours": partial(ours, OURS["SGD"]()),
                 "library": partial(train_library, model, optimizer, x, y, rows, net.rank, net.size)}
        for side in list(sides)[::-1 if repeat % 2 else 1]:
            seconds[side].append(timed(net, sides[side]))
    return final | {"seconds": seconds}


if __name__ == "__main__":
    main.cli()
