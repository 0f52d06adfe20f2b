"""Section 4.5 with torch: fully_shard (FSDP2) beside our stage 3.

Question   Does FSDP2 do what our stage 3 does, and what do its hooks cost or save?
Method     The same processes train the same MLP with Adam in float32 both ways in turns, ours over shared memory,
           torch's over gloo; then one reduce-scatter and all-gather on their own.
Read       The same losses from the same shards. FSDP2's step is the longer one here: gloo's collectives go through
           loopback TCP where ours go through shared memory, and each layer is copied in and out of its messages.
Source     Zhao et al. (2023), PyTorch FSDP: Experiences on scaling fully sharded data parallel;
           torch.distributed.fsdp.fully_shard.
"""
from __future__ import annotations

from math import ceil, sqrt
from typing import Annotated

import numpy as np
import typer

from part1_foundations.ch04_communication_primitives.collectives import (
    chunks,
    flat,
    ring_all_gather,
    ring_reduce_scatter,
)
from part1_foundations.ch04_communication_primitives.s4_05_mini_zero import batch, initial_weights
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from part1_foundations.ch04_communication_primitives.zero import Mlp, Zero
from shared import Run, demo, torch_world
from shared.fleet import preload
from shared.measure import Timing, human_bytes


@demo("4.5", library="torch (fully_shard, reduce_scatter_single, all_gather_single; gloo)", needs=("torch",),
      handles=("prefetch of the next layer", "resharding policy", "mixed precision", "sharded state dicts",
               "any module, any autograd graph"),
      smoke=dict(parameters=50_000, steps=4, repeats=3), laptop=dict(parameters=2_000_000, steps=5, repeats=7))
def main(run: Run, workers: Annotated[int, typer.Option(min=2)] = 2, parameters: int = 1_000_000, layers: int = 4,
         rows: int = 16, steps: int = 5, repeats: int = 5, seed: int = 0) -> None:
    """Train fully sharded with torch and with our stage 3.

    Args:
        workers: Worker processes, at least 2.
        parameters: Weights of the MLP, about: its width is rounded up to a multiple of the workers.
        layers: Layers of the MLP, all of one size.
        rows: Rows of each rank's batch.
        steps: Training steps of each repeat; the weights move on from one to the next.
    """
    preload("torch")  # in the background, while this process imports it too
    width = workers * ceil(sqrt(parameters / layers) / workers)
    ranks = torch_world.launch(workers, both, layers, width, rows, steps, repeats, seed, wire="shm", timeout=600)
    curves = {side: np.mean([rank["losses"][side] for rank in ranks], axis=0) for side in ("ours", "library")}
    training, halves = ({side: slowest([rank[what][side] for rank in ranks]) for side in curves}
                        for what in ("steps", "halves"))
    per_step = {side: Timing(tuple(s / steps for s in timing.samples)) for side, timing in training.items()}
    run.table(f"stage 3 on {workers} ranks, {layers} layers of {width} x {width}, float32", [
        (side, f"{curves[side][0]:.6f}", f"{curves[side][-1]:.6f}", str(ranks[0]["shards"][side])) for side in curves],
        ["side", "first loss", f"loss {len(curves['ours'])}", "values of each layer on rank 0"])
    run.compare(f"one training step, {human_bytes(16 * layers * width**2)} of state", **per_step)
    run.compare(f"reduce-scatter and all-gather of {human_bytes(4 * width**2)}", **halves)
    run.lines_of_code(ours=[Zero, Mlp, train_ours, ring_reduce_scatter, ring_all_gather, chunks, flat],
                      library=[build_library, train_library])
    run.record("losses", curves)

    run.claim(f"the loss curves of {len(curves['ours'])} steps agree, largest difference",
              measured=float(np.abs(curves["ours"] - curves["library"]).max()), at_most=1e-5)
    share = ceil(width**2 / workers)
    run.claim("every rank of fully_shard holds ceil(P/K) values of each tensor (the rank farthest from it)",
              measured=max((rank["shards"]["library"] for rank in ranks), key=lambda sizes: np.ptp([share, *sizes])),
              equals=[share] * layers)
    run.claim("torch's reduce-scatter and all-gather equal ours, largest relative difference",
              measured=max(rank["difference"] for rank in ranks), at_most=1e-6)


