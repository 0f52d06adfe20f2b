"""shared.torch_world: a process group on the fleet, and failures that name their cause."""
from __future__ import annotations

import os
import time

import numpy as np
import pytest

pytest.importorskip("torch")

from shared import torch_world  # noqa: E402
from shared.errors import UsageError, WorkerFailed  # noqa: E402
from tests.shared import torch_workers as workers  # noqa: E402


@pytest.mark.parametrize("size", [1, 3])
def test_results_by_rank_and_a_right_all_reduce(size):
    results = torch_world.launch(size, workers.all_reduce, 2.5)
    assert [(rank, world) for rank, world, _, _, _ in results] == [(rank, size) for rank in range(size)]
    for _, _, total, threads, pid in results:
        np.testing.assert_array_equal(total, np.arange(1000) * size + 2.5 * sum(range(size)))
        assert threads == 1 and pid != os.getpid()


@pytest.mark.timing
@pytest.mark.parametrize(("how", "message"), [
    ("raise", "raised ValueError: no more"), ("kill", "was killed by SIGKILL")])
def test_a_rank_that_fails_ends_the_run_and_is_the_one_named(how, message):
    torch_world.launch(3, workers.nothing)
    began = time.monotonic()
    with pytest.raises(WorkerFailed) as failure:
        torch_world.launch(3, workers.fail_at, 1, how)
    assert time.monotonic() - began < 2
    assert str(failure.value) == f"worker 1 {message}"
    assert ("in fail_at" in failure.value.worker_traceback) == (how == "raise")


def test_a_senseless_number_of_workers_is_refused():
    with pytest.raises(UsageError, match="at least 1"):
        torch_world.launch(0, workers.nothing)
