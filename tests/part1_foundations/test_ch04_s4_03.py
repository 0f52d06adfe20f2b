"""Section 4.3: data-parallel SGD against one process, its four faults, and what turns each claim red."""
from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install -e '.[sklearn]'")

from part1_foundations.ch04_communication_primitives import s4_03_mini_ddp as section  # noqa: E402
from part1_foundations.ch04_communication_primitives import s4_03_shortcut_ddp as shortcut  # noqa: E402
from shared.fleet import launch  # noqa: E402
from tests.part1_foundations import broken_ch04_s4_03 as broken  # noqa: E402

SMALL = dict(workers=2, steps=4)
TINY = dict(workers=2, steps=4, repeats=1, hidden=8)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


@pytest.mark.parametrize(("scenario", "update", "claim"), [
    ("healthy", broken.apart_by_rank, "replicas are bit-identical after every healthy step"),
    ("healthy", broken.wrong_divisor, "healthy replicas stay with the one-process run"),
    ("one rank skips a reduction", section.average, "the hash check flags the three diverging faults"),
    ("mean of means", broken.apart_by_rank, "the hash check misses the mean of means"),
    ("mean of means", section.size_weighted, "the one-process run exposes the mean of means"),
    ("unequal, weighted by size", section.average, "weighting by shard size restores agreement"),
])
def test_a_broken_update_turns_its_claim_red(monkeypatch, scenario, update, claim):
    right = section.scenarios

    def changed(steps):
        cases = right(steps)
        return cases | {scenario: replace(cases[scenario], update=update)}

    monkeypatch.setattr(section, "scenarios", changed)
    [failed] = failed_claims(section.main.run(**SMALL))
    assert failed.startswith(claim)


def test_a_hash_of_too_little_misses_a_fault(monkeypatch):
    monkeypatch.setattr(section, "train_all", broken.train_all_with_a_blunt_hash)
    [failed] = failed_claims(section.main.run(**SMALL))
    assert failed.startswith("the hash check flags the three diverging faults")


def test_a_reference_on_other_rows_agrees_with_nobody(monkeypatch):
    monkeypatch.setattr(section, "one_process", broken.one_process_on_half)
    failed = failed_claims(section.main.run(**SMALL))
    assert [text.split(",")[0] for text in failed] == [
        "healthy replicas stay with the one-process run",
        "weighting by shard size restores agreement under unequal shards"]


# --- the right ones ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [3, 5])
def test_other_world_sizes(workers):
    result = section.main.run(workers=workers, steps=3, seed=7)
    assert result.ok, failed_claims(result)
    apart = result.records["apart"]
    assert apart["healthy"] == apart["mean of means"] == [0, 0, 0]
    assert apart["one rank skips a reduction"][0] == 0 < apart["one rank skips a reduction"][1]
    assert all(0 < d < 1e-13 for d in apart["own gradient added first"])


def test_one_step_is_enough():
    assert section.main.run(workers=2, steps=1).ok


def test_it_learns_and_the_seed_decides():
    runs = [section.main.run(workers=2, steps=40, seed=seed) for seed in (1, 1, 2)]
    accuracies = [run.tables[0]["rows"][0][-1] for run in runs]
    assert float(accuracies[0]) > 0.7, "ten classes: guessing gives 0.1"
    assert runs[0].records == runs[1].records != runs[2].records


@given(workers=st.integers(2, 40), shift=st.integers(0, section.ROWS))
def test_shards_partition_the_union_batch(workers, shift):
    bounds = [section.shard(rank, workers, shift) for rank in range(workers)]
    assert bounds[0][0] == 0 and bounds[-1][1] == workers * section.ROWS
    assert all(before[1] == after[0] for before, after in zip(bounds, bounds[1:]))
    sizes = [last - first for first, last in bounds]
    assert sizes == [section.ROWS + shift] + [section.ROWS] * (workers - 2) + [section.ROWS - shift]


class Alone:
    """A world of one that pretends to be larger: an all-reduce of equal values, done by multiplication."""

    rank, size = 0, 1


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(0, 1000), seed=st.integers(0, 2**16))
def test_updates_agree_with_plain_sgd_in_a_world_of_one(rows, seed):
    weights, gradient = np.random.default_rng(seed).standard_normal((2, 5))
    expected = weights - section.RATE * gradient
    updates = [section.average, section.own_first] + [section.size_weighted] * (rows > 0)
    for update in updates:
        updated = weights.copy()
        update(Alone, updated, gradient.copy(), rows, 0)
        np.testing.assert_allclose(updated, expected, rtol=0, atol=1e-14)


def test_size_weighting_against_numpy_with_an_idle_rank():
    gradients, rows = np.random.default_rng(3).standard_normal((3, 7)), [5, 0, 11]
    gradients[1] = 0
    for weights in launch(3, broken.weighted_by_hand, gradients, rows):
        np.testing.assert_allclose(weights, -section.RATE * np.average(gradients, axis=0, weights=rows), atol=1e-15)


def test_book_figures():
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(4) for _ in range(6)]
    for total, mean in launch(6, broken.all_reduced, vectors):
        assert np.round(total, 4).tolist() == [-4.1115, -0.2046, -0.1783, 1.7551]
        assert np.round(mean, 4).tolist() == [-0.6852, -0.0341, -0.0297, 0.2925]


def test_flat_model_shares_memory_with_torch():
    import torch

    model, weights, gradient = section.flat_model(8, 0)
    assert weights.size == gradient.size == 64 * 8 + 8 + 8 * 10 + 10
    model(torch.ones(1, 64, dtype=torch.float64)).sum().backward()
    assert gradient.any()
    weights[:] = 0
    assert all(not parameter.any() for parameter in model.parameters())


def test_the_figure_takes_recorded_numbers_only():
    from matplotlib.figure import Figure

    result = section.main.run(**SMALL)
    axes = Figure().add_subplot()
    section.draw(json.loads(json.dumps(result.to_json())), axes)
    assert [line.get_label() for line in axes.get_lines()] == list(section.scenarios(1))


# --- the shortcut -----------------------------------------------------------------------------------------------------


def test_shortcut_agrees_and_is_shorter():
    result = shortcut.main.run(**TINY)
    assert result.ok, failed_claims(result)
    assert result.lines_of_code["library"] < result.lines_of_code["ours"]
    assert len(result.comparisons[0]["ours"]["samples"]) == len(result.comparisons[0]["library"]["samples"]) == 1


@pytest.mark.parametrize(("both", "claim"), [
    (broken.both_with_a_wrong_divisor, "DDP's final weights equal ours"),
    (broken.both_without_weighting, "DDP's join equals")])
def test_shortcut_disagreement_is_red(monkeypatch, both, claim):
    monkeypatch.setattr(shortcut, "both", both)
    [failed] = failed_claims(shortcut.main.run(**TINY))
    assert failed.startswith(claim)
