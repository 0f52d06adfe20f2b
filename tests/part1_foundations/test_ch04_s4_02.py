"""Section 4.2: tiers, hops, the deadlock and its watchdog, groups; and what turns each claim red."""
from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import s4_02_send_recv_atoms as section
from part1_foundations.ch04_communication_primitives.collectives import naive
from shared.fleet import Fleet, launch
from shared.transport import FINISHED, RECEIVING, RUNNING, SENDING, Link
from tests.part1_foundations import broken_ch04_s4_02 as broken

SMALL = dict(workers=4, mebibytes=0.01, points=2, repeats=1, links="none", patience=0.2)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


@pytest.mark.parametrize(("part", "piece", "variant", "claim"), [
    ("price_tiers", "hop_all_reduce", broken.hops_and_one_more, "all-reduce by hops sends exactly 2(K-1) messages"),
    ("price_tiers", "hop_all_reduce", broken.hops_without_rank_1, "every rank holds the exact integer sum"),
    ("deadlock_and_cure", "send_first", broken.receive_first, "send-first completes at a quarter"),
    ("deadlock_and_cure", "send_first", broken.one_listener, "send-first hangs at 4x"),
    ("deadlock_and_cure", "odd_even", broken.send_then_receive, "odd-even order never hangs"),
    ("deadlock_and_cure", "isend_first", broken.send_then_receive, "isend never hangs"),
    ("stay_inside_the_group", "even_ranks_sum", broken.everyone_relays, "a collective on the even ranks moves no byte"),
])
def test_a_broken_piece_turns_its_claim_red(monkeypatch, part, piece, variant, claim):
    monkeypatch.setattr(section, piece, variant)
    for other in {"price_tiers", "deadlock_and_cure", "stay_inside_the_group"} - {part}:
        monkeypatch.setattr(section, other, lambda *_: None)
    [failed] = failed_claims(section.main.run(**SMALL))
    assert failed.startswith(claim)


def test_one_worker_has_nobody_to_talk_to():
    with pytest.raises(section.UsageError, match="at least 2"):
        section.main.run(workers=1)


# --- hops ------------------------------------------------------------------------------------------------------------


def test_book_figures_of_the_hop_all_reduce():
    vectors = section.draw_vectors(0, 4, 3)
    assert vectors.tolist() == [[8, 6, 5], [3, 3, 1], [1, 1, 2], [8, 6, 9]]
    ranks = launch(4, broken.hops, vectors, section.hop_all_reduce)
    assert [x.tolist() for x, _ in ranks] == [[20, 16, 17]] * 4
    assert sum(messages for _, messages in ranks) == 6


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("wire", ["unix", "tcp", "shm"])
def test_hops_agree_with_numpy_and_with_the_root_algorithm(workers, wire):
    vectors = np.random.default_rng(workers).integers(-2**40, 2**40, (workers, 30011))
    ours = launch(workers, broken.hops, vectors, section.hop_all_reduce, wire=wire)
    theirs = launch(workers, broken.hops, vectors, naive, wire=wire)
    for (x, _), (y, _) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, vectors.sum(axis=0))
        np.testing.assert_array_equal(x, y)
    assert sum(messages for _, messages in ours) == 2 * (workers - 1)


def test_book_figures_of_256_mib_per_tier():
    """Link constants that give the printed milliseconds: 1 us and 300 GB/s, 25 and 50 GB/s, 30 us and 3.1 GB/s."""
    tiers = {"NVLink": Link(1e-6, 300e9), "PCIe": Link(1e-6, 25e9), "InfiniBand NDR": Link(2e-6, 50e9),
             "25G Ethernet": Link(30e-6, 3.1e9)}
    milliseconds = {name: 1e3 * link.seconds(256 << 20) for name, link in tiers.items()}
    assert {name: round(ms, 2) for name, ms in milliseconds.items()} == {
        "NVLink": 0.90, "PCIe": 10.74, "InfiniBand NDR": 5.37, "25G Ethernet": 86.62}
    assert round(milliseconds["25G Ethernet"] / milliseconds["NVLink"], 1) == 96.7


