"""Worker functions of test_ch04_s4_03, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

import numpy as np

from part1_foundations.ch04_communication_primitives import s4_03_mini_ddp as section
from part1_foundations.ch04_communication_primitives import s4_03_shortcut_ddp as shortcut
from part1_foundations.ch04_communication_primitives.collectives import ring


def wrong_divisor(net, weights, gradient, rows, step):
    ring(net, gradient)
    weights -= section.RATE * (gradient / (net.size + 1))


def apart_by_rank(net, weights, gradient, rows, step):
    """The right update, but the last rank's last bit is off."""
    section.average(net, weights, gradient, rows, step)
    if net.rank == net.size - 1:
        weights[-1] = np.nextafter(weights[-1], 1)


def train_all_with_a_blunt_hash(net, *args):
    section.fingerprint = lambda weights: np.frombuffer(np.round(weights[:8], 3).tobytes(), np.uint8)
    return section.train_all(net, *args)


def one_process_on_half(net, *args):
    section.union_batches = lambda *spec: half(*spec)
    return section.one_process(net, *args)


def half(population, workers, steps, seed, whole=section.union_batches):
    return whole(population, workers, steps, seed)[:, ::2]


def weighted_by_hand(net, gradients, rows):
    weights = np.zeros(gradients.shape[1])
    section.size_weighted(net, weights, gradients[net.rank].copy(), rows[net.rank], 0)
    return weights


def all_reduced(net, vectors):
    total = ring(net, vectors[net.rank].copy())
    weights = np.zeros(4)
    section.average(net, weights, vectors[net.rank].copy(), 1, 0)
    return total, weights / -section.RATE


def both_with_a_wrong_divisor(net, *args):
    shortcut.train_ours.__defaults__ = (wrong_divisor,)
    return shortcut.both(net, *args)


def both_without_weighting(net, *args):
    shortcut.size_weighted = section.average
    return shortcut.both(net, *args)
