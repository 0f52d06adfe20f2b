"""Section 4.8: one conformance suite over our library, gloo, MPI and nccl, and our ring as a torch backend.

Question   If a backend is an implementation of one contract, which backends here keep it, and what do they cost?
Method     Every backend found runs the same cases (collective, dtype, operation, size, group, mode) against NumPy's
           answers, then a bandwidth sweep; DDP trains on gloo and on our own backend.
Read       All agree wherever they claim to; they differ in what they lack, which must raise, and in speed: MPI wins
           short messages on free cores because it polls, and long ones go to whoever copies least.
Source     MPI Forum (2021), MPI 4.0; Li et al. (2020), PyTorch Distributed: Experiences on Accelerating Data Parallel
           Training.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives import mpi_world
from part1_foundations.ch04_communication_primitives.conformance import (
    COLLECTIVES,
    Case,
    Mpi,
    Nccl,
    Ours,
    Outcome,
    Scratch,
    Torch,
    choose_cases,
    run_suite,
    time_all_reduce,
    worst,
)
from part1_foundations.ch04_communication_primitives.s4_04_all_reduce_algorithms import buffer_sizes
from part1_foundations.ch04_communication_primitives.timing import slowest
from shared import Run, demo, torch_world
from shared.catalog import missing, version
from shared.measure import human_bytes, human_seconds

ADAPTERS = {"ours": Ours, "scratch": Scratch, "gloo": Torch}  # in processes of torch; MPI has its own


@demo("4.8", needs=("torch",), smoke=dict(workers=2, cases=40, mebibytes=0.25, points=3, repeats=3),
      laptop=dict(workers=4, cases=300, mebibytes=16, points=6, repeats=9))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 2, cases: int = 120, mebibytes: float = 4.0,
         points: int = 4, repeats: int = 5, steps: Annotated[int, Option(min=3)] = 10, seed: int = 0) -> None:
    """Hold every backend to one contract.

    Args:
        cases: Cases of the conformance suite, chosen to cover all pairs of their properties.
        mebibytes: Largest buffer of the bandwidth sweep in MiB.
        points: Number of buffer sizes, from 1 KiB up.
        steps: Training steps on each backend, at least 3.
    """
    states = probe(workers)
    run.table("backends", list(states.items()), ["backend", "state"])
    chosen, sizes = choose_cases(workers, cases, seed), buffer_sizes(mebibytes, points)
    adapters = ADAPTERS | ({"nccl": Nccl} if states["nccl"] == "runs" else {})
    ranks = torch_world.launch(workers, torch_ranks, adapters, train_ddp, chosen, sizes, repeats, steps, seed,
                               wire="shm", timeout=600)
    if states["mpi"].startswith("runs"):
        by_rank = mpi_world.launch(workers, mpi_ranks, chosen, sizes, repeats, seed, timeout=600)
        for rank, (suite, seconds) in zip(ranks, by_rank):
            rank["suite"] |= suite
            rank["seconds"] |= seconds
    verdicts = {name: [worst([rank["suite"][name][i] for rank in ranks]) for i in range(len(chosen))]
                for name in ranks[0]["suite"]}
    seconds = {name: [slowest([rank["seconds"][name][i] for rank in ranks]).median for i in range(len(sizes))]
               for name in verdicts}
    training = [rank["training"] for rank in ranks]
    print_suite(run, chosen, verdicts)
    print_bandwidth(run, workers, sizes, seconds)
    print_training(run, training)

    judge_suite(run, chosen, verdicts)
    apart = max(float(np.abs(rank["scratch"]["weights"] - rank["gloo"]["weights"]).max()) for rank in training)
    run.claim(f"DDP on scratch ends with the weights of DDP on gloo after {steps} steps, largest difference",
              measured=apart, at_most=1e-6)
    run.claim("those gradients travelled on our ring: bytes that all ranks sent from the third step on",
              measured=sum(rank["scratch"]["bytes"] for rank in training),
              equals=(steps - 2) * 2 * (workers - 1) * training[0]["scratch"]["weights"].nbytes)


def probe(workers: int) -> dict[str, str]:
    """What there is to run on this machine, and what is missing where something is."""
    import torch
    import torch.distributed as dist

    enough = torch.cuda.device_count() >= workers
    mpi = not missing(mpi_world.NEEDS) and f"runs: mpi4py {version('mpi4py')} under mpirun"
    return {
        "ours": "runs: collectives.py over shared memory",
        "scratch": "runs: collectives.py as a torch backend in Python",
        "gloo": f"runs: torch {torch.__version__}, loopback TCP",
        "mpi": mpi or "not installed: apt-get install openmpi-bin and pip install -e '.[mpi]'",
        "mpi inside torch": "runs" if dist.is_mpi_available() else "not compiled into this torch",
        "nccl": "runs" if dist.is_nccl_available() and enough else
                f"needs a GPU for each of {workers} ranks, found {torch.cuda.device_count()}",
    }


# --- on each rank -----------------------------------------------------------------------------------------------------


def torch_ranks(net, adapters: dict, train: Callable[..., dict], cases: list[Case], sizes: list[int], repeats: int,
                steps: int, seed: int) -> dict:
    """In a process with our Transport and a gloo group: suite and sweep of every adapter, then the trainings."""
    ready = {name: adapter(net, sorted({case.group for case in cases})) for name, adapter in adapters.items()}
    return {"suite": {name: run_suite(net, adapter, cases, seed) for name, adapter in ready.items()},
            "seconds": time_all_reduce(net, ready, sizes, repeats),
            "training": {backend: train(net, backend, steps, seed) for backend in ("gloo", "scratch")}}


def mpi_ranks(net, cases: list[tuple], sizes: list[int], repeats: int, seed: int) -> tuple[dict, dict]:
    """In a process of mpirun: the same suite and sweep."""
    cases = [Case(*case) for case in cases]
    mpi = Mpi(net, sorted({case.group for case in cases}))
    return {"mpi": run_suite(net, mpi, cases, seed)}, time_all_reduce(net, {"mpi": mpi}, sizes, repeats)


def train_ddp(net, backend: str, steps: int, seed: int) -> dict:
    """Unmodified DDP on a group of `backend`: final weights, losses, and the bytes this rank sent on our transport."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(seed + net.rank)  # DDP broadcasts rank 0's weights
    layers = torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(*layers), process_group=dist.new_group(backend=backend), bucket_cap_mb=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, teacher = torch.randn(steps, 32, 64), torch.linspace(-1, 1, 640).view(64, 10)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[step]), (x[step] @ teacher).argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 1:
            net.reset_stats()  # DDP has settled on its buckets now
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    return {"weights": weights, "losses": losses, "bytes": net.stats().sent_to().bytes}


