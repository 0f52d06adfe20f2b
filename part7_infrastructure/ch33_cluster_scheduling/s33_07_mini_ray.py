"""Section 33.7: a Ray of our own: tasks, actors, a shared-memory object store, ownership and lineage.

Question   What does a shared object store save, and what becomes of objects whose worker dies?
Method     On mini_ray.py, real processes: readers sum slices of one array, passed by reference and by value, bytes
           counted; an actor counts; then a worker is killed and an object evicted, and what runs again is recorded.
Read       By reference the array is copied once however many readers there are; after a loss exactly the missing part
           of the lineage runs again, and the sum is what it was.
Source     Moritz et al. (2018), Ray; Wang et al. (2021), Ownership: a distributed futures system.
"""
from __future__ import annotations

import operator
import time
from collections import deque
from typing import Annotated

import numpy as np
from typer import Option

from part7_infrastructure.ch33_cluster_scheduling.mini_ray import MiniRay, ObjectRef, segments
from shared import Run, demo
from shared.measure import Timing, human_bytes, interleave, ratio

PIECE = 1 << 17  # float64 values in one object of the lineage experiment: 1 MiB
HEADERS = 2048  # bytes: more than the messages and headers of one task come to


@demo("33.7", smoke=dict(workers=2, readers=4, mebibytes=16, tasks=100),
      laptop=dict(workers=4, readers=16, mebibytes=256, tasks=500))
