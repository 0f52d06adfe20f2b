"""Section 16.3: lists against critical paths, cycles and torch; gradients against autograd; what turns claims red."""
from __future__ import annotations

import json
from collections import Counter

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from part4_parallel_dl.ch16_model_pipeline_sharded import s16_03_pipeline_schedules as section
from part4_parallel_dl.ch16_model_pipeline_sharded.schedules import (
    SCHEDULES,
    Deadlock,
    Do,
    bubble,
    chunks_of,
    gpipe,
    interleaved,
    messages_sent,
    one_f_one_b,
    timeline,
)
from shared.errors import UsageError, WorkerFailed
from shared.fleet import launch
from tests.part4_parallel_dl import broken_ch16_s16_03 as broken

SMALL = dict(stages=2, micro_batches=4, layers=4, width=8, rows=1, tokens=4, pace_ms=2, repeats=1)


def failed_claims(result, timing: bool = False) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"] and (timing or not claim["timing"])]


# --- what turns claims red --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant", "claims"), [
    ("GPipe", one_f_one_b, ["GPipe holds M"]),
    ("1F1B", gpipe, ["1F1B holds min(S-r, M)"]),
    ("zero-bubble", broken.zero_bubble_with_all_weights_last, ["zero-bubble holds no more than S"]),
    ("interleaved", one_f_one_b, ["interleaving multiplies the messages"])])
def test_a_wrong_list_turns_its_claim_red(monkeypatch, name, variant, claims):
    monkeypatch.setitem(section.SCHEDULES, name, variant)
    failed = failed_claims(section.main.run(**SMALL))
    assert len(failed) == len(claims) and all(text.startswith(claim) for text, claim in zip(failed, claims)), failed


def test_a_mixture_that_is_none_turns_the_checkers_claim_red(monkeypatch):
    monkeypatch.setattr(section, "gpipe", one_f_one_b)
    [failed] = failed_claims(section.main.run(**SMALL))
    assert failed.startswith("the checker stops a mixture of 1F1B and GPipe")


@pytest.mark.parametrize(("variant", "claims"), [
    (broken.work_with_a_sum, ["all gradients of all schedules"]),
    (broken.work_without_a_weight_gradient, ["all gradients of all schedules"]),
    (broken.work_with_a_leak, ["1F1B holds min(S-r, M)", "zero-bubble holds no more than S"]),
    (broken.work_that_sends_twice, ["an activation and a gradient cross each cut"])])
def test_a_broken_rank_turns_its_claim_red(monkeypatch, variant, claims):
    monkeypatch.setattr(section, "work", variant)
    failed = failed_claims(section.main.run(**SMALL))
    assert len(failed) == len(claims) and all(text.startswith(claim) for text, claim in zip(failed, claims)), failed


@pytest.mark.timing
def test_what_the_clock_must_show_turns_red(monkeypatch):
    """A stage that is slower than declared; interleaving that does not interleave; a backward that was not cut."""
    monkeypatch.setitem(section.SCHEDULES, "zero-bubble", one_f_one_b)
    assert failed_claims(section.main.run(**(SMALL | dict(pace_ms=8))), timing=True)[0].startswith("cutting the backw")
    monkeypatch.setitem(section.SCHEDULES, "interleaved", one_f_one_b)
    monkeypatch.setattr(section, "work", broken.work_with_a_slow_stage)
    failed = " ".join(failed_claims(section.main.run(**(SMALL | dict(pace_ms=8))), timing=True))
    for claim in ("the bubble of GPipe and 1F1B is", "the event model predicts", "two chunks a rank shrink"):
        assert claim in failed


def test_a_deadlock_is_one_line_before_any_process_starts(monkeypatch):
    monkeypatch.setitem(section.SCHEDULES, "1F1B", broken.mixed)
    monkeypatch.setattr(section, "launch", None)
    with pytest.raises(Deadlock, match="rank 0 waits to do B0 of chunk 0, which needs I0 of chunk 1; rank 1 waits"):
        section.main.run(**SMALL)


