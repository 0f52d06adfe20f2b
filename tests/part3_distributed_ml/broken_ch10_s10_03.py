"""Worker functions of test_ch10_s10_03, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

from time import monotonic

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import ring
from part3_distributed_ml.ch10_distributed_optimization import optim
from part3_distributed_ml.ch10_distributed_optimization import s10_03_shortcut_ddp_loop as shortcut
from part3_distributed_ml.ch10_distributed_optimization import s10_03_sync_equals_big_batch as section


def sums(net, gradient, rows):
    return ring(net, gradient.copy())


def weighted_by_the_largest(net, gradient, rows):
    """Every worker's mean counts alike, whatever it is the mean of: right for full batches only."""
    return ring(net, gradient * (rows > 0)) / ring(net, np.array([float(rows > 0)]))


class LocalAdam(optim.Adam):
    """Adam on this worker's own gradient; the workers average the weights that come out."""

    def __init__(self, net, rate):
        super().__init__(rate)
        self.net = net

    def step(self, weights, gradient):
        super().step(weights, gradient)
        weights[:] = ring(self.net, weights.copy()) / self.net.size


def train_all_with_local_adam(net, runs, problem, batches):
    paths = section.train_all(net, runs, problem, batches)
    alone = optim.sync_sgd(net, problem, LocalAdam(net, 0.02), np.zeros(section.FEATURES), batches, section.ROWS,
                           average=lambda net, gradient, rows: gradient)
    return paths | {"Adam": alone.weights}


def race_that_waits_for_all(net, *args):
    """The referee lets the slowest finish too, and only then leaves it out."""
    first_finished = optim.first_finished

    def patient(net, step, deadline, wanted):
        ready = first_finished(net, step, deadline, net.size)
        ready[wanted:] = False
        return ready

    optim.first_finished = patient
    return section.race(net, *args)


def race_that_counts_everyone(net, *args):
    """Whoever gave up still counts as having contributed."""
    first_finished = optim.first_finished
    optim.first_finished = lambda *spec: first_finished(*spec) | True
    return section.race(net, *args)


def race_on_one_gradient(net, problem, *args):
    """With backups, whatever is averaged is half of it: the missing gradients count as zeros."""
    traces = section.race(net, problem, *args)

    def diluted(net, gradient, rows):
        return ring(net, gradient * (rows > 0)) / net.size**2

    optim.sync_sgd.__defaults__ = (*optim.sync_sgd.__defaults__[:-1], diluted)
    return {b: trace if b == 0 else section.race(net, problem, *args)[b] for b, trace in traces.items()}


def both_with(net, average, *args):
    optim.sync_sgd.__defaults__ = (*optim.sync_sgd.__defaults__[:-1], average)
    return shortcut.both(net, *args)


def both_without_our_weights(net, *args):
    return both_with(net, optim.mean_of_means, *args)


def both_without_scaled_losses(net, *args):
    train = shortcut.train_library
    shortcut.train_library = lambda *spec: train(*spec[:-1], 1)  # as if DDP summed
    return shortcut.both(net, *args)


# --- the right ones, in ways that a test asks for ---------------------------------------------------------------------


def train(net, problem, optimizer, batches, rows, start):
    return optim.sync_sgd(net, problem, optimizer(), start, batches, rows)


def race_to_finish(net, delays, wanted):
    """Whose gradients count, step by step, when ranks are ready after `delays[step][rank]` seconds."""
    chosen = []
    for step, delay in enumerate(delays):
        net.barrier()
        chosen.append(optim.first_finished(net, step, monotonic() + delay[net.rank], wanted).tolist())
    return chosen
