"""Section 4.5: reduce-scatter, all-gather, and a trainer that shards its state with them.

Question   What does it cost in bytes on the wire to divide the memory of a training run by K?
Method     The halves of all-reduce on their own; then K processes train one MLP with Adam in ZeRO stages 0 to 3,
           state bytes read off the live buffers, sent bytes counted, losses compared in float64.
Read       Stages 1 and 2 divide moments and gradients for nothing, for all-reduce was reduce-scatter and all-gather
           all along; only stage 3, which fetches weights twice, pays: half as much again.
Source     Rajbhandari et al. (2020), ZeRO; Bruck et al. (1997), Efficient algorithms for all-to-all communications.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Annotated

import numpy as np
import typer

from part1_foundations.ch04_communication_primitives.collectives import (
    bruck_all_gather,
    chunks,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
)
from part1_foundations.ch04_communication_primitives.zero import Mlp, Zero
from shared import Run, demo
from shared.fleet import launch
from shared.measure import human_bytes, peak_memory

STAGES = {0: "nothing", 1: "moments", 2: "moments, gradients", 3: "moments, gradients, weights"}
FLOAT32 = 4  # bytes


@demo("4.5", smoke=dict(workers=2, parameters=200_000, steps=4), laptop=dict(workers=4, parameters=5_000_000, steps=5))
def main(run: Run, workers: Annotated[int, typer.Option(min=2)] = 4, parameters: int = 1_000_000, layers: int = 4,
         rows: int = 16, steps: int = 5, seed: int = 0) -> None:
    """Shard a training run stage by stage.

    Args:
        workers: Worker processes, at least 2.
        parameters: Weights of the MLP, about: its width is rounded up to a multiple of the workers.
        layers: Layers of the MLP, all of one size.
        rows: Rows of each rank's batch.
    """
    width = workers * ceil(sqrt(parameters / layers) / workers)
    k, p = workers, layers * width * width  # every layer divides evenly by K: no padding anywhere
    halves, n = launch(k, split_all_reduce, width**2, seed, wire="shm"), 8 * width**2
    run.table(f"one buffer of {human_bytes(n)} (n) on {k} ranks", [
        (name, messages, f"{nbytes / n:.3f} n") for name, (messages, nbytes) in halves[0]["sent"].items()],
        ["primitive", "messages a rank", "bytes a rank"])

    setting = (layers, width, rows, steps, seed)
    runs = {stage: launch(k, train_both, stage, *setting, wire="shm", timeout=600)
            for stage in run.progress(STAGES, "stages")}
    single = {stage: [rank["float32"] for rank in ranks] for stage, ranks in runs.items()}
    runs["one process"] = launch(1, train_both, 0, layers, width, rows * k, steps, seed, timeout=600)
    curves = {name: np.mean([rank["float64"].losses for rank in ranks], axis=0) for name, ranks in runs.items()}

    unit = 2 * (k - 1) * FLOAT32 * p * steps  # what one ring all-reduce of the gradient a step makes all ranks send
    traffic = {stage: sum(rank.sent for rank in ranks) / unit for stage, ranks in single.items()}
    state = {stage: max(sum(rank.state.values()) for rank in ranks) for stage, ranks in single.items()}
    run.table(f"Adam on {p} parameters in float32, {k} ranks, {steps} steps", [
        (stage, sharded, human_bytes(state[stage]), f"{state[stage] / p:g} P",
         human_bytes(single[stage][0].sent / steps), f"{traffic[stage]:g}x",
         human_bytes(max(rank.growth for rank in single[stage])),
         f"{np.mean([rank.losses[-1] for rank in single[stage]]):.5f}") for stage, sharded in STAGES.items()],
        ["stage", "sharded", "state a rank", "bytes", "sent a step", "traffic", "peak growth", "loss"],
        note="state: weights, gradients and moments alive between steps; sent: by one rank; peak growth: "
             "resident memory, activations and passing buffers included")
    run.note(f"float64: loss {curves[0][0]:.4f} before the first step, {curves[0][-1]:.4f} before the last")
    run.record("workers", k)
    run.record("state", list(state.values()))
    run.record("sent", [ranks[0].sent / steps for ranks in single.values()])
    run.record("losses", {str(stage): curve for stage, curve in curves.items()})

    run.claim("reduce-scatter then all-gather, ring or Bruck, equals ring all-reduce bit for bit (values that differ)",
              measured=sum(rank["different"] for rank in halves), equals=0)
    expected = [16 * p, 8 * p + 8 * p // k, 4 * p + 12 * p // k, 16 * p // k]
    run.claim("Adam's state in float32 is 16P, 4P+4P+8P/K, 4P+12P/K, 16P/K bytes on every rank (the farthest from it)",
              measured=[farthest((sum(rank.state.values()) for rank in ranks), nbytes)
                        for ranks, nbytes in zip(single.values(), expected)], equals=expected, unit="B")
    run.claim("stages 0 to 2 move the bytes of a gradient all-reduce, 2(K-1)/K of it a rank, and stage 3 half more",
              measured=list(traffic.values()), equals=[1.0, 1.0, 1.0, 1.5])
    run.claim("the loss curves of the stages and of one process agree in float64, largest difference",
              measured=float(max(np.abs(curve - curves[0]).max() for curve in curves.values())), at_most=1e-10)


def split_all_reduce(net, elements: int, seed: int) -> dict:
    """On one rank: all-reduce, and its halves kept apart; what each sent and how many values differ in any bit."""
    x = np.random.default_rng((seed, net.rank)).standard_normal(elements)
    sent, results = {}, {}

    def counted(name: str, operation) -> None:
        net.reset_stats()
        results[name] = operation()
        sent[name] = (net.stats().sent_to().messages, net.stats().sent_to().bytes)

    counted("ring all-reduce", lambda: ring(net, x.copy()))
    counted("ring reduce-scatter", lambda: ring_reduce_scatter(net, x.copy()).copy())
    mine = results["ring reduce-scatter"]
    whole = np.full_like(x, np.nan)
    chunks(whole, net.size)[net.rank][:] = mine
    counted("ring all-gather", lambda: ring_all_gather(net, whole))
    counted("Bruck all-gather", lambda: bruck_all_gather(net, mine).reshape(-1))
    bits = {name: result.view(np.uint64) for name, result in results.items()}
    gathered = np.stack([bits["ring all-gather"], bits["Bruck all-gather"]])
    return {"sent": sent, "different": int(np.count_nonzero(gathered != bits["ring all-reduce"]))}


@dataclass(frozen=True)
class Trained:
    losses: list[float]  # this rank's, before each step
    sent: int  # bytes, over all steps
    state: dict[str, int]  # bytes of weights, gradients and moments
    growth: int  # bytes: the process's peak memory, less what it had before


def train_both(net, stage: int, *setting: int) -> dict[str, Trained]:
    """On one rank: float32 for the bytes (first, since peak memory never falls), then float64 for the losses."""
    return {dtype: train(net, stage, dtype, *setting) for dtype in ("float32", "float64")}


def train(net, stage: int, dtype: str, layers: int, width: int, rows: int, steps: int, seed: int) -> Trained:
    """Data-parallel Adam with the model state sharded as `stage` says."""
    before = peak_memory()
    state = Zero(net, initial_weights(layers, width, dtype, seed), stage)
    model, losses = Mlp(state), []
    net.reset_stats()
    for step in range(steps):
        x, y = batch(net.rank, net.size, step, rows, width, seed)
        losses.append(model.loss_and_gradients(x.astype(dtype), y.astype(dtype)))
        state.step()
    return Trained(losses, net.stats().sent_to().bytes, state.state_bytes(), peak_memory() - before)


def initial_weights(layers: int, width: int, dtype: str, seed: int) -> Iterator[np.ndarray]:
    """The same on every rank, one layer at a time, each (width, width)."""
    rng = np.random.default_rng(seed)
    for _ in range(layers):
        weights = rng.standard_normal((width, width), dtype=dtype)
        weights *= 1 / sqrt(width)
        yield weights


def batch(rank: int, workers: int, step: int, rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """This rank's rows of the step's union batch: x and the target, a smooth mix of neighbouring inputs."""
    x = np.random.default_rng((seed, step)).standard_normal((rows * workers, width))
    x = x[rank * rows:(rank + 1) * rows]
    return x, np.sin(x + np.roll(x, 1, axis=1))


def farthest(values, expected: int) -> int:
    return max(values, key=lambda value: abs(value - expected))


def draw(result: dict, axes) -> None:
    records = result["records"]
    traffic, state = (np.array(records[name]) / 2**20 for name in ("sent", "state"))
    axes.plot(traffic, state, "o", markersize=8)
    for stage, (x, y) in enumerate(zip(traffic, state)):
        axes.annotate(f"stage {stage}: {STAGES[stage]} sharded", (x, y), xytext=(8 if stage < 3 else -8, 0),
                      textcoords="offset points", ha="left" if stage < 3 else "right", va="center")
    axes.set(xlim=(0.9 * min(traffic), 1.1 * max(traffic)), ylim=(0, 1.1 * max(state)),
             xlabel="MiB sent by a rank in a step", ylabel="MiB of model state on a rank",
             title=f"Memory against traffic, {records['workers']} ranks")


if __name__ == "__main__":
    main.cli()
