"""K operating-system processes: start them together, collect their results, and never leave one behind.

`launch(K, fn, *args)` runs `fn(net, *args)` in K processes, each with its end `net` of a Transport, and returns their
results by rank. A worker that raises, dies or hangs ends the run: the others are killed and one WorkerFailed says who
and why.

Workers are started by multiprocessing's forkserver, not by fork. A fork of the caller would copy whatever threads hold
at that moment (PyTorch's, OpenBLAS's and FAISS's pools, gRPC, py4j), which is the classic way to hang a child; the
forkserver is a clean process without threads that has imported NumPy (and torch, once it is needed) before the first
fork, so that a worker still starts in a few milliseconds and shares those pages. Its price is that `fn` must be
importable by name: a function at the top level of a module.

A worker dies with its parent, however that ends: the kernel kills it when the forkserver goes (PR_SET_PDEATHSIG on
Linux, also for a stopped worker), and a thread watches a pipe that only the parent holds open (everywhere).
"""
from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import resource
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from mmap import mmap
from multiprocessing import connection, forkserver, get_context, parent_process, reduction, resource_tracker
from typing import Any

import numpy as np
import psutil

from shared import transport as wires
from shared.environment import world
from shared.errors import PeerLost, UsageError, WorkerFailed
from shared.measure import note_fleet_memory
from shared.transport import FINISHED, RECEIVING, RUNNING, SENDING, Board, Fabric, Link, Transport

MOST_WORKERS = 120  # connections are handed over as file descriptors, of which one message to the forkserver holds 256
WORKER_BYTES = 40 << 20  # private memory of one idle worker, measured generously
# Worth importing once, before the first fork: DDP and FSDP pull in torch._dynamo, 2 s in every worker otherwise.
HEAVY = ("torch", "torch.distributed.fsdp", "torch._dynamo", "sklearn.datasets")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}

_context = get_context("forkserver")
_preloaded: set[str] = set()
_running: weakref.WeakSet[Fleet] = weakref.WeakSet()


class SharedMemory:
    """Anonymous memory that travels to workers as a file descriptor: it has no name, so nothing can be left behind."""

    def __init__(self, nbytes: int, fd: int | None = None) -> None:
        if fd is None:
            if hasattr(os, "memfd_create"):
                fd = os.memfd_create("scalable")
            else:
                with tempfile.TemporaryFile() as file:
                    fd = os.dup(file.fileno())
            os.ftruncate(fd, max(1, nbytes))
        self.nbytes, self.fd = nbytes, fd
        self._map = mmap(fd, max(1, nbytes))

    def array(self, shape: Sequence[int], dtype: Any = np.float64, offset: int = 0) -> np.ndarray:
        """A view of the memory as an array of `shape`; writes are seen by every process."""
        return np.ndarray(shape, dtype, self._map, offset)

    def __reduce__(self):
        return _attach, (self.nbytes, reduction.DupFd(self.fd))

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self.fd)


def _attach(nbytes: int, duplicate) -> SharedMemory:
    return SharedMemory(nbytes, duplicate.detach())


class SharedArray:
    """One array in memory shared by parent and workers. Pass it to `launch`; read and write it through `.array`."""

    def __init__(self, values: np.ndarray) -> None:
        self._memory = SharedMemory(values.nbytes)
        self._shape, self._dtype = values.shape, values.dtype
        self.array[...] = values

    @property
    def array(self) -> np.ndarray:
        return self._memory.array(self._shape, self._dtype)


def launch(workers: int, fn: Callable, *args: Any, wire: str = "unix", fabric: Fabric | Link | None = None,
           timeout: float = 120.0, stall: float = 1.5, socket_buffer: int | None = None) -> list[Any]:
    """Run `fn(net, *args)` in `workers` processes and return their results by rank.

    wire: "unix", "tcp" or "shm". fabric: paces messages (a Link joins all ranks alike).
    timeout: seconds for the whole run. stall: seconds after which workers that all wait for each other count as hung.
    socket_buffer: bytes of each socket's send and receive buffer (the kernel rounds it).
    Under torchrun the processes exist already: the first `workers` of them run `fn` over TCP, all get the results.

    Raises: UsageError for a worker count this machine cannot hold; WorkerFailed when a worker raises, dies or hangs.
    """
    if world():
        from shared.elastic import launch_external

        return launch_external(workers, fn, args, fabric)
    with Fleet(workers, fn, *args, wire=wire, fabric=fabric, timeout=timeout, stall=stall,
               socket_buffer=socket_buffer) as fleet:
        return fleet.results()


