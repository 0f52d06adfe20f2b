"""Worker functions of test_ch04_s4_07, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

import time
from functools import partial

import numpy as np

from part1_foundations.ch04_communication_primitives import s4_07_weights_out_experience_in as section
from part1_foundations.ch04_communication_primitives.collectives import (
    broadcast_binomial,
    broadcast_scatter_all_gather,
    gather,
    gather_two_level,
)


def gather_in_reverse(net, mine, root=0):
    got = gather(net, mine, root)
    return got and got[::-1]


def broadcast_that_drops_the_last_rank(net, x, root=0):
    kept = x.copy()
    broadcast_binomial(net, x, root)
    if net.rank == net.size - 1:
        x[...] = kept
    return x


def binomial_nearest_first(net, x, root=0):
    """The right copies in the wrong order: who could help is served last."""
    distance = 1
    while distance < net.size and not net.rank & distance:
        distance *= 2
    if net.rank:
        net.recv(net.rank - distance, x)
    for near in (d for d in (1, 2, 4, 8) if d < distance and net.rank + d < net.size):
        net.send(net.rank + near, x)
    return x


def binomial_of_two_copies(net, x, root=0):
    """Every message carries the buffer twice."""
    twice = broadcast_binomial(net, np.concatenate([x, x]))
    x[...] = twice[:x.size]
    return x


def binomial_dawdling(net, x, root=0):
    time.sleep(0.02)
    return broadcast_binomial(net, x)


def scatter_all_gather_dawdling(net, x, root=0):
    time.sleep(0.05)
    return broadcast_scatter_all_gather(net, x)


def gather_of_two_copies(net, mine, root=0):
    got = gather(net, np.concatenate([mine, mine]), root)
    return got and [twice[:mine.size] for twice in got]


def patched(name, broken, net, *args):
    """The demo's training, in a process where one of its pieces is replaced."""
    setattr(section, name, broken)
    return section.act_and_learn(net, *args)


def learn_backwards(weights, experience, learn=section.learn):
    return 2 * weights - learn(weights, experience)


def gather_cases(net, cases):
    """What each case (seed, root, dtype, shape) leaves at this rank, and how many messages it received."""
    results = []
    for seed, root, dtype, shape in cases:
        net.reset_stats()
        got = gather_two_level(net, gather_input(seed, net.rank, dtype, shape), root % net.size)
        results.append((got, net.stats().received_from().messages, net.stats().received_from().bytes))
    return results


def gather_input(seed, rank, dtype, shape):
    return np.random.default_rng((seed, rank)).integers(0, 100, shape).astype(dtype)


def both_patched(name, broken, *args):
    from part1_foundations.ch04_communication_primitives import s4_07_shortcut_torch_broadcast_gather as shortcut

    setattr(shortcut, name, partial(broken, getattr(shortcut, name)))
    return shortcut.both(*args)


def gathered_in_another_order(library_rollout, *args):
    batch, batches = library_rollout(*args)
    return batch, batches and batches[::-1]


def gathered_in_half_the_bytes(library_rollout, *args):
    batch, batches = library_rollout(*args)
    return batch, batches and [each.int() for each in batches]


def episodes_from_other_starts(gymnasium_play, env, weights, seeds):
    return gymnasium_play(env, weights, seeds + 1)
