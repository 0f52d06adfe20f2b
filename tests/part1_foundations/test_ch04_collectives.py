"""Chapter 4's collectives against NumPy and math.fsum, and their messages and bytes against closed forms."""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from part1_foundations.ch04_communication_primitives import costs
from part1_foundations.ch04_communication_primitives.collectives import ALL_REDUCE, BROADCAST, OPS
from shared.errors import WorkerFailed
from shared.fleet import launch
from shared.measure import fit_line
from tests.part1_foundations import ch04_workers as workers
from tests.part1_foundations.ch04_workers import Case, Outcome, inputs, pieces

EVERY_K = range(1, 10)
EXACT = ("int32", "int64", "uint8")
ROUNDED = ("float32", "float64", "complex128")
LARGE = 1 << 20  # bytes


def log2(k: int) -> int:
    return k.bit_length() - 1


def rounds(k: int) -> int:
    return (k - 1).bit_length()


def core(k: int) -> int:
    return 1 << log2(k)


def chunk_bytes(nbytes: int, itemsize: int, parts: int) -> list[int]:
    """Bytes of each of `parts` chunks of whole items, as even as can be."""
    items = nbytes // itemsize
    return [(items // parts + (i < items % parts)) * itemsize for i in range(parts)]


# --- the oracle: what each rank must have, and what it must have sent -------------------------------------------------


def reduced(case: Case, size: int) -> np.ndarray:
    """The exact answer for whole numbers, max and min; for the other sums one that is only rounded once."""
    stack = np.stack(inputs(case, size))
    if stack.dtype.kind in "biu" or case.op in ("max", "min"):
        return OPS[case.op].reduce(stack, axis=0, dtype=stack.dtype)
    assert case.op in ("sum", "avg")
    wide = np.result_type(stack.dtype, np.float64)
    if stack[0].size > 10_000:
        total = stack.sum(axis=0, dtype=np.result_type(wide, np.longdouble)).astype(wide)
    else:
        columns = stack.reshape(size, -1).T
        total = np.array([math.fsum(column.real.tolist()) for column in columns], wide)
        if stack.dtype.kind == "c":
            total += 1j * np.array([math.fsum(column.imag.tolist()) for column in columns])
    return total.reshape(case.shape) / (size if case.op == "avg" else 1)


def close(case: Case, size: int, result: np.ndarray, expected: np.ndarray) -> bool:
    """Equal; or, for rounded sums, off by at most one rounding a term (K eps sum|x|)."""
    if result.dtype != np.dtype(case.dtype) or result.shape != expected.shape:
        return False
    if result.dtype.kind in "biu" or case.op in ("max", "min"):
        return np.array_equal(result, expected)
    bound = size * np.finfo(case.dtype).eps * np.abs(np.stack(inputs(case, size)).astype(expected.dtype)).sum(axis=0)
    return bool((np.abs(result - expected) <= bound).all())


def sent_by(case: Case, size: int, rank: int) -> tuple[int, int] | None:
    """(messages, bytes) that one rank sends, worked out without the algorithm; None where only the result is judged."""
    k, item = size, np.dtype(case.dtype).itemsize
    n = math.prod(case.shape) * item
    chunk = chunk_bytes(n, item, k)
    place = (rank - case.root) % k
    children = sum(place + d < k for d in (1 << i for i in range(rounds(k))) if not place or d < place & -place)
    match case.what, case.algo:
        case "all_reduce", "naive":
            return (k - 1, (k - 1) * n) if rank == 0 else (1, n)
        case "all_reduce", "tree":
            return (children + (rank > 0), (children + (rank > 0)) * n)
        case ("all_reduce", "ring") | ("broken", "chatty_ring" | "short_ring" | "forgetful_tree" | "own_order"):
            return 2 * (k - 1), 2 * n - chunk[rank] - chunk[(rank + 1) % k] if k > 1 else 0
        case "all_reduce", "recursive_doubling" | "halving_doubling":
            c = core(k)
            if rank >= c:
                return 1, n  # folded in: its buffer goes out, the result comes back
            fold = int(rank + c < k)
            if case.algo == "recursive_doubling":
                return log2(k) + fold, (log2(k) + fold) * n
            part = chunk_bytes(n, item, c)
            doubling = sum(sum(part[rank // d * d:rank // d * d + d]) for d in (1 << i for i in range(log2(c))))
            return 2 * log2(k) + fold, n - part[rank] + doubling + fold * n
        case "reduce_scatter", _:
            return k - 1, n - chunk[rank]
        case "all_gather", "ring":
            return k - 1, (k - 1) * n
        case "all_gather", _:
            return rounds(k), (k - 1) * n
        case "reduce", _:
            return (0, 0) if rank == case.root else (1, n)
        case "broadcast", "linear":
            return (k - 1, (k - 1) * n) if rank == case.root else (0, 0)
        case "broadcast", "binomial":
            return children, children * n
        case "broadcast", "scatter_all_gather":
            by_place = [chunk[(case.root + p) % k] for p in range(k)]
            end = k if place == 0 else min(place + (place & -place), k)  # its subtree: places place..end-1
            return (children + k - 1, sum(by_place[place + 1:end]) + n - chunk[(rank + 1) % k] if k > 1 else 0)
        case "all_to_all", _:
            mine = pieces(case, k, rank)
            return k - 1, sum(piece.nbytes for peer, piece in enumerate(mine) if peer != rank)
        case "gather", _:
            return (0, 0) if rank == case.root else (1, pieces(case, k, rank)[0].nbytes)
        case "scatter", _:
            mine = pieces(case, k, rank)
            return (k - 1, sum(p.nbytes for i, p in enumerate(mine) if i != rank)) if rank == case.root else (0, 0)
    return None


def complaints(case: Case, size: int, outcomes: list[Outcome]) -> list[str]:
    """Everything that is wrong with what the ranks got and sent in one case."""
    wrong = []
    results = [outcome.result for outcome in outcomes]
    x = inputs(case, size)
    if case.what in ("all_reduce", "broken"):
        wrong += ["not the sum"] if not close(case, size, results[0], reduced(case, size)) else []
        wrong += [f"rank {r} differs from rank 0" for r in range(size) if outcomes[r].digest != outcomes[0].digest]
    elif case.what == "reduce_scatter":
        for r, part in enumerate(np.array_split(reduced(case, size).reshape(-1), size)):
            whole = np.concatenate(results)
            if results[r].shape != part.shape:
                wrong.append(f"rank {r} has {results[r].shape}")
        if not wrong and not close(case, size, whole.reshape(case.shape), reduced(case, size)):
            wrong.append("not the chunks of the sum")
    else:
        match case.what:
            case "reduce":
                expected = reduced(case, size)
                fine = [close(case, size, results[r], expected) if r == case.root else results[r] is None
                        for r in range(size)]
            case "broadcast":
                fine = [same(result, x[case.root]) for result in results]
            case "all_gather":
                fine = [same(result, np.stack(x)) for result in results]
            case "all_to_all":
                sent = [pieces(case, size, rank) for rank in range(size)]
                fine = [all(same(results[d][s], sent[s][d]) for s in range(size)) and len(results[d]) == size
                        for d in range(size)]
            case "gather":
                sent = [pieces(case, size, rank)[0] for rank in range(size)]
                fine = [all(map(same, results[r], sent)) and len(results[r]) == size if r == case.root
                        else results[r] is None for r in range(size)]
            case "scatter":
                fine = list(map(same, results, pieces(case, size, case.root)))
        wrong += [f"rank {r}: wrong result" for r in range(size) if not fine[r]]
    wrong += [f"rank {r} did not work in place" for r in range(size) if not outcomes[r].returned_x]
    for r, outcome in enumerate(outcomes):
        expected = sent_by(case, size, r)
        if expected and (outcome.messages, outcome.nbytes) != expected:
            wrong.append(f"rank {r} sent {outcome.messages} messages, {outcome.nbytes} bytes, not {expected}")
    if sum(outcome.messages for outcome in outcomes) != sum(outcome.received for outcome in outcomes):
        wrong.append("messages that nobody received")
    return wrong


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def judge(size: int, cases: list[Case], **options) -> dict[Case, list[str]]:
    """Run all cases in one fleet; complaints by case, for those that have any."""
    by_rank = launch(size, workers.run, cases, **options)
    wrong = {case: complaints(case, size, [by_rank[rank][i] for rank in range(size)]) for i, case in enumerate(cases)}
    return {case: said for case, said in wrong.items() if said}


# --- every algorithm, every K -----------------------------------------------------------------------------------------


def all_reduces(k: int) -> list[Case]:
    shapes = [(n,) for n in sorted({0, 1, k - 1, k, k + 1, 5 * k + 3})] + [(), (3, 5, 7)]
    cases = []
    for algo in ALL_REDUCE:
        cases += [Case("all_reduce", algo, shape, dtype) for shape in shapes for dtype in ("int32", "float64")]
        cases += [Case("all_reduce", algo, (n,), dtype) for n in (k - 1, 5 * k + 3) for dtype in EXACT + ROUNDED
                  if dtype not in ("int32", "float64")]
        cases += [Case("all_reduce", algo, (LARGE // 8 + 1,), "int64")]
        cases += [Case("all_reduce", algo, (3 * k + 1,), dtype, "max") for dtype in ("bool", "uint8", "float64")]
        cases += [Case("all_reduce", algo, (3 * k + 1,), "int64", op) for op in ("min", "prod")]
        cases += [Case("all_reduce", algo, (3 * k + 1,), dtype, "avg") for dtype in ("float32", "complex128")]
    return cases


def others(k: int) -> list[Case]:
    shapes = [(n,) for n in sorted({0, 1, k - 1, k, k + 1, 5 * k + 3})] + [(), (3, 5)]
    large = (LARGE // 8 // k + 1,)
    cases = [Case("reduce_scatter", "ring", shape, dtype) for shape in shapes for dtype in ("int64", "float64")]
    cases += [Case("all_gather", algo, shape, dtype)
              for algo in ("ring", "bruck") for shape in shapes for dtype in ("uint8", "complex128")]
    for shape, root in itertools.product(shapes, sorted({0, k - 1})):
        cases.append(Case("reduce", "binomial", shape, "int32", root=root))
        cases += [Case("broadcast", algo, shape, "float32", root=root) for algo in BROADCAST]
    for root in range(k):
        cases += [Case(what, "", (2, 7), "int32", root=root, seed=root) for what in ("all_to_all", "gather", "scatter")]
    cases += [Case("reduce_scatter", "ring", large, "int64"), Case("all_gather", "bruck", large, "int64"),
              Case("all_gather", "ring", large, "int64"), Case("all_to_all", "", (3000,), "int64"),
              *(Case("broadcast", algo, large, "int64", root=k - 1) for algo in BROADCAST)]
    return cases


@pytest.mark.parametrize("k", EVERY_K)
def test_every_all_reduce_is_right_and_sends_what_its_formula_says(k):
    assert judge(k, all_reduces(k), wire=("unix", "tcp", "shm")[k % 3]) == {}


@pytest.mark.parametrize("k", EVERY_K)
def test_every_other_collective_is_right_and_sends_what_its_formula_says(k):
    assert judge(k, others(k), wire=("shm", "unix", "tcp")[k % 3]) == {}


@pytest.mark.parametrize("wire", ["unix", "tcp", "shm"])
def test_all_wires_carry_a_large_ring(wire):
    cases = [Case("all_reduce", algo, (LARGE // 4 + 1,), "float32", seed=1) for algo in ALL_REDUCE]
    assert judge(3, cases, wire=wire) == {}


def test_the_busiest_rank_sends_what_the_docstrings_say():
    k, n = 8, 8 * 1000 * 8
    outcomes = launch(k, workers.run, [Case("all_reduce", algo, (n // 8,), "float64") for algo in ALL_REDUCE])
    busiest = {algo: (max(rank[i].messages for rank in outcomes), max(rank[i].nbytes for rank in outcomes))
               for i, algo in enumerate(ALL_REDUCE)}
    assert busiest == {
        "naive": (k - 1, (k - 1) * n),
        "tree": (3, 3 * n),  # the root three copies down; rank 4 one up and two down
        "ring": (2 * (k - 1), 2 * n * (k - 1) // k),
        "recursive_doubling": (3, 3 * n),
        "halving_doubling": (6, 2 * n * (k - 1) // k),
    }


# --- random shapes, values, roots and numbers of ranks ----------------------------------------------------------------

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
values = st.binary(min_size=1, max_size=40)
seeds = st.integers(0, 2**32)
roots = st.integers(0, 8)


ZERO, NONE = st.just(0), st.none()


def drawn(what: list[str], algos, shape, dtypes, ops=("sum",), root=ZERO, seed=ZERO, values=NONE):
    return st.tuples(st.sampled_from(what), st.sampled_from(sorted(algos)), shape, st.sampled_from(dtypes),
                     st.sampled_from(ops), root, seed, NONE, values).map(lambda fields: Case(*fields))


WHOLE = [*EXACT, "int16", "uint32"]
random_cases = st.one_of(
    drawn(["all_reduce"], ALL_REDUCE, shapes, WHOLE, ["sum", "max", "min", "prod"], values=values),
    drawn(["all_reduce"], ALL_REDUCE, shapes, ROUNDED, ["sum", "avg"], seed=seeds),
    drawn(["all_reduce"], ALL_REDUCE, shapes, ["bool"], ["sum", "max", "min"], values=values),
    drawn(["reduce_scatter"], ["ring"], shapes, WHOLE, values=values),
    drawn(["all_gather"], ["ring", "bruck"], shapes, [*WHOLE, "float16"], values=values),
    drawn(["broadcast"], BROADCAST, shapes, [*WHOLE, "complex64"], root=roots, values=values),
    drawn(["reduce"], ["binomial"], shapes, WHOLE, root=roots, values=values),
    drawn(["all_to_all", "gather", "scatter"], [""], shapes.map(lambda s: s[:2]), WHOLE, root=roots, seed=seeds),
)


# Without shrinking: each try starts a fleet, and every failing case is named with its complaint anyway.
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck),
          phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(k=st.integers(1, 9), cases=st.lists(random_cases, min_size=30, max_size=40))
def test_random_cases(k, cases):
    assert judge(k, [case._replace(root=case.root % k) for case in cases]) == {}


# --- hierarchies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("node_of", "algo"), [
    ((0, 0, 1, 1), "hierarchical"), ((0, 0, 0, 1, 1, 1, 2, 2, 2), "hierarchical"), ((1, 0, 1, 0, 1, 0), "hierarchical"),
    ((0, 0, 0, 0), "hierarchical"), ((0, 1, 2), "hierarchical"), ((5,), "hierarchical"),
    ((0, 0, 1, 1), "hierarchical_leaders"), ((0, 0, 0, 1, 2, 2), "hierarchical_leaders"),
    ((2, 0, 2, 0, 2), "hierarchical_leaders"), ((0, 0, 0), "hierarchical_leaders")])
def test_a_hierarchy_sends_across_nodes_what_a_ring_of_nodes_would(node_of, algo):
    k, m = len(node_of), len(set(node_of))
    cases = [Case("all_reduce", algo, shape, dtype, node_of=node_of)
             for shape in [(0,), (1,), (k + 1,), (7, 9), (20_000,)] for dtype in ("int64", "float64")]
    even = Case("all_reduce", algo, (720,), "int64", node_of=node_of)  # divides by every K here
    assert judge(k, cases) == {}
    outcomes = launch(k, workers.run, [even])
    for node in set(node_of):
        uplink = sum(outcomes[rank][0].across for rank in range(k) if node_of[rank] == node)
        assert uplink == 2 * 720 * 8 * (m - 1) // m


# --- process groups ---------------------------------------------------------------------------------------------------


def test_groups_keep_their_bytes_to_themselves():
    members, size = [[4, 1, 3], [0, 6]], 7  # 2 and 5 are in neither; ranks are numbered in the order given
    outcomes = launch(size, workers.two_groups, members)
    for ranks in members:
        for place, rank in enumerate(ranks):
            results, sent, (my_place, my_size) = outcomes[rank]
            assert (my_place, my_size) == (place, len(ranks))
            for total in results[:len(ALL_REDUCE)]:
                assert total.tolist() == [sum(2.0 ** member for member in ranks)] * 10
            gathered, broadcast, exchanged, inner = results[len(ALL_REDUCE):]
            assert gathered.tolist() == ranks and broadcast.tolist() == [ranks[1]]
            assert [piece.tolist() for piece in exchanged] == [[member, place] for member in ranks]
            assert inner is None if 0 < place < len(ranks) - 1 else inner.tolist() == [ranks[0] + ranks[-1]]
            assert sum(sent.values()) > 0
            assert all(nbytes == 0 for peer, nbytes in sent.items() if peer not in ranks)
    for outsider in (2, 5):
        results, sent, _ = outcomes[outsider]
        assert results == [] and set(sent.values()) == {0}


def test_errors_name_what_is_wrong():
    for rank, said in enumerate(launch(3, workers.errors)):
        assert {kind for kind, _ in said.values()} == {"ValueError"} and len(said) == 13
        assert "contiguous" in said["not contiguous"][1] and "contiguous" in said["broadcast of a view"][1]
        assert "unknown all-reduce 'telepathy': one of naive, tree, ring" in said["algorithm"][1]
        assert "avg int64" in said["average"][1] and "median float64" in said["operation"][1]
        assert f"rank {rank} is not a member" in said["member"][1]
        assert "hierarchical_leaders" in said["nodes"][1]


def test_background_all_reduces_keep_their_order_and_hand_over_their_errors():
    for sums, messages, good in launch(3, workers.background):
        assert sums == [600.0, 60.0, 6.0]
        assert len(messages) == 2 and all("unknown all-reduce 'telepathy'" in message for message in messages)
        assert good == [3.0, 9.0]


def test_a_rank_that_leaves_ends_a_background_all_reduce():
    with pytest.raises(WorkerFailed, match="worker 2 raised KeyError: 'left'"):
        launch(3, workers.lost)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", EVERY_K)
def test_cost_formulas_agree_with_the_counts(k):
    """Where all ranks do the same, the path is what the busiest one sends; for naive, what the root handles."""
    n = 2520 * 8  # divides by every K
    for algo in ("ring", "recursive_doubling", "halving_doubling"):
        if algo == "ring" or k == core(k):
            sent = [sent_by(Case("all_reduce", algo, (n // 8,), "int64"), k, rank) for rank in range(k)]
            assert costs.rounds_and_bytes(algo, k, n) == (max(m for m, _ in sent), max(b for _, b in sent))
    assert costs.rounds_and_bytes("naive", k, n) == (2 * (k - 1), 2 * (k - 1) * n)
    assert costs.rounds_and_bytes("tree", k, n) == (2 * rounds(k), 2 * rounds(k) * n)
    for algo in ALL_REDUCE:
        messages, nbytes = costs.rounds_and_bytes(algo, k, n)
        assert costs.seconds(algo, k, n, 2.0, 0.5) == pytest.approx(2 * messages + nbytes / 2)
        line = fit_line([0, n, 2 * n], [costs.seconds(algo, k, size, 1e-3, 1e-9) for size in (0, n, 2 * n)])
        assert line.r2 == pytest.approx(1)
    with pytest.raises(ValueError, match="no cost formula for 'telepathy'"):
        costs.rounds_and_bytes("telepathy", max(2, k), n)


# --- law 4: the same checks turn red on wrong algorithms --------------------------------------------------------------


@pytest.mark.parametrize(("case", "complaint"), [
    (Case("broken", "short_ring", (40,), "int64"), "not the sum"),
    (Case("broken", "forgetful_tree", (40,), "int64"), "not the sum"),
    (Case("all_gather", "wrong_roll", (3,), "int64"), "wrong result"),
    (Case("broken", "chatty_ring", (40,), "int64"), "sent 4 messages, 1280 bytes, not (8, 512)"),
    (Case("broken", "own_order", (4000,), "float32"), "differs from rank 0"),
])
def test_a_broken_variant_is_caught(case, complaint):
    wrong = judge(5, [case])
    assert any(complaint in said for said in wrong[case])
