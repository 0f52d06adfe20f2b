"""Section 4.3: data-parallel SGD from a ring all-reduce, and four ways to get it wrong.

Question   What keeps K replicas one model, and which mistakes in the synchronisation does nobody notice?
Method     K processes train a torch MLP on digits, one flat gradient all-reduced a step, then repeat the run with
           four faults; a one-process run on the union batches is the reference.
Read       A hash of the weights, compared each step, catches every fault that drives replicas apart; the mean of
           means keeps them identical and wrong, and only the reference shows it.
Source     Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import typer

from part1_foundations.ch04_communication_primitives.collectives import broadcast_binomial, bruck_all_gather, ring
from shared import Run, demo
from shared.data import digits
from shared.fleet import check_workers, launch, preload

ROWS = 16  # of the union batch, for each rank
RATE = 0.5  # learning rate


@demo("4.3", needs=("torch", "sklearn"), smoke=dict(workers=2, steps=10), laptop=dict(workers=4, steps=200))
def main(run: Run, workers: Annotated[int, typer.Option(min=2)] = 4, steps: int = 100, hidden: int = 32,
         seed: int = 0) -> None:
    """Train with every way of synchronising.

    Args:
        workers: Worker processes, at least 2: one alone has nobody to disagree with.
        hidden: Units in the MLP's hidden layer.
    """
    check_workers(workers)
    preload("torch", "sklearn", "scipy")  # in the background, once for all workers
    [alone] = launch(1, one_process, workers, steps, hidden, seed)
    cases = scenarios(steps)
    ranks = launch(workers, train_all, cases, steps, hidden, seed, timeout=600)

    replicas = {name: np.stack([rank[name].weights for rank in ranks]) for name in cases}  # (ranks, steps, parameters)
    apart = {name: distance(w, w[0]) for name, w in replicas.items()}  # (steps,): the farthest replica from rank 0's
    from_reference = {name: distance(w, alone.weights) for name, w in replicas.items()}
    flagged = {name: ranks[0][name].flagged for name in cases}  # the steps in which the hashes differed
    rows = [(name, flagged[name][0] + 1 if flagged[name] else "never", f"{apart[name][-1]:.1e}",
             f"{from_reference[name].max():.1e}", f"{ranks[0][name].accuracy:.3f}") for name in cases]
    run.table(f"{workers} replicas of {alone.weights.shape[1]} parameters, {steps} steps of {ROWS} rows a rank", [
        *rows, ("one process, union batch", "", "", "", f"{alone.accuracy:.3f}")],
        ["run", "hash flags step", "replicas apart", "from one process", "accuracy"],
        note="apart: at the end, from rank 0's weights; from one process: the largest of all steps; both Euclidean")
    run.note(f"one rank skips step {steps // 2 + 1}; the other faults are there from step 1")
    run.record("apart", apart)
    run.record("from_reference", from_reference)

    healthy = replicas["healthy"]
    run.claim("replicas are bit-identical after every healthy step (weights that differ)",
              measured=int(np.count_nonzero(healthy.view(np.uint64) != healthy[0].view(np.uint64))), equals=0)
    run.claim("healthy replicas stay with the one-process run, distance",
              measured=from_reference["healthy"].max(), below=1e-10)
    fault = {name: case.fault_step for name, case in cases.items() if case.fault_step is not None}
    run.claim("the hash check flags the three diverging faults within one step (steps from fault to flag)",
              measured=[flagged[name][0] - fault[name] + 1 if flagged[name] else -1 for name in fault],
              equals=[1, 1, 1])
    run.claim("the hash check misses the mean of means (steps flagged)",
              measured=len(flagged["mean of means"]), equals=0)
    run.claim("the one-process run exposes the mean of means, distance",
              measured=from_reference["mean of means"].max(), above=1e-3)
    run.claim("weighting by shard size restores agreement under unequal shards, distance",
              measured=from_reference["unequal, weighted by size"].max(), below=1e-10)


# --- one update from everyone's gradients: right, and wrong -----------------------------------------------------------
# Each gets this rank's gradient of its mean loss over `rows` rows, both flat arrays, and changes `weights` in place.


def average(net, weights: np.ndarray, gradient: np.ndarray, rows: int, step: int) -> None:
    """The mean of the ranks' means: the gradient of the union batch if all shards are equal, of nothing otherwise."""
    ring(net, gradient)
    weights -= RATE * (gradient / net.size)


def size_weighted(net, weights: np.ndarray, gradient: np.ndarray, rows: int, step: int) -> None:
    """The gradient of the union batch for any shards: sums of row gradients over the sum of rows, in one all-reduce."""
    message = ring(net, np.append(gradient * rows, gradient.dtype.type(rows)))
    weights -= RATE * (message[:-1] / message[-1])


def skipping(net, weights: np.ndarray, gradient: np.ndarray, rows: int, step: int, at: int) -> None:
    """The last rank takes its own gradient for the result in step `at` (and takes part, or the others would wait)."""
    own = gradient.copy()
    ring(net, gradient)
    skips = step == at and net.rank == net.size - 1
    weights -= RATE * (own if skips else gradient / net.size)


def own_first(net, weights: np.ndarray, gradient: np.ndarray, rows: int, step: int) -> None:
    """All ranks apply all gradients, but each starts with its own: floating-point addition is not associative."""
    for one in np.roll(bruck_all_gather(net, gradient), -net.rank, axis=0):
        weights -= RATE / net.size * one


