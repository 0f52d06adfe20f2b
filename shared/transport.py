"""Point-to-point messages between worker processes: framed, counted, and optionally paced.

A message is one NumPy array. It travels over a Unix socket, a TCP connection, or a ring of slots in shared memory
(`wire="unix" | "tcp" | "shm"`), always behind the same 36-byte header, and is counted per peer and tag on both sides.
Nothing is pickled: the receiver rebuilds the array from a validated header and raw bytes.

A `Fabric` of `Link`s paces messages as network cards and switches would. Each message occupies its sender's outgoing
side and its receiver's incoming side for `overhead + bytes / bandwidth` seconds, one message at a time, and arrives
`latency` later; ranks on one node share that node's uplink. The bytes really move; only their arrival is held back to
the link's schedule.
"""
from __future__ import annotations

import contextlib
import fcntl
import math
import re
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared.errors import PeerLost, TransportError, UsageError

MAGIC = b"SAI1"
HEADER = struct.Struct("!4sBBHIQQd")  # magic, kind, dtype code, dimensions, tag, bytes, first axis, delivery time
AXES = struct.Struct("!Q")
DATA, CONTROL = 1, 2
FAREWELL = 0xFFFF_FFFF  # the tag of the last message of a rank that has ended its function (see shared.elastic)
DTYPES = [np.dtype(code) for code in "? i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 c8 c16".split()]
DTYPE_CODE = {dtype: code for code, dtype in enumerate(DTYPES)}
MAX_DIMENSIONS = 8
MAX_BYTES = 4 << 30  # a larger announced payload is an error in the frame, not an array of ours
INLINE = 16 << 10  # payloads up to this size travel with their header, also on the shm wire
PIECE = 256 << 10  # what is received from a socket before it is reduced: it still lies in the cache
SLOT, SLOTS = 1 << 19, 4  # a ring in shared memory: large slots spare the wake-ups that dominate on few cores

now = time.monotonic  # one clock for all processes of a machine


@dataclass(frozen=True)
class Link:
    """A point-to-point link.

    latency: seconds a message flies; several may be in the air at once.
    bandwidth: bytes per second. overhead: seconds for which a message occupies its sender and its receiver besides its
    bytes (what a network stack does per message). The alpha of the alpha-beta model is latency + overhead.
    """

    latency: float
    bandwidth: float
    overhead: float = 0.0
    name: str = "custom"

    def occupancy(self, nbytes: float) -> float:
        """Seconds for which one message of `nbytes` keeps each of its two ends busy."""
        return self.overhead + nbytes / self.bandwidth

    def seconds(self, nbytes: float) -> float:
        """Alpha-beta time of one message of `nbytes` on an idle link."""
        return self.latency + self.occupancy(nbytes)

    def __str__(self) -> str:
        return f"{self.name} ({(self.latency + self.overhead) * 1e3:g} ms, {self.bandwidth / 1e6:g} MB/s)"

    @classmethod
    def named(cls, text: str) -> Link | None:
        """The link that `--link` names: a key of LINKS, `none` (not paced), or like `0.1ms+0.9ms/50MBps`
        (latency + overhead / bandwidth)."""
        if text == "none":
            return None
        if text in LINKS:
            return LINKS[text]
        custom = re.fullmatch(r"([0-9.]+)ms(?:\+([0-9.]+)ms)?/([0-9.]+)MBps", text)
        try:
            latency, overhead, bandwidth = (float(part or 0) for part in custom.groups())
            return cls(latency / 1e3, bandwidth * 1e6 / (bandwidth > 0), overhead / 1e3, text)
        except (AttributeError, ValueError, ZeroDivisionError):
            raise UsageError(f"unknown link {text!r}: one of none, {', '.join(LINKS)}, "
                             "or like 0.1ms+0.9ms/50MBps") from None


LINKS = {
    link.name: link
    for link in (
        Link(1e-4, 12.5e6, 9e-4, "100mbe"),
        Link(1e-4, 50e6, 9e-4, "400mbe"),
        Link(1e-4, 100e6, 9e-4, "800mbe"),
        Link(5e-5, 125e6, 4.5e-4, "1gbe"),
        Link(2e-5, 1.25e9, 8e-5, "10gbe"),
        Link(2e-2, 12.5e6, 1e-4, "wan"),
    )
}


