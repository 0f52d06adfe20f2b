"""Section 33.7 with Ray: put, remote tasks and an actor beside our mini_ray.

Question   Does our Ray in one file do what Ray does, and what do the two cost?
Method     The same readers of one array and the same actor on both, as many workers as CPUs on each side; fan-outs and
           empty tasks timed in turns, Ray's start outside of every timing.
Read       The ratios: for an empty task and for a small array our head, one process and one pipe a worker, is the
           quicker one. A large array costs its one copy, and there Ray is: its store writes into pages that it keeps,
           where our new segment for each object makes the kernel find and clear its pages first.
Source     Ray Core (put, remote, get, actors); Moritz et al. (2018), Ray: a distributed framework.
"""
from __future__ import annotations

from types import ModuleType
from typing import Annotated, Any

import numpy as np
from typer import Option

from part7_infrastructure.ch33_cluster_scheduling import mini_ray
from part7_infrastructure.ch33_cluster_scheduling.mini_ray import MiniRay
from part7_infrastructure.ch33_cluster_scheduling.s33_07_mini_ray import Counter, share
from shared import Run, demo, engines
from shared.measure import human_bytes, interleave, ratio

AMOUNTS = (10, 5, 100)


@demo("33.7", library="ray", needs=("ray",),
      handles=("objects moved between nodes", "spilling to disk", "locality and resources in scheduling",
               "tasks that submit tasks", "restarted actors and workers", "code that is shipped, not imported"),
      smoke=dict(readers=4, mebibytes=8, points=2, repeats=3), laptop=dict(readers=16, mebibytes=64, repeats=7))
def main(run: Run, readers: int = 8, mebibytes: Annotated[float, Option(min=1, max=96)] = 32.0,
         points: Annotated[int, Option(min=1, max=4)] = 3, tasks: int = 50, repeats: int = 5, seed: int = 0) -> None:
    """Fan out and count with Ray and with our own.

    Args:
        readers: Tasks that read the array, each its slice.
        mebibytes: Size of the largest array in MiB; two of them fit Ray's store.
        points: Array sizes, each an eighth of the one before.
        tasks: Empty tasks of one timed repeat.
    """
    ray = engines.ray_cluster()
    workers = int(ray.cluster_resources()["CPU"])
    run.note(f"Ray started in {engines.started_in['ray']:.1f} s; {workers} workers on each side")
    largest = np.random.default_rng(seed).permutation(int(mebibytes * 2**20) // 8).astype(float)
    arrays = [largest[:largest.size // 8**i] for i in range(points)]
    rows, sums, faster = [], [], []
    with MiniRay(workers) as ours:
        for array in arrays:
            calls = {"ours": lambda: our_fan_out(ours, array, readers), "library": lambda: fan_out(ray, array, readers)}
            sums.append([call() for call in calls.values()])
            seconds = interleave(calls, repeats)
            pairs = ratio(seconds["library"], seconds["ours"])
            rows.append((human_bytes(array.nbytes), *map(str, seconds.values()), str(pairs)))
            faster += [human_bytes(array.nbytes)] if pairs.median > 1 else []
            if array is arrays[0]:
                run.compare(f"put {human_bytes(array.nbytes)}, {readers} tasks", **seconds)
        totals = {"ours": our_totals(ours), "library": actor_totals(ray)}
        seconds = interleave({"ours": lambda: our_empty_tasks(ours, tasks), "library": lambda: empty_tasks(ray, tasks)},
                             repeats)
        refused = is_read_only(ours.get(ours.put(largest))), is_read_only(ray.get(ray.put(largest)))
    run.compare(f"{tasks} empty tasks, one after the other", **seconds)
    run.table(f"one array put, its slices summed by {readers} tasks", rows, ["array", "ours", "ray", "ray / ours"])
    run.note(f"ours is the faster one at {', '.join(faster) or 'no size'}")
    run.lines_of_code(ours=[mini_ray, our_fan_out, our_totals], library=[fan_out, actor_totals])

    exact = [[array.sum()] * 2 for array in arrays]
    run.claim("sums by our tasks and by Ray's equal NumPy's (those that differ)", equals=0,
              measured=int(np.count_nonzero(np.array(sums) != np.array(exact))))
    run.claim("the actor's totals are the same", measured=totals["library"], equals=totals["ours"])
    run.claim("both hand out read-only arrays", measured=[int(side) for side in refused], equals=[1, 1])


def our_fan_out(ours: MiniRay, array: np.ndarray, readers: int) -> float:
    numbers = ours.put(array)
    return sum(ours.get([ours.remote(share, numbers, i, readers) for i in range(readers)]))


def fan_out(ray: ModuleType, array: np.ndarray, readers: int) -> float:
    numbers, reader = ray.put(array), ray.remote(share)
    return sum(ray.get([reader.remote(numbers, i, readers) for i in range(readers)]))


def our_totals(ours: MiniRay) -> list[int]:
    counter = ours.actor(Counter)
    return ours.get([counter.add(amount) for amount in AMOUNTS])


def actor_totals(ray: ModuleType) -> list[int]:
    counter = ray.remote(Counter).remote()
    return ray.get([counter.add.remote(amount) for amount in AMOUNTS])


def our_empty_tasks(ours: MiniRay, tasks: int) -> None:
    for _ in range(tasks):
        ours.get(ours.remote(nothing, True))


def empty_tasks(ray: ModuleType, tasks: int) -> None:
    empty = ray.remote(nothing)
    for _ in range(tasks):
        ray.get(empty.remote(True))


def nothing(value: Any) -> bool:
    return not value


def is_read_only(array: np.ndarray) -> bool:
    return not array.flags.writeable


if __name__ == "__main__":
    main.cli()
