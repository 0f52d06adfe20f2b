"""Section 4.7 with torch and gymnasium: the actor-learner loop in three calls.

Question   How much of the loop do broadcast, scatter, gather and a ready environment replace, and at what price?
Method     The same K processes roll out the same policy in turns: our collectives over shared memory with our
           vectorised cart-pole, and gloo over loopback TCP with gymnasium's CartPole.
Read       Ours is faster: such small messages cost gloo a hand-over to its threads and the loopback TCP stack each,
           and our cart-poles step together in NumPy while gymnasium's steps one by one in Python.
Source     torch.distributed, gloo backend; gymnasium, CartPole-v1; Salimans et al. (2017), Evolution Strategies.
"""
from __future__ import annotations

from functools import partial

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import broadcast_binomial, gather_two_level, scatter
from part1_foundations.ch04_communication_primitives.s4_07_weights_out_experience_in import (
    NOISE,
    cart_pole,
    learn,
    perturbations,
    play,
    rollout,
)
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.measure import ratio


@demo("4.7", library="torch.distributed + gymnasium", needs=("torch", "gymnasium"),
      handles=("choice of tree", "transport and rendezvous", "time-outs", "environments behind one interface"),
      smoke=dict(workers=2, iterations=3, episodes=4, horizon=100), laptop=dict(workers=4, iterations=12))
def main(run: Run, workers: int = 4, iterations: int = 9, episodes: int = 8, horizon: int = 200, wire: str = "shm",
         seed: int = 0) -> None:
    """Time our rollout against torch's and gymnasium's.

    Args:
        iterations: Updates of the policy, each timed on both sides.
        episodes: Pairs of episodes that a rank plays in an iteration.
        horizon: Steps after which an episode ends at the latest.
        wire: Transport of our collectives: shm, unix or tcp.
    """
    ranks = torch_world.launch(workers, both, iterations, episodes, horizon, seed, wire=wire, timeout=600)
    sides = {name: slowest([rank["seconds"][name] for rank in ranks]) for name in ranks[0]["seconds"]}
    whats = {"moves": "weights and seeds out, experience in", "all": f"the same with {2 * episodes} episodes a rank"}
    returns, root = ranks[0]["returns"], ranks[0]
    run.table(f"one of {len(returns)} rollouts over {workers} processes, {2 * episodes} episodes a rank, at the root",
              [("ours, counted", *root["ours_in"], f"{returns[0]:.1f}", f"{returns[-1]:.1f}"),
               ("torch, gathered", *root["library_in"], "", "")],
              ["", "batches in", "bytes in", "mean return, first", "last"])
    for key, what in whats.items():
        run.compare(f"{what}, {workers} processes", sides["ours", key], sides["library", key],
                    ratio(sides["library", key], sides["ours", key]))
    run.lines_of_code(ours=[rollout, broadcast_binomial, scatter, gather_two_level, play, cart_pole],
                      library=[library_rollout, gymnasium_play])
    run.record("returns", returns)

    local = [rank["batches"] for rank in ranks]  # [rank][iteration]
    differ = sum(not np.array_equal(got, sent) for got, sent in zip(root["gathered"], zip(*local), strict=True))
    run.claim("torch's gathered tensors equal the rank-local ones (iterations in which they do not)",
              measured=differ, equals=0)
    run.claim("the root receives as many batches and bytes as with our collectives",
              measured=root["library_in"], equals=root["ours_in"])
    run.claim("gymnasium's episodes last as long as ours (share of them)", at_least=0.99,
              measured=float(np.mean([rank["same"] for rank in ranks])))


def library_rollout(weights, seeds, episodes: int, act):
    """`rollout` in torch: weights (4,) in place, seeds (K, episodes) at rank 0; this rank's batch and, there, all."""
    import torch
    import torch.distributed as dist

    learner, mine = dist.get_rank() == 0, torch.empty(episodes, dtype=torch.int64)
    dist.broadcast(weights, 0)
    dist.scatter(mine, list(seeds) if learner else None)
    batch = torch.column_stack([mine, *act(weights.numpy(), mine.numpy())])
    batches = [torch.empty_like(batch) for _ in range(dist.get_world_size())] if learner else None
    dist.gather(batch, batches)
    return batch, batches


def gymnasium_play(env, weights: np.ndarray, seeds: np.ndarray):
    """Steps (2, pairs) that the policies weights +- NOISE * perturbation last, as `play`."""
    import torch

    steps = torch.zeros(2, len(seeds), dtype=torch.int64)
    for pair, (seed, noise) in enumerate(zip(seeds, NOISE * perturbations(seeds))):
        for sign, policy in enumerate((weights + noise, weights - noise)):
            observation, _ = env.reset(seed=int(seed))
            done = False
            while not done:
                observation, _, terminated, truncated, _ = env.step(int(observation @ policy > 0))
                done = terminated or truncated
                steps[sign, pair] += 1
    return steps


def both(net, iterations: int, episodes: int, horizon: int, seed: int) -> dict:
    """On one rank: both rollouts from equal weights in turns, with and without episodes; rank 0 learns from ours."""
    import gymnasium
    import torch

    env, rng = gymnasium.make("CartPole-v1", max_episode_steps=horizon), np.random.default_rng(seed)
    weights, idle = np.zeros(4), np.zeros((2, episodes), np.int64)
    seconds: dict = {(side, key): [] for key in ("moves", "all") for side in ("ours", "library")}
    report: dict = {"seconds": seconds, "batches": [], "gathered": [], "same": [], "returns": []}
    for i in range(iterations + 1):  # the first one warms up
        seeds, got = rng.integers(0, 2**31, (net.size, episodes)), {}
        tensors = torch.from_numpy(weights.copy()), torch.from_numpy(seeds), episodes
        calls = {
            ("ours", "moves"): partial(rollout, net, weights.copy(), seeds, lambda *_: idle),
            ("library", "moves"): partial(library_rollout, *tensors, lambda *_: torch.from_numpy(idle)),
            ("ours", "all"): partial(rollout, net, weights, seeds, partial(play, horizon=horizon)),
            ("library", "all"): partial(library_rollout, *tensors, partial(gymnasium_play, env))}
        for name in list(calls)[::-1 if i % 2 else 1]:
            net.reset_stats()
            seconds[name].append(timed(net, lambda: got.update({name: calls[name]()})))  # noqa: B023
            if name == ("ours", "moves"):
                received = net.stats().received_from().bytes
        (ours, batches), (theirs, gathered) = got["ours", "all"], got["library", "all"]
        report["batches"].append(theirs.numpy())
        report["same"].append(float(np.mean(ours == theirs.numpy())))
        if net.rank == 0:
            report["gathered"].append([batch.numpy() for batch in gathered])
            report["returns"].append(float(np.mean([batch[:, 1:] for batch in batches])))
            report["ours_in"] = [len(batches) - 1, received]
            report["library_in"] = [len(gathered) - 1, sum(batch.nbytes for batch in gathered[1:])]
            weights = learn(weights, np.concatenate(batches))
    report["seconds"] = {name: samples[1:] for name, samples in seconds.items()}
    return report


if __name__ == "__main__":
    main.cli()
