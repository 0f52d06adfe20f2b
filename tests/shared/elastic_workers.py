"""What the ranks of elastic_program.py run."""
from __future__ import annotations

import numpy as np

from shared.transport import Transport


def around_the_ring(net: Transport, start: float) -> list[float]:
    """[rank, world size, what the left neighbour sent, bytes sent], with a message larger than any socket buffer."""
    work = net.isend((net.rank + 1) % net.size, np.full(1_000_000, start + net.rank))
    got = net.recv((net.rank - 1) % net.size)
    work.wait()
    net.barrier()
    return [net.rank, net.size, float(got[-1]), net.stats().sent_to().bytes]


def fail_at(net: Transport, culprit: int) -> None:
    """One rank fails, the others wait for each other and for it, twice."""
    if net.rank == culprit:
        raise ValueError("no more")
    net.send((net.rank + 1) % net.size, np.zeros(2_000_000))
    net.recv((net.rank - 1) % net.size)
    net.barrier()


def not_plain(net: Transport) -> object:
    return object() if net.rank == 2 else net.rank
