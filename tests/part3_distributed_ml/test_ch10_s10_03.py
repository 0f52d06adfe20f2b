"""Section 10.3: synchronous SGD against one process and torch, backup workers, and what turns each claim red."""
from __future__ import annotations

import json
from functools import partial
from math import gamma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part3_distributed_ml.ch10_distributed_optimization import optim
from part3_distributed_ml.ch10_distributed_optimization import s10_03_sync_equals_big_batch as section
from part3_distributed_ml.ch10_distributed_optimization.optim import Adam, LeastSquares, Sgd, epoch_batches
from shared.fleet import launch
from tests.part3_distributed_ml import broken_ch10_s10_03 as broken

QUICK = dict(workers=2, steps=20, fastest_ms=4.0)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


def exact_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"] and not claim["timing"]]


@pytest.mark.parametrize(("name", "average", "claim"), [
    ("SGD", broken.weighted_by_the_largest, "SGD on 2 processes traces the path of one"),
    ("momentum", broken.sums, "momentum on 2 processes traces the path of one"),
    ("Adam", optim.mean_of_means, "Adam on 2 processes traces the path of one"),
    ("SGD, mean of means", optim.size_weighted, "a short batch needs weights"),
])
def test_a_broken_average_turns_its_claim_red(monkeypatch, name, average, claim):
    monkeypatch.setitem(section.RUNS, name, (section.RUNS[name][0], average))
    [failed] = exact_claims(section.main.run(**QUICK))
    assert failed.startswith(claim)


@pytest.mark.parametrize(("worker", "variant", "claim"), [
    ("train_all", broken.train_all_with_local_adam, "Adam on 2 processes traces the path of one"),
    ("race", broken.race_that_counts_everyone, "each step uses exactly K-b gradients"),
    ("race", broken.race_on_one_gradient, "one backup leaves the final loss"),
])
def test_a_broken_worker_turns_its_claim_red(monkeypatch, worker, variant, claim):
    monkeypatch.setattr(section, worker, variant)
    [failed] = exact_claims(section.main.run(**QUICK))
    assert failed.startswith(claim)


@pytest.mark.timing
def test_waiting_for_everyone_cuts_nothing(monkeypatch):
    monkeypatch.setattr(section, "race", broken.race_that_waits_for_all)
    assert any(text.startswith("one backup shortens the mean step") for text in failed_claims(
        section.main.run(**QUICK)))


@pytest.mark.timing
def test_the_mean_is_no_order_statistic(monkeypatch):
    monkeypatch.setattr(section, "order_statistic", lambda samples, n, k: 0.6 * samples.mean())
    [failed] = failed_claims(section.main.run("smoke"))
    assert failed.startswith("a step lasts E[slowest awaited] + all-reduce")


# --- the path ---------------------------------------------------------------------------------------------------------


def test_book_figures():
    problem = LeastSquares.planted(4096, 20, 0.5, seed=7)
    batches = epoch_batches(4096, 8 * 32, 30, seed=7)
    alone = optim.sgd(problem, Sgd(0.05), np.zeros(20), batches)
    for trace in launch(8, broken.train, problem, partial(Sgd, 0.05), batches, 32, np.zeros(20)):
        assert np.abs(trace.weights - alone).max() < 1e-13
        assert (trace.steps, trace.rounds) == (30, 30) and trace.loss[-1] < trace.loss[0]
        assert trace.bytes == pytest.approx(30 * 2 * 7 / 8 * 21 * 8, rel=0.25), "a ring of 21 numbers over 8 ranks"


@pytest.mark.parametrize(("workers", "examples"), [(3, 5), (4, 1), (1, 7)])
def test_more_workers_than_rows(workers, examples):
    """Most ranks have nothing to do in some steps, and still take part."""
    problem = LeastSquares.planted(examples, 3, 0.1, seed=1)
    batches = epoch_batches(examples, workers * 2, 9, seed=1)
    alone = optim.sgd(problem, Adam(0.1), np.ones(3), batches)
    for trace in launch(workers, broken.train, problem, partial(Adam, 0.1), batches, 2, np.ones(3)):
        np.testing.assert_allclose(trace.weights, alone, rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=40)
