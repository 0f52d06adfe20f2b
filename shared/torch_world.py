"""The same fleet as a torch.distributed world: `launch(K, fn)` runs `fn(rank, size)` in an initialised process group.

Backend gloo on CPUs and nccl on GPUs. Under torchrun the processes and the group come from its environment.
With `wire=` the same processes also hold a Transport, so that a library and our own code can be timed in turns.
"""
from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from shared import fleet
from shared.elastic import decode, encode
from shared.environment import world
from shared.errors import PeerLost, UsageError
from shared.transport import Fabric, Link


def launch(workers: int, fn: Callable, *args: Any, backend: str = "gloo", timeout: float = 120.0,
           wire: str | None = None, fabric: Fabric | Link | None = None) -> list[Any]:
    """Run `fn(rank, size, *args)` in `workers` processes with a default process group; results by rank.

    With `wire` ("unix", "tcp" or "shm", paced by `fabric`) it runs `fn(net, *args)` instead: `net` is a Transport with
    the same rank and size. timeout: seconds for the run and for each collective. Raises as `shared.fleet.launch` does.
    """
    if world():
        if wire:
            raise UsageError("this comparison starts its own processes: run it without torchrun")
        return _launch_external(workers, fn, args, backend, timeout)
    fleet.preload("torch")
    with socket.create_server(("127.0.0.1", 0), backlog=workers) as listener:
        with fleet.Fleet(workers, _member, listener, listener.getsockname()[1], backend, timeout, fn, args, bool(wire),
                         wire=wire or "none", fabric=fabric, timeout=timeout) as members:
            return members.results()


def _member(net, listener: socket.socket, port: int, backend: str, timeout: float, fn: Callable, args: tuple,
            with_net: bool) -> Any:
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    limit = timedelta(seconds=timeout)
    listening = {}
    if net.rank == 0:
        listening = dict(is_master=True, master_listen_fd=listener.detach(), wait_for_workers=False)
    if net.rank:
        listener.close()
    store = dist.TCPStore("127.0.0.1", port, net.size, timeout=limit, **listening)
    dist.init_process_group(backend, store=store, rank=net.rank, world_size=net.size, timeout=limit)
    try:
        return fn(net, *args) if with_net else fn(net.rank, net.size, *args)
    except RuntimeError as error:
        if "gloo/transport" in str(error) or "PeerLost" in str(error):  # the consequence of another rank's end
            raise PeerLost(f"rank {net.rank} lost a peer: {str(error).splitlines()[0]}") from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _destroy_process_group() -> None:
    """Gloo's threads must end before the interpreter does: else it aborts now and then."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _launch_external(workers: int, fn: Callable, args: tuple, backend: str, timeout: float) -> list[Any]:
    import torch
    import torch.distributed as dist

    rank, size = world()
    if workers != size:
        raise UsageError(f"torchrun started {size} processes but {workers} workers are needed")
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        atexit.register(_destroy_process_group)
    mine = torch.from_numpy(np.frombuffer(encode(fn(rank, size, *args)), np.uint8).copy())
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(sizes, torch.tensor([mine.numel()]))
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[:mine.numel()] = mine
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded)
    return [decode(raw[:int(n)].numpy().tobytes()) for raw, n in zip(gathered, sizes)]
