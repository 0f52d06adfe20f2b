"""Section 4.8: the conformance suite against plain definitions, the scratch backend, mpirun, what turns claims red."""
from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import conformance, mpi_world
from part1_foundations.ch04_communication_primitives import s4_08_backend_conformance as section
from part1_foundations.ch04_communication_primitives import s4_08_shortcut_mpi4py as shortcut
from part1_foundations.ch04_communication_primitives.conformance import Case, Outcome
from shared import torch_world
from shared.catalog import ROOT, missing
from shared.errors import MissingDependency, UsageError, WorkerFailed
from shared.fleet import launch
from tests.part1_foundations import broken_ch04_s4_08 as broken

needs_torch = pytest.mark.skipif(bool(missing(["torch"])), reason="needs torch: pip install -e '.[torch]'")
needs_mpi = pytest.mark.skipif(bool(missing(mpi_world.NEEDS)),
                               reason="needs MPI: apt-get install openmpi-bin and pip install -e '.[mpi]'")
SMALL = dict(workers=2, cases=40, mebibytes=0.01, points=2, repeats=1)
QUICK = SMALL | dict(cases=7, steps=3)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


@pytest.fixture
def without_mpi(monkeypatch):
    monkeypatch.setattr(section, "missing", lambda needs: [MissingDependency("mpirun", debian="openmpi-bin")])


# --- the demo ---------------------------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize(("adapter", "claim"), [
    (broken.LosesTheLastInteger, "all 2 backends give NumPy's integers"),
    (broken.RefusesEmpty, "all 2 backends give NumPy's integers"),
    (broken.In, "float32 results agree"),
    (broken.Float64InFloat32, "float16 and float64 results agree"),
    (broken.TruncatesAverages, "every unsupported case raises"),
])
def test_a_broken_backend_turns_its_claim_red(monkeypatch, without_mpi, adapter, claim):
    monkeypatch.setattr(section, "ADAPTERS", {"ours": adapter, "gloo": conformance.Torch})
    monkeypatch.setattr(section, "train_ddp", broken.no_training)
    [failed] = failed_claims(section.main.run(**SMALL))
    assert failed.startswith(claim)


@needs_torch
@pytest.mark.parametrize(("training", "claim"), [
    (broken.train_with_max, "DDP on scratch ends with the weights of DDP on gloo"),
    (broken.train_on_gloo_only, "those gradients travelled on our ring"),
])
def test_a_broken_training_turns_its_claim_red(monkeypatch, without_mpi, training, claim):
    monkeypatch.setattr(section, "train_ddp", training)
    [failed] = failed_claims(section.main.run(**QUICK))
    assert failed.startswith(claim)


@needs_torch
def test_absent_mpi_is_named_and_the_rest_runs(monkeypatch, without_mpi):
    monkeypatch.setattr(section, "train_ddp", broken.no_training)
    result = section.main.run(**QUICK | {"workers": 3})
    states = dict(result.tables[0]["rows"])
    assert result.ok and states["mpi"] == "not installed: apt-get install openmpi-bin and pip install -e '.[mpi]'"
    assert result.tables[1]["columns"] == ["collective", "ours", "scratch", "gloo"]
    assert states["nccl"] == "runs" or states["nccl"].startswith("needs a GPU for each of 3 ranks, found ")


# --- the suite itself -------------------------------------------------------------------------------------------------


def by_definition(case: Case, inputs: list[np.ndarray], member: int):
    """Element by element, as the MPI standard words it."""
    k, n = len(inputs), case.size
    reduce = {"sum": sum, "max": max, "avg": lambda values: sum(values) / k}.get(case.op)
    match case.collective:
        case "all_reduce":
            return [reduce([float(x[j]) for x in inputs]) for j in range(n)]
        case "reduce_scatter":
            return [reduce([float(x[member, j]) for x in inputs]) for j in range(n)]
        case "all_gather" | "gather":
            gathered = [[float(x[j]) for j in range(n)] for x in inputs]
            return gathered if case.collective == "all_gather" or member == k - 1 else None
        case "all_to_all":
            return [[float(x[member, j]) for j in range(n)] for x in inputs]
        case "broadcast":
            return [float(value) for value in inputs[k - 1]]
        case "scatter":
            return [float(value) for value in inputs[k - 1][member]]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(conformance.all_cases(5)), st.integers(0, 2**32), st.data())
