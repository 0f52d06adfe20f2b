"""Section 4.8 with mpi4py: the seven collectives in upper case, and torch's, which change backend by one word.

Question   What does an MPI library buy over our collectives, and what does a program change to move between backends?
Method     Processes of mpirun run our seven collectives and mpi4py's in turns, both over shared memory, on the same
           arrays; the suite judges both; torch runs the seven on two backends.
Read       mpi4py's reductions win short messages by far, C that polls against Python that sleeps; with megabytes both
           sides wait for memory, the gap closes, and our larger slots can win.
Source     MPI Forum (2021), MPI 4.0; Dalcin & Fang (2021), mpi4py: Status update after 12 years of development.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives import mpi_world
from part1_foundations.ch04_communication_primitives.collectives import (
    Group,
    all_to_all,
    broadcast_binomial,
    chunks,
    flat,
    gather,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
    scatter,
)
from part1_foundations.ch04_communication_primitives.conformance import (
    COLLECTIVES,
    Case,
    Mpi,
    Ours,
    choose_cases,
    run_suite,
    worst,
)
from part1_foundations.ch04_communication_primitives.s4_04_all_reduce_algorithms import buffer_sizes
from part1_foundations.ch04_communication_primitives.s4_08_backend_conformance import print_suite, probe
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.measure import human_bytes, ratio

OURS = (Group, ring, ring_reduce_scatter, ring_all_gather, all_to_all, broadcast_binomial, gather, scatter, chunks,
        flat)


@demo("4.8", library="mpi4py", needs=("mpi4py", "exe:mpirun", "torch"),
      handles=("algorithms chosen by size and ranks", "shared-memory transport", "launchers", "asynchronous forms"),
      smoke=dict(workers=2, cases=40, mebibytes=0.25, points=3, repeats=5),
      laptop=dict(workers=4, cases=300, mebibytes=8, points=5, repeats=9))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 2, cases: int = 120, mebibytes: float = 4.0,
         points: int = 4, repeats: int = 9, seed: int = 0) -> None:
    """Run the seven collectives through MPI, through torch and through our own library.

    Args:
        cases: Cases of the conformance suite.
        mebibytes: Largest array that a rank contributes in MiB.
        points: Number of array sizes, from 1 KiB up.
    """
    chosen, sizes = choose_cases(workers, cases, seed), buffer_sizes(mebibytes, points)
    ranks = mpi_world.launch(workers, under_mpirun, chosen, sizes, repeats, seed, timeout=600)
    verdicts = {side: [worst([rank[side][i] for rank in ranks]) for i in range(len(chosen))]
                for side in ("ours", "mpi4py")}
    print_suite(run, chosen, verdicts)
    rows = []
    for i, size in enumerate(sizes):
        timings = {name: [slowest([rank["seconds"][i][side][name] for rank in ranks]) for side in ("mpi4py", "ours")]
                   for name in COLLECTIVES}
        pairs = {name: ratio(*both) for name, both in timings.items()}
        rows.append((human_bytes(size), *(f"{pairs[name].median:.2f}" for name in COLLECTIVES)))
        if size in (sizes[0], sizes[-1]):
            library, ours = timings["all_reduce"]
            run.compare(f"all-reduce, {human_bytes(size)}, {workers} processes", ours, library, pairs["all_reduce"])
    run.table(f"time of mpi4py / ours, {workers} processes of mpirun", rows, ["from each rank", *COLLECTIVES],
              note="float32; below 1 mpi4py is faster")
    run.lines_of_code(ours=[*OURS, seven_ours], library=[seven_mpi4py])
    words = ["gloo", "scratch", *(["nccl"] if probe(workers)["nccl"] == "runs" else [])]
    through_torch = torch_world.launch(workers, through_words, words, sizes[-1], seed, wire="shm")

    run.claim("mpi4py passes every case that it supports (cases that differ or raise)", equals=0,
              measured=sum(v.status != "equal" for v in verdicts["mpi4py"] if not v.lacks))
    run.claim("mpi4py raises on every case that it lacks (cases that returned something)", equals=0,
              measured=sum(v.status != "raised" for v in verdicts["mpi4py"] if v.lacks))
    run.claim("mpi4py's seven results equal ours at every size, largest difference", at_most=1e-5,
              measured=max(rank["difference"] for rank in ranks))
    run.claim(f"torch's seven results equal ours, with the word {' or '.join(words)}, largest difference", at_most=1e-5,
              measured=max(through_torch))


# --- seven collectives, three times; each yields its result -----------------------------------------------------------
# x (n,) and rows (K, n) are inputs, mine (n,) and everyone (K, n) buffers; the root is the last rank.


def seven_ours(group: Group, x, rows, mine, everyone) -> Iterator[np.ndarray | None]:
    root = group.size - 1
    mine[:] = x
    yield group.all_reduce(mine)
    everyone[:] = rows
    yield group.reduce_scatter(everyone)
    yield group.all_gather(x)
    yield np.stack(group.all_to_all(rows))
    mine[:] = x
    yield group.broadcast(mine, root)
    pieces = group.gather(x, root)
    yield pieces and np.stack(pieces)
    yield group.scatter(rows if group.rank == root else None, root)


def seven_mpi4py(comm, x, rows, mine, everyone) -> Iterator[np.ndarray | None]:
    root = comm.size - 1
    at_root = comm.rank == root
    comm.Allreduce(x, mine)
    yield mine
    comm.Reduce_scatter_block(rows, mine)
    yield mine
    comm.Allgather(x, everyone)
    yield everyone
    comm.Alltoall(rows, everyone)
    yield everyone
    mine[:] = x
    comm.Bcast(mine, root)
    yield mine
    comm.Gather(x, everyone if at_root else None, root)
    yield everyone if at_root else None
    comm.Scatter(rows if at_root else None, mine, root)
    yield mine


def seven_torch(word: str, x, rows, mine, everyone) -> Iterator[np.ndarray | None]:
    import torch.distributed as dist

    group = dist.new_group(backend=word)  # the one word
    root = dist.get_world_size() - 1
    at_root = dist.get_rank() == root
    mine[:] = x
    dist.all_reduce(mine, group=group)
    yield mine
    dist.reduce_scatter(mine, list(rows), group=group)
    yield mine
    dist.all_gather(list(everyone), x, group=group)
    yield everyone
    dist.all_to_all(list(everyone), list(rows), group=group)
    yield everyone
    mine[:] = x
    dist.broadcast(mine, root, group=group)
    yield mine
    dist.gather(x, list(everyone) if at_root else None, root, group=group)
    yield everyone if at_root else None
    dist.scatter(mine, list(rows) if at_root else None, root, group=group)
    yield mine


# --- on each rank -----------------------------------------------------------------------------------------------------


def under_mpirun(net, cases: list[tuple], sizes: list[int], repeats: int, seed: int) -> dict:
    """In a process of mpirun: the suite on both sides, then the seven in turns at every size."""
    from mpi4py import MPI

    cases = [Case(*case) for case in cases]
    groups = sorted({case.group for case in cases})
    suites = {"ours": run_suite(net, Ours(net, groups), cases, seed),
              "mpi4py": run_suite(net, Mpi(net, groups), cases, seed)}
    seconds, differences = [], []
    for size in sizes:
        arrays = inputs(net, size, seed)
        sides = {"ours": lambda: seven_ours(Group(net), *arrays),
                 "mpi4py": lambda: seven_mpi4py(MPI.COMM_WORLD, *arrays)}
        seconds.append({side: {name: [] for name in COLLECTIVES} for side in sides})
        for repeat in range(repeats + 1):  # the first one warms up
            results = {}
            for side in list(sides)[::-1 if repeat % 2 else 1]:
                elapsed, results[side] = in_turn(net, sides[side]())
                for name, value in zip(COLLECTIVES, elapsed) if repeat else ():
                    seconds[-1][side][name].append(value)
        differences.append(difference(results["ours"], results["mpi4py"]))
    return suites | {"seconds": seconds, "difference": max(differences)}


def through_words(net, words: list[str], size: int, seed: int) -> float:
    """In a process of torch: the seven on a group of each backend; how far they are from ours."""
    import torch

    from part1_foundations.ch04_communication_primitives import scratch_backend

    arrays = inputs(net, size, seed)
    _, expected = in_turn(net, seven_ours(Group(net), *arrays))
    scratch_backend.offer(net)
    differences = []
    for word in words:
        device = f"cuda:{net.rank}" if word == "nccl" else "cpu"
        tensors = [torch.from_numpy(array.copy()).to(device) for array in arrays]
        results = [None if y is None else y.cpu().numpy().copy() for y in seven_torch(word, *tensors)]
        differences.append(difference(expected, results))
    return max(differences)


def inputs(net, nbytes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, net.rank))
    rows = rng.standard_normal((net.size, nbytes // 4), np.float32)
    return rows[0].copy(), rows, np.empty_like(rows[0]), np.empty_like(rows)


def in_turn(net, seven: Iterator[np.ndarray | None]) -> tuple[list[float], list[np.ndarray | None]]:
    """Seconds and result of each of the seven, every one started together with the other ranks."""
    seconds, results = [], []
    for _ in COLLECTIVES:
        box: list = []
        seconds.append(timed(net, lambda: box.append(next(seven))))
        results.append(None if box[0] is None else box[0].copy())
    return seconds, results


def difference(a: list, b: list) -> float:
    return max(np.inf if (x is None) != (y is None) else 0.0 if x is None else float(np.abs(x - y).max())
               for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main.cli()