# --- the watchdog ----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([RUNNING, SENDING, RECEIVING, FINISHED]), st.integers(0, 6)), min_size=7,
                max_size=7))
def test_wait_for_cycle_agrees_with_networkx(rows):
    status = np.array([(state, peer, 0, 0) for state, peer in rows], float)
    graph = nx.DiGraph([(rank, peer) for rank, (state, peer) in enumerate(rows) if state in (SENDING, RECEIVING)])
    cycles = [set(cycle) for cycle in nx.simple_cycles(graph)]
    found = section.wait_for_cycle(status)
    assert (found is not None) == bool(cycles)
    if found:
        assert found[0] == found[-1] and set(found) in cycles and len(found) == len(set(found)) + 1
        assert all(graph.has_edge(a, b) for a, b in zip(found, found[1:], strict=False))


def test_the_watchdog_finds_a_cycle_of_two_among_four():
    with Fleet(4, broken.pair_deadlocks_while_others_finish, stall=None) as fleet:
        assert section.watch(fleet, 0.1) in ([1, 2, 1], [2, 1, 2])


def test_the_watchdog_lets_a_failure_through():
    with Fleet(3, broken.die_early, stall=None) as fleet:
        assert section.watch(fleet, 0.1) is None
        with pytest.raises(Exception, match="rank 0 gives up"):
            fleet.results()


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_the_cures_work_for_odd_rings_too(workers):
    for order in (section.odd_even, section.isend_first):
        with Fleet(workers, section.pass_right, order, [10, 10**6], socket_buffer=4096) as fleet:
            assert section.watch(fleet, 0.5) is None
            fleet.results()


def test_the_kernel_grants_more_for_more():
    small, large = section.kernel_buffers(4096), section.kernel_buffers(65536)
    assert all(b > a >= 4096 for a, b in zip(small, large, strict=True))


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_sizes_and_tiers():
    sizes = section.message_sizes(0.25, 4)
    assert (sizes[0], sizes[-1], len(sizes)) == (8, 256 << 10, 4) and all(size % 8 == 0 for size in sizes)
    assert list(section.tiers("1gbe,wan")) == ["unix", "tcp", "shm", "1gbe", "wan"]
    assert list(section.tiers("none")) == ["unix", "tcp", "shm"]
    with pytest.raises(section.UsageError):
        section.tiers("carrier-pigeon")


@pytest.mark.timing
def test_a_paced_tier_is_fitted_to_its_link():
    result = section.main.run(workers=2, mebibytes=0.25, points=4, repeats=5, links="400mbe", patience=0.2)
    tier = result.records["tiers"]["400mbe"]
    assert tier["alpha"] == pytest.approx(1e-3, rel=0.25) and 1 / tier["beta"] == pytest.approx(50e6, rel=0.15)


# --- the shortcut ----------------------------------------------------------------------------------------------------

TINY = dict(workers=3, mebibytes=0.01, points=2, repeats=1)


@pytest.mark.parametrize(("variant", "claim"), [
    (None, None), (broken.both_with_broken_hops, "torch's hops"),
    (broken.both_with_a_broken_exchange, "batch_isend_irecv"), (broken.both_with_a_broken_group, "a sum in new_group")])
def test_shortcut_disagreement_is_red(monkeypatch, variant, claim):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part1_foundations.ch04_communication_primitives import s4_02_shortcut_torch_p2p as shortcut

    if variant:
        monkeypatch.setattr(shortcut, "both", variant)
    result = shortcut.main.run(**TINY)
    assert [text.startswith(claim) for text in failed_claims(result)] == [True] * bool(claim)
    assert result.lines_of_code["library"] < result.lines_of_code["ours"]
    assert [row[0] for row in result.tables[0]["rows"]] == ["8 B", "10.2 KiB"]