def train_ours(model: Mlp, batches: list[tuple]) -> list[float]:
    losses = []
    for x, y in batches:
        losses.append(model.loss_and_gradients(x, y))
        model.state.step()
    return losses


def build_library(layers: int, width: int, workers: int, seed: int) -> tuple:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    modules = []
    for weights in initial_weights(layers, width, "float32", seed):
        linear = torch.nn.Linear(width, width, bias=False)
        linear.weight.data = torch.from_numpy(weights.T.copy())  # torch multiplies by the transpose
        modules += [linear, torch.nn.Tanh()]
    model = torch.nn.Sequential(*modules[:-1])
    mesh = init_device_mesh("cpu", (workers,))
    for linear in model[::2]:
        fully_shard(linear, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def train_library(model, optimizer, batches: list[tuple]) -> list[float]:
    from torch.nn.functional import mse_loss

    losses = []
    for x, y in batches:
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def library_halves(x, mine, whole) -> None:
    """`x` reduced into `mine`, which is gathered into `whole`: once reduce_scatter_tensor, all_gather_into_tensor."""
    import torch.distributed as dist

    dist.reduce_scatter_single(mine, x)
    dist.all_gather_single(whole, mine)


def our_halves(net, x: np.ndarray) -> None:
    ring_reduce_scatter(net, x)
    ring_all_gather(net, x)


def both(net, layers: int, width: int, rows: int, steps: int, repeats: int, seed: int) -> dict:
    """On one rank: both trainings in turns, then both pairs of halves, on the same values."""
    import torch

    state = Zero(net, initial_weights(layers, width, "float32", seed), stage=3)
    mlp, (model, optimizer) = Mlp(state), build_library(layers, width, net.size, seed)
    shards = {"ours": [w.size for w in state.weights], "library": [p.to_local().numel() for p in model.parameters()]}
    losses: dict[str, list[float]] = {"ours": [], "library": []}
    result: dict = {"shards": shards, "losses": losses, "steps": {"ours": [], "library": []},
                    "halves": {"ours": [], "library": []}}
    for repeat in range(repeats + 1):
        batches = [batch(net.rank, net.size, repeat * steps + step, rows, width, seed) for step in range(steps)]
        ours = [(x.astype(np.float32), y.astype(np.float32)) for x, y in batches]
        library = [tuple(map(torch.from_numpy, pair)) for pair in ours]
        values = np.random.default_rng((seed, repeat, net.rank)).standard_normal(width * width).astype(np.float32)
        x, y, whole = values.copy(), torch.from_numpy(values.copy()), torch.empty(width * width)
        mine = torch.empty(width * width // net.size)
        turns = {("steps", "ours"): lambda: losses["ours"].extend(train_ours(mlp, ours)),
                 ("steps", "library"): lambda: losses["library"].extend(train_library(model, optimizer, library)),
                 ("halves", "ours"): lambda: our_halves(net, x),
                 ("halves", "library"): lambda: library_halves(y, mine, whole)}
        for what, side in list(turns)[::-1 if repeat % 2 else 1]:
            seconds = timed(net, turns[what, side])
            if repeat:  # the first one warms up
                result[what][side].append(seconds)
    return result | {"difference": float(np.abs(x - whole.numpy()).max() / np.abs(x).max())}


def draw(result: dict, axes) -> None:
    for (side, curve), style in zip(result["records"]["losses"].items(), ("-", "--")):
        axes.plot(range(1, len(curve) + 1), curve, style, label={"ours": "our stage 3", "library": "fully_shard"}[side])
    axes.set(xlabel="step", ylabel="loss", title="One training run, ours and FSDP2's")
    axes.legend()


if __name__ == "__main__":
    main.cli()