@dataclass(frozen=True)
class Fabric:
    """Which link joins which ranks. Ranks of one node share its uplink (`outer`); `inner` None is not paced."""

    node_of: tuple[int, ...]
    outer: Link | None
    inner: Link | None = None

    @classmethod
    def uniform(cls, workers: int, link: Link | None) -> Fabric:
        """Every rank on a node of its own, all joined by `link`."""
        return cls(tuple(range(workers)), link)

    def route(self, src: int, dst: int) -> tuple[Link | None, int, int]:
        """The link between two ranks and the queues (outgoing, incoming) that it occupies."""
        a, b = self.node_of[src], self.node_of[dst]
        if a == b:
            return self.inner, src, dst
        return self.outer, len(self.node_of) + a, len(self.node_of) + b


RUNNING, SENDING, RECEIVING, FINISHED = 0.0, 1.0, 2.0, 3.0


class Board:
    """A page of memory that all workers share: what each one is doing, and when each link is free again.

    `status[rank]` is (state, peer, tag, progress count); `free[direction, queue]` is a time on the monotonic clock.
    """

    def __init__(self, memory, workers: int) -> None:
        self.memory, self.workers = memory, workers
        self._thread_lock = threading.Lock()
        self.status = memory.array((workers, 4))
        self.free = memory.array((2, 2 * workers), offset=self.status.nbytes)

    @staticmethod
    def nbytes(workers: int) -> int:
        return 8 * (4 * workers + 4 * workers)

    def reserve(self, link: Link, out: int, into: int, nbytes: int) -> tuple[float, float]:
        """Book one message on its two queues; returns when it has left the sender and when it is delivered."""
        seconds = link.occupancy(nbytes)
        with self._thread_lock:
            fcntl.lockf(self.memory.fd, fcntl.LOCK_EX)  # released by the kernel if its holder dies
            try:
                start = max(now(), self.free[0, out], self.free[1, into] - link.latency)
                self.free[0, out] = start + seconds
                self.free[1, into] = start + seconds + link.latency
            finally:
                fcntl.lockf(self.memory.fd, fcntl.LOCK_UN)
        return float(start + seconds), float(start + seconds + link.latency)


@dataclass
class Count:
    messages: int = 0
    bytes: int = 0

    def add(self, nbytes: int) -> None:
        self.messages += 1
        self.bytes += nbytes


@dataclass
class Stats:
    """Payload counted at one rank, keyed by (peer, tag). Headers and barriers are not counted."""

    sent: dict[tuple[int, int], Count] = field(default_factory=dict)
    received: dict[tuple[int, int], Count] = field(default_factory=dict)

    @staticmethod
    def _total(counts: dict[tuple[int, int], Count], peer: int | None, tag: int | None) -> Count:
        chosen = [c for (p, t), c in counts.items() if peer in (None, p) and tag in (None, t)]
        return Count(sum(c.messages for c in chosen), sum(c.bytes for c in chosen))

    def sent_to(self, peer: int | None = None, tag: int | None = None) -> Count:
        """Messages and bytes sent to `peer` (None: all) under `tag` (None: all)."""
        return self._total(self.sent, peer, tag)

    def received_from(self, peer: int | None = None, tag: int | None = None) -> Count:
        """Messages and bytes received from `peer` (None: all) under `tag` (None: all)."""
        return self._total(self.received, peer, tag)


class Work:
    """A send or receive under way. `wait()` returns when it is complete (and the received array, for a receive)."""

    def __init__(self, wait: Callable[[], np.ndarray | None]) -> None:
        self._wait, self._done, self._value = wait, False, None

    def wait(self) -> np.ndarray | None:
        if not self._done:
            self._value, self._done = self._wait(), True
        return self._value