@given(examples=st.integers(1, 50), size=st.integers(1, 60), steps=st.integers(1, 40), seed=st.integers(0, 99))
def test_every_epoch_visits_every_example_once(examples, size, steps, seed):
    batches = epoch_batches(examples, size, steps, seed)
    each = -(-examples // size)  # batches of an epoch
    assert len(batches) == steps
    for start in range(0, steps - each + 1, each):
        assert sorted(np.concatenate(batches[start:start + each])) == list(range(examples))
    if size <= examples:
        assert {len(batch) for batch in epoch_batches(examples, size, steps, seed, drop_last=True)} == {size}
    else:
        with pytest.raises(ValueError, match="fill no batch"):
            epoch_batches(examples, size, steps, seed, drop_last=True)


def test_gradient_against_finite_differences():
    problem, rows = LeastSquares.planted(30, 4, 0.3, seed=2), np.array([0, 3, 3, 29])
    weights, step = np.random.default_rng(0).standard_normal(4), 1e-6 * np.eye(4)
    slopes = [(problem.loss(weights + e, rows) - problem.loss(weights - e, rows)) / 2e-6 for e in step]
    np.testing.assert_allclose(problem.gradient(weights, rows), slopes, atol=1e-8)
    assert not problem.gradient(weights, rows[:0]).any()


# --- the clock --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(samples=st.lists(st.floats(0, 100), min_size=1, max_size=30), n=st.integers(1, 9))
def test_order_statistics_add_up(samples, n):
    samples = np.array(samples)
    expected = [section.order_statistic(samples, n, k) for k in range(1, n + 1)]
    assert np.mean(expected) == pytest.approx(samples.mean(), abs=1e-9)
    assert all(low <= high + 1e-9 for low, high in zip(expected, expected[1:]))


def test_order_statistics_of_a_pareto_law():
    """Against the closed form: E X_(n-j:n) = Gamma(n+1) Gamma(j+1-1/a) / (Gamma(n+1-1/a) j!)."""
    quantiles = (1 - (np.arange(200_000) + 0.5) / 200_000) ** (-1 / 2.5)
    for n, j in [(2, 0), (8, 0), (8, 1), (8, 3)]:
        exact = gamma(n + 1) * gamma(j + 1 - 0.4) / (gamma(n + 1 - 0.4) * gamma(j + 1))
        assert section.order_statistic(quantiles, n, n - j) == pytest.approx(exact, rel=0.01)


def test_the_fastest_count_and_all_ranks_agree():
    delays = [[0.0, 0.3, 0.02], [0.3, 0.02, 0.0], [0.02, 0.0, 0.3], [0.0, 0.0, 0.3]]
    ranks = launch(3, broken.race_to_finish, delays, 2)
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0] == [[True, False, True], [False, True, True], [True, True, False], [True, True, False]]


def test_worlds_are_powers_of_two_and_the_largest():
    assert [section.worlds(k) for k in (2, 3, 6, 8)] == [[2], [2, 3], [2, 4, 6], [2, 4, 8]]


def test_the_figure_takes_recorded_numbers_only():
    from matplotlib.figure import Figure

    result = section.main.run(workers=3, steps=20, fastest_ms=2.0, backups=9)
    assert not exact_claims(result)
    axes = Figure().add_subplot()
    section.draw(json.loads(json.dumps(result.to_json())), axes)
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [3, 3], "at most K-1 backups"


# --- against torch: s10_03_shortcut_ddp_loop --------------------------------------------------------------------------


@pytest.fixture
def shortcut():
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part3_distributed_ml.ch10_distributed_optimization import s10_03_shortcut_ddp_loop

    return s10_03_shortcut_ddp_loop


def test_shortcut_agrees_and_is_shorter(shortcut):
    result = shortcut.main.run(workers=3, steps=6, repeats=1)
    assert result.ok, failed_claims(result)
    assert result.lines_of_code["library"] < result.lines_of_code["ours"]


@pytest.mark.parametrize(("variant", "claim"), [
    (broken.both_without_our_weights, "and so do ours with"),
    (broken.both_without_scaled_losses, "DDP with")])
def test_shortcut_disagreement_is_red(monkeypatch, shortcut, variant, claim):
    monkeypatch.setattr(shortcut, "both", variant)
    failed = failed_claims(shortcut.main.run(steps=6, repeats=1))
    assert len(failed) >= 2 and all(text.startswith(claim) for text in failed)