def test_answers_are_the_definitions(case, seed, data):
    if case.size > 100:
        return
    member = data.draw(st.integers(0, len(case.group) - 1))
    inputs = [conformance.make(case, (seed,), peer) for peer in range(len(case.group))]
    answer, expected = conformance.answer(case, inputs, member), by_definition(case, inputs, member)
    assert (answer is None) == (expected is None)
    if answer is not None:
        assert answer.shape[-1:] == (case.size,) and np.allclose(answer, np.reshape(expected, answer.shape), rtol=1e-12)
        if case.op != "avg" or case.dtype != "int64":
            right = answer.astype(case.dtype)
            assert conformance.deviation(case, right, inputs, member) <= conformance.tolerance(case)
            assert conformance.deviation(case, right[..., None], inputs, member) == np.inf
            assert conformance.deviation(case, None, inputs, member) == np.inf
            if case.size:
                assert conformance.deviation(case, right + 1, inputs, member) > conformance.tolerance(case)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_chosen_cases_cover_all_pairs(workers):
    every = conformance.all_cases(workers)
    pairs = set().union(*(set(itertools.combinations(enumerate(case), 2)) for case in every))
    chosen = conformance.choose_cases(workers, 120, seed=1)
    assert len(set(chosen)) == 120 and set(chosen) <= set(every)
    assert pairs == set().union(*(set(itertools.combinations(enumerate(case), 2)) for case in chosen))
    assert conformance.choose_cases(workers, 120, seed=1) == chosen
    few = conformance.choose_cases(workers, 40, seed=1)
    assert {case.collective for case in few} == set(conformance.COLLECTIVES) and len(set(few)) == 40
    assert set(conformance.choose_cases(workers, 10_000, seed=1)) == set(every)


def test_one_verdict_from_all_ranks():
    equal, raised = Outcome("equal", 0.0, 2.0, "", ""), Outcome("raised", np.inf, np.nan, "no", "ValueError: no")
    assert conformance.worst([None, equal, equal]).status == "equal"
    assert conformance.worst([raised, None, raised]).status == "raised"
    assert conformance.worst([equal, raised]).status == "differs"
    assert conformance.worst([equal, Outcome("differs", 1.0, 1.0, "", "")]).status == "differs"


def test_our_own_library_on_three_ranks_without_torch():
    cases = conformance.choose_cases(3, 100, seed=3)
    by_rank = launch(3, _suite_of_ours, cases)
    for case, outcomes in zip(cases, zip(*by_rank)):
        verdict = conformance.worst(outcomes)
        assert verdict.status == ("raised" if verdict.lacks else "equal"), (case, verdict)


def _suite_of_ours(net, cases):
    return conformance.run_suite(net, conformance.Ours(net, sorted({case.group for case in cases})), cases, 0)


# --- the scratch backend ----------------------------------------------------------------------------------------------


@needs_torch
def test_book_figures():
    for found in torch_world.launch(3, broken.book_sum, wire="unix"):
        for total, mean in found:
            assert total == [5, 3, 5]
            assert [round(value, 4) for value in mean] == [1.6667, 1.0, 1.6667]


@needs_torch
def test_scratch_backend_beyond_the_suite():
    ranks = torch_world.launch(3, broken.scratch_corners, wire="unix")
    assert ranks[2]["message"] == [[7] * 3] * 2 and ranks[0]["message"] == [[0] * 3] * 2
    for rank in ranks:
        assert rank["backend"] == "scratch"
        assert rank["completed"] == (True, [[3.0, 3.0, 3.0]])
        assert rank["squares"] == [0.0, 1.0, 2.0]
        assert rank["reduce"].startswith("RuntimeError")  # no method of that name: torch looks for another backend
        assert rank["premultiplied"] == "ValueError: scratch cannot reduce torch.float32 by this operation"
        assert "contiguous" in rank["strided"] and "BFloat16" in rank["bfloat16"]