class _Outbox:
    """Frames on their way to one peer, in order. Each is a generator that yields the poll event it waits for."""

    def __init__(self, peer: int, sock: socket.socket, ring: np.ndarray | None) -> None:
        self.peer, self.sock, self.ring = peer, sock, ring
        self.credits, self.next_slot = SLOTS, 0
        self.frames: deque[Generator[int, None, None]] = deque()
        self.blocked_on = 0
        self.queued = self.finished = 0
        self.lost = False

    def put(self, header: bytes, payload: memoryview) -> int:
        """Queue one frame and push what the wire takes now. Returns the frame's number."""
        self.frames.append(self._frame(header, payload))
        self.queued += 1
        self.push()
        self.check()
        return self.queued

    def push(self) -> None:
        """Write what the wire takes. A lost peer is noted here and raised by whoever sends to it or waits for that."""
        while self.frames:
            try:
                self.blocked_on = next(self.frames[0])
                return
            except StopIteration:
                self.frames.popleft()
                self.finished += 1
            except OSError:
                self.lost = True
                self.frames.clear()
        self.blocked_on = 0

    def check(self) -> None:
        if self.lost:
            raise PeerLost(f"lost rank {self.peer} while sending to it")

    def _frame(self, header: bytes, payload: memoryview) -> Generator[int, None, None]:
        if len(payload) <= INLINE:
            yield from self._write(memoryview(header + bytes(payload)))
        elif self.ring is None:
            yield from self._write(memoryview(header))
            yield from self._write(payload)
        else:
            yield from self._write(memoryview(header))
            source = np.frombuffer(payload, np.uint8)
            for start in range(0, len(payload), SLOT):
                while not self.credits:
                    try:
                        returned = self.sock.recv(SLOTS)
                    except BlockingIOError:
                        yield select.POLLIN
                        continue
                    if not returned:
                        raise ConnectionResetError
                    self.credits += len(returned)
                piece = source[start:start + SLOT]
                self.ring[self.next_slot, :len(piece)] = piece
                self.next_slot = (self.next_slot + 1) % SLOTS
                self.credits -= 1
                yield from self._write(memoryview(b"\1"))

    def _write(self, view: memoryview) -> Generator[int, None, None]:
        while view:
            try:
                view = view[self.sock.send(view):]
            except BlockingIOError:
                yield select.POLLOUT


class _Inbox:
    """The incoming side of one peer: its socket, its ring, and messages that arrived before they were asked for."""

    def __init__(self, sock: socket.socket, ring: np.ndarray | None) -> None:
        self.sock, self.ring = sock, ring
        self.next_slot = 0
        self.cut = False  # a receive gave up in the middle of a frame: what follows cannot be trusted
        self.ended = False  # the peer's farewell is here: no further message of its function can come
        self.early: deque[tuple[int, int, float, np.ndarray]] = deque()


