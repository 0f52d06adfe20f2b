"""One process of a world that torchrun, or a person, has started: run by test_elastic.py, one JSON line a rank."""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from shared import fleet
from shared.errors import ReaderError, WorkerFailed
from shared.transport import Link
from tests.shared import elastic_workers as workers


def said(call, *args, **options) -> list[str]:
    try:
        return ["no error", repr(call(*args, **options))]
    except WorkerFailed as error:
        return [type(error).__name__, str(error), error.worker_traceback]
    except ReaderError as error:
        return [type(error).__name__, str(error)]


def main(folder: str, *options: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    heard = {
        "part": fleet.launch(size - 1, workers.around_the_ring, 10.0),
        "whole": fleet.launch(size, workers.around_the_ring, 20.0),
        "too many": said(fleet.launch, size + 1, workers.around_the_ring, 0.0),
        "paced": said(fleet.launch, size, workers.around_the_ring, 0.0, fabric=Link(0.1, 1e6)),
        "one fails": said(fleet.launch, size, workers.fail_at, 1),
        "not plain": said(fleet.launch, size, workers.not_plain),
        "again": fleet.launch(size, workers.around_the_ring, 30.0),
    }
    if "torch" in options:
        from shared import torch_world
        from tests.shared import torch_workers

        results = torch_world.launch(size, torch_workers.all_reduce, 2.5)
        heard["torch"] = [[rank, size, float(total[-1])] for rank, size, total, _, _ in results]
        heard["torch too many"] = said(torch_world.launch, size + 1, torch_workers.nothing)
    Path(folder, f"{rank}.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main(*sys.argv[1:])
