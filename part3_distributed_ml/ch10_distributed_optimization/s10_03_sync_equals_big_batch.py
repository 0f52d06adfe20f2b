"""Section 10.3: synchronous SGD traces the big batch's path; backup workers trade gradients for time.

Question   What does a synchronous step cost beyond one process with the whole batch, and can it wait for fewer?
Method     K processes with ring all-reduce against one process, whole paths compared, then with heavy-tailed paced
           gradients and b backup workers; order statistics plus alpha-beta, both measured here, predict each step.
Read       The paths agree to rounding, unless a short batch is averaged without weights. A step lasts as long as the
           slowest gradient it waits for: one backup buys much of the tail, each further one less.
Source     Chen et al. (2016), Revisiting Distributed Synchronous SGD.
"""
from __future__ import annotations

from functools import partial
from math import comb
from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives.costs import seconds
from part1_foundations.ch04_communication_primitives.timing import fit_link
from part3_distributed_ml.ch10_distributed_optimization.optim import (
    Adam,
    LeastSquares,
    Sgd,
    Trace,
    epoch_batches,
    mean_of_means,
    sgd,
    size_weighted,
    sync_sgd,
)
from shared import Run, demo
from shared.fleet import launch
from shared.measure import AlphaBeta
from shared.transport import Link

FEATURES, NOISE, FLOAT = 20, 0.5, 8  # of the least squares; bytes of a float64
ROWS = 64  # of each worker in a full global batch
UNWEIGHTED = "SGD, mean of means"
RUNS = {  # what is compared with one process: optimizer, and how gradients are averaged
    "SGD": (partial(Sgd, 0.1), size_weighted),
    "momentum": (partial(Sgd, 0.02, momentum=0.9), size_weighted),
    "Adam": (partial(Adam, 0.02), size_weighted),
    UNWEIGHTED: (partial(Sgd, 0.1), mean_of_means),
}


@demo("10.3", smoke=dict(workers=2, steps=30), laptop=dict(workers=8, steps=300))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 4, steps: Annotated[int, Option(min=20)] = 100,
         backups: Annotated[int, Option(min=1)] = 3, fastest_ms: float = 8.0,
         tail: Annotated[float, Option(min=1.5)] = 2.5, link: str = "0.02ms+0.18ms/125MBps", seed: int = 0) -> None:
    """Compare paths, then race the barrier against backup workers.

    Args:
        workers: Largest world, at least 2; the powers of two below it run the plain barrier too.
        backups: Most gradients that a step of the largest world does not wait for.
        fastest_ms: Shortest duration of a gradient in milliseconds (its real arithmetic runs within).
        tail: Exponent of the Pareto distribution of durations; the smaller, the heavier its tail.
    """
    deviation, short, full = compare_paths(workers, steps, seed)
    run.table(f"{workers} processes against one with the whole batch, {steps} steps", [
        (name, how[1].__name__.replace("_", " "), f"{deviation[name]:.1e}") for name, how in RUNS.items()],
        ["run", "average", "largest deviation"],
        note=f"batches of {full} rows, the last of each epoch of {short}; over all steps, ranks and weights")

    pace, cells = Link.named(link), {}
    fit = fit_link(pace)
    problem = LeastSquares.planted(32 * ROWS * workers, FEATURES, NOISE, seed)
    best = problem.loss(np.linalg.lstsq(problem.x, problem.y)[0])
    for k in worlds(workers):
        most = min(backups, k - 1) if k == workers else 0
        ranks = launch(k, race, problem, steps, range(most + 1), fastest_ms / 1e3, tail, seed, fabric=pace, timeout=600)
        single = np.concatenate([rank[0].computing for rank in ranks])
        for b in range(most + 1):
            cells[k, b] = summary([rank[b] for rank in ranks], predict(single, k, b, fit), 1.1 * best)
    run.note(f"gradients paced to {fastest_ms:g} ms x Pareto({tail:g}), the same draws for every b; "
             f"links to {pace or 'nothing'}, measured {fit.alpha * 1e3:.2f} ms + "
             f"bytes / {fit.bandwidth / 1e6:.0f} MB/s")
    run.table("a step with b backups waits for the first K-b gradients", [
        (k, b, f"{c['step'] * 1e3:.1f}", f"{c['predicted'] * 1e3:.1f}", c["used"], f"{c['loss'] / best:.3f}",
         f"{c['to_target']:.2f} s" if c["to_target"] < float("inf") else "not reached") for (k, b), c in cells.items()],
        ["K", "b", "step, ms", "predicted", "gradients used", "final loss / best", "time to 1.1 x best"])
    largest = [cells[workers, b] for b in range(min(backups, workers - 1) + 1)]
    run.record("workers", workers)
    run.record("cells", {name: [cell[name] for cell in largest] for name in largest[0]})

    for name in [name for name in RUNS if name != UNWEIGHTED]:
        run.claim(f"{name} on {workers} processes traces the path of one, deviation", measured=deviation[name],
                  below=1e-12)
    run.claim("a short batch needs weights: the mean of means leaves the path, deviation",
              measured=deviation[UNWEIGHTED], above=1e-3)
    run.claim("each step uses exactly K-b gradients (cells that deviate)",
              measured=sum(cell["used"] != [k - b] for (k, b), cell in cells.items()), equals=0)
    run.claim("a step lasts E[slowest awaited] + all-reduce, for every K and b (largest relative error)", timing=True,
              measured=max(abs(cell["predicted"] / cell["step"] - 1) for cell in cells.values()), at_most=0.20)
    run.claim(f"one backup shortens the mean step (share cut, K={workers})", timing=True, at_least=0.15,
              measured=1 - largest[1]["step"] / largest[0]["step"])
    run.claim(f"one backup leaves the final loss (ratio to the plain barrier's, K={workers})",
              measured=largest[1]["loss"] / largest[0]["loss"], equals=1, tolerance=0.05)