class Transport:
    """This process's end of the world: rank `rank` of `size`, one connection to every other rank.

    Not thread-safe: one thread at a time may use it (a progress thread takes it over as a whole).
    Sends block until the wire has taken every byte, as a socket does; `isend` leaves the rest to later calls.
    """

    def __init__(self, rank: int, size: int, sockets: dict[int, tuple[socket.socket, socket.socket]], *,
                 rings: Callable[[int, int], np.ndarray] | None = None, board: Board | None = None,
                 fabric: Fabric | None = None) -> None:
        self.rank, self.size = rank, size
        self._board, self._fabric = board, fabric
        for pair in sockets.values():
            for sock in pair:
                sock.setblocking(False)
        ring = rings or (lambda src, dst: None)
        self._out = {peer: _Outbox(peer, out, ring(rank, peer)) for peer, (out, _) in sockets.items()}
        self._in = {peer: _Inbox(into, ring(peer, rank)) for peer, (_, into) in sockets.items()}
        self._scratch = np.empty(PIECE, np.uint8)
        self._stats = Stats()
        self._self_messages: deque[tuple[int, np.ndarray]] = deque()
        self._barriers = 0

    # --- the public operations -------------------------------------------------------------------------------

    def send(self, dst: int, array: np.ndarray, tag: int = 0) -> None:
        """Send `array` (any shape) to rank `dst`. Returns when it has left this process.

        Raises: PeerLost when the peer is gone, TransportError for an unsupported dtype or rank.
        """
        self.isend(dst, array, tag).wait()

    def isend(self, dst: int, array: np.ndarray, tag: int = 0) -> Work:
        """Start a send; `array` must not change before `wait()`. It advances while this rank waits for anything."""
        return self._isend(dst, array, tag, DATA)

    def recv(self, src: int, out: np.ndarray | None = None, tag: int = 0, *, reduce: np.ufunc | None = None,
             timeout: float | None = None) -> np.ndarray:
        """Receive the next message of rank `src` with `tag`, into `out` (same dtype and size) or a new array.

        With `reduce` (such as `np.add`) the message is combined into `out` piece by piece as it arrives.
        Messages with another tag wait for their own `recv`. `timeout` in seconds raises TransportError.
        """
        return self._recv(src, out, tag, DATA, reduce, timeout)

    def irecv(self, src: int, out: np.ndarray | None = None, tag: int = 0) -> Work:
        """A receive that is carried out by its `wait()`."""
        return Work(lambda: self.recv(src, out, tag))

    def barrier(self) -> None:
        """Return when every rank has called it (dissemination, ceil(log2 size) rounds). Not counted, not paced."""
        nothing, self._barriers = np.empty(0, np.uint8), self._barriers + 1
        hop = 1
        while hop < self.size:
            work = self._isend((self.rank + hop) % self.size, nothing, self._barriers, CONTROL)
            self._recv((self.rank - hop) % self.size, None, self._barriers, CONTROL, None, None)
            work.wait()
            hop *= 2

    def stats(self) -> Stats:
        """What this rank has sent and received since the start or the last `reset_stats`."""
        return self._stats

    def reset_stats(self) -> None:
        self._stats = Stats()

    def close(self) -> None:
        for box in self._out.values():
            with contextlib.suppress(PeerLost):
                self._finish_output(box, box.queued)
        for box in (*self._out.values(), *self._in.values()):
            box.sock.close()

    # --- sending -----------------------------------------------------------------------------------------------

    def _isend(self, dst: int, array: np.ndarray, tag: int, kind: int) -> Work:
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        if array.dtype not in DTYPE_CODE or array.ndim > MAX_DIMENSIONS or array.nbytes > MAX_BYTES:
            raise TransportError(f"cannot send an array of dtype {array.dtype} and shape {array.shape}")
        if not 0 <= tag < 1 << 32:
            raise TransportError(f"tag {tag} does not fit 32 bits")
        if dst != self.rank and dst not in self._out:
            raise TransportError(f"rank {self.rank} has no peer {dst} in a world of {self.size}")
        if kind == DATA:
            self._stats.sent.setdefault((dst, tag), Count()).add(array.nbytes)
        if dst == self.rank:
            self._self_messages.append((tag, array.copy()))
            return Work(lambda: None)
        left_at = delivered_at = 0.0
        if kind == DATA and self._fabric and self._board:
            link, out, into = self._fabric.route(self.rank, dst)
            if link:
                left_at, delivered_at = self._board.reserve(link, out, into, array.nbytes)
        header = HEADER.pack(MAGIC, kind, DTYPE_CODE[array.dtype], array.ndim, tag, array.nbytes,
                             array.shape[0] if array.ndim else 0, delivered_at)
        header += b"".join(AXES.pack(axis) for axis in array.shape[1:])
        box = self._out[dst]
        number = box.put(header, memoryview(array.reshape(-1)).cast("B") if array.nbytes else memoryview(b""))

        def wait() -> None:
            self._finish_output(box, number, dst, tag)
            self._sleep_until(left_at)
            self._progressed()

        return Work(wait)

    def _finish_output(self, box: _Outbox, number: int, peer: int = -1, tag: int = 0) -> None:
        while box.finished < number:
            box.check()
            self._wait_for(None, 0, SENDING, peer, tag, None)

    # --- receiving ---------------------------------------------------------------------------------------------

    def _recv(self, src: int, out: np.ndarray | None, tag: int, kind: int, reduce: np.ufunc | None,
              timeout: float | None) -> np.ndarray:
        deadline = None if timeout is None else now() + timeout
        if out is not None and not out.flags.c_contiguous:
            raise TransportError("recv needs a contiguous output array")
        if src == self.rank:
            array = self._take_own(tag)
        elif src not in self._in:
            raise TransportError(f"rank {self.rank} has no peer {src} in a world of {self.size}")
        else:
            box = self._in[src]
            array = self._take_early(box, src, tag, kind, deadline)
            while array is None:
                if box.ended:
                    raise PeerLost(f"rank {src} has ended, yet rank {self.rank} waits for it (tag {tag})")
                frame_kind, frame_tag, dtype, shape, nbytes, delivered_at = self._read_header(box, src, tag, deadline)
                wanted = frame_kind == kind and frame_tag == tag
                in_time = deadline is None or delivered_at <= deadline
                if wanted and in_time and (out is None or _fits(out, dtype, nbytes)):
                    if out is None:
                        out, reduce = np.empty(shape, dtype), None
                    self._read_payload(box, src, tag, nbytes, out, reduce, deadline)
                    self._sleep_until(delivered_at)
                    array = out
                else:  # somebody else's turn: keep it, so that tags may be received in any order
                    early = np.empty(shape, dtype)
                    self._read_payload(box, src, frame_tag, nbytes, early, None, deadline)
                    box.early.append((frame_kind, frame_tag, delivered_at, early))
                    box.ended = (frame_kind, frame_tag) == (DATA, FAREWELL) and not wanted
                    if wanted:
                        array = self._take_early(box, src, tag, kind, deadline)
        if kind == DATA:
            self._stats.received.setdefault((src, tag), Count()).add(array.nbytes)
        self._progressed()
        if out is None or array is out:
            return array
        if not _fits(out, array.dtype, array.nbytes):
            raise TransportError(f"message of {array.nbytes} bytes {array.dtype} from rank {src} does not fit "
                                 f"an output of {out.nbytes} bytes {out.dtype}")
        flat = out.reshape(-1)
        reduce(flat, array.reshape(-1), out=flat) if reduce else np.copyto(flat, array.reshape(-1))
        return out

    def _take_own(self, tag: int) -> np.ndarray:
        for i, (early_tag, array) in enumerate(self._self_messages):
            if early_tag == tag:
                del self._self_messages[i]
                return array
        raise TransportError(f"rank {self.rank} receives from itself with tag {tag} before sending")

    def _take_early(self, box: _Inbox, src: int, tag: int, kind: int, deadline: float | None) -> np.ndarray | None:
        for i, (early_kind, early_tag, delivered_at, array) in enumerate(box.early):
            if early_kind == kind and early_tag == tag:
                if deadline is not None and delivered_at > deadline:  # on its way, but not here in time
                    self._sleep_until(deadline)
                    raise TransportError(f"rank {self.rank} got no message from rank {src} (tag {tag}) in time")
                self._sleep_until(delivered_at)
                del box.early[i]
                box.ended = box.ended and tag != FAREWELL
                return array
        return None

    def _read_header(self, box: _Inbox, src: int, tag: int, deadline: float | None):
        if box.cut:
            raise TransportError(f"the stream from rank {src} was cut by an earlier error")
        raw = bytearray(HEADER.size)
        self._read_exact(box, src, tag, memoryview(raw), deadline, first=True)
        magic, kind, code, ndim, frame_tag, nbytes, first, delivered_at = HEADER.unpack(raw)
        if magic != MAGIC or kind not in (DATA, CONTROL) or code >= len(DTYPES) or ndim > MAX_DIMENSIONS:
            box.cut = True
            raise TransportError(f"malformed frame from rank {src}: header {bytes(raw[:8]).hex()}")
        rest = bytearray(AXES.size * max(0, ndim - 1))
        self._read_exact(box, src, tag, memoryview(rest), deadline)
        shape = (() if ndim == 0 else (first, *(axis for (axis,) in AXES.iter_unpack(rest))))
        expected = math.prod(shape) * DTYPES[code].itemsize
        if nbytes != expected or math.prod(axis or 1 for axis in shape) * DTYPES[code].itemsize > MAX_BYTES:
            box.cut = True
            raise TransportError(f"malformed frame from rank {src}: {nbytes} bytes for shape {shape} {DTYPES[code]}")
        if not 0 <= delivered_at < now() + 3600:
            box.cut = True
            raise TransportError(f"malformed frame from rank {src}: delivery time out of range")
        return kind, frame_tag, DTYPES[code], shape, nbytes, delivered_at

    def _read_payload(self, box: _Inbox, src: int, tag: int, nbytes: int, out: np.ndarray, reduce: np.ufunc | None,
                      deadline: float | None) -> None:
        flat = out.reshape(-1)
        in_ring = box.ring is not None and nbytes > INLINE
        if not in_ring and reduce is None:
            if nbytes:
                self._read_exact(box, src, tag, memoryview(flat).cast("B"), deadline)
            return
        token = memoryview(bytearray(1))
        step = SLOT if in_ring else PIECE
        for start in range(0, nbytes, step):
            size = min(step, nbytes - start)
            if in_ring:
                self._read_exact(box, src, tag, token, deadline)
                piece = box.ring[box.next_slot, :size]
            else:
                piece = self._scratch[:size]
                self._read_exact(box, src, tag, memoryview(piece), deadline)
            here = flat[start // out.itemsize:(start + size) // out.itemsize]
            incoming = piece.view(out.dtype)
            reduce(here, incoming, out=here) if reduce else np.copyto(here, incoming)
            if in_ring:
                box.next_slot = (box.next_slot + 1) % SLOTS
                with contextlib.suppress(OSError):  # a sender that is gone shows when more of it is wanted
                    box.sock.send(token)  # the slot may be filled again

    def _read_exact(self, box: _Inbox, src: int, tag: int, view: memoryview, deadline: float | None,
                    first: bool = False) -> None:
        wanted = len(view)
        while view:
            try:
                n = box.sock.recv_into(view)
            except BlockingIOError:
                try:
                    self._wait_for(box.sock, select.POLLIN, RECEIVING, src, tag, deadline)
                except TransportError:
                    box.cut = box.cut or not first or len(view) < wanted
                    raise
                continue
            except OSError:
                n = 0
            if n == 0:
                raise PeerLost(f"lost rank {src} while receiving from it")
            view = view[n:]

    # --- waiting -----------------------------------------------------------------------------------------------

    def _wait_for(self, sock: socket.socket | None, event: int, state: float, peer: int, tag: int,
                  deadline: float | None) -> None:
        """Block until `sock` is ready (or, without one, some output advanced), pushing pending output meanwhile."""
        poller = select.poll()
        blocked = {box.sock.fileno(): box for box in self._out.values() if box.blocked_on}
        wanted = {fd: box.blocked_on for fd, box in blocked.items()}
        if sock is not None:
            wanted[sock.fileno()] = wanted.get(sock.fileno(), 0) | event
        for fd, events in wanted.items():
            poller.register(fd, events)
        if self._board:
            state = state if deadline is None else RUNNING  # who waits with a time-out goes on by itself: not hung
            self._board.status[self.rank, :3] = state, peer, tag
        remaining = None if deadline is None else max(0.0, deadline - now()) * 1e3
        ready = poller.poll(remaining)
        if self._board:
            self._board.status[self.rank, 0] = RUNNING
        self._progressed()
        if not ready:
            raise TransportError(f"rank {self.rank} got no message from rank {peer} (tag {tag}) in time")
        for fd, _ in ready:
            if fd in blocked:
                blocked[fd].push()

    def _sleep_until(self, deadline: float) -> None:
        """Hold a paced message back until its link would have delivered it, pushing pending output meanwhile."""
        while (left := deadline - now()) > 0:
            blocked = {box.sock.fileno(): box for box in self._out.values() if box.blocked_on}
            if not blocked or left < 1e-3:
                time.sleep(left)
                continue
            poller = select.poll()
            for fd, box in blocked.items():
                poller.register(fd, box.blocked_on)
            for fd, _ in poller.poll(int(left * 1e3)):
                blocked[fd].push()

    def _progressed(self) -> None:
        if self._board:
            self._board.status[self.rank, 3] += 1


def _fits(out: np.ndarray, dtype: np.dtype, nbytes: int) -> bool:
    return out.dtype == dtype and out.nbytes == nbytes


# --- TCP meshes: every rank listens, connects to the ranks below it, and accepts those above it ----------------------

HELLO = struct.Struct("!4s16sI")


def tcp_mesh(rank: int, addresses: Sequence[tuple[str, int]], listener: socket.socket, token: bytes,
             timeout: float = 30.0, buffer: int | None = None) -> dict[int, tuple[socket.socket, socket.socket]]:
    """Join every pair of ranks by one TCP connection. Strangers (wrong token) are turned away.

    buffer: bytes of each connection's send and receive buffer, if not the system's choice.
    """
    deadline, mesh = now() + timeout, {}
    for peer in range(rank):
        try:
            sock = socket.create_connection(addresses[peer], timeout=timeout)
            sock.sendall(HELLO.pack(MAGIC, token, rank))
        except OSError as error:
            raise PeerLost(f"rank {rank} cannot reach rank {peer} at {addresses[peer]}: {error}") from None
        mesh[peer] = sock
    while len(mesh) < len(addresses) - 1:
        listener.settimeout(max(0.01, deadline - now()))
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            missing = sorted(set(range(len(addresses))) - set(mesh) - {rank})
            raise TransportError(f"rank {rank} waited {timeout:g} s for ranks {missing} to connect") from None
        peer = _greet(sock, token)
        if peer is None or not rank < peer < len(addresses) or peer in mesh:
            sock.close()
        else:
            mesh[peer] = sock
    listener.close()
    for sock in mesh.values():
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if buffer else ():
            sock.setsockopt(socket.SOL_SOCKET, option, buffer)
    return {peer: (sock, sock) for peer, sock in mesh.items()}


def _greet(sock: socket.socket, token: bytes) -> int | None:
    deadline, raw = now() + 2.0, b""
    try:
        while len(raw) < HELLO.size:
            sock.settimeout(max(0.01, deadline - now()))
            piece = sock.recv(HELLO.size - len(raw))
            if not piece:
                return None
            raw += piece
    except OSError:
        return None
    magic, their_token, peer = HELLO.unpack(raw)
    return peer if (magic, their_token) == (MAGIC, token) else None
