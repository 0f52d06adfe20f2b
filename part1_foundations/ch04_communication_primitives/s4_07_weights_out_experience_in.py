"""Section 4.7: broadcast, which duplicates, and gather, which cannot.

Question   Weights go out to every worker and experience comes back: which direction can be made cheap, and how?
Method     Three broadcasts and two gathers over paced links, counted at the root, with a logical clock for the
           rounds; then a learner and its actors use them to train a cart-pole policy by evolution strategies.
Read       A tree shares the work of copying one buffer; distinct batches must all enter the root, so that a hierarchy
           saves it messages but no bytes.
Source     Thakur, Rabenseifner & Gropp (2005), after van de Geijn, for scatter and all-gather; Salimans et al.
           (2017), Evolution Strategies; Barto, Sutton & Anderson (1983) for cart-pole.
"""
from __future__ import annotations

from functools import partial
from hashlib import sha256
from math import ceil, log2, sqrt

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import (
    BROADCAST,
    broadcast_binomial,
    gather,
    gather_two_level,
    scatter,
)
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo
from shared.errors import UsageError
from shared.fleet import launch
from shared.measure import human_bytes
from shared.transport import Link

MOVES = BROADCAST | {"flat gather": gather, "two-level gather": gather_two_level}
CLOCK = 1  # tag of the logical clock's messages, which are not counted
NOISE, RATE = 0.5, 0.2  # of evolution strategies: standard deviation of a perturbation, and learning rate


@demo("4.7", smoke=dict(workers=4, mebibytes=0.375, link="100mbe", iterations=3), laptop=dict(workers=8, mebibytes=4),
      cluster=dict(workers=64, mebibytes=64, episodes=64, link="none"))
