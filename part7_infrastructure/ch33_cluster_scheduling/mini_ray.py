"""Ray in one file: a head, a pool of workers, sealed shared-memory objects, futures, actors and lineage (Linux).

    with MiniRay(workers=4) as ray:
        numbers = ray.put(np.arange(8e6))                 # one copy, into shared memory
        parts = [ray.remote(total, numbers, i) for i in range(4)]   # futures, at once
        print(sum(ray.get(parts)))                        # workers read the array where it lies

Objects    A value is sealed into an anonymous memory segment (memfd), which the kernel then refuses to anyone's writes.
           Readers get its file descriptor and map it: nothing is copied, and nothing has a name that could be left.
           (Ray's store maps one region once and reuses its pages, which spares a large object most of its cost.)
           Each worker keeps what its tasks returned, as a node of Ray does; when it dies, that is lost.
Head       Owns the table of objects: where each lies, how many references it has, and the task that made it, its
           lineage. It hands a task to a worker once its arguments exist. (In Ray the process that submits a task keeps
           this table; here only the driver submits, and the head keeps it for the driver.)
Recovery   A lost object that somebody needs is made again by its task; what that task reads is made again first, and so
           on up to objects that are still there. Objects that were `put`, and results of actors, have no such task.

Functions travel by name, so they stand at the top level of a module. Messages are pickled, but only over socket pairs
that exist before the processes do and that nobody else can open.

Source: Moritz et al. (2018), Ray; Wang et al. (2021), Ownership: a distributed futures system.
"""
from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import pickle
import resource
import secrets
import socket
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from shared.errors import ReaderError, UsageError, WorkerFailed
from shared.fleet import Fleet

INLINE = 100 << 10  # bytes: an argument up to this size travels inside its task's message, as in Ray
ALIGNMENT = 64  # bytes: arrays begin on a cache line
ATTEMPTS = 3  # a task whose worker dies is tried again, but not for ever
MOST_WORKERS = 48  # each needs four descriptors when a process starts, and multiprocessing hands over 256


class TaskFailed(WorkerFailed):
    """A task raised, lost its actor or its input, or killed its worker too often. The traceback is the task's own."""

    def __init__(self, what: str, worker_traceback: str = "") -> None:
        ReaderError.__init__(self, what)
        self.worker_traceback = worker_traceback


# --- the object store: values in sealed segments of shared memory -----------------------------------------------------


def pack(value: Any) -> list[memoryview]:
    """A value as its pickle and, out of band, the bytes of its arrays, which are not copied."""
    buffers: list[memoryview] = []
    header = pickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    return [memoryview(header), *buffers]


def seal(parts: Sequence[memoryview], name: str) -> tuple[int, int]:
    """Copy `parts` into a new segment that can never be written again: its descriptor and its size in bytes."""
    sizes = [len(parts), *(part.nbytes for part in parts)]
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    table = memoryview(np.array(sizes, np.int64)).cast("B")
    for begin, part in zip(offsets([table.nbytes, *sizes[1:]]), [table, *parts]):
        for start in range(0, part.nbytes, 1 << 30):  # one system call writes 2 GiB at most
            os.pwrite(fd, part[start:start + (1 << 30)], begin + start)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS,
                fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd, os.fstat(fd).st_size


def unseal(fd: int) -> Any:
    """The value in a segment. Its arrays are read-only views; the memory lives as long as one of them. Closes `fd`."""
    view = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ))
    os.close(fd)
    count = int(view[:8].cast("q")[0])
    sizes = view[8:8 * (count + 1)].cast("q").tolist()
    begins = list(offsets([8 * (count + 1), *sizes]))[1:]
    header, *buffers = (view[begin:begin + size] for begin, size in zip(begins, sizes))
    return pickle.loads(header, buffers=buffers)


