"""Worker functions of test_ch04_s4_01, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

from part1_foundations.ch04_communication_primitives import s4_01_comm_compute_ratio as section
from part1_foundations.ch04_communication_primitives.collectives import ring

honest_train = section.train


def train_with_stragglers(net, all_reduce, plan, pace, repeats, seed):
    """More than two workers compute 1.8 times as slowly as the fit of two can know."""
    slow = 1.8 if net.size > 2 else 1
    return honest_train(net, all_reduce, plan, (slow * pace[0], slow * pace[1]), repeats, seed)


def train_at_one_price(net, all_reduce, plan, pace, repeats, seed):
    """An example costs the same however large the model is."""
    steps = []
    for parameters, batch in plan:
        scale = plan[0][0] / parameters
        steps += honest_train(net, all_reduce, [(parameters, batch)], (scale * pace[0], scale * pace[1]), repeats, seed)
    return steps


def everything_is_weak(batch, workers):
    """Forgets to divide the global batch among more workers."""
    return {"strong": batch // 2, "weak": batch // 2}


def everything_is_strong(batch, workers):
    """Divides a batch that should stay what it was."""
    return {"strong": batch // workers, "weak": batch // workers}


def weights_after(net, steps, batch):
    """All weights after some steps, as one NumPy vector."""
    import torch

    torch.manual_seed(0)
    model, (x, y) = section.mlp(3000), section.examples(batch, net.rank)
    for _ in range(steps):
        section.step(net, ring, model, x, y)
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


def _upside_down(batch_size):
    """The shortcut's worker, with the rest divided by the collective for one of the two batches."""
    from part1_foundations.ch04_communication_primitives import s4_01_shortcut_profiler_gamma as shortcut

    honest = shortcut.profiled_gamma

    def broken(model, optimizer, x, y, repeats):
        gammas = honest(model, optimizer, x, y, repeats)
        return [1 / gamma for gamma in gammas] if len(x) == batch_size else gammas

    shortcut.profiled_gamma = broken
    return shortcut.both


def both_small_upside_down(net, *args):
    return _upside_down(1)(net, *args)


def both_large_upside_down(net, *args):
    return _upside_down(2000)(net, *args)


def both_with_a_skipped_all_reduce(net, *args):
    """Each rank keeps its own gradient on our side."""
    from part1_foundations.ch04_communication_primitives import s4_01_shortcut_profiler_gamma as shortcut

    def broken(net, x):
        mine = x.copy()
        ring(net, x)
        x[:] = net.size * mine

    shortcut.ring = broken
    return shortcut.both(net, *args)
