"""Section 4.1: gamma, its prediction from two workers, and what turns each claim red."""
from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import s4_01_comm_compute_ratio as section
from shared.fleet import launch, preload
from shared.measure import AlphaBeta
from tests.part1_foundations import broken_ch04_s4_01 as broken

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


@pytest.mark.timing
@pytest.mark.parametrize(("piece", "variant", "start", "claim"), [
    ("train", broken.train_with_stragglers, 0.7, "gamma is within 30 % of the prediction"),
    ("local_batches", broken.everything_is_weak, 0.5, "under strong scaling gamma grows"),
    ("local_batches", broken.everything_is_strong, 0.5, "under weak scaling gamma changes"),
    ("train", broken.train_at_one_price, 0.5, "quadrupling the parameters"),
])
def test_a_broken_piece_turns_its_claim_red(monkeypatch, piece, variant, start, claim):
    monkeypatch.setattr(section, piece, variant)
    result = section.main.run("smoke", start=start)
    assert [text.startswith(claim) for text in failed_claims(result)] == [True], result.claims


@pytest.mark.timing
def test_smoke_measures_what_it_declares():
    result = section.main.run("smoke")
    assert result.ok
    strong, weak = (result.records["curves"][name] for name in ("strong", "weak"))
    assert strong["workers"] == weak["workers"] == [2, 4]
    assert strong["gamma"][0] == pytest.approx(0.5, rel=0.2)  # the batch was chosen for it
    assert strong["gamma"][1] / strong["gamma"][0] == pytest.approx(3, rel=0.25)
    assert weak["gamma"][1] / weak["gamma"][0] == pytest.approx(1.5, rel=0.25)


@pytest.mark.parametrize("wrong", [dict(workers=3), dict(link="none"), dict(link="string and tins"), dict(start=-1.0)])
def test_bad_parameters_are_usage_errors(wrong):
    with pytest.raises(section.UsageError):
        section.main.run("smoke", **wrong)


def test_a_step_of_two_workers_is_a_step_on_the_union_of_their_batches():
    preload("torch")
    first, second = launch(2, broken.weights_after, 3, 16)
    np.testing.assert_array_equal(first, second)
    torch.manual_seed(0)
    model = section.mlp(3000)
    (x0, y0), (x1, y1) = section.examples(16, 0), section.examples(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.cat([x0, x1])), torch.cat([y0, y1])).backward()
        optimizer.step()
    reference = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    np.testing.assert_allclose(first, reference, atol=1e-7)


@pytest.mark.parametrize("parameters", [1, 100, 5000, 100_000, 1_000_000])
def test_the_mlp_has_about_the_weights_asked_for(parameters):
    count = sum(weight.numel() for weight in section.mlp(parameters).parameters())
    assert count == pytest.approx(parameters, rel=0.05, abs=100)


@given(st.integers(2, 64), st.integers(10, 10**7), st.integers(1, 10**4), st.floats(1e8, 1e13), st.floats(1e-11, 1e-6))
def test_without_latency_parameters_cancel_out_of_gamma(workers, weights, batch, flops, beta):
    fit = section.Fit(flops, AlphaBeta(0.0, beta, 1.0))
    gamma = fit.gamma(workers, weights, batch)
    assert gamma == pytest.approx(2 * (workers - 1) / workers * 4 * beta * flops / (6 * batch))
    assert gamma == pytest.approx(fit.gamma(workers, 4 * weights, batch))
    assert gamma == pytest.approx(2 * fit.gamma(workers, weights, 2 * batch))
    assert fit.latency_share(weights) == 0


def test_the_fit_recovers_planted_rates():
    flops, alpha, beta = 2e9, 1e-3, 1 / 50e6
    steps = [section.Step(2, p, 10, 20 * p / flops, 40 * p / flops, 2 * (alpha + beta * 2 * p), 0.1)
             for p in (10**5, 4 * 10**5, 16 * 10**5)]
    fit = section.fit_at_two(steps[0], steps[1:])
    assert (fit.flops, fit.link.alpha, fit.link.beta) == pytest.approx((flops, alpha, beta))
    assert all(fit.gamma(2, step.weights, step.batch) == pytest.approx(step.gamma) for step in steps)
    assert fit.latency_share(10**5) == pytest.approx(1 / 5)


def test_break_even():
    assert section.break_even([2, 4, 8], [0.5, 1.5, 3.5]) == 3
    assert math.isnan(section.break_even([2, 4, 8], [0.5, 0.7, 0.9]))
    assert math.isnan(section.break_even([2, 4, 8], [1.1, 1.5, 2.0]))
    assert math.isnan(section.break_even([2, 4, 8], [0.5, 0.4, 2.0]))


def test_batches():
    assert section.local_batches(64, 2) == {"strong": 32, "weak": 32}
    assert section.local_batches(64, 8) == {"strong": 8, "weak": 32}


def test_the_slowest_rank_decides_every_part():
    a = section.Step(2, 10, 1, 1.0, 5.0, 2.0, 0.1)
    b = section.Step(2, 10, 1, 3.0, 4.0, 1.0, 0.2)
    assert section.slowest_rank([a, b]) == section.Step(2, 10, 1, 3.0, 5.0, 2.0, 0.2)


# --- the shortcut ----------------------------------------------------------------------------------------------------


@pytest.mark.timing
@pytest.mark.parametrize(("variant", "claim"), [
    (None, None), (broken.both_small_upside_down, "small batch (1)"),
    (broken.both_large_upside_down, "large batch (2000)"),
    (broken.both_with_a_skipped_all_reduce, "after the same steps")])
def test_shortcut_disagreement_is_red(monkeypatch, variant, claim):
    from part1_foundations.ch04_communication_primitives import s4_01_shortcut_profiler_gamma as shortcut

    if variant:
        monkeypatch.setattr(shortcut, "both", variant)
    result = shortcut.main.run("smoke", large=2000, repeats=2)
    assert [text.startswith(claim) for text in failed_claims(result)] == [True] * bool(claim)
    assert result.lines_of_code["library"] < result.lines_of_code["ours"]
    assert result.records["gamma"]["ours"][0] > 1 > result.records["gamma"]["ours"][1]
