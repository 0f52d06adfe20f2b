"""`launch` under torchrun: the processes exist already, on one host or several, and meet through its environment.

torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 collects everyone's address on the port after
MASTER_PORT (torchrun itself holds MASTER_PORT; SCALABLE_PORT overrides), hands out the list, and every pair of ranks
connects by TCP. Results return to all ranks, so that each process follows the same program; only rank 0 prints.
"""
from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import json
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from shared.environment import world
from shared.errors import PeerLost, TransportError, UsageError, WorkerFailed
from shared.transport import FAREWELL, HELLO, MAGIC, Count, Fabric, Stats, Transport, _greet, tcp_mesh


def launch_external(workers: int, fn: Callable, args: tuple, fabric: Fabric | None) -> list[Any]:
    """Run `fn(net, *args)` on the first `workers` ranks of the existing world; every rank gets all results."""
    rank, size = world()
    if workers > size:
        raise UsageError(f"torchrun started {size} processes but {workers} workers are needed")
    if fabric is not None:
        raise UsageError("links are real under torchrun and cannot be paced: add --link none")
    net = _join(rank, size)
    try:
        mine = encode(None)
        if rank < workers:
            inner = copy.copy(net)
            inner.size = workers
            try:
                inner.barrier()
                mine = encode({"result": fn(inner, *args)})
            except Exception as error:
                mine = encode({"error": repr(error), "traceback": traceback.format_exc(),
                               "is_consequence": isinstance(error, PeerLost)})
        outcomes = _exchange(net, mine)[:workers]
        net.barrier()
    finally:
        net.close()
    failed = [(outcome["is_consequence"], rank) for rank, outcome in enumerate(outcomes) if "error" in outcome]
    if failed:  # the cause, not those who lost their peer because of it
        _, rank = min(failed)
        raise WorkerFailed(rank, f"raised {outcomes[rank]['error']}", outcomes[rank]["traceback"])
    return [outcome["result"] for outcome in outcomes]


def _exchange(net: Transport, mine: bytes) -> list[Any]:
    """Everyone's outcome, at every rank. Whoever still waits for this one learns from it that it has ended."""
    payload = np.frombuffer(mine, np.uint8)
    works = [net.isend(peer, payload, FAREWELL) for peer in range(net.size)]
    gathered = [decode(net.recv(peer, tag=FAREWELL).tobytes()) for peer in range(net.size)]
    for work in works:
        work.wait()
    return gathered


def _join(rank: int, size: int, timeout: float = 60.0) -> Transport:
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), _rendezvous_port()
    token = hashlib.sha256(f"{os.environ.get('TORCHELASTIC_RUN_ID')}|{host}|{port}|{size}".encode()).digest()[:16]
    if rank == 0:
        try:
            desk = socket.create_server((host, port), backlog=size)
        except OSError as error:
            raise TransportError(f"no port: rank 0 at {host}:{port}: {error.strerror} (set SCALABLE_PORT)") from None
        listener = socket.create_server((host, 0), backlog=size)
        addresses = _hand_out_addresses(desk, listener.getsockname()[:2], size, token, timeout)
    else:
        sock = _call(host, port, timeout)
        listener = socket.create_server((sock.getsockname()[0], 0), backlog=size)
        with sock, sock.makefile("rw") as lines:
            sock.sendall(HELLO.pack(MAGIC, token, rank))
            lines.write(json.dumps(listener.getsockname()[:2]) + "\n")
            lines.flush()
            answer = lines.readline(1 << 20)
        if not answer:
            raise PeerLost(f"rank 0 turned rank {rank} away or ended: are all ranks of the same run?")
        addresses = [tuple(address) for address in json.loads(answer)]
    return Transport(rank, size, tcp_mesh(rank, addresses, listener, token, timeout))


def _rendezvous_port() -> int:
    return int(os.environ.get("SCALABLE_PORT") or int(os.environ.get("MASTER_PORT", "29500")) + 1)


def _call(host: str, port: int, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            if time.monotonic() > deadline:
                raise TransportError(f"no answer from rank 0 at {host}:{port}: {error.strerror}") from None
            time.sleep(0.05)


def _hand_out_addresses(desk: socket.socket, own: tuple, size: int, token: bytes, timeout: float) -> list[tuple]:
    callers: dict[int, tuple[socket.socket, tuple]] = {}
    desk.settimeout(timeout)
    with desk:
        while len(callers) < size - 1:
            try:
                sock, _ = desk.accept()
            except TimeoutError:
                missing = sorted(set(range(1, size)) - set(callers))
                raise TransportError(f"rank 0 waited {timeout:g} s for ranks {missing}") from None
            peer = _greet(sock, token)
            if peer is None or not 0 < peer < size or peer in callers:
                sock.close()
                continue
            with sock.makefile("r") as lines:
                callers[peer] = sock, tuple(json.loads(lines.readline(4096)))
    addresses = [own, *(callers[peer][1] for peer in range(1, size))]
    for sock, _ in callers.values():
        with sock:
            sock.sendall((json.dumps(addresses) + "\n").encode())
    return addresses


# --- values on the wire: JSON with arrays, tuples, keys of any type and the transport's counts; never a pickle --------


def encode(value: Any) -> bytes:
    return json.dumps(_plain(value)).encode()


def decode(raw: bytes) -> Any:
    return _rich(json.loads(raw))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcmMSU":  # the kinds without pointers and fields
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"!": "array", "dtype": value.dtype.str, "shape": value.shape, "data": data}
    if isinstance(value, np.generic) and value.dtype.kind in "biufcmMSU":
        return _plain(np.asarray(value))
    if isinstance(value, dict):
        return {"!": "dict", "items": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"!": "tuple", "items": [_plain(v) for v in value]}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, (Count, Stats)):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"!": type(value).__name__, "fields": _plain(fields)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TransportError(f"a {type(value).__name__} cannot be returned across hosts: "
                         "use numbers, text, arrays of them, lists, dicts")


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return [_rich(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value["!"]
    if kind == "array":
        array = np.frombuffer(base64.b64decode(value["data"]), np.dtype(value["dtype"])).reshape(value["shape"])
        return array.copy() if value["shape"] else array[()]
    if kind == "dict":
        return {_rich(k): _rich(v) for k, v in value["items"]}
    if kind == "tuple":
        return tuple(_rich(v) for v in value["items"])
    return {"Count": Count, "Stats": Stats}[kind](**_rich(value["fields"]))
