"""Section 4.6: all-to-all, which routes tokens to experts and back.

Question   What does it take to send every token to its expert and back, and what decides how long that takes?
Method     K processes hold tokens and one expert each: counts are exchanged, a pairwise all-to-all dispatches, paced
           experts compute, a second one combines; every row, pair and drop is audited.
Read       A layer lasts as long as its most popular expert, not the average one; a capacity caps that and pays in
           dropped or rerouted tokens.
Source     Lepikhin et al. (2021), GShard; Fedus, Zoph & Shazeer (2022), Switch Transformers.
"""
from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import all_to_all, ring
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo
from shared.fleet import launch, paced
from shared.measure import human_bytes
from shared.transport import Link

FLOAT = 4  # bytes of a float32
COUNTS, DISPATCH, COMBINE, AUDIT = 1, 2, 3, 4  # a tag for each phase, so that each is counted apart
Plan = namedtuple("Plan", "order sent received")  # kept rows by expert; rows for each expert; rows from each rank


@dataclass(frozen=True)
class Case:
    """A routing policy. skew: expert e is picked with weight (e + 1) ** -skew. factor: an expert serves at most
    ceil(factor * mean load) tokens (None: all). rounds: choices of a token; with 2 an overflow is rerouted once."""

    skew: float
    factor: float | None = None
    rounds: int = 1

    def capacity(self, mean: float) -> int | None:
        return None if self.factor is None else ceil(self.factor * mean)


SKEWS = [Case(skew) for skew in (0.0, 0.5, 1.0, 2.0)]
CAPPED = [Case(1.0, factor, rounds) for factor in (1.0, 1.25) for rounds in (1, 2)]


@demo("4.6", smoke=dict(workers=4, tokens=256, pace=160.0, repeats=2),
      laptop=dict(workers=8, tokens=4096, pace=60.0, repeats=3), cluster=dict(workers=64, tokens=8192, link="none"))
def main(run: Run, workers: int = 4, tokens: int = 1024, width: int = 64, pace: float = 100.0, link: str = "10gbe",
         repeats: int = 3, seed: int = 0) -> None:
    """Route tokens to experts and back.

    Args:
        tokens: Tokens on each worker, which also holds one expert.
        width: Numbers in a token, float32.
        pace: Microseconds that an expert takes for one token.
    """
    fabric, cases = Link.named(link), SKEWS + CAPPED
    ranks = launch(workers, route_and_return, cases, tokens, width, pace, repeats, seed, fabric=fabric, timeout=600)
    steps = [judge(case, [rank[case] for rank in ranks], tokens, width, seed) for case in cases]
    load, layer = ([step[key] / steps[0][key] for step in steps] for key in ("load", "time"))
    nbytes, rows = tokens * width * FLOAT, []
    run.table(f"one layer: {workers} ranks with one expert and {tokens} tokens ({human_bytes(nbytes)}) each", [
        (case.skew, case.factor or "-", case.rounds, step["load"], f"{step['load'] / tokens:.2f}", step["dropped"],
         human_bytes(step["bytes"]), str(step["seconds"]), f"{x:.2f}") for case, step, x in zip(cases, steps, layer)],
        ["skew", "capacity", "choices", "max load", "/ mean", "dropped", "moved", "layer", "/ uniform"],
        note=f"experts paced to {pace:g} µs a token, links to {fabric or 'nothing'}")
    for k in sorted({k for k in (2, 4, 8, 16, 32, 64) if k < workers} | {workers}):
        sent = np.array(launch(k, traffic, tokens, width, seed)).swapaxes(0, 1) / nbytes  # [collective, from, to]
        rows += [(k, name, (pairs > 0).sum(axis=1).max(), f"{pairs.sum(axis=1).max():.2f} n",
                  f"{pairs[:k // 2, k // 2:].sum():.2f} n") for name, pairs in zip(("all-to-all, twice", "ring"), sent)]
    run.table(f"uniform routing beside an all-reduce, n = {human_bytes(nbytes)} on each rank", rows,
              ["workers", "collective", "peers of a rank", "busiest rank sends", "lower to upper half"])
    run.record("steps", [(case in CAPPED, step["load"] / tokens, step["time"]) for case, step in zip(cases, steps)])
    run.record("seconds_of_a_mean_load", tokens * pace / 1e6)

    run.claim("every kept token returns to its origin row, processed by its routed expert (rows that do not)",
              measured=sum(step["strayed"] for step in steps), equals=0)
    run.claim("bytes between any two ranks are tokens x width x itemsize, out and back (pairs that deviate)",
              measured=sum(step["pairs"] for step in steps), equals=0)
    run.claim("receive counts are the transpose of send counts (entries that are not)",
              measured=sum(step["not_transposed"] for step in steps), equals=0)
    run.claim("the time ratio of two skews is that of their max loads (largest relative error, against uniform)",
              measured=max(abs(x / n - 1) for x, n in zip(layer[:len(SKEWS)], load)), at_most=0.25, timing=True)
    run.claim("capacity c bounds every expert at ceil(c * mean) (most tokens above it)", at_most=0,
              measured=max(step["load"] - case.capacity(tokens) for case, step in zip(cases, steps) if case.factor))
    run.claim("a capacity drops exactly the computed overflow (tokens, by row of the table)",
              measured=[step["dropped"] for step in steps], equals=[step["overflow"] for step in steps])


