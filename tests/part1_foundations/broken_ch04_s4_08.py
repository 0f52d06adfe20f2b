"""Workers and adapters of test_ch04_s4_08, most broken on purpose; apart, so that they need not import pytest."""
from __future__ import annotations

import os
import signal
import time

import numpy as np

from part1_foundations.ch04_communication_primitives import conformance
from part1_foundations.ch04_communication_primitives import s4_08_backend_conformance as section
from part1_foundations.ch04_communication_primitives import s4_08_shortcut_mpi4py as shortcut
from part1_foundations.ch04_communication_primitives.collectives import ring
from part1_foundations.ch04_communication_primitives.conformance import Mpi, Ours

# --- adapters that break the contract ---------------------------------------------------------------------------------


class LosesTheLastInteger(Ours):
    """An all-gather of integers, as if the last element of every message had been dropped."""

    def start(self, case, x):
        wait = super().start(case, x)
        if (case.collective, case.dtype) == ("all_gather", "int64"):
            return lambda: np.concatenate([wait()[:, :-1], np.zeros_like(wait()[:, :1])], axis=1)[:, :case.size]
        return wait


class In(Ours):
    """Reduces floats of one kind in a lower precision."""

    kind, precision = "float32", "float16"

    def start(self, case, x):
        if case.dtype != self.kind or case.op not in ("sum", "avg"):
            return super().start(case, x)
        wait = super().start(case, x.astype(self.precision))
        return lambda: wait().astype(self.kind)


class Float64InFloat32(In):
    kind, precision = "float64", "float32"


class TruncatesAverages(Ours):
    """Divides integers as C does instead of refusing."""

    def start(self, case, x):
        if (case.op, case.dtype) != ("avg", "int64"):
            return super().start(case, x)
        wait = super().start(case._replace(op="sum", asynchronous=False), x)
        return lambda: wait() // len(case.group)


class RefusesEmpty(Ours):
    """Raises on no elements, though it says that it supports them."""

    def start(self, case, x):
        if not case.size and case.dtype == "int64":
            raise ValueError("nothing to send")
        return super().start(case, x)


# --- trainings --------------------------------------------------------------------------------------------------------


def no_training(net, backend, steps, seed):
    """Nothing, as if all had gone well: for tests of the suite, since DDP takes seconds to import."""
    weights = np.zeros(3, np.float32)
    sent = (steps - 2) * 2 * (net.size - 1) * weights.nbytes // net.size
    return {"weights": weights, "losses": [0.0], "bytes": sent if backend == "scratch" else 0}


def train_with_max(net, backend, steps, seed):
    """As many bytes, but the largest gradient instead of the sum."""
    from part1_foundations.ch04_communication_primitives import scratch_backend

    scratch_backend.ScratchGroup.allreduce = lambda self, tensors, opts: scratch_backend._queue(
        lambda: [ring(self.group, tensor.numpy(), np.maximum) for tensor in tensors], tensors)
    return section.train_ddp(net, backend, steps, seed)


def train_on_gloo_only(net, backend, steps, seed):
    return section.train_ddp(net, "gloo", steps, seed)


# --- under mpirun -----------------------------------------------------------------------------------------------------


class BroadcastsFromTheFirst(Mpi):
    def start(self, case, x):
        if case.collective != "broadcast":
            return super().start(case, x)
        wait = super().start(case._replace(collective="all_gather"), x)
        return lambda: wait()[0]


class AddsForAverage(Mpi):
    def start(self, case, x):
        return super().start(case._replace(op="sum") if case.op == "avg" and case.dtype != "float16" else case, x)


def mpirun_with_a_wrong_root(*args):
    shortcut.Mpi = BroadcastsFromTheFirst
    return shortcut.under_mpirun(*args)


def mpirun_with_an_average(*args):
    shortcut.Mpi = AddsForAverage
    return shortcut.under_mpirun(*args)


def mpirun_with_a_maximum(*args):
    right = shortcut.seven_mpi4py

    def wrong(comm, x, rows, mine, everyone):
        from mpi4py import MPI

        seven = right(comm, x, rows, mine, everyone)
        next(seven)
        comm.Allreduce(x, mine, MPI.MAX)
        yield mine
        yield from seven

    shortcut.seven_mpi4py = wrong
    return shortcut.under_mpirun(*args)


