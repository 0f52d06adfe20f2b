"""What the workers of test_torch_world.py run."""
from __future__ import annotations

import os
import signal

import numpy as np
import torch
import torch.distributed as dist


def nothing(rank: int, size: int) -> None:
    pass


def all_reduce(rank: int, size: int, step: float) -> tuple[int, int, np.ndarray, int, int]:
    total = torch.arange(1000, dtype=torch.float64) + step * rank
    dist.all_reduce(total)
    return rank, dist.get_world_size(), total.numpy(), torch.get_num_threads(), os.getpid()


def fail_at(rank: int, size: int, culprit: int, how: str) -> None:
    dist.barrier()
    if rank == culprit:
        if how == "raise":
            raise ValueError("no more")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(10))
