"""What the workers of test_fleet.py, test_elastic.py and test_torch_world.py run."""
from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from shared.errors import TransportError
from shared.fleet import SharedArray
from shared.transport import Transport


def nothing(net: Transport) -> None:
    pass


def whoami(net: Transport, *args: object) -> tuple:
    return net.rank, net.size, os.getpid(), *args


def fill(net: Transport, shared: SharedArray, readings: SharedArray) -> float:
    shared.array[net.rank] = net.rank + 1
    net.barrier()
    readings.array[net.rank] = shared.array.sum()
    return float(shared.array.sum())


def deeper(rank: int) -> None:
    raise ValueError(f"rank {rank} cannot\nand says so in two lines")


def fail_at(net: Transport, culprit: int) -> None:
    """One rank fails, the others wait for it."""
    if net.rank == culprit:
        deeper(net.rank)
    net.recv(culprit)


def end_at(net: Transport, culprit: int, how: str) -> None:
    """One rank ends itself in the way named, the others wait for it."""
    if net.rank == culprit:
        if how == "exit":
            sys.exit("enough")
        os._exit(7) if how == "_exit" else os.kill(os.getpid(), getattr(signal, how))
        time.sleep(60)
    net.recv(culprit)


def ring_of_receives(net: Transport) -> None:
    net.send((net.rank + 1) % net.size, np.zeros(3))
    net.recv((net.rank - 1) % net.size)
    net.recv((net.rank - 1) % net.size, tag=9)


def wait_for_the_finished(net: Transport) -> None:
    if net.rank:
        net.recv(0)


def poll_with_time_outs(net: Transport) -> int:
    """All ranks only listen for a while, which is waiting but not hanging."""
    misses, deadline = 0, time.monotonic() + 1.0
    while time.monotonic() < deadline:
        try:
            net.recv((net.rank + 1) % net.size, timeout=0.1)
        except TransportError:
            misses += 1
    return misses


def sleep(net: Transport, seconds: float) -> None:
    time.sleep(seconds)


def unpicklable(net: Transport) -> object:
    return (lambda: 0) if net.rank == 1 else net.rank


def say(net: Transport) -> None:
    print(f"rank {net.rank} speaks")


def wait_for_ever(net: Transport) -> None:
    net.recv((net.rank + 1) % net.size)


def survivor(net: Transport) -> str:
    """Rank 1 is killed while rank 0 listens to it; rank 0 then goes on with rank 2."""
    if net.rank == 0:
        try:
            net.recv(1)
        except TransportError as error:
            return f"{error}; {net.recv(2)}"
    elif net.rank == 1:
        time.sleep(60)
    net.send(0, np.array(2.5))
    return "sent"


def big(net: Transport) -> np.ndarray:
    return np.full(3_000_000, net.rank)