def test_real_processes_hang_where_the_checker_says_so():
    with pytest.raises(WorkerFailed, match="hangs"):
        launch(2, broken.run_lists, broken.mixed(2, 4), timeout=20)
    assert [live for live, _ in launch(2, broken.run_lists, broken.mixed(2, 2), timeout=20)] == [2, 2]


# --- the lists --------------------------------------------------------------------------------------------------------


def test_book_figures():
    utilisation = [1 - bubble(timeline(gpipe(4, m))) for m in (1, 2, 4, 8, 16, 32, 64)]
    assert [round(value, 4) for value in utilisation] == [0.25, 0.4, 0.5714, 0.7273, 0.8421, 0.9143, 0.9552]


sizes = st.integers(1, 6).flatmap(lambda stages: st.tuples(st.just(stages), st.integers(1, 4).map(stages.__mul__)))


@settings(deadline=None, max_examples=25)
@given(sizes)
def test_lengths_against_their_closed_forms(size):
    stages, m = size
    length = {name: section.length(timeline(make(stages, m))) for name, make in SCHEDULES.items()}
    fill = 3 * (stages - 1)  # a forward and a backward of every other stage, in units of a forward
    assert length == pytest.approx({"GPipe": 3 * m + fill, "1F1B": 3 * m + fill, "interleaved": 3 * m + fill / 2,
                                    "zero-bubble": 3 * m + fill / 3})


@settings(deadline=None, max_examples=25)
@given(sizes, st.sampled_from(list(SCHEDULES)))
def test_every_chunk_does_every_micro_batch_once(size, name):
    stages, m = size
    lists = SCHEDULES[name](stages, m)
    kinds = "FIW" if name == "zero-bubble" else "FB"
    done = Counter((rank, *do) for rank, instructions in enumerate(lists) for do in instructions)
    assert done == Counter((chunk % stages, what, chunk, i) for chunk in range(chunks_of(lists)) for i in range(m)
                           for what in kinds)
    assert sum(messages_sent(lists)) == 2 * m * (chunks_of(lists) - 1)


def dependency_graph(lists, cost) -> nx.DiGraph:
    """What must come after what, written down anew: list order, and whose message is whose input."""
    graph, chunks = nx.DiGraph(), chunks_of(lists)
    at = {(half, do.chunk, do.micro_batch): do for instructions in lists for do in instructions
          for half in ("IW" if do.what == "B" else do.what)}
    for do in set(at.values()):
        graph.add_edge("start", do, seconds=0)
        graph.add_edge(do, (do, "end"), seconds=cost[do.what] * len(lists) / chunks)
    for instructions in lists:
        for a, b in zip(instructions, instructions[1:]):
            graph.add_edge((a, "end"), b, seconds=0)
    for (half, chunk, m), do in at.items():
        sources = {"F": [("F", chunk - 1, m)], "I": [("F", chunk, m), ("I", chunk + 1, m)], "W": [("I", chunk, m)]}
        for source in sources[half]:
            if source in at and at[source] != do:
                graph.add_edge((at[source], "end"), do, seconds=0)
    return graph


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(list(SCHEDULES)), st.data())
def test_timeline_against_the_longest_path_and_deadlock_against_a_cycle(stages, rounds, name, data):
    """With lists as they are, and with two instructions of one rank exchanged, which may or may not be harmless."""
    lists = SCHEDULES[name](stages, stages * rounds)
    mine = lists[data.draw(st.integers(0, stages - 1))]
    a, b = (data.draw(st.integers(0, len(mine) - 1)) for _ in "ab")
    mine[a], mine[b] = mine[b], mine[a]
    cost = data.draw(st.fixed_dictionaries({what: st.integers(1, 9) for what in "FBIW"}))
    graph = dependency_graph(lists, cost)
    if nx.is_directed_acyclic_graph(graph):
        longest = nx.dag_longest_path_length(graph, weight="seconds")
        assert max(span.end for spans in timeline(lists, cost) for span in spans) == pytest.approx(longest)
    else:
        with pytest.raises(Deadlock):
            timeline(lists, cost)


