"""Section 4.7: broadcasts, gathers and the actor-learner loop, against NumPy, gymnasium, closed forms and breakage."""
from __future__ import annotations

from functools import partial
from math import ceil, log2, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import s4_07_weights_out_experience_in as section
from part1_foundations.ch04_communication_primitives.collectives import gather
from shared.errors import UsageError
from shared.fleet import launch
from tests.part1_foundations import broken_ch04_s4_07 as broken

SMALL = dict(workers=4, mebibytes=0.001, iterations=2, episodes=2, horizon=20, repeats=1, link="none")
PACED = dict(workers=4, mebibytes=0.25, link="100mbe", iterations=1, episodes=1, horizon=5, repeats=2)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


# --- what turns each claim red: broken pieces, run by real workers ----------------------------------------------------


@pytest.mark.parametrize(("move", "variant", "claim"), [
    ("flat gather", broken.gather_in_reverse, "every broadcast and gather"),
    ("linear", broken.broadcast_that_drops_the_last_rank, "every broadcast and gather"),
    ("binomial", broken.binomial_nearest_first, "a broadcast takes K-1 rounds"),
    ("binomial", broken.binomial_of_two_copies, "its root sends K-1 copies"),
    ("flat gather", broken.gather_of_two_copies, "a gather's root receives"),
    ("two-level gather", gather, "in the two-level one"),
])
def test_a_broken_move_turns_its_claim_red(monkeypatch, move, variant, claim):
    monkeypatch.setitem(section.MOVES, move, variant)
    failed = failed_claims(section.main.run(**SMALL))
    if move == "linear":  # this one is a binomial broadcast besides, and is counted as such
        failed = [text for text in failed if not text.startswith(("a broadcast takes", "its root sends"))]
    assert len(failed) == 1 and failed[0].startswith(claim), failed


@pytest.mark.parametrize(("name", "variant", "iterations", "claim"), [
    ("broadcast_binomial", broken.broadcast_that_drops_the_last_rank, 2, "all actors hold byte-identical weights"),
    ("learn", broken.learn_backwards, 20, "the mean return of the last ten"),
])
def test_a_broken_loop_turns_its_claim_red(monkeypatch, name, variant, iterations, claim):
    monkeypatch.setattr(section, "act_and_learn", partial(broken.patched, name, variant))
    failed = failed_claims(section.main.run(**SMALL | dict(workers=2, iterations=iterations, episodes=8, horizon=100)))
    assert len(failed) == 1 and failed[0].startswith(claim), failed


@pytest.mark.timing
@pytest.mark.parametrize(("move", "variant", "claim"), [
    ("binomial", broken.binomial_dawdling, "scatter and all-gather loses"),
    ("scatter_all_gather", broken.scatter_all_gather_dawdling, "scatter and all-gather beats"),
])
def test_a_slow_broadcast_turns_its_claim_red(monkeypatch, move, variant, claim):
    monkeypatch.setitem(section.MOVES, move, variant)
    failed = failed_claims(section.main.run(**PACED))
    assert len(failed) == 1 and failed[0].startswith(claim), failed


@pytest.mark.timing
def test_smoke_holds_every_claim():
    result = section.main.run("smoke")
    assert result.ok, failed_claims(result)
    assert len(result.claims) == 8 and len(result.records["returns"]) == 3


# --- the moves --------------------------------------------------------------------------------------------------------


CASE = st.tuples(st.integers(0, 10**6), st.integers(0, 8), st.sampled_from(["i8", "f4", "u1"]),
                 st.lists(st.integers(0, 4), max_size=3).map(tuple))


@settings(max_examples=9, deadline=None)
@given(st.integers(1, 9), st.lists(CASE, min_size=3, max_size=3))
def test_two_level_gather_equals_the_list_of_inputs(workers, cases):
    ranks = launch(workers, broken.gather_cases, cases)
    for i, (seed, root, dtype, shape) in enumerate(cases):
        inputs = [broken.gather_input(seed, rank, dtype, shape) for rank in range(workers)]
        for rank in range(workers):
            got, messages, nbytes = ranks[rank][i]
            if rank != root % workers:
                assert got is None and messages <= ceil(sqrt(workers - 1)) - 1
                continue
            assert messages == ceil(sqrt(workers - 1)) and nbytes == (workers - 1) * inputs[0].nbytes
            for array, wanted in zip(got, inputs, strict=True):
                assert array.dtype == wanted.dtype and array.shape == wanted.shape and np.array_equal(array, wanted)