@dataclass(frozen=True)
class Scenario:
    update: Callable[..., None]
    fault_step: int | None = None  # the first step after which replicas must differ
    broadcast: bool = True  # of rank 0's initial weights
    shift: int = 0  # rows that the first rank has too many and the last rank too few


def scenarios(steps: int) -> dict[str, Scenario]:
    return {
        "healthy": Scenario(average),
        "one rank skips a reduction": Scenario(partial(skipping, at=steps // 2), fault_step=steps // 2),
        "no initial broadcast": Scenario(average, fault_step=0, broadcast=False),
        "own gradient added first": Scenario(own_first, fault_step=0),
        "mean of means": Scenario(average, shift=ROWS // 2),
        "unequal, weighted by size": Scenario(size_weighted, shift=ROWS // 2),
    }


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    weights: np.ndarray  # (steps, parameters): after each step
    flagged: list[int]
    accuracy: float  # on all digits, after the last step


def train_all(net, cases: dict[str, Scenario], steps: int, hidden: int, seed: int) -> dict[str, Trace]:
    """On one rank: the same training under every scenario."""
    data = as_tensors(*digits())
    return {name: train(net, case, data, steps, hidden, seed) for name, case in cases.items()}


def train(net, case: Scenario, data: tuple, steps: int, hidden: int, seed: int) -> Trace:
    """Data-parallel SGD: everyone starts from rank 0's weights, sees its own rows, applies everyone's gradients."""
    model, weights, gradient = flat_model(hidden, seed + net.rank)
    if case.broadcast:
        broadcast_binomial(net, weights)
    history, flagged = [], []
    first, last = shard(net.rank, net.size, case.shift)
    for step, union in enumerate(union_batches(len(data[1]), net.size, steps, seed)):
        mine = union[first:last]
        train_step(net, model, weights, gradient, data[0][mine], data[1][mine], step, case.update)
        if not same_everywhere(net, weights):
            flagged.append(step)
        history.append(weights.copy())
    return Trace(np.array(history), flagged, accuracy(model, data))


def train_step(net, model, weights: np.ndarray, gradient: np.ndarray, x, y, step: int,
               update: Callable[..., None]) -> None:
    """Backward on this rank's rows (none is allowed), then the common update."""
    from torch.nn.functional import cross_entropy

    gradient[:] = 0
    if len(y):
        cross_entropy(model(x), y).backward()
    update(net, weights, gradient, len(y), step)


def same_everywhere(net, weights: np.ndarray) -> bool:
    """Whether all ranks hold the same bits: 32 bytes from each tell."""
    digests = bruck_all_gather(net, fingerprint(weights))
    return bool((digests == digests[0]).all())


def fingerprint(weights: np.ndarray) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(weights.tobytes()).digest(), np.uint8)


def one_process(net, workers: int, steps: int, hidden: int, seed: int) -> Trace:
    """The reference, as one would write it without any of the above: torch's SGD on the union of the K shards."""
    import torch

    x, y = as_tensors(*digits())
    model, history = mlp(hidden, seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for union in union_batches(len(y), workers, steps, seed):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[union]), y[union]).backward()
        optimizer.step()
        history.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy())
    return Trace(np.array(history), [], accuracy(model, (x, y)))


def mlp(hidden: int, seed: int, dtype: str = "float64"):
    import torch

    torch.manual_seed(seed)
    layers = torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)
    return torch.nn.Sequential(*layers).to(getattr(torch, dtype))


def flat_model(hidden: int, seed: int, dtype: str = "float64") -> tuple:
    """(model, weights, gradient): the model's parameters and their gradients are views of the two flat arrays."""
    import torch

    model = mlp(hidden, seed, dtype)
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    gradient = torch.zeros_like(weights)
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter, piece in zip(model.parameters(), gradient.split(sizes)):
        parameter.grad = piece.view_as(parameter)
    return model, weights.numpy(), gradient.numpy()


def as_tensors(x: np.ndarray, y: np.ndarray, dtype: str = "float64") -> tuple:
    import torch

    return torch.from_numpy(x.astype(dtype)), torch.from_numpy(y)


def accuracy(model, data: tuple) -> float:
    return float((model(data[0]).argmax(1) == data[1]).double().mean())


def union_batches(population: int, workers: int, steps: int, seed: int) -> np.ndarray:
    """Row numbers of every step's union batch, shape (steps, ROWS * workers), drawn with replacement."""
    return np.random.default_rng(seed).integers(0, population, (steps, ROWS * workers))


def shard(rank: int, workers: int, shift: int = 0) -> tuple[int, int]:
    """First row of a union batch that is `rank`'s, and the one after its last. All but the ends move by `shift`."""
    return rank * ROWS + shift * (rank > 0), (rank + 1) * ROWS + shift * (rank + 1 < workers)


def distance(weights: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of the rank farthest from `reference` (steps, parameters), for each step: Euclidean, shape (steps,)."""
    return np.linalg.norm(weights - reference, axis=-1).max(axis=0)


def draw(result: dict, axes) -> None:
    records, floor = result["records"], 1e-18  # zero has no place on a logarithmic axis
    for name, apart in records["apart"].items():
        axes.plot(range(1, len(apart) + 1), np.maximum(apart, floor), "-" if max(apart) else "--", label=name)
    axes.set(yscale="log", xlabel="step", ylabel="distance between replicas", title="How far the replicas drift apart")
    axes.text(1, floor * 2, "identical", va="bottom")
    axes.legend()


if __name__ == "__main__":
    main.cli()