# --- the path ---------------------------------------------------------------------------------------------------------


def compare_paths(workers: int, steps: int, seed: int) -> tuple[dict[str, float], int, int]:
    """Largest deviation from the one-process path for each of RUNS; rows of the epoch's last batch and of a full one.

    The data fill four global batches, and of the fifth rank 0's part, an eighth of rank 1's and nothing of the others'.
    """
    full, short = workers * ROWS, ROWS + ROWS // 8
    problem = LeastSquares.planted(4 * full + short, FEATURES, NOISE, seed)
    batches = epoch_batches(problem.examples, full, steps, seed)
    ranks = launch(workers, train_all, RUNS, problem, batches, timeout=600)
    deviation = {}
    for name, (optimizer, _) in RUNS.items():
        alone = sgd(problem, optimizer(), np.zeros(FEATURES), batches)
        deviation[name] = float(max(np.abs(rank[name] - alone).max() for rank in ranks))
    return deviation, short, full


def train_all(net, runs: dict, problem: LeastSquares, batches: list[np.ndarray]) -> dict[str, np.ndarray]:
    """On one rank: its path, (steps, d), in each of the runs."""
    return {name: sync_sgd(net, problem, optimizer(), np.zeros(FEATURES), batches, ROWS, average=average).weights
            for name, (optimizer, average) in runs.items()}


# --- the clock --------------------------------------------------------------------------------------------------------


def race(net, problem: LeastSquares, steps: int, backups: range, fastest: float, tail: float,
         seed: int) -> dict[int, Trace]:
    """On one rank: the same training on the same paced durations with each number of backups."""
    durations = fastest * (1 + np.random.default_rng((seed, net.rank)).pareto(tail, steps))
    batches = epoch_batches(problem.examples, net.size * ROWS, steps, seed, drop_last=True)
    rate = min(0.1, 6 / steps)  # the run converges within its steps, and no sooner
    return {b: sync_sgd(net, problem, Sgd(rate), np.zeros(FEATURES), batches, ROWS, durations, b) for b in backups}


def summary(ranks: list[Trace], predicted: float, target: float) -> dict:
    """One cell of the table; seconds are those of the slowest rank."""
    whole = max(ranks, key=lambda trace: trace.seconds.sum())
    reached = np.append(np.flatnonzero(whole.loss <= target), whole.steps)[0]
    return {"step": float(whole.seconds.mean()), "predicted": predicted, "used": sorted(set(whole.used.tolist())),
            "loss": float(whole.loss[-1]),
            "to_target": float(whole.seconds[:reached + 1].sum()) if reached < whole.steps else float("inf"),
            "predicted_to_target": float(predicted * (reached + 1))}


def predict(single: np.ndarray, workers: int, backups: int, fit: AlphaBeta) -> float:
    """Seconds of a step: the slowest gradient awaited, the all-reduce of d sums and a count, and the referee's word.

    single: measured seconds of single gradients. With backups, a report reaches rank 0 and K-1 answers leave it.
    """
    waiting = order_statistic(single, workers, workers - backups)
    all_reduce = seconds("ring", workers, FLOAT * (FEATURES + 1), fit.alpha, fit.beta)
    return waiting + all_reduce + (workers * fit.alpha if backups else 0.0)


def order_statistic(samples: np.ndarray, n: int, k: int) -> float:
    """Expected k-th smallest of n independent draws from `samples`: the m-th of M has weight P_m - P_(m-1), where
    P_m = P(at least k of n draws are among the m smallest) is a binomial tail."""
    share = np.linspace(0, 1, len(samples) + 1)
    at_most = sum(comb(n, j) * share**j * (1 - share)**(n - j) for j in range(k, n + 1))
    return float(np.sort(samples) @ np.diff(at_most))


def worlds(workers: int) -> list[int]:
    """The powers of two below `workers`, from 2, and `workers`."""
    return [2**i for i in range(1, workers.bit_length()) if 2**i < workers] + [workers]


def draw(result: dict, axes) -> None:
    cells, workers = result["records"]["cells"], result["records"]["workers"]
    b = range(len(cells["step"]))
    axes.plot(b, cells["to_target"], "o", label="measured")
    axes.plot(b, cells["predicted_to_target"], "-", linewidth=1, label="steps x predicted step")
    axes.set(xticks=list(b), xlabel="backup workers b", ylabel="seconds to 1.1 x the least loss", ylim=(0, None),
             title=f"{workers} workers with heavy-tailed gradients, the slowest b dropped")
    axes.legend()


if __name__ == "__main__":
    main.cli()
