"""A conformance suite for collectives: one list of cases, NumPy's answers, and an adapter for each backend.

A case is a collective with its dtype, operation, size, group and mode. An `Adapter` says which cases its backend lacks
and carries out the others, arrays in and arrays out. `run_suite` holds it to both: what it has must equal NumPy's
answer on every rank, what it lacks must raise.

Arrays (K members of the group, n elements): all_reduce, all_gather, broadcast and gather take shape (n,),
reduce_scatter, all_to_all and scatter take (K, n), of which row i is member i's. The root is the last member.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import Group
from part1_foundations.ch04_communication_primitives.timing import timed

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "gather", "scatter")
DTYPES = ("int64", "float16", "float32", "float64")
SIZES = (0, 1, 7, 1009)  # elements a member sends to one other: none, one, odd, prime
REDUCING, BY_MEMBER = ("all_reduce", "reduce_scatter"), ("reduce_scatter", "all_to_all", "scatter")


class Case(NamedTuple):
    collective: str
    dtype: str
    op: str  # sum, max or avg; "" where nothing is reduced
    size: int
    group: tuple[int, ...]  # ranks of the world, in ascending order
    asynchronous: bool

    @property
    def root(self) -> int:
        return len(self.group) - 1  # its rank in the group, unlike its rank in the world unless that is the group


class Outcome(NamedTuple):
    """What one case did on one rank, or (`worst`) on all members."""

    status: str  # "equal", "differs" or "raised"
    error: float  # largest difference from NumPy, see `deviation`
    seconds: float  # of one call
    lacks: str  # why the backend says that it lacks the case, or ""
    detail: str  # what was raised


class Adapter(Protocol):
    def lacks(self, case: Case) -> str:
        """Why the backend cannot do `case`, or "". """

    def start(self, case: Case, x: np.ndarray) -> Callable[[], np.ndarray | None]:
        """Start the collective on `x`, which may be overwritten; the function returned waits for it and gives the
        result (for gather, None except at the root). Raises if the backend lacks the case."""


# --- the cases and their answers --------------------------------------------------------------------------------------


def all_cases(workers: int) -> list[Case]:
    """The whole product, about 700 cases: on the world, and on the odd ranks."""
    groups = [tuple(range(workers)), tuple(range(1, workers, 2))]
    return [Case(collective, dtype, op, size, group, asynchronous)
            for collective in COLLECTIVES for op in (("sum", "max", "avg") if collective in REDUCING else ("",))
            for dtype, size, group, asynchronous in itertools.product(DTYPES, SIZES, groups, (False, True))]


def choose_cases(workers: int, count: int, seed: int) -> list[Case]:
    """`count` of them: those that cover all pairs of values (such as max with size 0), greedily, then others."""
    pool = all_cases(workers)
    pool = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))]
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in pool}
    uncovered, chosen = set().union(*pairs.values()), []
    while uncovered and len(chosen) < count:
        best = max(pool, key=lambda case: len(pairs[case] & uncovered))
        chosen.append(best)
        uncovered -= pairs[best]
    return chosen + [case for case in pool if case not in set(chosen)][:count - len(chosen)]


def make(case: Case, seed: tuple[int, ...], member: int) -> np.ndarray:
    """The input of one member, the same wherever it is made."""
    rng = np.random.default_rng((*seed, member))
    shape = (len(case.group), case.size) if case.collective in BY_MEMBER else (case.size,)
    return rng.integers(-1000, 1000, shape) if case.dtype == "int64" else rng.standard_normal(shape).astype(case.dtype)


def answer(case: Case, inputs: Sequence[np.ndarray], member: int) -> np.ndarray | None:
    """NumPy's result for one member, floats in float64."""
    stacked = np.stack(inputs).astype("int64" if case.dtype == "int64" else "float64")  # (K, n) or (K, K, n)
    if case.collective in REDUCING:
        reduced = {"sum": np.sum, "max": np.max, "avg": np.mean}[case.op](stacked, axis=0)
        return reduced if case.collective == "all_reduce" else reduced[member]
    at_root = stacked if member == case.root else None
    return {"all_gather": stacked, "broadcast": stacked[case.root], "gather": at_root,
            "all_to_all": stacked[:, member] if stacked.ndim == 3 else None,
            "scatter": stacked[case.root, member] if stacked.ndim == 3 else None}[case.collective]


def deviation(case: Case, got: np.ndarray | None, inputs: Sequence[np.ndarray], member: int) -> float:
    """Integers: the elements that differ. Floats: the largest difference as a share of the members' largest magnitudes
    added up. Infinite for a wrong shape or dtype, or for data where there should be none."""
    expected = answer(case, inputs, member)
    if expected is None or got is None:
        return 0.0 if got is expected else np.inf
    if got.dtype != case.dtype or got.shape != expected.shape:
        return np.inf
    if case.dtype == "int64":
        return float(np.count_nonzero(got != expected))
    scale = sum(np.abs(x.astype("float64")).max(initial=0) for x in inputs) or 1.0
    return float(np.abs(got - expected).max(initial=0) / scale)