# --- what the reader sees ---------------------------------------------------------------------------------------------


def judge_suite(run: Run, cases: list[Case], verdicts: dict[str, list[Outcome]]) -> None:
    judged = [(case, verdict) for outcomes in verdicts.values() for case, verdict in zip(cases, outcomes)]
    has = {dtype: [verdict for case, verdict in judged if case.dtype == dtype and not verdict.lacks]
           for dtype in ("int64", "float16", "float32", "float64")}
    run.claim(f"all {len(verdicts)} backends give NumPy's integers on every case they support (cases that do not)",
              measured=sum(v.status != "equal" for v in has["int64"]), equals=0)
    run.claim("float32 results agree with NumPy's, largest relative error of any backend and case",
              measured=max((v.error for v in has["float32"]), default=0.0), at_most=1e-5)
    run.claim("float16 and float64 results agree to their own precision (cases that do not)",
              measured=sum(v.status != "equal" for v in has["float16"] + has["float64"]), equals=0)
    run.claim("every unsupported case raises on all its ranks (cases that returned something)",
              measured=sum(v.status != "raised" for _, v in judged if v.lacks), equals=0)


def print_suite(run: Run, cases: list[Case], verdicts: dict[str, list[Outcome]]) -> None:
    rows = []
    for collective in COLLECTIVES:
        cells = []
        for outcomes in verdicts.values():
            has = [v for case, v in zip(cases, outcomes) if case.collective == collective and not v.lacks]
            passed = [v.seconds for v in has if v.status == "equal"]
            cells.append(f"{len(passed)}/{len(has)}" + (f"  {human_seconds(np.median(passed))}" if passed else ""))
        rows.append((collective, *cells))
    lacked = {name: [v.status for v in outcomes if v.lacks] for name, outcomes in verdicts.items()}
    rows.append(("not supported, raised", *(f"{one.count('raised')}/{len(one)}" for one in lacked.values())))
    run.table(f"{len(cases)} cases: passed / supported, and the median time of one call", rows,
              ["collective", *verdicts])
    lacking = [(name, reason, next(v.detail for v in outcomes if v.lacks == reason))
               for name, outcomes in verdicts.items() for reason in sorted({v.lacks for v in outcomes} - {""})]
    if lacking:
        run.table("what each backend lacks, and what it says when asked all the same", lacking,
                  ["backend", "lacks", "raises"])
    run.record("passed", {name: [v.status == "equal" for v in outcomes] for name, outcomes in verdicts.items()})


def print_bandwidth(run: Run, workers: int, sizes: list[int], seconds: dict[str, list[float]]) -> None:
    share = 2 * (workers - 1) / workers  # of the buffer, which every rank of a ring sends
    busbw = {name: [share * size / s for size, s in zip(sizes, times)] for name, times in seconds.items()}
    run.table(f"all-reduce of float32 over {workers} processes: time, and bus bandwidth in MB/s", [
        (human_bytes(size), *(f"{human_seconds(seconds[name][i])}  {busbw[name][i] / 1e6:.0f}" for name in seconds))
        for i, size in enumerate(sizes)], ["buffer", *seconds],
        note="bus bandwidth: 2(K-1)/K of the buffer over the time" + ("; mpi ran later, in processes of its own"
                                                                      if "mpi" in seconds else ""))
    run.record("bytes", sizes)
    run.record("workers", workers)
    run.record("bus_bandwidth", busbw)


def print_training(run: Run, training: list[dict]) -> None:
    rows = []
    for backend, first in training[0].items():
        sent = sum(rank[backend]["bytes"] for rank in training)
        rows.append((backend, first["losses"][0], first["losses"][-1], human_bytes(sent)))
    run.table(f"unmodified DDP, {first['weights'].size} float32 parameters, {len(first['losses'])} steps", rows,
              ["backend", "first loss", "last loss", "sent on our transport"])


def draw(result: dict, axes) -> None:
    records = result["records"]
    for name, bandwidth in records["bus_bandwidth"].items():
        axes.plot(records["bytes"], bandwidth, "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="buffer (bytes)", ylabel="bus bandwidth (bytes/s)",
             title=f"One all-reduce over {records['workers']} processes, by backend")
    axes.legend()


if __name__ == "__main__":
    main.cli()