@needs_torch
def test_ddp_on_scratch_is_told_of_a_lost_peer():
    told, left = torch_world.launch(2, broken.ddp_loses_a_peer, wire="unix")
    assert left == "left" and told.startswith("step 2: ") and "PeerLost" in told


@needs_torch
def test_a_killed_peer_is_named_not_those_who_lost_it():
    with pytest.raises(WorkerFailed, match="worker 1 was killed by SIGKILL"):
        torch_world.launch(2, broken.killed_in_a_collective, wire="unix")


# --- mpirun and the shortcut ------------------------------------------------------------------------------------------


@needs_mpi
@needs_torch
def test_shortcut_s4_08_shortcut_mpi4py_in_smoke():
    result = shortcut.main.run(**SMALL)
    assert result.ok and result.lines_of_code["library"] < 25 < result.lines_of_code["ours"]
    assert result.tables[-1]["columns"] == ["from each rank", *conformance.COLLECTIVES]
    assert len(result.comparisons) == 2


@needs_mpi
@needs_torch
@pytest.mark.parametrize(("name", "variant", "claim"), [
    ("under_mpirun", broken.mpirun_with_a_wrong_root, "mpi4py passes every case"),
    ("under_mpirun", broken.mpirun_with_an_average, "mpi4py raises on every case that it lacks"),
    ("under_mpirun", broken.mpirun_with_a_maximum, "mpi4py's seven results equal ours"),
    ("through_words", broken.words_with_a_gather_in_the_wrong_order, "torch's seven results equal ours"),
])
def test_a_broken_side_of_the_shortcut_turns_its_claim_red(monkeypatch, name, variant, claim):
    monkeypatch.setattr(shortcut, name, variant)
    [failed] = failed_claims(shortcut.main.run(**SMALL))
    assert failed.startswith(claim)


@needs_mpi
def test_mpi_on_three_ranks_with_a_transport_beside_it():
    assert mpi_world.launch(3, broken.ring_under_mpirun, 300_000) == [(3, 6 * 299_999, 4)] * 3


@needs_mpi
@pytest.mark.parametrize(("how", "says"), [
    ("raises", "worker 1 raised ValueError: out of cheese"), ("dies", "exited on signal 9")])
def test_a_failed_rank_ends_the_run(how, says):
    begin = time.monotonic()
    with pytest.raises(WorkerFailed, match=says) as caught:
        mpi_world.launch(2, broken.fails, how)
    assert ("out of cheese" in caught.value.worker_traceback) == (how == "raises")
    assert time.monotonic() - begin < 10


@needs_mpi
def test_a_time_out_and_bad_counts():
    with pytest.raises(WorkerFailed, match="still running after 0.5 s"):
        mpi_world.launch(1, broken.fails, "sleeps", timeout=0.5)
    with pytest.raises(UsageError):
        mpi_world.launch(0, broken.fails, "sleeps")


def test_without_mpirun_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(mpi_world, "missing", lambda needs: [MissingDependency("mpirun", debian="openmpi-bin")])
    with pytest.raises(MissingDependency, match="apt-get install openmpi-bin"):
        mpi_world.launch(2, broken.fails, "sleeps")


@needs_mpi
@pytest.mark.skipif(not mpi_world.DIE_WITH_US, reason="needs setpriv: apt-get install util-linux")
def test_mpirun_dies_with_a_killed_parent(tmp_path):
    code = ("from part1_foundations.ch04_communication_primitives import mpi_world\n"
            "from tests.part1_foundations import broken_ch04_s4_08 as broken\n"
            f"mpi_world.FOLDERS = {str(tmp_path)!r}\n"
            "mpi_world.launch(3, broken.fails, 'sleeps')")
    parent = psutil.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.rglob("*.sock"))) < 3 and time.monotonic() < deadline:  # the ranks are past MPI_Init
            time.sleep(0.01)
        started = parent.children(recursive=True)
        assert len(started) >= 4
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(started, timeout=3)
    assert not alive
    assert not list(tmp_path.rglob("*")), "its files are left"
