"""Worker functions of test_ch16_s16_03, most broken on purpose; apart, so that workers need not import pytest."""
from __future__ import annotations

from part4_parallel_dl.ch16_model_pipeline_sharded import s16_03_pipeline_schedules as section
from part4_parallel_dl.ch16_model_pipeline_sharded import s16_03_shortcut_torch_pipelining as shortcut
from part4_parallel_dl.ch16_model_pipeline_sharded.schedules import gpipe, one_f_one_b, with_late_weights


def zero_bubble_with_all_weights_last(stages, micro_batches):
    return [with_late_weights(instructions, late=micro_batches) for instructions in one_f_one_b(stages, micro_batches)]


def mixed(stages, micro_batches):
    """1F1B, but the last stage wants all forwards first: a deadlock if there are more micro-batches than stages."""
    return [*one_f_one_b(stages, micro_batches)[:-1], gpipe(stages, micro_batches)[-1]]


def work_with_a_sum(net, *args):
    """The losses of the micro-batches are added, not averaged."""
    _sum_the_losses()
    return section.work(net, *args)


def work_without_a_weight_gradient(net, *args):
    """Micro-batch 1 never hands its weight gradients in."""
    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage

    right = Stage.W
    Stage.W = lambda self, chunk, m, _: self.in_flight.pop((chunk, m)) and None if m == 1 else right(self, chunk, m, _)
    return section.work(net, *args)


def work_with_a_leak(net, *args):
    """Somebody keeps every micro-batch: its activations stay although the schedule is done with them."""
    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage

    right, kept = Stage.F, []

    def forward(self, chunk, m, x):
        result = right(self, chunk, m, x)
        kept[:] = [held for held in kept if held in self.alive] + [self.in_flight[chunk, m]]
        return result

    Stage.F = forward
    return section.work(net, *args)


def work_that_sends_twice(net, *args):
    send = net.isend
    net.isend = lambda peer, array, tag: (send(peer, array, tag + 10**6), send(peer, array, tag))[1]
    return section.work(net, *args)


def work_with_a_slow_stage(net, plan, *args):
    """The last stage takes twice the declared time: the others wait for it."""
    *model, pace, repeats = args
    return section.work(net, plan, *model, pace * (2 if net.rank == net.size - 1 else 1), repeats)


def _sum_the_losses():
    """From now on a stage weighs each micro-batch by 1 instead of 1/M."""
    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage

    right = Stage.F

    def forward(self, *args):
        self.scale = 1.0
        return right(self, *args)

    Stage.F = forward


def both_with_a_sum(net, *args):
    _sum_the_losses()
    return shortcut.both(net, *args)


def run_lists(net, lists):
    """One step, not paced: the most that this rank held, and its share of the loss."""
    from part4_parallel_dl.ch15_data_parallel.tiny_gpt import cross_entropy
    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage, chunks_of_rank

    micro_batches = 1 + max(do.micro_batch for do in lists[0])
    chunks = chunks_of_rank(section.make_model(len(lists), 8, 4, 0), len(lists), net)
    stage = Stage(net, chunks, len(lists), cross_entropy)
    trace = stage.run(lists[net.rank], *section.make_batch(micro_batches, 1, 4, 0))
    return trace.live, trace.loss