def main(run: Run, workers: Annotated[int, Option(min=2, max=32)] = 4, readers: int = 8,
         mebibytes: Annotated[float, Option(min=1)] = 64.0, tasks: int = 200, repeats: int = 3, seed: int = 0) -> None:
    """Fan out, count, kill.

    Args:
        workers: Worker processes, at least 2, beside the head.
        readers: Tasks that read the array, each its slice.
        mebibytes: Size of the array in MiB.
        tasks: Empty tasks, for their latency and rate.
    """
    array = np.random.default_rng(seed).permutation(int(mebibytes * 2**20) // 8).astype(float)
    exact = array.size * (array.size - 1) // 2
    with MiniRay(workers) as ray:
        fans = {r: fan_out_both(ray, array, r, repeats) for r in sorted({1, max(1, readers // 4), readers})}
        run.table(f"{human_bytes(array.nbytes)} (B) to R readers on {workers} workers", [
            (r, how, f"{fan['bytes'][how] / array.nbytes:.4f} B", str(fan["seconds"][how]))
            for r, fan in fans.items() for how in fan["bytes"]], ["R", "passed", "bytes copied", "time"],
            note="copied: into shared memory, and all messages; time: put and all R tasks")
        refused = [ray.get(ray.remote(try_to_write, ray.put(array[:PIECE]), on=worker)) for worker in range(workers)]

        latency, rate = empty_tasks(ray, tasks)
        run.table("an empty task", [(str(latency), f"{rate:.0f}")], ["submit to result", "tasks a second"],
                  note=f"latency: {tasks} tasks one after the other; rate: {tasks} submitted at once")

        counter = ray.actor(Counter)
        totals = ray.get([counter.add(amount) for amount in (10, 5, 100)])

        sums, again, expected = lose_and_recover(ray, workers)
        run.table("lost and made again", [
            (what, ", ".join(names), total) for (what, names), total in zip(again.items(), sums[1:])],
            ["loss", "tasks run again", "sum of all"])
        alive = ray.segments()
    left = segments(ray.name)
    run.note(f"segments of shared memory: {alive} before the shutdown, {left} after it")

    most = fans[readers]
    slower = ratio(most["seconds"]["by value"], most["seconds"]["by reference"])
    run.record("readers", list(fans))
    run.record("copied", {how: [fan["bytes"][how] for fan in fans.values()] for how in most["bytes"]})
    run.record("seconds", {how: [fan["seconds"][how].median for fan in fans.values()] for how in most["bytes"]})
    for how, copies in (("by reference", 1), ("by value", readers)):
        times = "once" if copies == 1 else "R times"
        run.claim(f"{how} copies the array {times}, and headers (bytes beyond it a reader)",
                  measured=(most["bytes"][how] - copies * array.nbytes) / readers, between=(1, HEADERS), unit="B")
    run.claim(f"by value takes longer than by reference at R={readers} (ratio)", measured=slower.median, above=1.0,
              timing=True)
    run.claim("the readers' slices add up to n(n-1)/2, both ways (sums that do not)", equals=0,
              measured=sum(total != exact for fan in fans.values() for total in fan["sums"]))
    run.claim("every worker is refused when it writes into the array it reads (workers that could)", equals=0,
              measured=refused.count(False))
    run.claim("the actor keeps its state between calls", measured=totals, equals=[10, 15, 115])
    for what in again:
        run.claim(f"{what}: exactly the missing lineage runs again, each task once", equals=", ".join(expected[what]),
                  measured=", ".join(again[what]))
    values = 2 * workers * PIECE
    run.claim("the sum is the same before and after the losses", measured=sums, equals=[values * (values - 1)] * 3)
    run.claim("shared memory left after the shutdown", measured=left, equals=0, unit="segments")


# --- one array, many readers ------------------------------------------------------------------------------------------


def share(x: np.ndarray, i: int, readers: int) -> float:
    return float(np.array_split(x, readers)[i].sum())


def fan_out(ray: MiniRay, array: np.ndarray, readers: int, by_reference: bool) -> float:
    """The sum of the readers' sums. At most one task a worker is under way, so that copies do not fill the memory."""
    argument = ray.put(array) if by_reference else array
    under_way: deque[ObjectRef] = deque()
    total = 0.0
    for i in range(readers):
        if len(under_way) == ray.workers:
            total += ray.get(under_way.popleft())
        under_way.append(ray.remote(share, argument, i, readers))
    return total + sum(ray.get(under_way))


def fan_out_both(ray: MiniRay, array: np.ndarray, readers: int, repeats: int) -> dict[str, dict | list]:
    """Both ways: bytes copied and sums of one fan-out each, then seconds in interleaved repeats."""
    ways = {"by reference": True, "by value": False}
    copied, sums = {}, []
    for how, by_reference in ways.items():
        before = bytes_copied(ray)
        sums.append(fan_out(ray, array, readers, by_reference))
        copied[how] = bytes_copied(ray) - before
    seconds = interleave({how: lambda by=by: fan_out(ray, array, readers, by) for how, by in ways.items()},
                         repeats, warmup=0)
    return {"bytes": copied, "sums": sums, "seconds": seconds}


def bytes_copied(ray: MiniRay) -> int:
    state = ray.state()
    return state["sealed"] + state["messages"]


def try_to_write(x: np.ndarray) -> bool:
    """Whether both ways of writing into `x` are refused."""
    try:
        x.flags.writeable = True
    except ValueError:
        pass
    try:
        x[0] = -1.0
    except ValueError:
        return True
    return False


# --- empty tasks, an actor --------------------------------------------------------------------------------------------


def empty_tasks(ray: MiniRay, tasks: int) -> tuple[Timing, float]:
    """Latency of a task alone, and tasks a second when all are submitted at once."""
    latencies = []
    for _ in range(tasks):
        begin = time.perf_counter()
        ray.get(ray.remote(operator.not_, True))
        latencies.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    ray.get([ray.remote(operator.not_, True) for _ in range(tasks)])
    return Timing(tuple(latencies)), tasks / (time.perf_counter() - begin)


class Counter:
    def __init__(self) -> None:
        self.total = 0

    def add(self, amount: int) -> int:
        self.total += amount
        return self.total


# --- losses -----------------------------------------------------------------------------------------------------------


def piece(i: int) -> np.ndarray:
    return np.arange(i * PIECE, (i + 1) * PIECE, dtype=float)


def double(x: np.ndarray) -> np.ndarray:
    return 2 * x


def add_up(*arrays: np.ndarray) -> int:
    return int(sum(array.sum() for array in arrays))


def lose_and_recover(ray: MiniRay, workers: int) -> tuple[list[int], dict[str, list[str]], dict[str, list[str]]]:
    """Two objects a worker, each made from a piece; then a worker is killed, and then one object evicted.

    Every other piece is no longer referred to, so its memory is free and only its lineage is left. Returns the sum
    before and after each loss, and for each loss the tasks that ran again and those that had to.
    """
    pieces = [ray.remote(piece, i, on=i % workers) for i in range(2 * workers)]
    doubled = [ray.remote(double, p, on=i % workers) for i, p in enumerate(pieces)]
    ids = {f"piece {i}": p.id for i, p in enumerate(pieces)} | {f"double {i}": d.id for i, d in enumerate(doubled)}
    reads = {f"double {i}": [f"piece {i}"] for i in range(2 * workers)}
    sums = [ray.get(ray.remote(add_up, *doubled))]
    del pieces[::2]
    again, expected = {}, {}
    losses = {"a worker killed": (lambda: ray.kill(0), lambda name, worker: worker == 0),
              "an object evicted": (lambda: ray.evict(doubled[1]), lambda name, worker: name == "double 1")}
    for what, (lose, is_lost) in losses.items():
        before = ray.state()
        lose()
        sums.append(ray.get(ray.remote(add_up, *doubled)))
        runs = ray.state()["runs"]
        again[what] = [name for name, i in ids.items() for _ in range(runs[i] - before["runs"][i])]
        held = {name: before["where"][i] for name, i in ids.items() if i in before["where"]}
        missing = must_run(list(reads), reads, {name for name, worker in held.items() if not is_lost(name, worker)})
        expected[what] = [name for name in ids if name in missing]
    return sums, again, expected


def must_run(wanted: list[str], reads: dict[str, list[str]], there: set[str]) -> set[str]:
    """What has to be made, given what is there: the wanted, what they read, and so on, up to what exists."""
    missing = set(wanted) - there
    read = [name for task in missing for name in reads.get(task, [])]
    return missing | must_run(read, reads, there) if missing else set()


def draw(result: dict, axes) -> None:
    records = result["records"]
    for how, seconds in records["seconds"].items():
        axes.plot(records["readers"], seconds, "o-", label=how)
    axes.set(xlabel="tasks that read the array", ylabel="seconds", ylim=(0, None), xticks=records["readers"],
             title="One array for many tasks, passed by reference and by value")
    axes.legend()


if __name__ == "__main__":
    main.cli()
