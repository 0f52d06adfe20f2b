"""Worker functions of test_ch04_s4_05, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

import numpy as np

from part1_foundations.ch04_communication_primitives import s4_05_mini_zero as section
from part1_foundations.ch04_communication_primitives import s4_05_shortcut_fsdp2 as shortcut
from part1_foundations.ch04_communication_primitives import zero
from part1_foundations.ch04_communication_primitives.collectives import (
    chunks,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
    tree,
)
from part1_foundations.ch04_communication_primitives.zero import Zero


def reduce_scatter_in_another_order(net, x, op=np.add):
    """The right sums, but added up a tree: other roundings."""
    return chunks(tree(net, x, op), net.size)[net.rank]


def all_gather_a_step_short(net, x):
    parts = chunks(x, net.size)
    for step in range(net.size - 2):
        work = net.isend((net.rank + 1) % net.size, parts[(net.rank - step) % net.size])
        net.recv((net.rank - 1) % net.size, parts[(net.rank - step - 1) % net.size])
        work.wait()
    return x


def split_with_a_reduction_in_another_order(net, *args):
    section.ring_reduce_scatter = reduce_scatter_in_another_order
    return section.split_all_reduce(net, *args)


def split_with_a_short_all_gather(net, *args):
    section.ring_all_gather = all_gather_a_step_short
    return section.split_all_reduce(net, *args)


def train_with_shards_that_are_views(net, *args):
    """Each shard looks into the whole layer, which therefore stays in memory."""
    Zero.kept = lambda self, layer, sharded: chunks(layer.copy(), net.size)[net.rank] if sharded else layer.copy()
    return section.train_both(net, *args)


def train_with_all_reduced_gradients(net, *args):
    """Gradients arrive complete and are cut afterwards: the right numbers by twice the bytes."""
    zero.ring_reduce_scatter = lambda net, x: chunks(ring(net, x), net.size)[net.rank]
    return section.train_both(net, *args)


def train_with_sums(net, stage, *args):
    """Stage 2 takes a sum for the mean. Adam shrugs off a factor, but its epsilon does not."""
    if stage == 2:
        Zero.reduce = lambda self, i, gradient: np.copyto(self.gradients[i], ring_reduce_scatter(net, gradient))
    return section.train_both(net, stage, *args)


def train_on_stale_weights(net, stage, *args):
    """Stage 1 fetches the others' updated weights and drops them."""
    if stage == 1:
        zero.ring_all_gather = lambda net, x: ring_all_gather(net, x.copy())
    return section.train_both(net, stage, *args)


def both_with_replicas(net, *args):
    """A mesh on which every rank is a replica: the same losses, nothing sharded."""
    from torch.distributed import device_mesh

    real = device_mesh.init_device_mesh
    names = ("replicate", "shard")
    device_mesh.init_device_mesh = lambda device, shape: real(device, (*shape, 1), mesh_dim_names=names)
    return shortcut.both(net, *args)


def both_with_sums(net, *args):
    """Our side without the division by K. Adam shrugs off a factor, but its epsilon does not."""
    class Summing(Zero):
        def reduce(self, i, gradient):
            self.eps = 1e-3
            self.gradients[i][:] = ring_reduce_scatter(self.net, gradient)

    shortcut.Zero = Summing
    return shortcut.both(net, *args)


def both_with_a_short_all_gather(net, *args):
    shortcut.our_halves = lambda net, x: ring_reduce_scatter(net, x)
    return shortcut.both(net, *args)


def split(net, values):
    x = values[net.rank].copy()
    mine = ring_reduce_scatter(net, x).copy()
    whole = np.zeros_like(x)
    chunks(whole, net.size)[net.rank][:] = mine
    return mine, ring_all_gather(net, whole) - ring(net, values[net.rank].copy())


def train_ragged(net, stage):
    """Layers whose sizes K does not divide, one of them smaller than K, trained towards zero."""
    rng = np.random.default_rng(0)
    state = Zero(net, (rng.standard_normal(shape) for shape in [(5, 7), (2,), (3, 3)]), stage, rate=0.1)
    for step in range(4):
        for i, shape in enumerate(state.shapes):
            gradient = state.gradient_buffer(i)
            gradient[...] = 2 * state.gathered(i) * np.random.default_rng((step, net.rank)).random(shape)
            state.reduce(i, gradient)
        state.step()
    return [state.gathered(i) for i in range(3)], sum(state.state_bytes().values())