def words_with_a_gather_in_the_wrong_order(*args):
    right = shortcut.seven_torch

    def wrong(word, x, rows, mine, everyone):
        for i, result in enumerate(right(word, x, rows, mine, everyone)):
            yield result.flip(0) if i == shortcut.COLLECTIVES.index("gather") and result is not None else result

    shortcut.seven_torch = wrong
    return shortcut.through_words(*args)


def mpi_suite_of(net, cases, seed):
    cases = [conformance.Case(*case) for case in cases]
    return conformance.run_suite(net, Mpi(net, sorted({case.group for case in cases})), cases, seed)


def fails(net, how):
    if net.rank == net.size - 1 and how == "raises":
        raise ValueError("out of cheese")
    if net.rank == net.size - 1 and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def ring_under_mpirun(net, elements):
    """Our ring over the shared-memory transport, large enough for its slots."""
    from mpi4py import MPI

    x = np.arange(elements) * (net.rank + 1)
    ring(net, x)
    net.barrier()
    return MPI.COMM_WORLD.size, int(x[-1]), net.stats().sent_to().messages


# --- the scratch backend ----------------------------------------------------------------------------------------------


def book_sum(net):
    """The book's three vectors, summed and averaged by our library, by gloo and by our backend."""
    import torch
    import torch.distributed as dist

    from part1_foundations.ch04_communication_primitives import scratch_backend
    from part1_foundations.ch04_communication_primitives.collectives import Group

    scratch_backend.offer(net)
    mine = [[1, 2, 3], [0, 1, 0], [4, 0, 2]][net.rank]
    ours = Group(net)
    found = [(ours.all_reduce(np.array(mine)).tolist(), ours.all_reduce(np.array(mine, float), op="avg").tolist())]
    for group in (dist.group.WORLD, dist.new_group(backend="scratch")):
        total, mean = torch.tensor(mine), torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(total, group=group)
        dist.all_reduce(mean, dist.ReduceOp.AVG, group=group)
        found.append((total.tolist(), mean.tolist()))
    return found


def scratch_corners(net):
    """What the suite does not ask of the backend: messages in a subgroup, barriers, refusals, failures, leftovers."""
    import torch
    import torch.distributed as dist

    from part1_foundations.ch04_communication_primitives import scratch_backend

    def says(call):
        try:
            return f"returned {call()}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"

    scratch_backend.offer(net)
    world, ends = dist.new_group(backend="scratch"), dist.new_group([0, 2], backend="scratch")
    found = {"backend": dist.get_backend(world)}
    if net.rank != 1:
        x = torch.full((2, 3), net.rank)
        if net.rank == 0:
            dist.send(x + 7, 2, group=ends, tag=5)
        else:
            dist.recv(x, 0, group=ends, tag=5)
        found["message"] = x.tolist()
    dist.barrier(world)
    work = dist.all_reduce(torch.ones(3), group=world, async_op=True)
    work.wait()
    found["completed"] = work.is_completed(), [t.tolist() for t in work.get_future().value()]
    found["reduce"] = says(lambda: dist.reduce(torch.ones(3), 0, group=world))
    found["premultiplied"] = says(lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND, group=world))
    found["strided"] = says(lambda: dist.broadcast(torch.ones(4, 4).t()[::2], 0, group=world))
    found["bfloat16"] = says(lambda: dist.broadcast(torch.ones(4, dtype=torch.bfloat16), 0, group=world))
    square = torch.full((2, 2), float(net.rank))
    pieces = [torch.empty(2, 2) for _ in range(3)]
    dist.all_gather(pieces, square, group=world)
    found["squares"] = [piece[0, 0].item() for piece in pieces]
    return found


def ddp_loses_a_peer(net):
    """A rank leaves in the middle of a training on scratch: what the others are told, if they do not hang."""
    import torch
    import torch.distributed as dist

    from part1_foundations.ch04_communication_primitives import scratch_backend

    scratch_backend.offer(net)
    group = dist.new_group(backend="scratch")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2), process_group=group)
    for step in range(4):
        if step == 2 and net.rank == 1:
            net.close()
            return "left"
        try:
            model(torch.ones(3, 4)).sum().backward()
        except RuntimeError as error:
            return f"step {step}: {error}"
    return "finished"


def killed_in_a_collective(net):
    import torch
    import torch.distributed as dist

    from part1_foundations.ch04_communication_primitives import scratch_backend

    scratch_backend.offer(net)
    group = dist.new_group(backend="scratch")
    for step in range(100):
        if step == 50 and net.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(3), group=group)
