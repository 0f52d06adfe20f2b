"""Section 4.10: buckets, the event model, ring attention, DDP beside them, and what turns each claim red."""
from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from part1_foundations.ch04_communication_primitives import s4_10_overlap_and_buckets as section
from part1_foundations.ch04_communication_primitives import s4_10_shortcut_ddp_bucket_cap as shortcut
from part1_foundations.ch04_communication_primitives.bucketer import Bucketer, fill_buckets, overlapped_step, timings
from part1_foundations.ch04_communication_primitives.collectives import Group
from part1_foundations.ch04_communication_primitives.ring_attention import (
    OnlineSoftmax,
    circulate,
    full_attention,
    merge_shards,
    ring_attention,
)
from shared.errors import UsageError
from shared.fleet import launch
from shared.plot import figure

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch: pip install -e '.[torch]'")
TIMED = dict(workers=2, layers=4, width=256, layer_ms=6, sequence=128, repeats=4)
QUICK = dict(workers=2, layers=4, width=16, layer_ms=1, sequence=128, repeats=1, link="1gbe")
SHORT = dict(workers=2, layers=4, width=32, layer_ms=1, repeats=1)


def failed(result, timing: bool) -> list[str]:
    return [claim["text"] for claim in result.claims if not claim["holds"] and claim["timing"] <= timing]


# --- broken variants, run by real workers ---------------------------------------------------------------------------


class LateBucketer(Bucketer):
    """Starts nothing before wait()."""

    def __init__(self, params, cap_bytes, group, overlap=True):
        super().__init__(params, cap_bytes, group, overlap=False)


class CaplessBucketer(Bucketer):
    """Sends every parameter by itself, whatever the cap."""

    def __init__(self, params, cap_bytes, group, overlap=True):
        super().__init__(params, 1, group, overlap)


class StaleBucketer(Bucketer):
    """Overlapping, it sends a bucket without having copied the gradient that completes it."""

    def _on_gradient(self, param):
        bucket, i = self._place[param]
        before = bucket.views[i].clone()
        if self.overlap and bucket.missing == {i}:
            param.grad, good = before, param.grad
            super()._on_gradient(param)
            param.grad = good
        else:
            super()._on_gradient(param)


class SummingBucketer(Bucketer):
    """Forgets to divide by the number of ranks."""

    def _start_next(self):
        bucket = self.buckets[self._started]
        bucket.work = self.group.iall_reduce(bucket.flat.numpy())
        self._started += 1


def first_gradient_model(layer_seconds, layer_bytes, cap_bytes, all_reduce_seconds):
    """Lets a bucket leave with its first gradient instead of its last."""
    ready, lane_free, communication = np.cumsum(layer_seconds), 0.0, 0.0
    for bucket in fill_buckets(layer_bytes, cap_bytes):
        duration = all_reduce_seconds(sum(layer_bytes[i] for i in bucket))
        lane_free = max(lane_free, ready[bucket[0]]) + duration
        communication += duration
    return timings(ready[-1], max(lane_free, ready[-1]), ready[-1] + communication)


def ring_averaging_shards(net, queries, kv, causal=False):
    """Averages the shards' attentions with equal weights instead of by their softmax denominators."""
    parts = []
    for owner, shard in circulate(net, kv):
        if not causal or owner <= net.rank:
            parts.append(merge_shards(queries, [(owner, shard)], net.rank, causal))
    return np.mean(parts, axis=0)


def ring_seeing_the_future(net, queries, kv, causal=False):
    return ring_attention(net, queries, kv)


def ring_hoarding(net, queries, kv, causal=False):
    """Keeps a copy of every shard that comes by."""
    kept = [(owner, shard.copy()) for owner, shard in circulate(net, kv)]
    return merge_shards(queries, kept, net.rank, causal)


@needs_torch
@pytest.mark.timing
@pytest.mark.parametrize(("name", "variant", "claims"), [
    ("Bucketer", LateBucketer, ["overlap shortens the step", "the event model predicts"]),
    ("Bucketer", CaplessBucketer, ["one bucket of everything hides", "the event model predicts"]),
    ("overlapped_step", first_gradient_model, ["the event model predicts"]),
])
def test_a_broken_overlap_turns_its_claims_red(monkeypatch, name, variant, claims):
    monkeypatch.setattr(section, name, variant)
    texts = failed(section.main.run(**TIMED), timing=True)
    assert len(texts) == len(claims) and all(text.startswith(start) for text, start in zip(texts, claims)), texts