class Tagged:
    """A transport all of whose messages carry one tag."""

    def __init__(self, net, tag: int) -> None:
        self.net, self.rank, self.size, self.tag = net, net.rank, net.size, tag

    def isend(self, dst: int, array: np.ndarray):
        return self.net.isend(dst, array, self.tag)

    def recv(self, src: int) -> np.ndarray:
        return self.net.recv(src, tag=self.tag)


def moe_layer(net, tokens: np.ndarray, choices: np.ndarray, expert: Callable[[np.ndarray], np.ndarray],
              capacity: int | None = None, pace: float = 0.0) -> tuple[np.ndarray, np.ndarray, Plan]:
    """One expert layer. tokens: (n, width) of this rank; choices: (n, rounds), each token's experts by preference.

    Returns the outputs (n, width), 0 where dropped; the expert that served each row, -1 where dropped; the plan.
    """
    routed = choices[:, 0] if capacity is None else assign(net, choices, capacity)
    plan = make_plan(net, routed)
    arrived = dispatch(Tagged(net, DISPATCH), tokens, plan)
    with paced(pace * len(arrived)):
        processed = expert(arrived)
    return combine(Tagged(net, COMBINE), processed, plan, len(tokens)), routed, plan


def assign(net, choices: np.ndarray, capacity: int) -> np.ndarray:
    """The expert that serves each token of this rank, -1 for none: first come, first served, by rank, then row."""
    routed, used = np.full(len(choices), -1), 0
    for choice in choices.T:  # every waiting token asks its next choice; an expert grants what it has left
        waiting = np.flatnonzero(routed < 0)
        asked = exchange_counts(net, np.bincount(choice[waiting], minlength=net.size))
        granted = np.clip(capacity - used - (np.cumsum(asked) - asked), 0, asked)
        used += granted.sum()
        for expert, room in enumerate(exchange_counts(net, granted)):
            routed[waiting[choice[waiting] == expert][:room]] = expert
    return routed


def make_plan(net, routed: np.ndarray) -> Plan:
    """Sort the kept rows by expert, and tell every expert how many to expect."""
    kept = np.flatnonzero(routed >= 0)
    sent = np.bincount(routed[kept], minlength=net.size)
    return Plan(kept[np.argsort(routed[kept], kind="stable")], sent, exchange_counts(net, sent))


def exchange_counts(net, counts: np.ndarray) -> np.ndarray:
    """Entry r of the result is what rank r holds for this rank: the all-to-all of one number a pair."""
    return np.concatenate(all_to_all(Tagged(net, COUNTS), counts.reshape(-1, 1)))


def dispatch(net, rows: np.ndarray, plan: Plan) -> np.ndarray:
    """Send each kept row to its expert; returns the rows that arrive here, by origin rank."""
    return np.concatenate(all_to_all(net, np.split(rows[plan.order], np.cumsum(plan.sent)[:-1])))


def combine(net, processed: np.ndarray, plan: Plan, rows: int) -> np.ndarray:
    """The way back: what arrived is sent home and put into its origin row. Rows that were dropped stay 0."""
    home = np.zeros((rows, *processed.shape[1:]), processed.dtype)
    home[plan.order] = np.concatenate(all_to_all(net, np.split(processed, np.cumsum(plan.received)[:-1])))
    return home


def route_and_return(net, cases: list[Case], tokens: int, width: int, pace: float, repeats: int, seed: int) -> dict:
    """On one rank: every case in interleaved repeats. The first warms up, and is the one audited and counted."""
    x, experts, results = make_tokens(net.rank, tokens, width, seed), make_experts(net.size, width, seed), {}
    for repeat in range(repeats + 1):
        for case in cases:
            choices = make_choices(case, net.rank, net.size, tokens, seed)
            layer = partial(moe_layer, net, x, choices, experts[net.rank], case.capacity(tokens), pace / 1e6)
            if repeat:
                results[case]["seconds"].append(timed(net, layer))
                continue
            net.reset_stats()
            y, routed, plan = layer()
            results[case] = {"routed": routed, "sent": plan.sent, "received": plan.received, "seconds": [],
                             "out": bytes_sent(net, DISPATCH), "back": bytes_sent(net, COMBINE),
                             "strayed": audit(net, x, y, routed, plan, experts)}
    return results