def offsets(sizes: Sequence[int]) -> Iterator[int]:
    """Where parts of these sizes begin, one behind the other, each on a multiple of ALIGNMENT."""
    begin = 0
    for size in sizes:
        yield begin
        begin += -(-size // ALIGNMENT) * ALIGNMENT


def segments(name: str) -> int:
    """Segments called `name` that any process still holds open or mapped, and files of that name in /dev/shm."""
    found = {path.name for path in Path("/dev/shm").glob(f"{name}*")}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or belongs to another user
            for line in (process / "maps").read_text().splitlines():
                if f"memfd:{name}" in line:
                    found.add(line.split()[4])  # the inode
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    if f"memfd:{name}" in os.readlink(link):
                        found.add(str(link.stat().st_ino))
    return len(found)


class Channel:
    """One end of a pipe: messages, counted in bytes, and the descriptors that follow them."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.bytes = connection, 0

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, *message: Any, fds: Sequence[int] = ()) -> None:
        payload = pickle.dumps(message, protocol=5)
        self.connection.send_bytes(payload)
        self.bytes += len(payload)
        with self._socket() as sock:
            for fd in fds:
                socket.send_fds(sock, [b"."], [fd])

    def recv(self) -> tuple:
        """The next message. EOFError when the other end is gone."""
        try:
            payload = self.connection.recv_bytes()
        except OSError as error:
            raise EOFError from error
        self.bytes += len(payload)
        return pickle.loads(payload)

    def recv_fd(self) -> int:
        with self._socket() as sock:
            _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        if not fds:
            raise EOFError
        return fds[0]

    def _socket(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self.fileno()))


# --- a worker ---------------------------------------------------------------------------------------------------------


class Future(NamedTuple):
    """Stands for an object among the arguments of a task."""

    id: int


def worker_process(tasks: Channel, store: Channel, name: str) -> None:
    """Run one task after the other until the head is gone; a thread hands out the sealed results meanwhile."""
    sealed: dict[int, int] = {}  # number of a segment -> its descriptor
    actors: dict[int, Any] = {}
    threading.Thread(target=serve_store, args=(store, sealed), daemon=True).start()
    with suppress(EOFError):
        while True:
            tasks.send(*run_task(tasks, sealed, actors, name))


def run_task(tasks: Channel, sealed: dict[int, int], actors: dict[int, Any], name: str) -> tuple:
    """Receive one task, run it and seal its result: ("done", bytes sealed) or ("failed", error, traceback)."""
    segment, body, inputs, actor = tasks.recv()
    objects = {i: unseal(tasks.recv_fd()) for i in inputs}
    try:
        fn, args = pickle.loads(body)
        args = [objects[arg.id] if isinstance(arg, Future) else arg for arg in args]
        if actor is None:
            value = fn(*args)
        elif isinstance(fn, str):
            value = getattr(actors[actor], fn)(*args)
        else:
            actors[actor], value = fn(*args), None
        sealed[segment], nbytes = seal(pack(value), name)
        return "done", nbytes
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", traceback.format_exc()


def serve_store(store: Channel, sealed: dict[int, int]) -> None:
    with suppress(EOFError):
        while True:
            what, segment = store.recv()
            if what == "pull":
                store.send(segment, fds=[sealed[segment]])
            else:
                os.close(sealed.pop(segment))


# --- the head: who owns what, and who runs what -----------------------------------------------------------------------


@dataclass(eq=False)
class Worker:
    """A worker as the head sees it."""

    tasks: Channel
    store: Channel
    alive: bool = True
    task: Task | None = None


@dataclass(eq=False)
class Task:
    """Also the lineage of its result: it keeps the entries of what it reads, and with them how those were made."""

    body: bytes  # the pickled function and arguments, which the head need not understand
    inputs: list[Owned]
    on: int | None = None  # the worker it should run on, as long as that one lives
    actor: int | None = None
    waiting: bool = True  # for its inputs, for a worker, or for its end
    attempts: int = 0
    segment: int = 0  # what its worker calls the result: a new number each time, or a late "drop" could hit the next


@dataclass(eq=False)
class Owned:
    """The owner's entry of one object."""

    id: int
    task: Task | None = None  # None: it was put
    holder: Worker | None = None  # who keeps its segment ...
    fd: int | None = None  # ... unless it was put: then the head does
    references: int = 0  # the driver's handles, and tasks that are still to read it
    error: tuple[str, str] | None = None

    @property
    def available(self) -> bool:
        return self.fd is not None or self.holder is not None and self.holder.alive


def head_process(driver: Channel, workers: list[Worker]) -> None:
    Head(driver, workers).run()


class Head:
    def __init__(self, driver: Channel, workers: list[Worker]) -> None:
        self.driver, self.workers = driver, workers
        self.objects: dict[int, Owned] = {}  # those that the driver has a handle of
        self.pending: list[tuple[Task, Owned]] = []  # tasks without a worker, and their results, in order
        self.actors: dict[int, Worker] = {}
        self.wanted: Owned | None = None  # what the driver waits for
        self.runs: Counter[int] = Counter()  # object id -> how often its task has run to its end
        self.numbers = itertools.count()
        self.sealed = 0  # bytes copied into segments
        self.unsettled = False  # something has changed since the pending tasks were last looked through

    def run(self) -> None:
        with suppress(EOFError):  # from the driver: it has ended
            while True:
                listening = {worker.tasks: worker for worker in self.workers if worker.alive}
                for channel in wait([self.driver, *listening]):
                    if channel is self.driver:
                        self.hear_driver(*self.driver.recv())
                    else:
                        self.hear_worker(listening[channel])
                self.unsettled = True
                while self.unsettled:
                    self.unsettled = False
                    self.schedule()

    def hear_driver(self, what: str, released: list[int], *rest: Any) -> None:
        for object_id in released:
            self.release(self.objects[object_id])
        if what == "task":
            object_id, body, inputs, on, actor, creates = rest
            if creates:
                self.actors[actor] = self.workers[(actor if on is None else on) % len(self.workers)]
            task = Task(body, [self.objects[i] for i in inputs], on, actor)
            self.objects[object_id] = Owned(object_id, task, references=1)
            self.submit(task, self.objects[object_id])
        elif what == "put":
            object_id, nbytes = rest
            self.objects[object_id] = Owned(object_id, fd=self.driver.recv_fd(), references=1)
            self.sealed += nbytes
        elif what == "get":
            self.wanted = self.objects[rest[0]]
        elif what == "evict":
            self.drop(self.objects[rest[0]])
        else:
            self.driver.send(self.state())

    def hear_worker(self, worker: Worker) -> None:
        try:
            what, *rest = worker.tasks.recv()
        except EOFError:
            self.bury(worker)
            return
        (task, result), worker.task = worker.task, None
        if what == "done":
            result.holder = worker
            self.sealed += rest[0]
            self.runs[result.id] += 1
        else:
            result.error = tuple(rest)
        self.finish(task, result)

    # --- scheduling ---------------------------------------------------------------------------------------------

    def submit(self, task: Task, result: Owned) -> None:
        task.waiting = True
        for owned in task.inputs:
            owned.references += 1
        self.pending.append((task, result))

    def schedule(self) -> None:
        """Give every task that can run a worker, start what has to be made again, and answer the driver."""
        if self.wanted:
            self.ensure(self.wanted)
        held_up: set[int] = set()  # actors with a call that must wait: later calls must not overtake it
        left, queue = [], deque(self.pending)
        self.pending = []
        while queue:
            task, result = queue.popleft()
            for owned in task.inputs:
                self.ensure(owned)  # may append to self.pending
            queue.extend(self.pending)
            self.pending.clear()
            if not self.start(task, result, held_up):
                left.append((task, result))
                held_up.add(task.actor)
        self.pending = left + self.pending
        if self.wanted and (self.wanted.available or self.wanted.error):
            self.answer(self.wanted)

    def start(self, task: Task, result: Owned, held_up: set) -> bool:
        """Send the task to a worker, or fail it. False: it has to wait."""
        error = next((owned.error for owned in task.inputs if owned.error), None)
        if task.actor is None:
            alive = [worker for worker in self.workers if worker.alive]
            preferred = [self.workers[task.on % len(self.workers)]] if task.on is not None else []
            choice = [worker for worker in preferred if worker.alive] or alive
        else:
            choice = [self.actors[task.actor]] if self.actors[task.actor].alive else []
        if not choice:
            error = error or ("no worker is left" if task.actor is None else "the actor's worker died", "")
        if error:
            result.error = error
            self.finish(task, result)
            return True
        idle = next((worker for worker in choice if worker.task is None), None)
        if idle is None or not all(owned.available for owned in task.inputs):
            return False
        if task.actor is not None and task.actor in held_up:
            return False
        return self.dispatch(task, result, idle)

    def dispatch(self, task: Task, result: Owned, worker: Worker) -> bool:
        fds = [self.pull(owned) for owned in task.inputs]
        try:
            if None in fds:
                return False  # a holder has just died: what it held is made again first
            task.segment = next(self.numbers)
            worker.tasks.send(task.segment, task.body, [owned.id for owned in task.inputs], task.actor, fds=fds)
            worker.task, task.attempts = (task, result), task.attempts + 1
            return True
        except OSError:
            self.bury(worker)
            return False
        finally:
            for fd in fds:
                if fd is not None:
                    os.close(fd)

    def finish(self, task: Task, result: Owned) -> None:
        task.waiting, self.unsettled = False, True
        for owned in task.inputs:
            self.release(owned)
        if not result.references:
            self.drop(result)

    def answer(self, owned: Owned) -> None:
        if owned.error:
            self.driver.send(*owned.error)
        elif (fd := self.pull(owned)) is not None:
            self.driver.send("object", fds=[fd])
            os.close(fd)
        else:
            return  # its holder has just died: it is made again first
        self.wanted = None

    # --- objects: pulled, released, lost, made again --------------------------------------------------------------

    def pull(self, owned: Owned) -> int | None:
        """A descriptor of the object's segment, from whoever holds it; None if that worker is dead."""
        if owned.fd is not None:
            return os.dup(owned.fd)
        try:
            owned.holder.store.send("pull", owned.task.segment)
            owned.holder.store.recv()
            return owned.holder.store.recv_fd()
        except (EOFError, OSError):
            self.bury(owned.holder)
            return None

    def release(self, owned: Owned) -> None:
        """One reference less. With the last one the value goes; the entry stays as lineage of whatever needs it."""
        owned.references -= 1
        if not owned.references:
            self.drop(owned)
            self.objects.pop(owned.id, None)

    def drop(self, owned: Owned) -> None:
        """Forget the value, which frees its memory once nobody maps it any more."""
        if owned.fd is not None:
            os.close(owned.fd)
        elif owned.available:
            with suppress(OSError):
                owned.holder.store.send("drop", owned.task.segment)
        owned.fd = owned.holder = None

    def ensure(self, owned: Owned) -> None:
        """Lineage recovery: a lost object's task runs again. Its lost inputs follow when it is scheduled."""
        if owned.available or owned.error or owned.task and owned.task.waiting:
            return
        if owned.task is None or owned.task.actor is not None:
            owned.error = f"object {owned.id} is lost and has no task that could make it again", ""
        else:
            self.submit(owned.task, owned)

    def bury(self, worker: Worker) -> None:
        """A worker is dead: with it what it held and its actors; what it was doing is tried again."""
        worker.alive, self.unsettled = False, True
        if worker.task:
            (task, result), worker.task = worker.task, None
            if task.actor is not None or task.attempts >= ATTEMPTS:
                result.error = f"a task's worker died, attempt {task.attempts}", ""
                self.finish(task, result)
            else:
                self.pending.insert(0, (task, result))

    def state(self) -> dict[str, Any]:
        channels = [self.driver, *(channel for worker in self.workers for channel in (worker.tasks, worker.store))]
        return {"runs": dict(self.runs), "sealed": self.sealed, "messages": sum(c.bytes for c in channels),
                "where": {i: self.workers.index(owned.holder) for i, owned in self.objects.items()
                          if owned.available and owned.holder}}


# --- the driver's side ------------------------------------------------------------------------------------------------


class ObjectRef:
    """A future: a handle of an object that may not exist yet, and that lives while a handle or a task needs it."""

    def __init__(self, object_id: int, released: deque[int]) -> None:
        self.id, self._released = object_id, released

    def __del__(self) -> None:
        self._released.append(self.id)  # told to the head with the next message: __del__ may run in the middle of one

    def __reduce__(self):
        raise UsageError("pass a future as an argument of its own, not inside another value")


class MiniRay:
    """The driver's connection to a head and `workers` workers of its own. Use it as a context manager."""

    head, worker = staticmethod(head_process), staticmethod(worker_process)

    def __init__(self, workers: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise ReaderError("mini_ray needs Linux: its objects are sealed memory (memfd_create)")
        if workers > MOST_WORKERS:
            raise UsageError(f"at most {MOST_WORKERS} workers, got {workers}")
        self.workers, self.name = workers, f"mini_ray-{secrets.token_hex(4)}"
        self._ids, self._released = itertools.count(), deque()
        ours, head_end = Pipe()
        links = [(*Pipe(), *Pipe()) for _ in range(workers)]  # head's and worker's end for tasks, then for the store
        self._channel = Channel(ours)
        self._fleet = Fleet(1 + workers, process, self.head, self.worker, head_end, links, self.name, wire="none",
                            stall=None, timeout=5)
        for end in [head_end, *itertools.chain(*links)]:
            end.close()

    def put(self, value: Any) -> ObjectRef:
        """Copy a value into shared memory, once."""
        return self._put(pack(value))

    def remote(self, fn: Callable, *args: Any, on: int | None = None) -> ObjectRef:
        """Have a worker call `fn(*args)`; futures among `args` arrive as values. `on`: preferably which worker."""
        return self._submit(fn, args, on)

    def actor(self, cls: Callable, *args: Any, on: int | None = None) -> Actor:
        """Make `cls(*args)` in a worker, where it stays."""
        actor = next(self._ids)
        return Actor(self, actor, self._submit(cls, args, on, actor, creates=True))

    def get(self, ref: ObjectRef | Sequence[ObjectRef]) -> Any:
        """The value of a future, or the values of several, once they exist. Arrays are read-only views."""
        if not isinstance(ref, ObjectRef):
            return [self.get(each) for each in ref]
        self._send("get", ref.id)
        what, *rest = self._answer()
        if what != "object":
            raise TaskFailed(what, *rest)
        return unseal(self._channel.recv_fd())

    def evict(self, ref: ObjectRef) -> None:
        """Throw a value out of the store, as memory pressure would. Whoever needs it again has it made again."""
        self._send("evict", ref.id)

    def kill(self, worker: int) -> None:
        """SIGKILL a worker, and return once it is gone."""
        process = psutil.Process(self._fleet.pids[1 + worker])
        self._fleet.kill(1 + worker)
        process.wait(5)

    def state(self) -> dict[str, Any]:
        """`runs` of each object's task, `where` (which worker) each object is, bytes `sealed`, bytes of `messages`."""
        self._send("state")
        return self._answer()[0]

    def segments(self) -> int:
        return segments(self.name)

    def close(self) -> None:
        """End head and workers."""
        self._channel.connection.close()
        self._fleet.outcomes(all_of=True)  # they see that the driver has gone; waiting for them lets them say so
        self._fleet.close()

    def __enter__(self) -> MiniRay:
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        self._fleet.close() if kind else self.close()

    def _put(self, parts: list[memoryview]) -> ObjectRef:
        ref = ObjectRef(next(self._ids), self._released)
        fd, nbytes = seal(parts, self.name)
        self._send("put", ref.id, nbytes, fds=[fd])
        os.close(fd)
        return ref

    def _submit(self, fn: Callable | str, args: Sequence[Any], on: int | None, actor: int | None = None,
                creates: bool = False) -> ObjectRef:
        if not isinstance(fn, str) and ("<" in fn.__qualname__ or fn.__module__ == "__main__"):
            raise UsageError(f"{fn.__qualname__} cannot travel by name: define it at the top level of a module")
        refs, body = {}, []
        for arg in args:
            parts = [] if isinstance(arg, ObjectRef) else pack(arg)
            if sum(part.nbytes for part in parts) > INLINE:
                arg = self._put(parts)  # passing a large value by value stores a copy of it, for this task alone
            if isinstance(arg, ObjectRef):
                refs[arg.id] = arg
                arg = Future(arg.id)
            body.append(arg)
        ref = ObjectRef(next(self._ids), self._released)
        self._send("task", ref.id, pickle.dumps((fn, body), protocol=5), list(refs), on, actor, creates)
        return ref

    def _send(self, what: str, *rest: Any, fds: Sequence[int] = ()) -> None:
        released = [self._released.popleft() for _ in range(len(self._released))]
        try:
            self._channel.send(what, released, *rest, fds=fds)
        except OSError:
            self._lost()

    def _answer(self) -> tuple:
        try:
            return self._channel.recv()
        except EOFError:
            self._lost()

    def _lost(self) -> None:
        """The head is gone: say why."""
        self._fleet.results()
        raise TaskFailed("the head has ended")


class Actor:
    """A handle of an object that lives in a worker: `actor.method(*args)` is a future of the method's result.

    Calls run one after the other in the order made. The actor's state dies with its worker.
    """

    def __init__(self, ray: MiniRay, actor: int, created: ObjectRef) -> None:
        self._ray, self._actor, self._created = ray, actor, created

    def __getattr__(self, method: str) -> Callable[..., ObjectRef]:
        return lambda *args: self._ray._submit(method, args, None, self._actor)


def process(net, head: Callable, worker: Callable, driver: Connection, links: list[tuple], name: str) -> None:
    """Rank 0 is the head, the others are workers. Each closes the ends of all others, so that a death is noticed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one descriptor for each object
    if net.rank == 0:
        for _, theirs, _, their_store in links:
            theirs.close()
            their_store.close()
        head(Channel(driver), [Worker(Channel(tasks), Channel(store)) for tasks, _, store, _ in links])
        for tasks, _, store, _ in links:
            tasks.close()  # which ends the workers
            store.close()
        return
    _, tasks, _, store = links[net.rank - 1]
    for end in [driver, *itertools.chain(*links)]:
        if end not in (tasks, store):
            end.close()
    worker(Channel(tasks), Channel(store), name)
