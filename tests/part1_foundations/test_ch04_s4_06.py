"""Section 4.6: the expert layer, its audit and its counts, against plain loops, the book and the library."""
from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import s4_06_moe_dispatch as section
from shared.fleet import launch
from tests.part1_foundations import broken_ch04_s4_06 as broken_pieces
from tests.part1_foundations.broken_ch04_s4_06 import book_device, both_patched, layers, patched, ragged_choices

SMALL = dict(workers=4, tokens=64, width=8, pace=1.0, repeats=1, link="none")
STRAYED, PAIRS, TRANSPOSED = "every kept token returns", "bytes between any two ranks", "receive counts are"
TIME, BOUND, DROPS = "the time ratio of two skews", "capacity c bounds", "a capacity drops exactly"


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


# --- what turns each claim red: broken pieces, run by real workers ----------------------------------------------------


@pytest.mark.parametrize(("name", "broken", "claim"), [
    ("combine", broken_pieces.combine_that_leaves_the_rows_sorted, STRAYED),
    ("combine", broken_pieces.combine_that_loses_a_rank, STRAYED),
    ("dispatch", broken_pieces.dispatch_padded_to_the_longest, PAIRS),
    ("moe_layer", broken_pieces.layer_with_stale_send_counts, TRANSPOSED),
    ("assign", broken_pieces.assign_with_a_jumped_queue, BOUND),
    ("assign", broken_pieces.assign_one_short, DROPS),
])
def test_a_broken_piece_turns_its_claim_red(monkeypatch, name, broken, claim):
    monkeypatch.setattr(section, "route_and_return", partial(patched, name, broken))
    failed = [text for text in failed_claims(section.main.run(**SMALL)) if not text.startswith(TIME)]
    assert len(failed) == 1 and failed[0].startswith(claim), failed


def test_no_capacity_at_all_turns_both_capacity_claims_red(monkeypatch):
    monkeypatch.setattr(section, "route_and_return", partial(patched, "assign", broken_pieces.assign_beyond_capacity))
    failed = [text for text in failed_claims(section.main.run(**SMALL)) if not text.startswith(TIME)]
    assert [text.startswith(start) for text, start in zip(failed, (BOUND, DROPS), strict=True)] == [True, True]


@pytest.mark.timing
def test_experts_that_take_the_same_time_turn_the_timing_claim_red(monkeypatch):
    monkeypatch.setattr(section, "route_and_return", partial(patched, "paced", broken_pieces.pace_of_the_mean))
    failed = failed_claims(section.main.run(**SMALL))
    assert len(failed) == 1 and failed[0].startswith(TIME)


@pytest.mark.timing
def test_smoke_holds_every_claim():
    result = section.main.run("smoke")
    assert result.ok, failed_claims(result)
    assert [row[3] for row in result.tables[0]["rows"]][4:] == [256, 256, 320, 320]  # the capacities, filled by skew 1


@pytest.mark.parametrize(("workers", "tokens"), [(1, 5), (3, 1), (5, 7)])
def test_odd_worlds_and_fewer_tokens_than_experts(workers, tokens):
    result = section.main.run(**SMALL | dict(workers=workers, tokens=tokens))
    assert [text for text in failed_claims(result) if not text.startswith(TIME)] == []


# --- the layer against plain loops ------------------------------------------------------------------------------------


def serve_in_order(choices, experts, capacity):
    """choices[rank][row][round] -> routed[rank][row], by the definition: rounds, then ranks, then rows."""
    routed = [[-1] * len(rows) for rows in choices]
    for turn in range(2):
        for rank, rows in enumerate(choices):
            for row, wanted in enumerate(rows):
                load = sum(taken.count(wanted[turn]) for taken in routed)
                if routed[rank][row] < 0 and load < capacity:
                    routed[rank][row] = int(wanted[turn])
    return routed


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 10**6), min_size=4, max_size=4))
def test_layer_equals_a_loop_over_all_tokens(experts, seeds):
    ranks = launch(experts, layers, seeds)
    for i, seed in enumerate(seeds):
        choices = [ragged_choices(seed, rank, experts) for rank in range(experts)]
        expected = serve_in_order([rows.tolist() for rows in choices], experts, seed % 7)
        assert [rank[i][0] for rank in ranks] == expected
        everyone = np.concatenate(choices)
        assert section.overflow(everyone, experts, seed % 7) == sum(row.count(-1) for row in expected)
        for rank, row in zip(ranks, expected):
            routed, y, x, plan = rank[i]
            assert np.array_equal(y[:, 0], [0 if e < 0 else v + 1000 * (1 + e) for v, e in zip(x[:, 0], row)])
            assert plan.sent.tolist() == [row.count(e) for e in range(experts)]
        sent, received = (np.array([getattr(rank[i][3], side) for rank in ranks]) for side in ("sent", "received"))
        assert np.array_equal(received, sent.T)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 20))
def test_overflow_of_one_choice_is_what_exceeds_the_limit(choices, limit):
    loads = np.bincount(choices, minlength=6)
    assert section.overflow(np.array(choices)[:, None], 6, limit) == np.maximum(loads - limit, 0).sum()


# --- the book's figures -----------------------------------------------------------------------------------------------


def test_book_loads_of_eight_experts():
    loads, returned = zip(*launch(8, book_device))
    assert list(loads) == [1247, 908, 650, 445, 348, 240, 144, 114] and all(returned)
    assert (round(max(loads) / np.mean(loads), 2), round(min(loads) / np.mean(loads), 2)) == (2.44, 0.22)


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_traffic_counts_the_ring_and_every_token_that_leaves(workers):
    tokens, width = 24, 4
    sent = np.array(launch(workers, section.traffic, tokens, width, 0))
    choices = [section.make_choices(section.SKEWS[0], rank, workers, tokens, 0)[:, 0] for rank in range(workers)]
    leaving = np.array([np.bincount(choice, minlength=workers) for choice in choices])
    np.fill_diagonal(leaving, 0)
    assert np.array_equal(sent[:, 0], 16 * (leaving + leaving.T))
    around = np.roll(np.eye(workers, dtype=int), 1, axis=1) * 2 * 4 * tokens * width * (workers - 1) // workers
    assert np.array_equal(sent[:, 1], around)


# --- the shortcut -----------------------------------------------------------------------------------------------------


def test_shortcut_agrees_and_disagreement_is_red(monkeypatch):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part1_foundations.ch04_communication_primitives import s4_06_shortcut_all_to_all_single as shortcut

    small = dict(workers=3, tokens=128, repeats=1)
    good = shortcut.main.run(**small)
    assert good.ok and good.lines_of_code["library"] < good.lines_of_code["ours"]
    assert [row[0] for row in good.tables[0]["rows"]] == [2, 16, 128]
    for broken, claim in ((broken_pieces.outputs_off_by_one_row, "torch's combined outputs"),
                          (broken_pieces.counts_not_exchanged, "torch's receive counts")):
        monkeypatch.setattr(shortcut, "both", partial(both_patched, "library_layer", broken))
        failed = failed_claims(shortcut.main.run(**small))
        assert len(failed) == 1 and failed[0].startswith(claim)
