"""Section 33.7: the store, lineage and faults of mini_ray against independent answers; what turns each claim red."""
from __future__ import annotations

import importlib.util
import itertools
import json
import mmap
import operator
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import networkx as nx
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from part7_infrastructure.ch33_cluster_scheduling import s33_07_mini_ray as section
from part7_infrastructure.ch33_cluster_scheduling import s33_07_shortcut_ray_core as shortcut
from part7_infrastructure.ch33_cluster_scheduling.mini_ray import MiniRay, TaskFailed, pack, seal, segments, unseal
from shared.errors import ReaderError, UsageError, WorkerFailed
from tests.part7_infrastructure import broken_ch33_s33_07 as broken

SMALL = dict(workers=2, readers=3, mebibytes=2, tasks=3, repeats=1)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"] and not claim["timing"]]


@pytest.mark.parametrize(("name", "variant", "claim"), [
    ("MiniRay", broken.PutsNothing, "by reference copies the array once"),
    ("MiniRay", broken.OneCopyOfAll, "by value copies the array R times"),
    ("share", broken.share_without_its_last, "the readers' slices add up to n(n-1)/2"),
    ("MiniRay", broken.WritableViews, "every worker is refused when it writes"),
    ("MiniRay", broken.ForgetfulActors, "the actor keeps its state"),
    ("MiniRay", broken.TooMuchLineage, "a worker killed: exactly the missing lineage"),
    ("MiniRay", broken.NoEviction, "an object evicted: exactly the missing lineage"),
    ("MiniRay", broken.WrongLineage, "the sum is the same before and after"),
    ("MiniRay", broken.LeavesAFile, "shared memory left after the shutdown"),
])
def test_a_broken_variant_turns_its_claim_red(monkeypatch, name, variant, claim):
    monkeypatch.setattr(section, name, variant)
    try:
        [failed] = failed_claims(section.main.run(**SMALL))
    finally:
        for path in Path("/dev/shm").glob("mini_ray-*"):
            path.unlink()
    assert failed.startswith(claim)


def test_copies_by_reference_are_no_slower_turns_the_ratio_red(monkeypatch):
    monkeypatch.setattr(section, "fan_out", lambda ray, array, readers, by_reference: time.sleep(
        0.02 if by_reference else 0.01))
    [claim] = [claim for claim in section.main.run(**SMALL).claims if claim["timing"]]
    assert not claim["holds"]


# --- the store --------------------------------------------------------------------------------------------------------

arrays = hnp.arrays(hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.complex_number_dtypes() | hnp.boolean_dtypes(),
                    hnp.array_shapes(min_dims=0, min_side=0, max_side=5))


@settings(deadline=None, max_examples=60)
@given(value=st.dictionaries(st.text(max_size=3), arrays | st.integers() | st.lists(st.none() | st.text(max_size=3))))
def test_values_come_back_as_they_were(value):
    fd, nbytes = seal(pack(value), "mini_ray-test")
    assert os.fstat(fd).st_size == nbytes
    back = unseal(fd)
    assert back.keys() == value.keys()
    for key, was in value.items():
        if isinstance(was, np.ndarray):
            assert (back[key].dtype, back[key].shape) == (was.dtype, was.shape)
            assert back[key].tobytes() == was.tobytes()
        else:
            assert back[key] == was


def test_the_kernel_refuses_to_write_into_a_sealed_segment():
    x = np.arange(1000.0)
    fd, nbytes = seal(pack(x), "mini_ray-test")
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, nbytes)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    view = unseal(fd)
    assert not view.flags.writeable and view.ctypes.data % 64 == 0
    with pytest.raises(ValueError):
        view.flags.writeable = True
    np.testing.assert_array_equal(view, x)


def test_segments_live_as_long_as_someone_reads_them():
    name = "mini_ray-test-segments"
    view = unseal(seal(pack(np.ones(1000)), name)[0])
    assert segments(name) == 1
    del view
    assert segments(name) == 0


# --- tasks, futures, actors -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray():
    with MiniRay(2) as ray:
        yield ray


def test_book_figures(ray):
    assert section.fan_out(ray, np.arange(8e6), 4, by_reference=True) == 31_999_996_000_000
    counter = ray.actor(section.Counter)
    assert ray.get([counter.add(amount) for amount in (10, 5, 100)]) == [10, 15, 115]


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("by_reference", [True, False])
def test_more_readers_than_values(ray, size, by_reference):
    assert section.fan_out(ray, np.arange(float(size)), 5, by_reference) == size * (size - 1) / 2


def test_memory_is_freed_with_the_last_reference():
    with MiniRay(2) as ray:
        ref = ray.put(np.ones(1000))
        made = ray.remote(np.negative, ref)
        again = ray.remote(np.negative, made)
        assert ray.get(again)[0] == 1.0 and ray.segments() == 3
        del ref, made
        settle(ray, 1)
        assert ray.get(again)[0] == 1.0
        del again
        settle(ray, 0)


def settle(ray, expected):
    """Handles that are gone are told with the next message, and a worker's store then closes its segment."""
    deadline = time.monotonic() + 5
    while (ray.state() and ray.segments() != expected) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ray.segments() == expected


def test_an_actor_runs_its_calls_in_their_order(ray):
    log = ray.actor(broken.Log, on=0)
    slow = ray.remote(broken.late, "first", 0.1, on=1)
    log.add(slow)
    assert ray.get(log.add("second")) == ["first", "second"]


