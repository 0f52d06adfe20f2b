"""Section 4.1: communication over compute, the ratio that says when a training step is network-bound.

Question   When does adding workers stop paying, and which of parameters, batch and workers decides it?
Method     K processes train a torch MLP data-parallel: compute paced to a measured cost per example, ring all-reduce
           on a paced link, both timed; rates fitted at K=2 predict every other K.
Read       Parameters cancel out of gamma, the batch per worker does not: a fixed global batch crosses gamma = 1 as
           workers join, a fixed batch per worker hardly moves it.
Source     Goyal et al. (2017), Accurate, Large Minibatch SGD; Patarasuk & Yuan (2009) for the ring.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import ring
from part1_foundations.ch04_communication_primitives.costs import seconds as all_reduce_seconds
from part1_foundations.ch04_communication_primitives.timing import timed
from shared import Run, demo
from shared.errors import UsageError
from shared.fleet import check_workers, launch, paced, preload
from shared.measure import AlphaBeta, fit_alpha_beta, human_seconds
from shared.transport import Link

FLOAT = 4  # bytes of a float32 gradient entry
INPUTS, CLASSES = 64, 10
FLOPS = 6  # per parameter and example: 2 forward, 4 backward


@demo("4.1", needs=("torch",), smoke=dict(workers=4, parameters=100_000, wide=3, repeats=3),
      laptop=dict(workers=8, parameters=1_000_000, repeats=3),
      cluster=dict(workers=64, parameters=25_000_000, link="1gbe"))
def main(run: Run, workers: int = 4, parameters: int = 400_000, link: str = "0.05ms+0.05ms/20MBps", start: float = 0.5,
         wide: int = 1, repeats: int = 3, seed: int = 0) -> None:
    """Measure gamma = all-reduce time / compute time under strong and weak scaling.

    Args:
        workers: Largest world, at least 4; the powers of two below it run too.
        parameters: Weights of the MLP, approximately.
        wide: The comparison of sizes takes a model this many times as large, and one four times that.
        start: Gamma to begin with at K=2: the global batch is chosen for it from the measured cost per example.
    """
    wire, worlds = Link.named(link), [k for k in (1, 2, 4, 8, 16, 32, 64) if k < workers] + [workers]
    if workers < 4 or wire is None:
        raise UsageError("gamma against K needs --workers of at least 4 and a paced --link")
    check_workers(workers)
    preload("torch")
    [[real]] = launch(1, train, ring, [(parameters, 64)], (0, 0), 5, seed)
    slower = 8 * workers / run.result.machine["cores"]  # all workers' real compute then fills an eighth of the cores
    pace = tuple(slower * part / (real.weights * real.batch) for part in (real.forward, real.backward))
    an_example, unit = real.weights * sum(pace), math.lcm(*worlds)
    expected = all_reduce_seconds("ring", 2, FLOAT * real.weights, wire.latency + wire.overhead, 1 / wire.bandwidth)
    batch = unit * max(1, round(2 * expected / (start * an_example * unit)))
    run.note(f"MLP of {real.weights} weights; an example takes {human_seconds(an_example / slower)}, paced to "
             f"{human_seconds(an_example)}; link paced to {wire}; global batch {batch}")

    cells: dict[tuple, Step] = {}
    for k in run.progress(worlds, "worlds"):
        plan: dict = {scaling: (parameters, share) for scaling, share in local_batches(batch, k).items()}
        if k == 2:  # where weak and strong are the same; instead, other parameters with a small batch
            plan = {"strong": plan["strong"]} | {x: (x * parameters, max(1, batch // 16)) for x in (wide, 4 * wide)}
        ranks = launch(k, train, ring, list(plan.values()), pace, repeats, seed, fabric=wire, timeout=600)
        cells |= {(name, k): slowest_rank(steps) for name, steps in zip(plan, zip(*ranks, strict=True), strict=True)}
    cells["weak", 2] = cells["strong", 2]
    sizes = [cells[size, 2] for size in (wide, 4 * wide)]
    fit = fit_at_two(cells["strong", 2], sizes)
    run.note(f"fitted at K=2: {fit.flops / 1e9:.3g} GFLOP/s, alpha {human_seconds(fit.link.alpha)}, "
             f"{fit.link.bandwidth / 1e6:.1f} MB/s (R2 {fit.link.r2:.4f})")
    judge_scaling(run, cells, fit)
    judge_parameters(run, sizes, fit)


@dataclass(frozen=True)
class Step:
    """Median seconds of the parts of one training step; `busy`: the share of paced time with real compute."""

    workers: int
    weights: int
    batch: int
    forward: float
    backward: float
    all_reduce: float
    busy: float

    @property
    def gamma(self) -> float:
        return self.all_reduce / (self.forward + self.backward)


@dataclass(frozen=True)
class Fit:
    """What two workers tell about any number of them."""

    flops: float
    link: AlphaBeta

    def gamma(self, workers: int, weights: int, batch: int) -> float:
        communication = all_reduce_seconds("ring", workers, FLOAT * weights, self.link.alpha, self.link.beta)
        return communication * self.flops / (FLOPS * weights * batch)

    def latency_share(self, weights: int) -> float:
        """How much of the all-reduce of two workers is latency."""
        return self.link.alpha / float(self.link.predict(FLOAT * weights / 2))


def local_batches(batch: int, workers: int) -> dict[str, int]:
    """Examples a worker gets: strong scaling divides the global batch, weak scaling keeps the share it had at K=2."""
    return {"strong": batch // workers, "weak": batch // 2}


def train(net, all_reduce: Callable, plan: Sequence[tuple[int, int]], pace: tuple[float, float], repeats: int,
          seed: int) -> list[Step]:
    """On one rank: `repeats` steps for each (parameters, local batch) of the plan; medians of their parts.
    `pace`: seconds per weight and example that forward and backward last at least."""
    import torch

    steps = []
    for parameters, batch in plan:
        torch.manual_seed(seed)
        model, (x, y) = mlp(parameters), examples(batch, seed + net.rank)
        p = sum(weight.numel() for weight in model.parameters())
        torch.nn.functional.cross_entropy(model(x), y).backward()
        update(model, torch.zeros(p))
        samples = [step(net, all_reduce, model, x, y, pace[0] * p * batch, pace[1] * p * batch) for _ in range(repeats)]
        net.barrier()  # so that nobody computes unpaced beside a neighbour's last all-reduce
        steps.append(Step(net.size, p, batch, *np.median(samples, axis=0).tolist()))
    return steps


def step(net, all_reduce: Callable, model, x, y, forward: float = 0, backward: float = 0) -> tuple[float, ...]:
    """One step of data-parallel SGD: seconds of forward, backward (paced to these) and all-reduce, and the share of
    paced time that was real compute."""
    import torch

    net.barrier()
    begin = time.perf_counter()
    with paced(forward):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        real = time.perf_counter() - begin
    middle = time.perf_counter()
    with paced(backward):
        loss.backward()
        real += time.perf_counter() - middle
    end = time.perf_counter()
    gradient = torch.cat([weight.grad.reshape(-1) for weight in model.parameters()])
    communication = timed(net, lambda: all_reduce(net, gradient.numpy()))
    update(model, gradient / net.size)
    return middle - begin, end - middle, communication, real / (end - begin)


def update(model, gradient, rate: float = 0.01) -> None:
    """SGD: subtract the flat gradient, and forget it."""
    import torch

    with torch.no_grad():
        pieces = gradient.split([weight.numel() for weight in model.parameters()])
        for weight, piece in zip(model.parameters(), pieces, strict=True):
            weight -= rate * piece.view_as(weight)
            weight.grad = None


def mlp(parameters: int):
    """A torch MLP with two hidden layers of h units, where h^2 + (INPUTS + CLASSES + 2) h is about `parameters`."""
    from torch import nn

    b = INPUTS + CLASSES + 2
    h = max(1, round((math.sqrt(b * b + 4 * parameters) - b) / 2))
    return nn.Sequential(nn.Linear(INPUTS, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, CLASSES))


def examples(batch: int, seed: int):
    """Random inputs of shape (batch, INPUTS) and labels, as tensors."""
    import torch

    rng = np.random.default_rng(seed)
    x, labels = rng.standard_normal((batch, INPUTS), np.float32), rng.integers(0, CLASSES, batch)
    return torch.from_numpy(x), torch.from_numpy(labels)


def slowest_rank(steps: Sequence[Step]) -> Step:
    """The step of the whole world: each part is over when the last rank is done."""
    parts = ("forward", "backward", "all_reduce", "busy")
    return replace(steps[0], **{part: max(getattr(step, part) for step in steps) for part in parts})


def fit_at_two(first: Step, others: Sequence[Step]) -> Fit:
    """FLOP rate of the first step, alpha-beta of all: two workers reduce by two messages of half the gradient."""
    steps = [first, *others]
    link = fit_alpha_beta([FLOAT * step.weights / 2 for step in steps], [step.all_reduce / 2 for step in steps])
    return Fit(FLOPS * first.weights * first.batch / (first.forward + first.backward), link)


def judge_scaling(run: Run, cells: dict[tuple, Step], fit: Fit) -> None:
    curves: dict[str, dict[str, list]] = {}
    for scaling in ("strong", "weak"):
        steps = [cells[scaling, k] for k in sorted(k for name, k in cells if name == scaling)]
        predicted = [fit.gamma(step.workers, step.weights, step.batch) for step in steps]
        rows = [(s.workers, s.batch, human_seconds(s.forward), human_seconds(s.backward), human_seconds(s.all_reduce),
                 f"{s.gamma:.2f}", f"{guess:.2f}", f"{s.busy:.0%}") for s, guess in zip(steps, predicted, strict=True)]
        run.table(f"{scaling} scaling", rows, ["K", "local batch", "forward", "backward", "all-reduce", "gamma",
                                               "predicted", "really busy"])
        curves[scaling] = {"workers": [step.workers for step in steps[1:]], "gamma": [step.gamma for step in steps[1:]],
                           "predicted": predicted[1:]}  # without K=1, which has nobody to talk to
    run.record("curves", curves)
    strong, weak = curves["strong"], curves["weak"]
    errors = [np.divide(curve["gamma"], curve["predicted"])[1:] - 1 for curve in (strong, weak)]
    crossing, guess = (break_even(strong["workers"], strong[kind]) for kind in ("gamma", "predicted"))
    run.note(f"strong scaling breaks even at K = {crossing:.2f}; predicted {guess:.2f}")
    run.claim("gamma is within 30 % of the prediction at every K that was not fitted (largest error)",
              measured=np.max(np.abs(errors)), at_most=0.3, timing=True)
    run.claim("under strong scaling gamma grows with K and crosses 1 (break-even K)", measured=crossing,
              between=(2, strong["workers"][-1]), timing=True)
    run.claim("under weak scaling gamma changes by less than 2x from K=2 up (largest / smallest)", timing=True,
              measured=max(weak["gamma"]) / min(weak["gamma"]), below=2)


def break_even(workers: Sequence[int], gamma: Sequence[float]) -> float:
    """The K at which gamma passes 1, between the measured ones; NaN unless it grows with every K and passes 1."""
    grows = all(b > a for a, b in zip(gamma, gamma[1:], strict=False))
    return float(np.interp(1, gamma, workers, left=np.nan, right=np.nan)) if grows else math.nan


def judge_parameters(run: Run, steps: Sequence[Step], fit: Fit) -> None:
    """Steps of two workers that differ in parameters alone, each four times those of the one before."""
    run.table("two workers, the same batch, other parameters", [
        (step.weights, step.batch, human_seconds(step.forward + step.backward), human_seconds(step.all_reduce),
         f"{fit.latency_share(step.weights):.1%}", f"{step.gamma:.2f}") for step in steps],
        ["weights", "local batch", "compute", "all-reduce", "of it latency", "gamma"])
    changes = [abs(more.gamma / fewer.gamma - 1) for fewer, more in zip(steps, steps[1:], strict=False)
               if fit.latency_share(fewer.weights) < 0.05]
    run.claim("quadrupling the parameters changes gamma by under 30 % once latency is under 5 % (largest change)",
              measured=max(changes, default=math.nan), below=0.3, timing=True)


def draw(result: dict, axes) -> None:
    for scaling, curve in result["records"]["curves"].items():
        [points] = axes.plot(curve["workers"], curve["gamma"], "o", label=f"{scaling} scaling")
        axes.plot(curve["workers"], curve["predicted"], "-", color=points.get_color(), linewidth=1)
    axes.axhline(1, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="workers K", ylabel="gamma = all-reduce / compute", xticks=curve["workers"],
             title="Points measured, lines predicted from K=2; above 1 the network decides")
    axes.legend()


if __name__ == "__main__":
    main.cli()