class Fleet:
    """The processes of one `launch`, for demos that kill, stop or outlive some of them. Use it as a context manager."""

    def __init__(self, workers: int, fn: Callable, *args: Any, wire: str = "unix", fabric: Fabric | Link | None = None,
                 timeout: float = 120.0, stall: float | None = 1.5, socket_buffer: int | None = None) -> None:
        self._reports, self._processes = [], []
        check_workers(workers)
        if wire not in ("unix", "tcp", "shm", "none"):
            raise UsageError(f"unknown wire {wire!r}: one of unix, tcp, shm")
        self.size, self._timeout, self._stall = workers, timeout, stall
        fabric = Fabric.uniform(workers, fabric) if isinstance(fabric, Link) else fabric
        if fabric and len(fabric.node_of) != workers:
            raise UsageError(f"the fabric joins {len(fabric.node_of)} ranks but {workers} workers were asked for")
        self._memory = SharedMemory(Board.nbytes(workers))
        self.board = Board(self._memory, workers)
        self._seen, self._seen_at = -1.0, time.monotonic()
        self._start(fn, args, wire, fabric, socket_buffer)

    def _start(self, fn: Callable, args: tuple, wire: str, fabric: Fabric | None, socket_buffer: int | None) -> None:
        _start_forkserver()
        _running.add(self)
        try:
            with _main_hidden_unless(fn.__module__ == "__main__"):
                for rank, ends in enumerate(_wiring(wire, self.size, socket_buffer)):
                    with _uninterrupted():  # a process that is half started would belong to nobody
                        ours, theirs = _context.Pipe()
                        process = _context.Process(
                            target=_worker, name=f"worker-{rank}", daemon=True,
                            args=(rank, self.size, ends, self._memory, fabric, theirs, fn, args))
                        self._reports.append(ours)
                        self._processes.append(process)
                        process.start()
                        theirs.close()
                        ends.close()
            for report in self._reports:  # everyone is connected before anyone begins
                _tell(report, "go")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:  # an interrupt may come before the `with` block is entered
        self.close()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def kill(self, rank: int, sig: int = signal.SIGKILL) -> None:
        """Send a signal to one worker of this fleet."""
        os.kill(self._processes[rank].pid, sig)

    def results(self) -> list[Any]:
        """Wait for every worker. Raises WorkerFailed on the first that fails, dies, hangs or outlasts the time-out."""
        outcomes = self.outcomes()
        failed = [outcome for outcome in outcomes.values() if isinstance(outcome, WorkerFailed)]
        try:
            if failed:  # the cause, not those who lost their peer because of it
                raise min(failed, key=lambda error: (getattr(error, "is_consequence", False), error.rank))
            return [outcomes[rank] for rank in range(self.size)]
        finally:
            del outcomes, failed  # an error that this frame holds would hold this frame, and so the fleet's memory

    def outcomes(self, all_of: bool = False) -> dict[int, Any]:
        """Result or WorkerFailed by rank. Stops soon after the first failure unless `all_of`."""
        outcomes: dict[int, Any] = {}
        deadline, memory = time.monotonic() + self._timeout, 0
        by_report = {report: rank for rank, report in enumerate(self._reports)}
        by_sentinel = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        while len(outcomes) < self.size:
            waiting = [report for report, rank in by_report.items() if rank not in outcomes]
            ready = connection.wait(waiting + [s for s, rank in by_sentinel.items() if rank not in outcomes], 0.1)
            for thing in sorted(ready, key=lambda thing: thing not in by_report):  # a report before its sender's end
                rank = by_report[thing] if thing in by_report else by_sentinel[thing]
                if rank not in outcomes:
                    outcomes[rank], peak = self._outcome(rank)
                    memory += peak
            if not all_of and any(isinstance(o, WorkerFailed) for o in outcomes.values()):
                deadline = min(deadline, time.monotonic() + 0.25)  # let the others say what they saw
            missing = [rank for rank in range(self.size) if rank not in outcomes]
            hung = self._hung(missing) if missing and not ready else None
            if hung or missing and time.monotonic() > deadline:
                elsewhere = any(isinstance(outcome, WorkerFailed) for outcome in outcomes.values())
                for rank in missing:
                    what = hung or f"was still {self.describe(rank)} after {self._timeout:g} s"
                    outcomes[rank] = WorkerFailed(rank, "was ended after another failed" if elsewhere else what)
                    outcomes[rank].is_consequence = elsewhere
        note_fleet_memory(memory)
        return outcomes

    def _outcome(self, rank: int) -> tuple[Any, int]:
        report, process = self._reports[rank], self._processes[rank]
        with contextlib.suppress(EOFError, OSError):
            if report.poll():
                kind, value, peak = report.recv()
                if kind == "result":
                    return value, peak
                headline, text, is_consequence = value
                error = WorkerFailed(rank, f"raised {headline}", text)
                error.is_consequence = is_consequence
                return error, peak
        process.join(2)
        code = process.exitcode
        if code is not None and code < 0:
            return WorkerFailed(rank, f"was killed by {signal.Signals(-code).name}"), 0
        return WorkerFailed(rank, f"ended with exit code {code} and no result"), 0

    def _hung(self, missing: list[int]) -> str | None:
        """Why the workers that have not reported can never go on, or None. Judged only after `stall` quiet seconds."""
        if self._stall is None:
            return None
        progress = float(self.board.status[:, 3].sum())
        moving = progress != self._seen or any(self.board.status[rank, 0] == RUNNING for rank in missing)
        stopped = [rank for rank in missing if self._is_stopped(rank)]
        if moving and not stopped:
            self._seen, self._seen_at = progress, time.monotonic()
            return None
        if time.monotonic() - self._seen_at < self._stall:
            return None
        if stopped:
            return f"hangs: worker {stopped[0]} is stopped (SIGSTOP)"
        return "hangs: " + "; ".join(f"rank {rank} is {self.describe(rank)}" for rank in missing[:8])

    def _is_stopped(self, rank: int) -> bool:
        try:
            return psutil.Process(self._processes[rank].pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    def describe(self, rank: int) -> str:
        """What a worker does now, in words: running, sending to a peer, or receiving from one."""
        state, peer, tag, _ = self.board.status[rank]
        words = {SENDING: f"sending to rank {peer:.0f}", RECEIVING: f"receiving from rank {peer:.0f} (tag {tag:.0f})",
                 FINISHED: "finished"}
        return words.get(float(state), "running")

    def close(self) -> None:
        """End every worker: those that have reported are let go, the others are killed."""
        _running.discard(self)
        with _uninterrupted():
            started = [process for process in self._processes if process.pid is not None]
            deadline = time.monotonic() + 1
            for report in self._reports:
                _tell(report, "bye")
            for rank, process in enumerate(started):
                if self.board.status[rank, 0] == FINISHED:
                    process.join(max(0.0, deadline - time.monotonic()))
            for process in started:
                if process.is_alive():
                    process.kill()
            for process in started:
                process.join()
                process.close()
            for report in self._reports:
                report.close()
            self._processes, self._reports = [], []


@contextlib.contextmanager
def paced(seconds: float) -> Iterator[None]:
    """Real compute runs inside; the block lasts until `seconds` after its start, as if this worker had its own core.

    So K workers can be timed honestly on fewer cores, as long as their real work fits. The pace is declared: print it.
    """
    deadline = time.monotonic() + seconds
    yield
    if (left := deadline - time.monotonic()) > 0:
        time.sleep(left)


def check_workers(workers: int) -> None:
    """Raise UsageError unless this machine can hold `workers` processes."""
    if workers < 1:
        raise UsageError(f"{workers} workers make no fleet: at least 1")
    most = min(MOST_WORKERS, int(psutil.virtual_memory().available // WORKER_BYTES))
    if workers > most:
        raise UsageError(f"{workers} workers do not fit on this machine (at most {most}); across machines use torchrun")


def preload(*modules: str) -> None:
    """Import these modules in the forkserver before its first fork, in the background. Unknown ones are ignored."""
    _start_forkserver(modules)


def _start_forkserver(extra: Sequence[str] = ()) -> None:
    """Start the forkserver, or restart it when the caller has since loaded something heavy that it lacks."""
    wanted = {name for name in HEAVY if name in sys.modules or name.split(".")[0] in extra}
    if _preloaded >= wanted | {"numpy"}:
        return
    if _preloaded:
        if _running:
            return  # its workers would die with it; the new ones import for themselves
        forkserver._forkserver._stop()  # private, but multiprocessing offers no other way to change the preload
    wanted |= _preloaded | {"numpy"}
    forkserver.set_forkserver_preload([*sorted(wanted), "shared.fleet", "shared.demo"])
    resource_tracker.ensure_running()  # it unblocks signals when it starts, so it goes first
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)  # K workers with a pool of threads each would fight for the cores
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is the parent's affair alone
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    _preloaded.update(wanted)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done (where Python would turn them into an exception)."""
    caught: list[int] = []
    handlers = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}  # interrupts are raised in the main thread alone
    try:
        for sig, handler in handlers.items():
            if callable(handler):
                signal.signal(sig, lambda sig, frame: caught.append(sig))
        yield
    finally:
        for sig, handler in handlers.items():
            if callable(handler):
                signal.signal(sig, handler)
        for sig in caught:
            signal.raise_signal(sig)


@atexit.register
def _end_forkserver() -> None:
    """At exit, at once: left to itself it would take a second to unload torch, with the reader's stderr still open."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _main_hidden_unless(needed: bool) -> Iterator[None]:
    """Keep multiprocessing from running the caller's main script again in every worker that does not need it."""
    main = sys.modules["__main__"]
    if not needed:
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _tell(report: connection.Connection, word: str) -> None:
    with contextlib.suppress(OSError):
        report.send(word)


# --- wiring: what each rank needs to reach the others, made before it starts ------------------------------------------


class _Ends:
    """The connections of one rank: per peer a socket to send on and one to receive from, and the rings, if any."""

    def __init__(self) -> None:
        self.sockets: dict[int, tuple[socket.socket, socket.socket]] = {}
        self.rings: SharedMemory | None = None
        self.tcp: tuple[list, socket.socket, bytes] | None = None
        self.buffer: int | None = None

    def close(self) -> None:
        for sock in {sock for pair in self.sockets.values() for sock in pair}:
            sock.close()
        if self.tcp:
            self.tcp[1].close()


def _wiring(wire: str, size: int, buffer: int | None) -> Iterator[_Ends]:
    all_ends = [_Ends() for _ in range(size)]
    if wire == "tcp":
        listeners = [socket.create_server(("127.0.0.1", 0), backlog=size) for _ in range(size)]
        token, addresses = secrets.token_bytes(16), [listener.getsockname() for listener in listeners]
        for ends, listener in zip(all_ends, listeners, strict=True):
            ends.tcp = (addresses, listener, token)
            ends.buffer = buffer
    else:
        _raise_descriptor_limit(2 * size * size + 256)
        if wire == "shm" and size > 1:
            rings = SharedMemory(size * size * wires.SLOTS * wires.SLOT)
            for ends in all_ends:
                ends.rings = rings
        for a in range(size if wire != "none" else 0):
            for b in range(a + 1, size):
                ab, ba = _pair(buffer)
                back = _pair(buffer) if wire == "shm" else (ab, ba)
                all_ends[a].sockets[b] = (ab, back[0])
                all_ends[b].sockets[a] = (back[1], ba)
    return iter(all_ends)


def _pair(buffer: int | None) -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for sock in pair if buffer else ():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    return pair


def _raise_descriptor_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and (hard == resource.RLIM_INFINITY or hard > soft):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# --- inside a worker --------------------------------------------------------------------------------------------------


def _worker(rank: int, size: int, ends: _Ends, memory: SharedMemory, fabric: Fabric | None,
            report: connection.Connection, fn: Callable, args: tuple) -> None:
    global _counted_by_others
    _counted_by_others = _peak_bytes() * (size - 1) // size  # the pages of the fork are everyone's: count them once
    _die_with_parent()
    _limit_threads()
    board = Board(memory, size)
    try:
        net = _connect(rank, size, ends, board, fabric)
        report.recv()
        if ends.sockets or ends.tcp:
            net.barrier()
        outcome = ("result", fn(net, *args), _peak_bytes())
    except BaseException as error:
        outcome = _failure(error)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed by the worker's own function
            stream.flush()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone: there is nobody to tell
        try:
            report.send(outcome)
        except OSError:
            raise
        except Exception as error:  # a result that cannot be pickled is the worker's failure, not the fleet's
            report.send(_failure(error))
        board.status[rank, 0] = FINISHED
        report.recv()  # keep the connections open until everyone has what was sent on them
    os._exit(0)


def _connect(rank: int, size: int, ends: _Ends, board: Board, fabric: Fabric | None) -> Transport:
    sockets, rings = ends.sockets, None
    if ends.tcp:
        sockets = wires.tcp_mesh(rank, *ends.tcp, buffer=ends.buffer)
    if ends.rings:
        slots = ends.rings.array((size, size, wires.SLOTS, wires.SLOT), np.uint8)

        def rings(src: int, dst: int) -> np.ndarray:
            return slots[src, dst]

    return Transport(rank, size, sockets, rings=rings, board=board, fabric=fabric)


def _die_with_parent() -> None:
    sentinel = parent_process().sentinel
    os.close(forkserver._forkserver._forkserver_alive_fd)  # our copy would keep the forkserver alive with any worker

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        libc.prctl(29, 1000)  # PR_SET_TIMERSLACK, nanoseconds: paced links sleep to the microsecond


def _limit_threads() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _failure(error: BaseException) -> tuple[str, tuple[str, str, bool], int]:
    """What a worker reports when it raised: a headline, the traceback, and whether it only lost a peer.

    The traceback starts at the worker's own function: the frames of this module are of no use to the reader.
    """
    frames = traceback.TracebackException.from_exception(error)
    frames.stack = traceback.StackSummary.from_list([f for f in frames.stack if f.filename != __file__])
    headline = list(frames.format_exception_only())[0 if not isinstance(error, SyntaxError) else -1].splitlines()[0]
    return "error", (headline, "".join(frames.format()), isinstance(error, PeerLost)), _peak_bytes()


_counted_by_others = 0


def _peak_bytes() -> int:
    """The most this worker ever held, less its fellows' share of what all inherited from the forkserver."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else peak * 1024) - _counted_by_others