def tolerance(case: Case) -> float:
    """Largest deviation allowed: one rounding for each member in half precision."""
    return {"int64": 0, "float16": len(case.group) * 2.0**-11, "float32": 1e-5, "float64": 1e-12}[case.dtype]


# --- running them -----------------------------------------------------------------------------------------------------


def run_suite(net, adapter: Adapter, cases: Sequence[Case], seed: int) -> list[Outcome | None]:
    """On one rank: the outcome of every case, None where this rank is not a member.

    What the backend lacks comes last: a group in which a call has raised may be out of step afterwards.
    """
    outcomes: list[Outcome | None] = [None] * len(cases)
    for i in sorted(range(len(cases)), key=lambda i: bool(adapter.lacks(cases[i]))):
        net.barrier()
        if net.rank in cases[i].group:
            outcomes[i] = run_case(net, adapter, cases[i], (seed, i))
    return outcomes


def run_case(net, adapter: Adapter, case: Case, seed: tuple[int, int]) -> Outcome:
    """Two calls on different data: one after the other, or both started and then waited for in reverse order."""
    member, lacks = case.group.index(net.rank), adapter.lacks(case)
    inputs = [[make(case, (*seed, call), peer) for peer in range(len(case.group))] for call in (0, 1)]
    mine = [values[member].copy() for values in inputs]
    results: list = []

    def both() -> None:
        if case.asynchronous:
            waits = [adapter.start(case, x) for x in mine]
            results.extend([wait() for wait in waits[::-1]][::-1])
        else:
            results.extend([adapter.start(case, x)() for x in mine])

    try:
        seconds = timed(Group(net, case.group), both) / 2
    except Exception as error:
        return Outcome("raised", np.inf, np.nan, lacks, f"{type(error).__name__}: {error}".splitlines()[0])
    error = max(deviation(case, got, values, member) for got, values in zip(results, inputs))
    return Outcome("equal" if error <= tolerance(case) else "differs", error, seconds, lacks, "")


def worst(by_rank: Sequence[Outcome | None]) -> Outcome:
    """One outcome for a case from those of its members: "raised" only if all raised, "equal" only if all are."""
    members = [Outcome(*outcome) for outcome in by_rank if outcome is not None]
    statuses = {outcome.status for outcome in members}
    status = statuses.pop() if len(statuses) == 1 else "differs"
    return Outcome(status, max(o.error for o in members), max(o.seconds for o in members), members[0].lacks,
                   members[0].detail)


