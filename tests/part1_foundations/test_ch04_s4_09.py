"""Section 4.9: layouts on shared uplinks, the search for a rank order, the book's figures, and what turns claims red.

s4_09_hierarchical_all_reduce and s4_09_shortcut_device_mesh_groups.
"""
from __future__ import annotations

import time
from functools import partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import s4_09_hierarchical_all_reduce as section
from part1_foundations.ch04_communication_primitives.collectives import (
    Group,
    hierarchical,
    hierarchical_leaders,
    node_groups,
    reduce_binomial,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
)
from shared.errors import UsageError
from shared.fleet import launch
from shared.measure import AlphaBeta
from shared.transport import Fabric, Link

SMALL = dict(shapes="2x2", mebibytes=0.125, points=2, repeats=1, link="100mbe")


# --- broken variants, run by real workers -----------------------------------------------------------------------------


def chatty(all_reduce, net, x, placement):
    """Right, but every rank also sends a few bytes to everybody else."""
    all_reduce(net, x, placement)
    for peer in set(range(net.size)) - {net.rank}:
        net.isend(peer, np.zeros(1, np.uint8), tag=7).wait()
    for peer in set(range(net.size)) - {net.rank}:
        net.recv(peer, tag=7)
    return x


def leaders_without_broadcast(net, x, node_of):
    """The leaders keep the sum to themselves."""
    inside, _ = node_groups(net, node_of)
    leaders = [node_of.index(node) for node in sorted(set(node_of))]
    reduce_binomial(inside, x)
    if net.rank in leaders:
        ring(Group(net, leaders), x)
    return x


def scattered_without_the_cross_stage(net, x, node_of):
    inside, across = node_groups(net, node_of)
    ring(across, ring_reduce_scatter(inside, x).copy())
    return ring_all_gather(inside, x)


def dawdling(all_reduce, net, x, placement):
    """Takes twice its time."""
    begin = time.perf_counter()
    all_reduce(net, x, placement)
    time.sleep(time.perf_counter() - begin)
    return x


def late(all_reduce, net, x, placement):
    """Starts late, however small the buffer."""
    time.sleep(0.05)
    return all_reduce(net, x, placement)


def same_for_all(net, sizes, trips):
    """A link matrix that was never measured."""
    return np.ones((len(sizes), net.size, net.size)) * (1 - np.eye(net.size))


def replace(monkeypatch, layout, variant):
    real = section.layouts
    monkeypatch.setattr(section, "layouts", lambda *args: real(*args) | {layout: (variant, real(*args)[layout][1])})


def failed_claims(result, timing=(False, True)) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"] and claim["timing"] in timing]


@pytest.mark.parametrize(("layout", "variant", "claim"), [
    (section.CONTIGUOUS, partial(chatty, section.ring_in_order), "ring, contiguous: exactly 2(K-1)/K"),
    (section.INTERLEAVED, partial(chatty, section.ring_in_order), "ring, interleaved: exactly G times"),
    (section.SEARCHED, partial(chatty, section.ring_in_order), "ring, searched order: exactly the contiguous"),
    (section.LEADERS, partial(chatty, hierarchical_leaders), "leader hierarchy: exactly 2(M-1)/M"),
    (section.SCATTERED, partial(chatty, hierarchical), "reduce-scatter hierarchy: exactly 2(M-1)/M"),
    (section.LEADERS, leaders_without_broadcast, "every rank always holds the exact sum"),
    (section.SCATTERED, scattered_without_the_cross_stage, "every rank always holds the exact sum"),
])
def test_a_broken_layout_turns_its_claim_red(monkeypatch, layout, variant, claim):
    replace(monkeypatch, layout, variant)
    [failed] = failed_claims(section.main.run(**SMALL), timing=(False,))
    assert failed.startswith(claim)


@pytest.mark.timing
@pytest.mark.parametrize(("layout", "variant", "claim"), [
    (section.SEARCHED, partial(dawdling, section.ring_in_order), "the searched order takes no longer"),
    (section.CONTIGUOUS, partial(dawdling, section.ring_in_order), "the interleaved order takes at least 1.5x"),
    (section.LEADERS, partial(late, hierarchical_leaders), "the leader hierarchy gains more"),
])
def test_a_slow_layout_turns_its_claim_red(monkeypatch, layout, variant, claim):
    replace(monkeypatch, layout, variant)
    [failed] = failed_claims(section.main.run("smoke", repeats=2))
    assert failed.startswith(claim)


def test_a_link_matrix_that_was_not_measured_hides_the_nodes(monkeypatch):
    monkeypatch.setattr(section, "measure_links", same_for_all)
    [failed] = failed_claims(section.main.run(**SMALL), timing=(False,))
    assert failed.startswith("the search finds the planted nodes")


