"""What the environment says about where this process runs. Light: imported at every start."""
from __future__ import annotations

import os


def world() -> tuple[int, int] | None:
    """(rank, size) when this process was started by torchrun or by hand with its variables, else None."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None