def test_errors_reach_whoever_asks(ray):
    failing = ray.remote(operator.truediv, 1, 0)
    with pytest.raises(TaskFailed, match="ZeroDivisionError") as caught:
        ray.get(ray.remote(operator.add, failing, 1))
    assert "division by zero" in caught.value.worker_traceback
    with pytest.raises(TaskFailed, match="TypeError"):
        ray.get(ray.remote(open))
    with pytest.raises(UsageError, match="cannot travel by name"):
        ray.remote(lambda: 0)
    with pytest.raises(UsageError, match="argument of its own"):
        ray.remote(sum, [failing])
    lost = ray.put(1)
    ray.evict(lost)
    with pytest.raises(TaskFailed, match="has no task that could make it again"):
        ray.get(lost)
    assert ray.get(ray.remote(operator.add, 1, 1)) == 2, "and the others go on"


# --- faults -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 12))
def test_the_lineage_is_what_networkx_finds(seed, size):
    rng = np.random.default_rng(seed)
    reads = {i: [j for j in range(i) if rng.random() < 0.4] for i in range(size)}
    there = {i for i in range(size) if rng.random() < 0.5}
    graph = nx.DiGraph([(i, j) for i in reads for j in reads[i]])  # from what reads to what is read
    graph.add_nodes_from(reads)
    graph.remove_nodes_from(there)
    expected = nx.descendants(graph, size - 1) | {size - 1} if size - 1 not in there else set()
    assert section.must_run([size - 1], reads, there) == expected


@pytest.mark.parametrize("seed", range(3))
def test_random_graphs_survive_evictions(ray, seed):
    rng = np.random.default_rng(seed)
    reads = {i: [j for j in range(i) if rng.random() < 0.4] for i in range(10)}
    refs, values = [], []
    for i, inputs in reads.items():
        refs.append(ray.remote(broken.node, i, *(refs[j] for j in inputs)))
        values.append(i + sum(values[j] for j in inputs))
    assert [x[0] for x in ray.get(refs)] == values
    before, evicted = ray.state()["runs"], {i for i in range(10) if i == 9 or rng.random() < 0.5}
    for i in evicted:
        ray.evict(refs[i])
    assert ray.get(refs[9])[-1] == values[9]
    runs = ray.state()["runs"]
    again = [i for i in range(10) for _ in range(runs[refs[i].id] - before[refs[i].id])]
    assert again == sorted(section.must_run([9], reads, set(range(10)) - evicted))


def test_workers_that_die():
    with MiniRay(2) as ray:
        counter = ray.actor(section.Counter, on=0)
        total, busy = counter.add(1), ray.remote(broken.late, "done", 0.3, on=0)
        assert ray.get(total) == 1
        ray.kill(0)
        assert ray.get(busy) == "done", "what it was doing is done by another"
        for call in (total, counter.add(1)):
            with pytest.raises(TaskFailed, match="actor|no task that could make it again"):
                ray.get(call)
        with pytest.raises(TaskFailed, match="died|no worker is left"):
            ray.get(ray.remote(broken.end_this_worker))
        with pytest.raises(TaskFailed, match="no worker is left"):
            ray.get(ray.remote(operator.add, 1, 1))


def test_a_task_that_kills_its_workers_is_given_up():
    with MiniRay(4) as ray:
        with pytest.raises(TaskFailed, match="attempt 3"):
            ray.get(ray.remote(broken.end_this_worker))
        assert ray.get(ray.remote(operator.add, 1, 1)) == 2


def test_a_head_that_dies_is_reported():
    with pytest.raises(WorkerFailed, match="SIGKILL"), MiniRay(1) as ray:
        ray._fleet.kill(0, signal.SIGKILL)
        ray.get(ray.remote(operator.add, 1, 1))


def test_nothing_is_left_of_a_killed_driver():
    code = "from tests.part7_infrastructure.broken_ch33_s33_07 import hold_on; hold_on()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        try:
            name, alive, *pids = driver.stdout.readline().split()
        finally:
            driver.kill()
    assert alive == "2"
    deadline = time.monotonic() + 5
    while (segments(name) or any(map(psutil.pid_exists, map(int, pids)))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert segments(name) == 0 and not any(map(psutil.pid_exists, map(int, pids)))


def test_a_system_without_sealed_memory_is_one_line(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ReaderError, match="mini_ray needs Linux"):
        MiniRay(1)


def test_too_many_workers():
    with pytest.raises(UsageError, match="at most 48"):
        MiniRay(49)


def test_the_figure_takes_recorded_numbers_only():
    from matplotlib.figure import Figure

    result = section.main.run(**SMALL)
    assert result.ok or all(claim["timing"] for claim in result.claims if not claim["holds"])
    axes = Figure().add_subplot()
    section.draw(json.loads(json.dumps(result.to_json())), axes)
    assert len(axes.lines) == 2


# --- against Ray ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ray_engine():
    from shared import engines

    return engines.ray_cluster()


TINY = dict(readers=2, mebibytes=1, points=1, tasks=2, repeats=1)


@pytest.mark.ray
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs ray: pip install -e '.[ray]'")
@pytest.mark.parametrize(("name", "variant", "claim"), [
    ("our_fan_out", lambda ray, array, readers: array[1:].sum(), "sums by our tasks and by Ray's"),
    ("our_totals", lambda ray: list(itertools.accumulate((10, 5, 99))), "the actor's totals are the same"),
    ("is_read_only", lambda array: array.copy().flags.writeable is False, "both hand out read-only arrays"),
])
def test_a_broken_side_turns_its_claim_red(monkeypatch, ray_engine, name, variant, claim):
    monkeypatch.setattr(shortcut, name, variant)
    [failed] = failed_claims(shortcut.main.run(**TINY))
    assert failed.startswith(claim)