def main(run: Run, workers: int = 4, mebibytes: float = 2.0, iterations: int = 40, episodes: int = 8,
         horizon: int = 200, link: str = "400mbe", repeats: int = 3, seed: int = 0) -> None:
    """Move weights out and experience in.

    Args:
        workers: Ranks, at least 2; rank 0 is the learner, and all of them act.
        mebibytes: Largest buffer in MiB.
        iterations: Updates of the policy.
        episodes: Pairs of episodes that a rank plays in an iteration.
        horizon: Steps after which an episode ends at the latest.
    """
    if workers < 2:
        raise UsageError("--workers must be at least 2, got 1: a broadcast needs a receiver")
    pace, sizes = Link.named(link), sorted({1024, 32 << 10, max(1024, int(mebibytes * 2**20))})
    worlds = sorted({k for k in (2, 3, 4, 5, 6, 8, 16, 32, 64) if k < workers} | {workers})
    roots, wrong = {}, 0
    for k in worlds:
        ranks = launch(k, count, MOVES, min(sizes[-1], 1 << 20), seed)
        wrong += sum(rank[name]["wrong"] for rank in ranks for name in MOVES)
        for name in MOVES:
            roots[k, name] = ranks[0][name] | {"rounds": max(rank[name]["rounds"] for rank in ranks)}
    ranks = launch(workers, clock, MOVES, sizes, repeats, fabric=pace, timeout=600)
    seconds = {key: slowest([rank[key] for rank in ranks]) for key in ranks[0]}
    run.table(f"one buffer or batch of n bytes, {workers} ranks, links paced to {pace or 'nothing'}", [
        (name.replace("_", " "), *(roots[workers, name][what] for what in ("rounds", "sent", "sent_bytes", "received",
         "received_bytes")), *(f"{seconds[name, size].median * 1e3:.1f}" for size in sizes)) for name in MOVES],
        ["median ms", "rounds", "sends", "n", "receives", "n", *(f"ms, {human_bytes(size)}" for size in sizes)],
        note="sends, receives: messages and buffers at the root")

    ranks = launch(workers, act_and_learn, iterations, episodes, horizon, seed, fabric=pace, timeout=600)
    returns, window = ranks[0]["returns"], min(10, (iterations + 1) // 2)
    first, last = float(np.mean(returns[:window])), float(np.mean(returns[-window:]))
    moved = [human_bytes(ranks[0][way] / iterations) for way in ("sent", "received")]
    run.table(f"{iterations} iterations of {workers} actors, {episodes} pairs of episodes each",
              [(f"{first:.1f}", f"{last:.1f}", *moved)],
              [f"mean return, first {window}", f"last {window}", "learner sends / iteration", "receives / iteration"])
    run.record("returns", returns)
    run.record("workers", worlds)

    def root(name: str, what: str) -> list[float]:
        return [roots[k, name][what] for k in worlds]

    run.record("root", {name: root(name, "sent_bytes" if name in BROADCAST else "received_bytes") for name in MOVES})
    ideal = [[k - 1 for k in worlds], [ceil(log2(k)) for k in worlds]]
    run.claim("every broadcast and gather delivers the exact bytes (wrong results)", measured=wrong, equals=0)
    run.claim(f"a broadcast takes K-1 rounds if linear, ceil(log2 K) if binomial (K = {', '.join(map(str, worlds))})",
              measured=[root("linear", "rounds"), root("binomial", "rounds")], equals=ideal)
    run.claim("its root sends K-1 copies if linear, ceil(log2 K) if binomial (same K)",
              measured=[root("linear", "sent_bytes"), root("binomial", "sent_bytes")], equals=ideal)
    if pace and workers > 2:  # two ranks have nothing to share
        gain = [seconds["binomial", size].median / seconds["scatter_all_gather", size].median for size in sizes]
        run.claim(f"scatter and all-gather loses to binomial at {human_bytes(sizes[0])} (binomial's time / its own)",
                  measured=gain[0], below=1.0, timing=True)
        run.claim(f"scatter and all-gather beats binomial at {human_bytes(sizes[-1])} (binomial's time / its own)",
                  measured=gain[-1], above=1.0, timing=True)
    run.claim("a gather's root receives K-1 batches in both layouts (same K)", equals=[ideal[0]] * 2,
              measured=[root(name, "received_bytes") for name in ("flat gather", "two-level gather")])
    run.claim("in the two-level one they are about sqrt(K) messages (largest distance from it, same K)",
              measured=max(abs(m - sqrt(k)) for k, m in zip(worlds, root("two-level gather", "received"))), below=1.0)
    run.claim("all actors hold byte-identical weights (iterations in which they do not)", equals=0,
              measured=sum(len(set(digests)) > 1 for digests in zip(*(rank["digests"] for rank in ranks))))
    if iterations >= 20:
        run.claim("the mean return of the last ten iterations exceeds that of the first ten",
                  measured=last, above=first)


class Rounds:
    """A transport with a logical clock: what a rank sends leaves one round after the last thing it did."""

    def __init__(self, net) -> None:
        self.net, self.rank, self.size, self.now = net, net.rank, net.size, 0

    def isend(self, dst: int, array: np.ndarray):
        self.now += 1
        self.net.send(dst, np.array(self.now), CLOCK)
        return self.net.isend(dst, array)

    def send(self, dst: int, array: np.ndarray) -> None:
        self.isend(dst, array).wait()

    def recv(self, src: int, out: np.ndarray | None = None) -> np.ndarray:
        self.now = max(self.now, int(self.net.recv(src, tag=CLOCK)))
        return self.net.recv(src, out)


def count(net, moves: dict, size: int, seed: int) -> dict[str, dict]:
    """On one rank: what each move of `size` bytes sends and receives here, its last round, whether it went wrong."""
    batches = [np.random.default_rng((seed, rank)).integers(0, 256, size, np.uint8) for rank in range(net.size)]
    results = {}
    for name, move in moves.items():
        net.reset_stats()
        clocked = Rounds(net)
        got = move(clocked, batches[net.rank].copy())
        wanted = batches[0] if name in BROADCAST else batches if net.rank == 0 else None
        sent, received = net.stats().sent_to(tag=0), net.stats().received_from(tag=0)
        results[name] = {"rounds": clocked.now, "sent": sent.messages, "sent_bytes": sent.bytes / size,
                         "received": received.messages, "received_bytes": received.bytes / size,
                         "wrong": wanted is not None and not np.array_equal(got, wanted)}
    return results


def clock(net, moves: dict, sizes: list[int], repeats: int) -> dict[tuple[str, int], list[float]]:
    """On one rank: seconds of each move of each size, in interleaved repeats."""
    seconds: dict = {(name, size): [] for name in moves for size in sizes}
    for _ in range(repeats):
        for name, size in seconds:
            buffer = np.zeros(size, np.uint8)
            seconds[name, size].append(timed(net, partial(moves[name], net, buffer)))
    return seconds


# --- the learner and its actors ---------------------------------------------------------------------------------------


def act_and_learn(net, iterations: int, episodes: int, horizon: int, seed: int) -> dict:
    """On one rank: the whole training. Rank 0 is the learner, and acts like the others."""
    rng, weights = np.random.default_rng(seed), np.zeros(4) if net.rank == 0 else np.full(4, np.nan)
    digests, returns = [], []
    net.reset_stats()
    for _ in range(iterations):
        seeds = rng.integers(0, 2**31, (net.size, episodes)) if net.rank == 0 else None
        _, batches = rollout(net, weights, seeds, partial(play, horizon=horizon))
        digests.append(sha256(weights.tobytes()).hexdigest())
        if net.rank == 0:
            experience = np.concatenate(batches)
            weights = learn(weights, experience)
            returns.append(float(experience[:, 1:].mean()))
    stats = net.stats()
    return {"digests": digests, "returns": returns, "sent": stats.sent_to().bytes,
            "received": stats.received_from().bytes}


def rollout(net, weights: np.ndarray, seeds: np.ndarray | None, act) -> tuple[np.ndarray, list[np.ndarray] | None]:
    """Weights out (in place), seeds out (K, pairs), episodes, experience in: this rank's batch and, at rank 0, all.

    A batch is (pairs, 3) in int64, the seeds and the lengths of their two episodes: perturbations never travel,
    the learner regrows them from their seeds.
    """
    broadcast_binomial(net, weights)
    mine = scatter(net, seeds)
    batch = np.column_stack([mine, *act(weights, mine)])
    return batch, gather_two_level(net, batch)


def play(weights: np.ndarray, seeds: np.ndarray, horizon: int) -> np.ndarray:
    """Steps (2, pairs) that the policies weights +- NOISE * perturbation last, both from the start of their seed."""
    noise = NOISE * perturbations(seeds)
    starts = np.array([np.random.default_rng(seed).uniform(-0.05, 0.05, 4) for seed in seeds])
    steps = cart_pole(np.concatenate([weights + noise, weights - noise]), np.concatenate([starts, starts]), horizon)
    return steps.reshape(2, -1)


def learn(weights: np.ndarray, experience: np.ndarray) -> np.ndarray:
    """One step of evolution strategies, antithetic: experience is (pairs, 3), seed and both returns."""
    seeds, plus, minus = experience.T
    scale = 2 * NOISE * len(seeds) * max(experience[:, 1:].std(), 1e-9)
    return weights + RATE * (plus - minus) @ perturbations(seeds) / scale


def perturbations(seeds: np.ndarray) -> np.ndarray:
    return np.array([np.random.default_rng((seed, 1)).standard_normal(4) for seed in seeds])


def cart_pole(weights: np.ndarray, starts: np.ndarray, horizon: int) -> np.ndarray:
    """Steps survived by the policies `push right if state @ weights > 0`, all at once: weights and starts are (n, 4).

    The state is position, velocity, angle and its velocity, by Euler steps of 20 ms, and fails at 2.4 m or 12 degrees.
    """
    state, alive, steps = starts.T, np.ones(len(starts), bool), np.zeros(len(starts), np.int64)
    for _ in range(horizon):
        _, v, angle, spin = state
        force = np.where((weights.T * state).sum(axis=0) > 0, 10.0, -10.0)
        sin, cos = np.sin(angle), np.cos(angle)
        push = (force + 0.05 * spin**2 * sin) / 1.1
        twist = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        state = state + 0.02 * np.array([v, push - 0.05 * twist * cos / 1.1, spin, twist])
        steps += alive
        alive &= (np.abs(state[0]) <= 2.4) & (np.abs(state[2]) <= np.radians(12))
        if not alive.any():
            break
    return steps


def draw(result: dict, axes) -> None:
    records = result["records"]
    grid = axes.figure.add_gridspec(1, 2)
    axes.set_subplotspec(grid[0])
    for width, (name, buffers) in zip((6, 2, 2, 3, 1), records["root"].items()):  # three of them coincide
        axes.plot(records["workers"], buffers, "o-", linewidth=width, label=name.replace("_", " "))
    axes.set(xlabel="ranks K", ylabel="buffers sent or received by the root", ylim=(0, None), title="Root traffic / n")
    axes.legend(fontsize="small")
    learning = axes.figure.add_subplot(grid[1])
    learning.plot(range(1, len(records["returns"]) + 1), records["returns"], "-")
    learning.set(xlabel="iteration", ylabel="mean return (steps)", ylim=(0, None), title="Cart-pole by evolution")


if __name__ == "__main__":
    main.cli()
