"""Gradient buckets: all-reduce what backward has finished while it is still at work on the rest.

A hook on every parameter runs as soon as its gradient is accumulated and copies it into a flat bucket. Buckets are
filled in reverse order of registration, which is roughly the order in which backward produces gradients, and a full
bucket goes to the group's progress thread at once. `overlapped_step` predicts what that saves.

Source: Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel Training, section 3.2.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from part1_foundations.ch04_communication_primitives.collectives import Group

if TYPE_CHECKING:
    from torch import Tensor

    from shared.transport import Work


def fill_buckets(nbytes: Sequence[int], cap_bytes: float) -> list[list[int]]:
    """Indices of `nbytes`, in order, in buckets. One closes as soon as it holds `cap_bytes` or more, as torch's do."""
    buckets, held = [[]], 0
    for i, size in enumerate(nbytes):
        if held >= cap_bytes:
            buckets.append([])
            held = 0
        buckets[-1].append(i)
        held += size
    return buckets if nbytes else []


def overlapped_step(layer_seconds: Sequence[float], layer_bytes: Sequence[int], cap_bytes: float,
                    all_reduce_seconds: Callable[[float], float]) -> dict[str, float]:
    """Predict a step by its events. `layer_seconds` and `layer_bytes` are in backward's order, last layer first.

    A bucket's all-reduce starts once its last gradient is there and the one lane of the progress thread is free.
    Returns what `timings` does; serial is the step in which all communication waits for the end of backward.
    """
    ready = list(accumulate(layer_seconds))
    lane_free = communication = 0.0
    for bucket in fill_buckets(layer_bytes, cap_bytes):
        duration = all_reduce_seconds(sum(layer_bytes[i] for i in bucket))
        lane_free = max(lane_free, ready[bucket[-1]]) + duration
        communication += duration
    return timings(ready[-1], lane_free, ready[-1] + communication)


def timings(backward: float, step: float, serial: float) -> dict[str, float]:
    """Seconds of backward, the overlapped and the serial step, and the share of the communication that is hidden."""
    return {"backward": backward, "step": step, "serial": serial, "hidden": (serial - step) / (serial - backward)}


class Bucket:
    """Some parameters and one flat buffer for their gradients; `views[i]` is the part of the buffer of `params[i]`."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        import torch

        self.params = list(params)
        self.flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
        self.views = [part.view_as(p) for part, p in zip(self.flat.split([p.numel() for p in params]), params)]
        self.missing = set(range(len(params)))
        self.work: Work | None = None


class Bucketer:
    """Averages the gradients of `params` over `group` during backward. Call `wait()` after it and before the optimizer.

        bucketer = Bucketer(model.parameters(), 25 << 20, Group(net))
        loss.backward()
        bucketer.wait()

    cap_bytes: a bucket closes once it holds that many. overlap False starts every all-reduce in `wait()` instead.
    All parameters need one dtype, a NumPy one. Between the start of backward and the end of `wait()` the group belongs
    to its progress thread.

    Buckets start strictly in order even when a later one fills first: every rank must call the same collectives in the
    same order, and ranks may finish their layers in different orders. A parameter without a gradient counts as zeros.
    """

    def __init__(self, params: Iterable[Tensor], cap_bytes: float, group: Group, overlap: bool = True) -> None:
        last_first = [p for p in params if p.requires_grad][::-1]
        if len({p.dtype for p in last_first}) > 1:
            raise ValueError("all parameters of a Bucketer need the same dtype")
        self.group, self.overlap = group, overlap
        self.buckets = [Bucket([last_first[i] for i in indices])
                        for indices in fill_buckets([p.numel() * p.element_size() for p in last_first], cap_bytes)]
        self._started = 0
        self._place = {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.params)}
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in last_first]

    def _on_gradient(self, param: Tensor) -> None:
        bucket, i = self._place[param]
        if i not in bucket.missing:
            raise RuntimeError("a second backward before Bucketer.wait()")
        bucket.views[i].copy_(param.grad)
        bucket.missing.remove(i)
        while self.overlap and self._started < len(self.buckets) and not self.buckets[self._started].missing:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self.buckets[self._started]
        bucket.work = self.group.iall_reduce(bucket.flat.numpy(), op="avg")
        self._started += 1

    def wait(self) -> None:
        """Return when every `param.grad` holds the average over the group."""
        while self._started < len(self.buckets):
            for i in self.buckets[self._started].missing:
                self.buckets[self._started].views[i].zero_()
            self._start_next()
        for bucket in self.buckets:
            bucket.work.wait()
            for param, view in zip(bucket.params, bucket.views):
                if param.grad is None:
                    param.grad = view.clone().to(param.device)
                else:
                    param.grad.copy_(view)
            bucket.missing, bucket.work = set(range(len(bucket.params))), None
        self._started = 0

    def close(self) -> None:
        """Take the hooks off the parameters again."""
        for hook in self._hooks:
            hook.remove()


class TracedGroup(Group):
    """A group that notes when each of its all-reduces began and ended, on time.perf_counter."""

    def __init__(self, net, ranks: Sequence[int] | None = None) -> None:
        super().__init__(net, ranks)
        self.spans: list[tuple[float, float]] = []

    def all_reduce(self, x, *how, **named):
        begin = time.perf_counter()
        super().all_reduce(x, *how, **named)
        self.spans.append((begin, time.perf_counter()))
        return x