def test_a_search_for_the_dearest_ring_is_red(monkeypatch):
    real = section.search
    monkeypatch.setattr(section, "search", lambda seconds, seed: real(-seconds, seed))
    failed = failed_claims(section.main.run(**SMALL), timing=(False,))
    assert [text.split(":")[0] for text in failed] == [
        "ring, searched order", "the search finds the planted nodes from ping-pongs alone"]


# --- the book's printed figures ---------------------------------------------------------------------------------------

NVLINK, NETWORK, GIB = AlphaBeta(1e-6, 1 / 300e9, 1.0), AlphaBeta(5e-6, 1 / 12.5e9, 1.0), 2**30


def test_book_figures_for_eight_ranks():
    nvlink, network = (1e3 * section.model("ring", 8, GIB, link.alpha, link.beta) for link in (NVLINK, NETWORK))
    assert (f"{nvlink:.2f}", f"{network:.2f}", f"{network / nvlink:.1f}") == ("6.28", "150.39", "24.0")


def test_book_figures_for_four_nodes_of_eight():
    cost = section.predict(4, 8, GIB, NVLINK, NETWORK)
    flat, hierarchy = 1e3 * cost[section.CONTIGUOUS], 1e3 * cost[section.LEADERS]
    assert (f"{flat:.2f}", f"{hierarchy:.2f}", f"{flat / hierarchy:.2f}") == ("166.74", "138.74", "1.20")


def test_the_model_of_the_scattered_hierarchy_adds_its_stages():
    """G rings over M nodes at once on one uplink: each of the 2(M-1) steps takes G messages of n/(G M)."""
    steps = 2 * 3 * 8 * (NETWORK.alpha + GIB / 32 * NETWORK.beta)
    inside = 2 * 7 * (NVLINK.alpha + GIB / 8 * NVLINK.beta)
    assert section.predict(4, 8, GIB, NVLINK, NETWORK)[section.SCATTERED] == pytest.approx(steps + inside)


# --- the search against an oracle and planted truth -------------------------------------------------------------------


