"""shared.fleet: results and failures come back with their rank, and nothing is ever left behind."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from shared import fleet
from shared.errors import UsageError, WorkerFailed
from shared.fleet import Fleet, SharedArray, launch
from shared.measure import peak_memory, timed
from shared.transport import RECEIVING, Fabric, Link
from tests.shared import fleet_workers as workers

ROOT = Path(__file__).parents[2]
GONE_SECONDS = 2.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run. A zombie has ended: it only waits for its parent to read its exit code."""
    left = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except psutil.NoSuchProcess:
            pass
    return left


def left_after(processes: list[psutil.Process], seconds: float = GONE_SECONDS) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["unix", "tcp", "shm"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_results_come_back_by_rank_from_processes_of_their_own(size, wire):
    results = launch(size, workers.whoami, "extra", [1, 2], wire=wire)
    assert [result[:2] for result in results] == [(rank, size) for rank in range(size)]
    assert all(result[3:] == ("extra", [1, 2]) for result in results)
    pids = {result[2] for result in results}
    assert len(pids) == size and os.getpid() not in pids


def test_results_larger_than_a_pipe_come_back():
    before = peak_memory()
    for rank, array in enumerate(launch(3, workers.big)):
        assert array.shape == (3_000_000,) and (array == rank).all()
    assert peak_memory() - before >= 0 and peak_memory() > 3 * 24e6  # the workers' own peaks are counted


def test_a_shared_array_is_seen_by_both_sides():
    shared, readings = SharedArray(np.zeros((4, 1000))), SharedArray(np.zeros(4))
    assert launch(4, workers.fill, shared, readings) == [10_000.0] * 4
    assert shared.array[:, -1].tolist() == [1, 2, 3, 4]
    assert readings.array.tolist() == [10_000.0] * 4
    assert SharedArray(np.empty((0, 3), "i2")).array.shape == (0, 3)


def test_a_function_of_the_main_script_runs_too(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from shared.fleet import launch\n"
                      "def double(net):\n    print(f'worker {net.rank} speaks\\n', end='')\n    return 2 * net.rank\n"
                      "if __name__ == '__main__':\n    print(launch(3, double))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["[0, 2, 4]", *(f"worker {rank} speaks" for rank in range(3))]


# --- what makes no sense ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 9999])
def test_a_senseless_number_of_workers_is_one_clear_line(size):
    with pytest.raises(UsageError, match=f"^{size} workers (make no fleet|do not fit on this machine)") as error:
        launch(size, workers.nothing)
    assert "\n" not in str(error.value)


def test_an_unknown_wire_or_an_unfit_fabric_is_one_clear_line():
    with pytest.raises(UsageError, match="unknown wire 'carrier pigeon': one of unix, tcp, shm"):
        launch(2, workers.nothing, wire="carrier pigeon")
    with pytest.raises(UsageError, match="the fabric joins 4 ranks but 2 workers were asked for"):
        launch(2, workers.nothing, fabric=Fabric.uniform(4, Link(0.1, 1e6)))


def test_a_function_that_is_not_importable_is_refused_and_nothing_stays():
    with pytest.raises(Exception, match="(?i)pickle"):
        launch(2, lambda net: 0)
    assert not fleet._running


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_exception_comes_back_with_its_rank_and_its_own_traceback(culprit):
    with pytest.raises(WorkerFailed) as failure:
        launch(3, workers.fail_at, culprit)
    assert failure.value.rank == culprit
    assert str(failure.value) == f"worker {culprit} raised ValueError: rank {culprit} cannot"
    text = failure.value.worker_traceback
    assert text.startswith("Traceback (most recent call last):")
    assert text.endswith(f"ValueError: rank {culprit} cannot\nand says so in two lines\n")
    assert "in fail_at" in text and "in deeper" in text
    assert fleet.__file__ not in text


@pytest.mark.parametrize(("how", "message"), [
    ("SIGKILL", "worker 1 was killed by SIGKILL"),
    ("SIGTERM", "worker 1 was killed by SIGTERM"),
    ("SIGSEGV", "worker 1 was killed by SIGSEGV"),
    ("_exit", "worker 1 ended with exit code 7 and no result"),
    ("exit", "worker 1 raised SystemExit: enough"),
])
def test_a_worker_that_ends_is_named_and_not_those_who_lost_it(how, message):
    with pytest.raises(WorkerFailed) as failure:
        launch(3, workers.end_at, 1, how)
    assert str(failure.value) == message
    assert failure.value.rank == 1


@pytest.mark.timing
@pytest.mark.parametrize("fail", [(workers.fail_at, 1), (workers.end_at, 1, "SIGKILL")], ids=["raises", "is killed"])
def test_a_failure_ends_the_run_at_once(fail):
    launch(3, workers.nothing)
    began = time.monotonic()
    with pytest.raises(WorkerFailed):
        launch(3, *fail)
    assert time.monotonic() - began < 2


def test_workers_that_wait_for_each_other_are_reported_as_hung():
    launch(3, workers.nothing)
    began = time.monotonic()
    with pytest.raises(WorkerFailed) as failure:
        launch(3, workers.ring_of_receives, stall=1.0)
    seconds = time.monotonic() - began
    assert str(failure.value) == (
        "worker 0 hangs: rank 0 is receiving from rank 2 (tag 9); rank 1 is receiving from rank 0 (tag 9); "
        "rank 2 is receiving from rank 1 (tag 9)")
    assert 1.0 <= seconds < 2.5


def test_a_worker_that_waits_for_one_that_has_finished_hangs():
    with pytest.raises(WorkerFailed, match=r"worker 1 hangs: rank 1 is receiving from rank 0 \(tag 0\)$"):
        launch(2, workers.wait_for_the_finished, stall=0.4)


def test_workers_that_listen_with_time_outs_do_not_hang():
    assert all(misses >= 3 for misses in launch(2, workers.poll_with_time_outs, stall=0.3))


def test_a_stopped_worker_is_reported():
    with pytest.raises(WorkerFailed, match=r"hangs: worker 1 is stopped \(SIGSTOP\)"):
        launch(3, workers.end_at, 1, "SIGSTOP", stall=0.5)


def test_a_run_that_outlasts_its_time_out_is_ended():
    with pytest.raises(WorkerFailed, match="worker 0 was still running after 0.4 s"):
        launch(2, workers.sleep, 60.0, timeout=0.4, stall=0.2)


def test_a_result_that_cannot_be_pickled_is_that_workers_failure():
    with pytest.raises(WorkerFailed, match="worker 1 raised .*[pP]ickle") as failure:
        launch(2, workers.unpicklable)
    assert failure.value.rank == 1


def test_survivors_of_a_killed_worker_finish():
    with Fleet(3, workers.survivor) as three:
        while tuple(three.board.status[0, :3]) != (RECEIVING, 1, 0):  # past the barrier of the start
            time.sleep(0.001)
        three.kill(1)
        outcomes = three.outcomes(all_of=True)
    assert outcomes[0] == "lost rank 1 while receiving from it; 2.5"
    assert str(outcomes[1]) == "worker 1 was killed by SIGKILL"
    assert outcomes[2] == "sent"


# --- nothing is left behind -------------------------------------------------------------------------------------------


@linux_only
def test_no_process_descriptor_or_shared_memory_is_left_over_twenty_launches():
    shared = SharedArray(np.zeros(10))
    launch(3, workers.nothing, wire="tcp")
    descriptors, segments = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    pids = []
    for i in range(20):
        wire = ("unix", "tcp", "shm")[i % 3]
        if i % 7 == 6:
            with pytest.raises(WorkerFailed):
                launch(3, workers.fail_at, 1, wire=wire)
        else:
            pids += [result[2] for result in launch(3, workers.whoami, shared, wire=wire)]
    assert len(set(os.listdir("/proc/self/fd"))) <= len(descriptors)
    assert set(os.listdir("/dev/shm")) <= segments
    assert len(pids) == 54 and not [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()
                                    and Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.timing
def test_a_worker_takes_a_few_milliseconds_once_warm(capsys):
    """The whole life of a worker: started, connected to seven others, run, reported and reaped."""
    each = timed(lambda: launch(8, workers.nothing), repeats=7).median / 8
    with capsys.disabled():
        print(f"\none worker: {each * 1e3:.1f} ms (median of 7 fleets of 8, target 20 ms)")
    assert each < 0.040


WAITING = """
import signal, time
from shared.fleet import Fleet
from shared.transport import RECEIVING
from tests.shared.fleet_workers import wait_for_ever
with Fleet(3, wait_for_ever, stall=None) as three:
    while (three.board.status[:, 0] != RECEIVING).any():
        time.sleep(0.01)
    if {stopped}:
        three.kill(1, signal.SIGSTOP)
    print(*three.pids, flush=True)
    three.results()
"""


def family_of(parent: subprocess.Popen) -> list[psutil.Process]:
    """The parent, its forkserver and resource tracker, and its workers, once it has printed their pids."""
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(pids) == 3 and set(pids) < {process.pid for process in family}
    return [psutil.Process(parent.pid), *family]


def test_workers_die_with_their_parent_however_it_ends():
    cases = [(sig, stopped) for sig in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for stopped in (False, True)]
    parents = [subprocess.Popen([sys.executable, "-c", WAITING.format(stopped=stopped)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _, stopped in cases]
    families = []
    try:
        families = [family_of(parent) for parent in parents]
        for (sig, stopped), parent, family in zip(cases, parents, families, strict=True):
            parent.send_signal(sig)
            left = left_after(family)
            assert left == [], f"{sig.name}, a worker stopped: {stopped}: {left} outlived their parent"
        for (sig, _), parent in zip(cases, parents, strict=True):
            errors = parent.communicate(timeout=10)[1]
            assert ("KeyboardInterrupt" in errors) == (sig == signal.SIGINT) and errors.count("Traceback") <= 1
    finally:
        for parent, family in zip(parents, families or [[]] * len(parents), strict=True):
            for process in alive(family):
                process.kill()
            parent.kill()
            parent.communicate()


def test_ctrl_c_in_a_terminal_reaches_all_and_only_the_parent_speaks():
    """A terminal sends SIGINT to the whole foreground group: parent, forkserver, workers."""
    parent = subprocess.Popen([sys.executable, "-c", WAITING.format(stopped=False)], cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        family = family_of(parent)
        os.killpg(parent.pid, signal.SIGINT)
        assert left_after(family) == []
        assert parent.communicate(timeout=10)[1].count("Traceback") == 1
    finally:
        parent.kill()
        parent.communicate()


INTERRUPTED = """
import signal, sys, time
import psutil
from shared import fleet
from tests.shared.fleet_workers import whoami

signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))  # as Ctrl-C would, at a chosen moment
fleet.launch(3, whoami)
interrupted = 0
for i in range({rounds}):
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4 + i * {step})
        fleet.launch(3, whoami, wire=("unix", "tcp", "shm")[i % 3])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
me = psutil.Process()
deadline = time.monotonic() + 2
while True:
    left = [c for c in me.children(recursive=True) if c.ppid() != me.pid and c.status() != psutil.STATUS_ZOMBIE]
    if not left or time.monotonic() > deadline:
        break
    time.sleep(0.01)
assert not left, left
assert not fleet._running
assert [result[0] for result in fleet.launch(3, whoami)] == [0, 1, 2]
print(interrupted)
"""


def test_an_interrupt_at_any_moment_leaves_nothing_and_the_next_fleet_works():
    rounds = 60
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.format(rounds=rounds, step=1.5e-3)], cwd=ROOT, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > rounds // 10
    # Python itself swallows, and shows, an interrupt that comes while it deletes an object; nobody else may speak.
    assert done.stderr.count("Traceback") == done.stderr.count("Exception ignored in"), done.stderr


INNER = """
import os, pathlib, pytest
from shared.fleet import Fleet
from tests.shared.fleet_workers import wait_for_ever

@pytest.mark.parametrize("i", range(2))
def test_wait(i):
    with Fleet(2, wait_for_ever, stall=None) as two:
        path = pathlib.Path(__file__).parent / f"pids{i}.tmp"
        path.write_text(" ".join(map(str, two.pids)))
        path.rename(path.with_suffix(".pids"))
        two.results()
"""


def test_no_orphan_when_a_parallel_test_session_is_killed(tmp_path):
    (tmp_path / "test_inner.py").write_text(INNER)
    session = subprocess.Popen([sys.executable, "-m", "pytest", "-n", "2", "-q", "-p", "no:cacheprovider",
                                "-p", "no:hypothesispytest", "-c", os.devnull, "--rootdir", tmp_path, tmp_path],
                               cwd=ROOT, stdout=subprocess.DEVNULL)
    family = []
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("*.pids"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        pids = [int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()]
        family = psutil.Process(session.pid).children(recursive=True)
        assert len(pids) == 4 and set(pids) <= {process.pid for process in family}
        for process in psutil.Process(session.pid).children():  # xdist's two workers, which hold the fleets
            process.kill()
        session.kill()
        assert left_after(family) == []
    finally:
        for process in alive(family):
            process.kill()
        session.kill()
        session.wait()