@needs_torch
@pytest.mark.parametrize(("name", "variant", "claim"), [
    ("Bucketer", StaleBucketer, "overlapped gradients equal serial ones"),
    ("ring_attention", ring_averaging_shards, "ring attention equals full attention"),
    ("ring_attention", ring_seeing_the_future, "ring attention equals full attention"),
    ("ring_attention", ring_hoarding, "a rank holds at most two K/V shards"),
])
def test_a_broken_algorithm_turns_its_claim_red(monkeypatch, name, variant, claim):
    monkeypatch.setattr(section, name, variant)
    texts = failed(section.main.run(**QUICK), timing=False)
    assert len(texts) == 1 and texts[0].startswith(claim), texts


@needs_torch
def test_the_demo_with_three_workers_and_its_figure():
    result = section.main.run(**QUICK | {"workers": 3, "sequence": 192})
    assert failed(result, timing=False) == []
    assert [row[0] for row in result.tables[0]["rows"]] == [1, 2, 4]
    assert len(result.records["timeline"]["layers"]) == 5 and len(result.records["timeline"]["buckets"]) == 2
    assert len(figure(result.to_json(), section.draw).axes[0].child_axes) == 2


@pytest.mark.parametrize("wrong", [dict(layers=7), dict(sequence=1001), dict(workers=4, sequence=128)])
def test_values_that_make_no_sense_are_usage_errors(wrong):
    with pytest.raises(UsageError, match="--layers|--sequence"):
        section.main.function(None, **wrong)


# --- the event model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers_per_bucket", "milliseconds", "hidden"), [
    (1, 146.3, 97.9), (2, 148.4, 95.8), (4, 152.5, 91.7), (8, 160.9, 83.3), (16, 177.5, 66.7), (48, 244.2, 0.0)])
def test_book_figures(layers_per_bucket, milliseconds, hidden):
    step = overlapped_step([3e-3] * 48, [25e6] * 48, 25e6 * layers_per_bucket, lambda n: 200e-6 + n / 12e9)
    assert round(1e3 * step["step"], 1) == milliseconds
    assert abs(round(100 * step["hidden"], 1)) == hidden
    assert round(1e3 * step["serial"], 1) == 253.6 or layers_per_bucket > 1


LAYERS = st.lists(st.tuples(st.floats(1e-4, 1e-2), st.integers(1, 10**6)), min_size=1, max_size=30)


@given(layers=LAYERS, cap=st.integers(1, 3 * 10**6), alpha=st.floats(1e-5, 1e-2), beta=st.floats(1e-10, 1e-7))
def test_the_event_model_is_the_simpy_simulation(layers, cap, alpha, beta):
    seconds, sizes = zip(*layers)
    world = simpy.Environment()
    lane, finished = simpy.Resource(world, 1), []

    def all_reduce(nbytes):
        with lane.request() as turn:
            yield turn
            yield world.timeout(alpha + beta * nbytes)
        finished.append(world.now)

    def backward():
        held = 0
        for i, (duration, nbytes) in enumerate(layers):
            yield world.timeout(duration)
            held += nbytes
            if held >= cap or i == len(layers) - 1:
                world.process(all_reduce(held))
                held = 0

    world.process(backward())
    world.run()
    step = overlapped_step(seconds, sizes, cap, lambda n: alpha + beta * n)
    assert step["step"] == pytest.approx(max(finished))
    assert step["backward"] == pytest.approx(sum(seconds))
    assert step["serial"] == pytest.approx(sum(seconds) + len(finished) * alpha + beta * sum(sizes))
    assert -1e-9 <= step["hidden"] <= 1


@needs_torch
@settings(deadline=None)  # the first example imports torch
@given(elements=st.lists(st.integers(1, 50), min_size=1, max_size=20), cap=st.integers(1, 1000))
def test_buckets_are_filled_as_torch_fills_them(elements, cap):
    import torch
    import torch.distributed as dist

    assignment, _ = dist._compute_bucket_assignment_by_size([torch.empty(n) for n in elements], [cap])
    assert fill_buckets([4 * n for n in elements], cap) == assignment


# --- the Bucketer -----------------------------------------------------------------------------------------------------


def bucketed(net, cap_bytes: float, rounds: int) -> list:
    """Local and averaged gradients of three parameters, finished in another order on each rank; rank 1 skips one."""
    import torch

    rng = np.random.default_rng(net.rank)
    params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((5,), (2, 3), (4,))]
    bucketer, history = Bucketer(params, cap_bytes, Group(net)), []
    for _ in range(rounds):
        local = [torch.from_numpy(rng.standard_normal(p.shape)) for p in params]
        if net.rank == 1:
            local[2].zero_()
        for p in params:
            p.grad = None
        for i in np.roll(range(3), net.rank):
            if not (net.rank == 1 and i == 2):
                (params[i] * local[i]).sum().backward()
        bucketer.wait()
        history.append(([x.numpy() for x in local], [p.grad.numpy().copy() for p in params]))
    bucketer.close()
    params[0].sum().backward()  # no hook any more: nothing is sent, nothing is noticed
    return history


