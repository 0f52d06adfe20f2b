"""Section 4.4: the race of the all-reduce algorithms, its cost formulas, and what turns each claim red."""
from __future__ import annotations

import time

import numpy as np
import pytest

from part1_foundations.ch04_communication_primitives import costs
from part1_foundations.ch04_communication_primitives import s4_04_all_reduce_algorithms as section
from part1_foundations.ch04_communication_primitives.collectives import chunks, flat, recursive_doubling, ring, tree
from shared.measure import Timing

SMALL = dict(workers=4, mebibytes=0.03125, points=2, repeats=2)


# --- broken variants, run by real workers ---------------------------------------------------------------------------


def whole_buffer_ring(net, x, op=np.add):
    """Correct, but every step carries the whole buffer."""
    passing, incoming = flat(x).copy(), np.empty_like(flat(x))
    for _ in range(net.size - 1):
        work = net.isend((net.rank + 1) % net.size, passing)
        net.recv((net.rank - 1) % net.size, incoming)
        work.wait()
        op(flat(x), incoming, out=flat(x))
        passing = incoming.copy()
    return x


def ring_one_step_short(net, x, op=np.add):
    """The last step of the reduce-scatter is missing."""
    parts = chunks(x, net.size)
    for step in range(net.size - 2):
        work = net.isend((net.rank + 1) % net.size, parts[(net.rank - step - 1) % net.size])
        net.recv((net.rank - 1) % net.size, parts[(net.rank - step - 2) % net.size], reduce=op)
        work.wait()
    return x


def ring_in_float32(net, x, op=np.add):
    y = ring(net, x.astype(np.float32), op)
    x[...] = y
    return x


def dawdling(net, x, op=np.add):
    time.sleep(0.02)
    return recursive_doubling(net, x, op)


def failed_claims(result) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"]]


@pytest.mark.parametrize(("algorithm", "variant", "claims"), [
    ("ring", whole_buffer_ring, ["each ring rank sends exactly", "the ring's busiest rank sends under 2"]),
    ("halving_doubling", ring, ["halving-doubling sends the ring's bytes"]),
    ("naive", tree, ["the naive root handles"]),
    ("tree", ring_one_step_short, ["every rank holds the exact integer sum", "float64 sums agree"]),
    ("tree", ring_in_float32, ["float64 sums agree"]),
])
def test_a_broken_algorithm_turns_its_claim_red(monkeypatch, algorithm, variant, claims):
    monkeypatch.setitem(section.ALL_REDUCE, algorithm, variant)
    failed = failed_claims(section.main.run(**SMALL))
    untimed = [text for text in failed if "predict" not in text]
    assert len(untimed) == len(claims), failed
    assert all(text.startswith(start) for text, start in zip(untimed, claims)), failed


@pytest.mark.timing
def test_an_algorithm_slower_than_its_formula_turns_the_predictions_red(monkeypatch):
    monkeypatch.setitem(section.ALL_REDUCE, "recursive_doubling", dawdling)
    monkeypatch.setattr(section, "seconds", lambda name, *cell: costs.seconds(name, *cell) / 3)
    failed = failed_claims(section.main.run(**SMALL))
    assert [text.split(" within 25 %")[0] for text in failed] == [
        "the predicted winner is the measured one or", "alpha-beta predicts"]


# --- the formulas against the book's printed figures and against brute force ------------------------------------------

BOOK = dict(alpha=5e-6, beta=1 / 100e9)


@pytest.mark.parametrize(("workers", "naive", "tree_", "ring_"), [
    (8, 9.465, 4.057, 1.244), (128, 171.727, 9.465, 2.602), (1024, 1383.277, 13.522, 11.571)])
def test_book_figures_for_64_mib(workers, naive, tree_, ring_):
    milliseconds = [1e3 * costs.seconds(name, workers, 64 << 20, **BOOK) for name in ("naive", "tree", "ring")]
    assert milliseconds == pytest.approx([naive, tree_, ring_], abs=5e-4)


def test_book_figures_for_64_workers():
    def at(name, mebibytes):
        return 1e3 * costs.seconds(name, 64, mebibytes * 2**20, **BOOK)

    assert (round(at("tree", 1), 3), round(at("ring", 1), 3)) == (0.186, 0.651)
    assert (round(at("ring", 16), 3), round(at("tree", 16), 3)) == (0.960, 2.073)


@pytest.mark.parametrize("workers", range(2, 10))
def test_ring_bytes_count_what_the_schedule_sends(workers):
    for elements in (0, 1, workers - 1, 1000):
        parts = [part.nbytes for part in chunks(np.empty(elements), workers)]
        for rank in range(workers):
            sent = sum(parts[(rank - step - 1) % workers] + parts[(rank - step) % workers]
                       for step in range(workers - 1))
            assert section.ring_bytes(8 * elements, workers, rank) == sent


def test_regret_is_one_for_the_winner_and_the_ratio_otherwise():
    cell = {"measured": {"a": Timing((2.0,)), "b": Timing((3.0,))}, "predicted": {"a": 9, "b": 1}}
    assert section.choice_regret(cell) == 1.5
    assert section.choice_regret(cell | {"predicted": {"a": 1, "b": 9}}) == 1.0


def test_worlds_and_sizes():
    assert section.worlds(6) == [2, 3, 4, 6]
    assert section.worlds(1) == [1]
    assert section.buffer_sizes(8, 7) == [1024, 8192, 32768, 131072, 524288, 2097152, 8388608]


def test_shortcut_disagreement_is_red(monkeypatch):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[torch]'")
    from part1_foundations.ch04_communication_primitives import s4_04_shortcut_torch_all_reduce as shortcut

    good = shortcut.main.run("smoke")
    assert good.ok and good.lines_of_code["library"] < good.lines_of_code["ours"]
    assert {row[0] for row in good.tables[0]["rows"]} == {"1.00 KiB", "128 KiB", "512 KiB"}
    monkeypatch.setattr(shortcut, "both", _both_with_a_short_ring)
    assert not shortcut.main.run("smoke").ok


def _both_with_a_short_ring(net, *args):
    from part1_foundations.ch04_communication_primitives import s4_04_shortcut_torch_all_reduce as shortcut

    shortcut.ring = ring_one_step_short
    return shortcut.both(net, *args)
