"""Section 4.5: the halves of all-reduce, the sharded trainer against one process and torch, what turns claims red."""
from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import s4_05_mini_zero as section
from part1_foundations.ch04_communication_primitives.zero import Mlp, Zero, resident
from shared.fleet import launch
from tests.part1_foundations import broken_ch04_s4_05 as broken

SMALL = dict(workers=3, parameters=3_000, steps=3, rows=4)  # three ranks: with two, the order of a sum cannot matter


class Alone:
    rank, size = 0, 1


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


@pytest.mark.parametrize(("name", "variant", "claim"), [
    ("split_all_reduce", broken.split_with_a_reduction_in_another_order, "reduce-scatter then all-gather, ring or"),
    ("split_all_reduce", broken.split_with_a_short_all_gather, "reduce-scatter then all-gather, ring or"),
    ("train_both", broken.train_with_shards_that_are_views, "Adam's state in float32 is"),
    ("train_both", broken.train_with_all_reduced_gradients, "stages 0 to 2 move the bytes of a gradient all-reduce"),
    ("train_both", broken.train_with_sums, "the loss curves of the stages and of one process agree"),
    ("train_both", broken.train_on_stale_weights, "the loss curves of the stages and of one process agree"),
])
def test_a_broken_variant_turns_its_claim_red(monkeypatch, name, variant, claim):
    monkeypatch.setattr(section, name, variant)
    [failed] = failed_claims(section.main.run(**SMALL))
    assert failed.startswith(claim)


# --- the right ones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 5])
def test_other_world_sizes(size):
    result = section.main.run(**(SMALL | dict(workers=size, layers=1, seed=5)))
    assert result.ok, failed_claims(result)
    losses = result.records["losses"]
    assert losses["0"] == losses["1"] == losses["2"] == losses["3"], "the stages do the same sums in the same order"
    assert result.records["sent"][3] * 2 == result.records["sent"][0] * 3


def test_book_figures():
    values = np.random.default_rng(0).standard_normal((4, 12))
    for rank, (mine, difference) in enumerate(launch(4, broken.split, values)):
        assert mine.shape == (3,) and not difference.any()
        np.testing.assert_allclose(mine, values.sum(axis=0)[3 * rank:3 * rank + 3], rtol=0, atol=1e-15)


def adam_by_hand(weights, gradients, rate=1e-3, b1=0.9, b2=0.999, eps=1e-8):
    """Algorithm 1 of Kingma & Ba, as printed."""
    m, v, theta = 0.0, 0.0, weights
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        theta = theta - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return theta


@settings(deadline=None, max_examples=30)
@given(shape=st.tuples(st.integers(0, 5), st.integers(1, 5)), steps=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_adam_is_the_papers(shape, steps, seed):
    rng = np.random.default_rng(seed)
    weights, gradients = rng.standard_normal(shape), rng.standard_normal((steps, *shape))
    state = Zero(Alone, [weights], stage=0)
    for gradient in gradients:
        state.reduce(0, state.gradients[0])
        state.gradients[0][:] = gradient
        state.step()
    np.testing.assert_allclose(state.gathered(0), adam_by_hand(weights, gradients), rtol=0, atol=1e-13)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_backward_against_finite_differences(layers):
    width, x, y = 5, *np.random.default_rng(1).standard_normal((2, 3, 5))
    weights = list(section.initial_weights(layers, width, "float64", 0))

    def loss(i, row, column, change):
        moved = [w.copy() for w in weights]
        moved[i][row, column] += change
        return Mlp(Zero(Alone, moved, stage=0)).loss_and_gradients(x, y)

    state = Zero(Alone, weights, stage=0)
    Mlp(state).loss_and_gradients(x, y)
    for i, row, column in [(0, 0, 0), (layers // 2, 2, 3), (layers - 1, 4, 1)]:
        slope = (loss(i, row, column, 1e-6) - loss(i, row, column, -1e-6)) / 2e-6
        assert state.gradients[i][row, column] == pytest.approx(slope, abs=1e-8)


def test_layers_that_do_not_divide_evenly():
    by_stage = [launch(4, broken.train_ragged, stage) for stage in range(4)]
    for ranks in by_stage:
        for layers, _ in ranks:
            for layer, reference in zip(layers, by_stage[0][0][0]):
                np.testing.assert_array_equal(layer, reference)
    total = 8 * (35 + 2 + 9)  # bytes of one set of values
    assert [sum(nbytes for _, nbytes in ranks) for ranks in by_stage] == [16 * total, 10 * total, 7 * total, 4 * total]


def test_resident_counts_what_is_kept_alive():
    whole = np.zeros(100)
    assert resident([]) == 0
    assert resident([whole[:1], whole[5:7].reshape(2, 1)]) == 800, "two views of one array keep it alive, once"
    assert resident([whole[:1].copy(), np.zeros(2)]) == 24


def test_unknown_stage():
    with pytest.raises(ValueError, match="stages 0 to 3"):
        Zero(Alone, [], stage=4)


def test_it_learns():
    losses = section.main.run(**(SMALL | dict(parameters=1_000, steps=60))).records["losses"]
    assert all(np.mean(curve[-10:]) < 0.8 * np.mean(curve[:10]) for curve in losses.values())


def test_the_seed_decides():
    runs = [section.main.run(**(SMALL | dict(seed=seed))).records["losses"] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_figure_takes_recorded_numbers_only():
    from matplotlib.figure import Figure

    result = section.main.run(**SMALL)
    axes = Figure().add_subplot()
    section.draw(json.loads(json.dumps(result.to_json())), axes)
    assert [text.get_text().split(":")[0] for text in axes.texts] == [f"stage {i}" for i in range(4)]


# --- against torch ----------------------------------------------------------------------------------------------------

TINY = dict(workers=2, parameters=1_000, steps=2, repeats=1, rows=4)


@pytest.fixture
def shortcut():
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part1_foundations.ch04_communication_primitives import s4_05_shortcut_fsdp2

    return s4_05_shortcut_fsdp2


def test_shortcut_agrees_and_is_shorter(shortcut):
    result = shortcut.main.run(**TINY)
    assert result.ok, failed_claims(result)
    assert result.lines_of_code["library"] < result.lines_of_code["ours"]
    assert len(result.comparisons) == 2 and len(result.records["losses"]["library"]) == 4


@pytest.mark.parametrize(("both", "claim"), [
    (broken.both_with_sums, "the loss curves of 4 steps agree"),
    (broken.both_with_replicas, "every rank of fully_shard holds"),
    (broken.both_with_a_short_all_gather, "torch's reduce-scatter and all-gather equal ours")])
def test_shortcut_disagreement_is_red(monkeypatch, shortcut, both, claim):
    monkeypatch.setattr(shortcut, "both", both)
    [failed] = failed_claims(shortcut.main.run(**TINY))
    assert failed.startswith(claim)