@needs_torch
@pytest.mark.parametrize("cap_bytes", [1, 60, 1e9])
def test_bucketed_gradients_are_the_mean_over_ranks(cap_bytes):
    ranks = launch(3, bucketed, cap_bytes, 3)
    for steps in zip(*ranks):
        for i in range(3):
            mean = np.mean([local[i] for local, _ in steps], axis=0)
            for _, averaged in steps:
                np.testing.assert_allclose(averaged[i], mean, rtol=1e-14, atol=1e-15)


@needs_torch
def test_misuse_of_the_bucketer_is_refused():
    import torch

    with pytest.raises(ValueError, match="same dtype"):
        Bucketer([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.float64))], 1, None)
    p = torch.nn.Parameter(torch.ones(2))
    Bucketer([p, torch.nn.Parameter(torch.ones(2))], 1e9, None)
    p.sum().backward()
    with pytest.raises(RuntimeError, match="second backward"):
        p.sum().backward()


# --- ring attention ---------------------------------------------------------------------------------------------------


def attend_some(net, cases: list) -> list:
    results = []
    for n, d, scale, causal in cases:
        q, k, v = np.random.default_rng(n * d).standard_normal((3, 2, n * net.size, d)) * scale
        mine = slice(net.rank * n, (net.rank + 1) * n)
        kv = np.stack([k[:, mine], v[:, mine]])
        before = kv.copy()
        net.reset_stats()
        out = ring_attention(net, q[:, mine], kv, causal)
        sent = net.stats().sent_to()
        results.append((out, np.array_equal(before, kv), sent.messages, sent.bytes / kv.nbytes))
    return results


@needs_torch
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ring_attention_is_torchs_attention(workers):
    import torch

    shapes = ((1, 1), (2, 4), (33, 8))
    cases = [(n, d, scale, causal) for n, d in shapes for scale in (1, 40) for causal in (False, True)]
    ranks = launch(workers, attend_some, cases)
    for (n, d, scale, causal), outcomes in zip(cases, zip(*ranks)):
        q, k, v = torch.from_numpy(np.random.default_rng(n * d).standard_normal((3, 2, n * workers, d)) * scale)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).numpy()
        ours = np.concatenate([out for out, *_ in outcomes], axis=1)
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-9)
        hops = workers if workers > 1 else 0
        assert all((home, messages, shards) == (True, hops, hops) for _, home, messages, shards in outcomes)


@given(cuts=st.lists(st.integers(1, 11), unique=True, max_size=5), order=st.randoms(use_true_random=False),
       scale=st.sampled_from([0.1, 1.0, 300.0]))
def test_online_softmax_takes_blocks_in_any_order(cuts, order, scale):
    q, k, v = np.random.default_rng(len(cuts)).standard_normal((3, 2, 12, 4)) * scale
    blocks = list(zip([0, *sorted(cuts)], [*sorted(cuts), 12]))
    order.shuffle(blocks)
    visible, softmax = np.tri(12, dtype=bool), OnlineSoftmax(q)
    for a, b in blocks:
        softmax.add(k[:, a:b], v[:, a:b], visible[:, a:b])
    np.testing.assert_allclose(softmax.result(), full_attention(q, k, v, first=0), rtol=1e-9, atol=1e-12)
    scores = np.where(visible, q @ k.swapaxes(1, 2) / 2, -np.inf)
    np.testing.assert_allclose(softmax.log_sum_exp(), logsumexp(scores, axis=-1), rtol=1e-9, atol=1e-9)


# --- the shortcut -----------------------------------------------------------------------------------------------------


@needs_torch
def test_the_shortcut_agrees():
    good = shortcut.main.run(**SHORT)
    assert failed(good, timing=True) == [] and good.lines_of_code["library"] < good.lines_of_code["ours"]
    assert [row[1:3] for row in good.tables[0]["rows"]] == [[4, 4], [2, 2], [1, 1]]


@needs_torch
@pytest.mark.parametrize(("variant", "claim"), [
    (SummingBucketer, "DDP's gradients equal ours"), (CaplessBucketer, "DDP's trace has as many collectives")])
def test_a_broken_bucketer_turns_the_shortcut_red(monkeypatch, variant, claim):
    monkeypatch.setattr(shortcut, "both", {SummingBucketer: both_summing, CaplessBucketer: both_capless}[variant])
    texts = failed(shortcut.main.run(**SHORT), timing=True)
    assert len(texts) == 1 and texts[0].startswith(claim), texts


_both = shortcut.both


def both_summing(net, *args):
    shortcut.Bucketer = SummingBucketer  # in the worker, which imported the module afresh
    return _both(net, *args)


def both_capless(net, *args):
    shortcut.Bucketer = CaplessBucketer
    return _both(net, *args)