def test_interleaving_needs_whole_rounds():
    with pytest.raises(ValueError, match="multiples of 4 stages, not 6"):
        interleaved(4, 6)


# --- one rank, and the whole demo -------------------------------------------------------------------------------------


class Alone:
    rank, size = 0, 1

    def barrier(self):
        pass


def test_input_gradient_first_weight_gradient_later():
    import torch

    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage

    chunk = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU(), torch.nn.Linear(5, 2, bias=False))
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    torch.nn.functional.mse_loss(chunk(x.flatten(0, 1)), y.flatten(0, 1)).backward()
    expected = [p.grad for p in chunk.parameters()]
    stage = Stage(Alone(), {0: chunk}, 1, torch.nn.functional.mse_loss)
    halves = [Do("F", 0, 0), Do("F", 0, 1), Do("I", 0, 1), Do("I", 0, 0)]
    assert stage.run(halves, x, y).live == 2
    assert not any(p.grad.any() for p in chunk.parameters())
    trace = stage.run([*halves, Do("W", 0, 0), Do("W", 0, 1)], x, y)
    assert trace.live == 2 and not stage.in_flight and not stage.alive
    for parameter, gradient in zip(chunk.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_gradient_that_is_missing_or_comes_twice_is_no_agreement():
    exact = section.whole_model(2, 2, 8, 1, 4, 0)
    name = next(iter(exact))
    assert section.largest_difference(exact, [exact]) == 0
    assert section.largest_difference(exact, [exact, {name: exact[name]}]) == float("inf")
    assert section.largest_difference(exact, [{key: g for key, g in exact.items() if key != name}]) == float("inf")


def test_odd_sizes_hold_and_the_figure_takes_recorded_numbers_only():
    from matplotlib.figure import Figure

    result = section.main.run(**(SMALL | dict(stages=3, micro_batches=7, layers=7, seed=3)))
    assert not failed_claims(result)
    axes = Figure().add_subplot()
    section.draw(json.loads(json.dumps(result.to_json())), axes)
    assert [panel.get_ylabel() for panel in axes.child_axes] == list(SCHEDULES)


@pytest.mark.parametrize("wrong", [dict(micro_batches=3), dict(layers=3), dict(width=6)])
def test_sizes_that_cannot_be(wrong):
    with pytest.raises(UsageError, match="2 stages need at least 4"):
        section.main.run(**(SMALL | wrong))


# --- against torch ----------------------------------------------------------------------------------------------------

TINY = dict(stages=2, micro_batches=4, layers=4, width=8, rows=1, tokens=4, repeats=1)


@pytest.fixture
def shortcut():
    from part4_parallel_dl.ch16_model_pipeline_sharded import s16_03_shortcut_torch_pipelining

    return s16_03_shortcut_torch_pipelining


def test_shortcut_agrees_and_is_shorter(shortcut):
    result = shortcut.main.run(**(TINY | dict(stages=3, micro_batches=6, layers=6)))
    assert result.ok, failed_claims(result)
    assert result.lines_of_code["library"] < result.lines_of_code["ours"] and len(result.comparisons) == 4


def test_shortcut_disagreement_is_red(monkeypatch, shortcut):
    monkeypatch.setattr(shortcut, "both", broken.both_with_a_sum)
    lists = {"zero-bubble": broken.zero_bubble_with_all_weights_last, "interleaved": one_f_one_b}
    for name, variant in lists.items():
        monkeypatch.setitem(shortcut.SCHEDULES, name, variant)
    assert len(failed_claims(shortcut.main.run(**TINY))) == 4
    with pytest.raises(UsageError, match="in multiples of 2"):
        shortcut.main.run(**(TINY | dict(micro_batches=3)))