def time_all_reduce(net, adapters: dict[str, Adapter], sizes: Sequence[int],
                    repeats: int) -> dict[str, list[list[float]]]:
    """On one rank: seconds of float32 sums of `sizes` bytes, by adapter, size and repeat; adapters take turns."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in adapters}
    for size in sizes:
        case = Case("all_reduce", "float32", "sum", size // 4, tuple(range(net.size)), False)
        x = np.ones(case.size, np.float32)
        for samples in seconds.values():
            samples.append([])
        for repeat in range(repeats + 1):
            for name in list(adapters)[::-1 if repeat % 2 else 1]:
                x[:] = 1
                elapsed = timed(net, lambda: adapters[name].start(case, x)())
                seconds[name][-1] += [elapsed] if repeat else []  # the first one warms up
    return seconds


# --- adapters ---------------------------------------------------------------------------------------------------------


class Ours:
    """collectives.py over a Transport."""

    def __init__(self, net, groups: Sequence[tuple[int, ...]]) -> None:
        self.groups = {ranks: Group(net, ranks) for ranks in groups if net.rank in ranks}

    def lacks(self, case: Case) -> str:
        if case.asynchronous and case.collective != "all_reduce":
            return "only all_reduce is asynchronous"
        return "no average of integers" if (case.op, case.dtype) == ("avg", "int64") else ""

    def start(self, case: Case, x: np.ndarray) -> Callable[[], np.ndarray | None]:
        group = self.groups[case.group]
        if case.asynchronous:
            return getattr(group, f"i{case.collective}")(x, op=case.op).wait
        match case.collective:
            case "all_reduce" | "reduce_scatter":
                result = getattr(group, case.collective)(x, op=case.op)
            case "all_gather":
                result = group.all_gather(x)
            case "all_to_all":
                result = np.stack(group.all_to_all(x))
            case "broadcast":
                result = group.broadcast(x, case.root)
            case "gather":
                pieces = group.gather(x, case.root)
                result = None if pieces is None else np.stack(pieces)
            case "scatter":
                result = group.scatter(x if group.rank == case.root else None, case.root)
        return lambda: result


class Torch:
    """torch.distributed on one backend, in processes with a default group. On GPUs, one for each rank."""

    backend, device = "gloo", "cpu"

    def __init__(self, net, groups: Sequence[tuple[int, ...]]) -> None:
        import torch.distributed as dist

        self.groups = {ranks: dist.new_group(list(ranks), backend=self.backend) for ranks in groups}

    def lacks(self, case: Case) -> str:
        return "no average of integers" if (case.op, case.dtype) == ("avg", "int64") else ""

    def start(self, case: Case, x: np.ndarray) -> Callable[[], np.ndarray | None]:
        import torch
        import torch.distributed as dist

        group, k = self.groups[case.group], len(case.group)
        options: dict = {"group": group, "async_op": case.asynchronous}
        if case.op:
            options["op"] = getattr(dist.ReduceOp, case.op.upper())
        at_root = group.rank() == case.root
        x = torch.from_numpy(x).to(self.device)
        match case.collective:
            case "all_reduce":
                work, result = dist.all_reduce(x, **options), x
            case "reduce_scatter":
                result = x.new_empty(case.size)
                work = dist.reduce_scatter(result, list(x), **options)
            case "all_gather":
                result = x.new_empty(k, case.size)
                work = dist.all_gather(list(result), x, **options)
            case "all_to_all":
                result = x.new_empty(k, case.size)
                work = dist.all_to_all(list(result), list(x), **options)
            case "broadcast":
                work, result = dist.broadcast(x, group_src=case.root, **options), x
            case "gather":
                result = x.new_empty(k, case.size) if at_root else None
                work = dist.gather(x, list(result) if at_root else None, group_dst=case.root, **options)
            case "scatter":
                result = x.new_empty(case.size)
                work = dist.scatter(result, list(x) if at_root else None, group_src=case.root, **options)

        def finish() -> np.ndarray | None:
            if work is not None:
                work.wait()
            return None if result is None else result.cpu().numpy()

        return finish


class Scratch(Torch):
    """The same calls on our own backend."""

    backend = "scratch"

    def __init__(self, net, groups: Sequence[tuple[int, ...]]) -> None:
        from part1_foundations.ch04_communication_primitives import scratch_backend

        scratch_backend.offer(net)
        super().__init__(net, groups)


class Nccl(Torch):
    backend = "nccl"

    def __init__(self, net, groups: Sequence[tuple[int, ...]]) -> None:
        import torch

        self.device = f"cuda:{net.rank}"
        torch.cuda.set_device(net.rank)
        super().__init__(net, groups)


class Mpi:
    """mpi4py's upper-case methods, in processes that mpirun has started."""

    def __init__(self, net, groups: Sequence[tuple[int, ...]]) -> None:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        self.groups = {ranks: world.Create(world.group.Incl(ranks)) for ranks in groups}

    def lacks(self, case: Case) -> str:
        return "no average" if case.op == "avg" else "no half precision" if case.dtype == "float16" else ""

    def start(self, case: Case, x: np.ndarray) -> Callable[[], np.ndarray | None]:
        from mpi4py import MPI
        from mpi4py.util import dtlib

        dtlib.from_numpy_dtype(x.dtype)  # raises for float16, where Open MPI 4.1 crashes when it reduces none of them
        comm, k = self.groups[case.group], len(case.group)
        op = getattr(MPI, case.op.upper()) if case.op else None  # MPI has no AVG
        name = {"all_reduce": "Allreduce", "reduce_scatter": "Reduce_scatter_block", "all_gather": "Allgather",
                "all_to_all": "Alltoall", "broadcast": "Bcast"}.get(case.collective, case.collective.title())
        call = getattr(comm, "I" + name.lower() if case.asynchronous else name)
        at_root = comm.rank == case.root
        match case.collective:
            case "all_reduce":
                request, result = call(MPI.IN_PLACE, x, op), x
            case "reduce_scatter":
                result = np.empty(case.size, x.dtype)
                request = call(x, result, op)
            case "all_gather" | "all_to_all":
                result = np.empty((k, case.size), x.dtype)
                request = call(x, result)
            case "broadcast":
                request, result = call(x, case.root), x
            case "gather":
                result = np.empty((k, case.size), x.dtype) if at_root else None
                request = call(x, result, case.root)
            case "scatter":
                result = np.empty(case.size, x.dtype)
                request = call(x if at_root else None, result, case.root)

        def finish() -> np.ndarray | None:
            if request is not None:
                request.Wait()
            return result

        return finish
