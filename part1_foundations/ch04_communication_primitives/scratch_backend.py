"""Our collectives as a torch.distributed backend named "scratch": what trains on a process group trains on it.

A process that holds a Transport offers it, and then asks torch for groups as it would of any backend:

    scratch_backend.offer(net)
    group = torch.distributed.new_group(backend="scratch")

torch makes one ScratchGroup for each process group and calls its methods with lists of CPU tensors, which share their
memory with NumPy arrays. A call checks its arguments and queues the rest for one progress thread, which owns the
Transport from then on, so that backward computes on while gradients travel; torch waits for the future it gets back.
Sends and receives wait for their turn in the same queue. A method that is missing here raises in torch.

This module needs torch: import it inside functions.

Source: torch.distributed.ProcessGroup, whose C++ methods a Python subclass may override; Li et al. (2020).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from part1_foundations.ch04_communication_primitives.collectives import OPS, Group, Progress
from shared.transport import Transport

TORCH_NAMES = {name: getattr(dist.ReduceOp, {"prod": "product"}.get(name, name).upper()) for name in OPS}
_net: Transport | None = None
_progress: Progress | None = None


def offer(net: Transport) -> None:
    """Let groups of backend "scratch" run over `net`, whose ranks are those of torch's default group."""
    global _net, _progress
    _net, _progress = net, Progress()
    if "scratch" not in dist.Backend.backend_list:
        dist.Backend.register_backend("scratch", ScratchGroup, extended_api=True, devices=["cpu"])


class ScratchWork(dist.Work):
    """A collective under way, as torch sees it."""

    def __init__(self, done: torch.futures.Future) -> None:
        super().__init__()
        self._done = done

    def wait(self, timeout: object = None) -> bool:
        self._done.wait()
        return True

    def is_completed(self) -> bool:
        return self._done.done()

    def get_future(self) -> torch.futures.Future:
        return self._done


class ScratchGroup(dist.ProcessGroup):
    """One process group. Roots and peers are ranks of the group; tensors may have any shape, lists one entry a rank."""

    def __init__(self, options, _backend_options) -> None:
        super().__init__(options.group_rank, options.group_size)
        self.group = Group(_net, options.global_ranks_in_group or None)

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return "scratch"

    def allreduce(self, tensors: list[Tensor], opts) -> ScratchWork:
        op = _op(opts.reduceOp, tensors[0])
        return _queue(lambda: [self.group.all_reduce(_array(t), op=op) for t in tensors], tensors)

    def broadcast(self, tensors: list[Tensor], opts) -> ScratchWork:
        return _queue(lambda: [self.group.broadcast(_array(t), opts.rootRank) for t in tensors], tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts) -> ScratchWork:
        def job() -> None:
            for parts, mine in zip(outputs, inputs):
                _fill(parts, self.group.all_gather(_array(mine)))

        return _queue(job, outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts) -> ScratchWork:
        op = _op(opts.reduceOp, outputs[0])

        def job() -> None:
            for mine, parts in zip(outputs, inputs):
                _fill([mine], [self.group.reduce_scatter(np.stack([_array(part) for part in parts]), op)])

        return _queue(job, outputs)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts) -> ScratchWork:
        return _queue(lambda: _fill(outputs, self.group.all_to_all([_array(t) for t in inputs])), outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts) -> ScratchWork:
        def job() -> None:
            gathered = self.group.gather(_array(inputs[0]), opts.rootRank)
            if gathered is not None:
                _fill(outputs[0], gathered)

        return _queue(job, outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts) -> ScratchWork:
        pieces = [_array(t) for t in inputs[0]] if self.group.rank == opts.rootRank else None
        return _queue(lambda: _fill(outputs, [self.group.scatter(pieces, opts.rootRank)]), outputs)

    def barrier(self, opts) -> ScratchWork:
        return _queue(self.group.barrier, [])

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> ScratchWork:
        return _queue(lambda: self.group.send(peer, _array(tensors[0]), tag), tensors)

    def recv(self, tensors: list[Tensor], peer: int, tag: int) -> ScratchWork:
        return _queue(lambda: self.group.recv(peer, _array(tensors[0]), tag), tensors)


def _queue(job: Callable[[], object], result: list) -> ScratchWork:
    """Hand `job` to the progress thread; the work's future holds `result`, or raises what the job raised."""
    future: torch.futures.Future = torch.futures.Future()

    def run() -> None:
        try:
            job()
            future.set_result(result)
        except Exception as error:
            future.set_exception(error)

    _progress.submit(run)
    return ScratchWork(future.then(lambda finished: finished.wait()))  # an exception that C++ sees as one, too


def _op(given: dist.ReduceOp, tensor: Tensor) -> str:
    name = next((name for name, op in TORCH_NAMES.items() if given == op), None)
    if name is None or name == "avg" and not tensor.is_floating_point():
        raise ValueError(f"scratch cannot reduce {tensor.dtype} by {name or 'this operation'}")
    return name


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array. TypeError for a dtype that NumPy lacks or a tensor that is not on the CPU."""
    return tensor.detach().numpy()


def _fill(tensors: Sequence[Tensor], arrays: Sequence[np.ndarray]) -> None:
    for tensor, array in zip(tensors, arrays):
        _array(tensor)[...] = array.reshape(tensor.shape)