@pytest.mark.parametrize("workers", [2, 5, 8])
def test_rounds_and_root_traffic_follow_the_closed_forms(workers):
    size, high = 840, ceil(log2(workers))
    ranks = launch(workers, section.count, section.MOVES, size, 0)
    rounds = {name: max(rank[name]["rounds"] for rank in ranks) for name in section.BROADCAST}
    assert rounds == {"linear": workers - 1, "binomial": high, "scatter_all_gather": high + workers - 1}
    assert sum(rank["binomial"]["sent"] for rank in ranks) == workers - 1
    share = (workers - 1) / workers  # the scatter's chunks, then the root's part in the ring
    assert ranks[0]["scatter_all_gather"]["sent_bytes"] == pytest.approx(2 * share)


def test_one_rank_has_nobody_to_send_to():
    with pytest.raises(UsageError, match="--workers must be at least 2"):
        section.main.run(**SMALL | dict(workers=1))


# --- the loop ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.integers(0, 10**6), st.integers(1, 120))
def test_cart_pole_lasts_as_long_as_gymnasiums(weights, seed, horizon):
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium: pip install -e '.[gym]'")
    env, steps, weights = gymnasium.make("CartPole-v1", max_episode_steps=horizon).unwrapped, 0, np.array(weights)
    env.reset(seed=seed)
    start, failed = np.array(env.state), False
    while not failed and steps < horizon:
        _, _, failed, _, _ = env.step(int((np.array(env.state) * weights).sum() > 0))
        steps += 1
    assert section.cart_pole(weights[None], start[None], horizon).tolist() == [steps]
    assert np.array_equal(start, np.random.default_rng(seed).uniform(-0.05, 0.05, 4))


def test_learning_is_the_mean_of_perturbations_weighted_by_what_they_gained():
    experience, weights = np.array([[11, 30, 10], [12, 5, 9], [13, 7, 7]]), np.array([0.1, -0.2, 0.3, 0.0])
    gradient = np.zeros(4)
    for seed, plus, minus in experience:
        gradient += (plus - minus) * np.random.default_rng((seed, 1)).standard_normal(4) / (2 * section.NOISE * 3)
    expected = weights + section.RATE * gradient / np.std([30, 10, 5, 9, 7, 7])
    assert section.learn(weights, experience) == pytest.approx(expected, rel=1e-12)


def test_forty_iterations_learn_to_balance_and_repeat_exactly():
    [first, *_], [again, *_] = (launch(2, section.act_and_learn, 40, 8, 200, 3) for _ in range(2))
    assert first["returns"] == again["returns"] and len(set(first["digests"])) > 10
    assert np.mean(first["returns"][-10:]) > np.mean(first["returns"][:10])
    assert first["received"] == 40 * 8 * 3 * 8  # one other rank: iterations x pairs x (seed, two returns) x 8 bytes
    assert first["sent"] == 40 * (4 + 8) * 8  # weights and seeds


# --- the shortcut -----------------------------------------------------------------------------------------------------


def test_shortcut_agrees_and_disagreement_is_red(monkeypatch):
    for library, extra in (("torch", "torch"), ("gymnasium", "gym")):
        pytest.importorskip(library, reason=f"needs {library}: pip install -e '.[{extra}]'")
    from part1_foundations.ch04_communication_primitives import s4_07_shortcut_torch_broadcast_gather as shortcut

    small = dict(workers=2, iterations=1, episodes=2, horizon=30)
    good = shortcut.main.run(**small)
    assert good.ok and good.lines_of_code["library"] < good.lines_of_code["ours"] and len(good.comparisons) == 2
    for name, variant, claim in (("library_rollout", broken.gathered_in_another_order, "torch's gathered tensors"),
                                 ("library_rollout", broken.gathered_in_half_the_bytes, "the root receives as many"),
                                 ("gymnasium_play", broken.episodes_from_other_starts, "gymnasium's episodes last")):
        monkeypatch.setattr(shortcut, "both", partial(broken.both_patched, name, variant))
        failed = failed_claims(shortcut.main.run(**small))
        assert len(failed) == 1 and failed[0].startswith(claim), failed