def audit(net, x: np.ndarray, y: np.ndarray, routed: np.ndarray, plan: Plan, experts: list) -> int:
    """Rows whose stamp (token id, expert) or whose output is not that of their routed expert, or not 0 if dropped."""
    net, ids, expected = Tagged(net, AUDIT), 1 + net.rank * len(x) + np.arange(len(x)), np.zeros_like(x)
    stamps = combine(net, dispatch(net, ids, plan) * net.size + net.rank, plan, len(x))
    for e, expert in enumerate(experts):
        expected[routed == e] = expert(x[routed == e])
    return int(((stamps != np.where(routed < 0, 0, ids * net.size + routed)) | (y != expected).any(axis=1)).sum())


def bytes_sent(net, *tags: int) -> list[int]:
    return [sum(net.stats().sent_to(peer, tag).bytes for tag in tags) for peer in range(net.size)]


def judge(case: Case, ranks: list[dict], tokens: int, width: int, seed: int) -> dict:
    """What all ranks report on one case, held against counts that need no message."""
    size, keys, seconds = len(ranks), ("routed", "sent", "received", "out", "back"), [rank["seconds"] for rank in ranks]
    routed, sent, received, out, back = (np.array([rank[key] for rank in ranks]) for key in keys)
    counts = np.array([np.bincount(row[row >= 0], minlength=size) for row in routed])  # [rank, expert]
    wire = counts * width * FLOAT * ~np.eye(size, dtype=bool)
    choices = np.concatenate([make_choices(case, rank, size, tokens, seed) for rank in range(size)])
    return {"load": int(counts.sum(axis=0).max()), "dropped": int((routed < 0).sum()),
            "seconds": slowest(seconds), "time": slowest(seconds).median,
            "overflow": overflow(choices, size, case.capacity(tokens) or len(choices)),
            "bytes": int((out + back).sum()), "pairs": int(((out != wire) | (back.T != wire)).sum()),
            "not_transposed": int((received != sent.T).sum()), "strayed": sum(rank["strayed"] for rank in ranks)}


def overflow(choices: np.ndarray, experts: int, limit: int) -> int:
    """How many of all tokens, choices (tokens, rounds) in order of rank and row, find no expert with room."""
    room, served = [limit] * experts, np.zeros(len(choices), bool)
    for choice in choices.T:
        for token in np.flatnonzero(~served):
            served[token] = room[choice[token]] > 0
            room[choice[token]] -= int(served[token])
    return int((~served).sum())


def make_tokens(rank: int, tokens: int, width: int, seed: int) -> np.ndarray:
    """(tokens, width) float32 in small integers, as are the experts' weights: sums are then exact in any order."""
    return np.rint(4 * np.random.default_rng((seed, 0, rank)).standard_normal((tokens, width))).astype(np.float32)


def make_experts(count: int, width: int, seed: int) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Two-layer networks. Any rank can make them all, which is how the audit knows what each should have answered."""
    weights = np.random.default_rng((seed, 1)).integers(-2, 3, (count, 2, width, width)).astype(np.float32)
    return [lambda x, up=up, down=down: np.maximum(x @ up, 0) @ down for up, down in weights]


def make_choices(case: Case, rank: int, experts: int, tokens: int, seed: int) -> np.ndarray:
    """Rank `rank`'s routing, (tokens, rounds): the expert drawn by popularity, then another one at random."""
    rng, weights = np.random.default_rng((seed, 2, rank)), np.arange(1, experts + 1) ** -case.skew
    first = rng.choice(experts, tokens, p=weights / weights.sum())
    return np.stack([first, (first + rng.integers(1, max(2, experts), tokens)) % experts][:case.rounds], axis=1)


def traffic(net, tokens: int, width: int, seed: int) -> list[list[int]]:
    """Bytes to each rank: dispatch and combine of uniformly routed tokens, then a ring all-reduce of as many."""
    x = make_tokens(net.rank, tokens, width, seed)
    moe_layer(net, x, make_choices(SKEWS[0], net.rank, net.size, tokens, seed), np.copy)
    ring(net, x)
    return [bytes_sent(net, DISPATCH, COMBINE), bytes_sent(net, 0)]


def draw(result: dict, axes) -> None:
    steps, unit = result["records"]["steps"], result["records"]["seconds_of_a_mean_load"]
    for capped, marker, label in ((False, "o", "growing skew, no capacity"), (True, "s", "skew 1 with a capacity")):
        axes.plot(*zip(*[step[1:] for step in steps if step[0] == capped]), marker, label=label)
    loads = [1, max(load for _, load, _ in steps)]
    axes.plot(loads, [load * unit for load in loads], "-", linewidth=1, label="the busiest expert's work alone")
    axes.set(xlabel="load of the most popular expert / mean load", ylabel="seconds a layer", ylim=(0, None),
             title="A layer lasts as long as its most popular expert")
    axes.legend()


if __name__ == "__main__":
    main.cli()