@st.composite
def planted(draw, most_nodes=4, most_per_node=4):
    """(node of each rank, symmetric link matrix of two noisy tiers)."""
    nodes, per_node = draw(st.integers(2, most_nodes)), draw(st.integers(2, most_per_node))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    node_of = (rng.permutation(nodes * per_node) // per_node).tolist()
    tiers = np.where(np.equal.outer(node_of, node_of), 1.0, 10.0) * rng.uniform(1, 1.3, (len(node_of),) * 2)
    return node_of, np.triu(tiers, 1) + np.triu(tiers, 1).T


def nodes_of(node_of) -> list[list[int]]:
    return sorted([rank for rank in range(len(node_of)) if node_of[rank] == node] for node in set(node_of))


def ring_length(order, seconds) -> float:
    return sum(seconds[a, b] for a, b in zip(order, np.roll(order, -1)))


def shortest_ring(seconds) -> float:
    """Held & Karp's dynamic programme: the exact optimum by another road."""
    size = len(seconds)
    best = {(frozenset([k]), k): seconds[0, k] for k in range(1, size)}
    for count in range(2, size):
        best = {(frozenset(chosen), last): min(best[frozenset(chosen) - {last}, k] + seconds[k, last]
                                               for k in chosen if k != last)
                for chosen in combinations(range(1, size), count) for last in chosen}
    return min(best[frozenset(range(1, size)), k] + seconds[k, 0] for k in range(1, size))


@settings(max_examples=12, deadline=None)
@given(planted(most_nodes=3, most_per_node=2))
def test_the_exhaustive_search_is_optimal(truth):
    node_of, seconds = truth
    order = section.search(seconds)
    assert sorted(order) == list(range(len(node_of)))
    assert ring_length(order, seconds) == pytest.approx(shortest_ring(seconds))
    assert section.groups(order, seconds) == nodes_of(node_of)


@settings(max_examples=30, deadline=None)
@given(planted(), st.integers(0, 100))
def test_two_opt_finds_the_planted_nodes(truth, seed):
    node_of, seconds = truth
    order = section.two_opt(seconds, np.random.default_rng(seed).permutation(len(node_of)).tolist())
    assert sorted(order) == list(range(len(node_of)))
    assert section.groups(order, seconds) == nodes_of(node_of)


def test_two_opt_takes_over_where_exhaustion_ends():
    node_of = [0, 1, 2] * 4
    seconds = np.where(np.equal.outer(node_of, node_of), 1.0, 10.0) * (1 - np.eye(12))
    order = section.search(seconds, seed=3)
    assert order == section.search(seconds, seed=3) and ring_length(order, seconds) == 9 * 1.0 + 3 * 10.0


@settings(max_examples=30, deadline=None)
@given(planted(), st.integers(0, 20), st.booleans())
def test_groups_do_not_depend_on_where_or_which_way_the_ring_starts(truth, turn, mirror):
    node_of, seconds = truth
    order = np.roll(np.argsort(node_of, kind="stable"), turn)[::-1 if mirror else 1].tolist()
    assert section.groups(order, seconds) == nodes_of(node_of)


@pytest.mark.timing
def test_the_measured_links_are_those_of_the_fabric():
    link, node_of = Link(1e-3, 10e6, 1e-3), np.array([0, 1, 1])
    sizes = (8, 40_000)
    seconds = np.sum(launch(3, section.measure_links, sizes, 6, fabric=Fabric((0, 1, 1), link)), axis=0)
    assert np.array_equal(seconds, seconds.transpose(0, 2, 1)) and not np.diagonal(seconds, axis1=1, axis2=2).any()
    for size, matrix in zip(sizes, seconds):
        across = matrix[np.not_equal.outer(node_of, node_of)]
        assert (across >= link.seconds(size)).all() and across.max() < 2 * link.seconds(size)
        assert 0 < matrix[1, 2] < 1e-3


# --- layouts, sizes and input -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(planted())
def test_the_orders_cross_nodes_as_often_as_they_should(truth):
    node_of, _ = truth
    placed = section.layouts(node_of, [])

    def crossings(order):
        assert sorted(order) == list(range(len(node_of)))
        return sum(node_of[a] != node_of[b] for a, b in zip(order, np.roll(order, -1)))

    assert crossings(placed[section.CONTIGUOUS][1]) == len(set(node_of))
    assert crossings(placed[section.INTERLEAVED][1]) == len(node_of)


@pytest.mark.parametrize("workers", [4, 6, 8, 12])
def test_every_buffer_splits_evenly(workers):
    sizes = section.buffer_sizes(0.25, 4, workers)
    assert len(sizes) == 4 and all(size % (8 * workers) == 0 for size in sizes)
    assert abs(sizes[0] - 1024) <= 4 * workers and abs(sizes[-1] - 2**18) <= 4 * workers
    assert section.buffer_sizes(1e-9, 2, workers)[0] >= 8 * workers


def test_shapes():
    assert section.parse("2x4,4x2") == [(2, 4), (4, 2)] and section.parse("10x3") == [(10, 3)]


@pytest.mark.parametrize("shapes", ["", "2", "2x", "1x4", "4x1", "0x0", "2x2,", "2x2;2x2", "-2x2", "2x2x2", "99x99"])
def test_bad_shapes_are_usage_errors(shapes):
    with pytest.raises(UsageError):
        section.main.run("smoke", shapes=shapes)


def test_an_unpaced_uplink_is_a_usage_error():
    with pytest.raises(UsageError, match="nothing to place"):
        section.main.run("smoke", link="none")


# --- the shortcut -----------------------------------------------------------------------------------------------------


def own_buffer_only(x, *groups) -> None:
    pass


def without_the_cross_stage(net, x, node_of):
    inside, _ = node_groups(net, node_of)
    return ring(inside, x)


def transposed_mesh(nodes, per_node):
    from part1_foundations.ch04_communication_primitives import s4_09_shortcut_device_mesh_groups as shortcut

    return shortcut.mesh_groups(nodes, per_node)[::-1]


def both_with(name, variant, net, *args):
    """The shortcut's worker function with one of its pieces exchanged, in a worker, where it is still whole."""
    from part1_foundations.ch04_communication_primitives import s4_09_shortcut_device_mesh_groups as shortcut

    if name == "mesh_groups":  # it calls the real one
        groups = variant(*args[:2])
        setattr(shortcut, name, lambda *shape: groups)
    else:
        setattr(shortcut, name, variant)
    return shortcut.both(net, *args)


@pytest.mark.parametrize(("name", "variant", "claims"), [
    ("flat_all_reduce", own_buffer_only, ["torch's hierarchy gives its flat"]),
    ("hierarchical", without_the_cross_stage, ["our hierarchy gives torch's result"]),
    ("mesh_all_reduce", own_buffer_only, ["torch's hierarchy gives its flat", "our hierarchy gives torch's result"]),
    ("mesh_groups", transposed_mesh, ["the mesh's groups are ours"]),
])
def test_shortcut_disagreement_is_red(monkeypatch, name, variant, claims):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part1_foundations.ch04_communication_primitives import s4_09_shortcut_device_mesh_groups as shortcut

    monkeypatch.setattr(shortcut, "both", partial(both_with, name, variant))
    failed = failed_claims(shortcut.main.run("smoke", repeats=1))
    assert len(failed) == len(claims) and all(map(str.startswith, failed, claims)), failed


def test_shortcut_runs_both_sides_on_the_same_processes():
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part1_foundations.ch04_communication_primitives import s4_09_shortcut_device_mesh_groups as shortcut

    result = shortcut.main.run("smoke", nodes=2, per_node=3, repeats=2)
    assert result.ok and result.lines_of_code["library"] < result.lines_of_code["ours"]
    assert result.records["bytes"] == section.buffer_sizes(0.25, 2, 6)
    assert [len(result.records["seconds"][side]) for side in ("ours", "library", "flat")] == [2, 2, 2]
