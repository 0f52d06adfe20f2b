"""Section 4.10: bucketed all-reduce behind the backward pass, and ring attention.

Question   How much of the gradient all-reduce can hide behind backward, and how large should a bucket be?
Method     Hooks on a deep torch MLP with paced layers hand full buckets to a progress thread that runs ring all-reduce
           on a paced link; an event model predicts each step. Then K/V shards circulate behind blocks of attention.
Read       Small buckets pay a latency each and form a queue, one bucket of everything starts when nothing is left to
           hide behind; the best size lies between, where the model says.
Source     Li et al. (2020), PyTorch Distributed; Liu, Zaharia & Abbeel (2023), Ring Attention.
"""
from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from typer import Option

from part1_foundations.ch04_communication_primitives.bucketer import Bucketer, TracedGroup, overlapped_step, timings
from part1_foundations.ch04_communication_primitives.collectives import Group
from part1_foundations.ch04_communication_primitives.ring_attention import (
    full_attention,
    gathered_attention,
    ring_attention,
)
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo
from shared.errors import UsageError
from shared.fleet import launch, paced
from shared.measure import AlphaBeta, fit_alpha_beta, human_bytes, human_seconds
from shared.transport import Link

HEADS, FEATURES, FLOAT = 2, 64, 4  # attention heads, features of each, bytes of a float32


@demo("4.10", needs=("torch",),
      smoke=dict(workers=2, layers=8, width=224, layer_ms=5, sequence=512, repeats=3),
      laptop=dict(workers=4, layers=24, width=200, layer_ms=8, sequence=4096, repeats=3))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 2, layers: Annotated[int, Option(min=4)] = 12,
         width: int = 224, layer_ms: float = 5.0, batch: int = 16, sequence: int = 1024, link: str = "400mbe",
         repeats: int = 5, seed: int = 0) -> None:
    """Sweep the bucket size with and without overlap, then circulate keys and values.

    Args:
        layers: Hidden layers of the MLP; the bucket sizes are its divisors.
        width: Units per layer; a layer has width * (width + 1) parameters.
        repeats: Timed repeats of each step at least; up to twice as many while a busy machine disturbs them.
        layer_ms: Declared duration of one layer's backward, in milliseconds (the real arithmetic runs inside).
        batch: Examples per rank.
        sequence: Positions of the attention part, a multiple of the workers.
    """
    sizes = [m for m in range(1, layers + 1) if layers % m == 0]
    if len(sizes) < 3:
        raise UsageError(f"--layers must have a divisor besides 1 and itself, got {layers}")
    if sequence % workers or sequence < 64 * workers:
        raise UsageError(f"--sequence must be a multiple of --workers and at least 64 for each, got {sequence}")
    pace, layer_bytes = Link.named(link), FLOAT * width * (width + 1)
    plan = (sizes, layers, width, batch, layer_ms / 1e3, repeats, seed)
    ranks = launch(workers, sweep, Bucketer, *plan, fabric=pace, timeout=600)
    fit, layer_seconds, measured = combine(ranks, sizes)
    predicted = {m: overlapped_step(layer_seconds, [layer_bytes] * layers, m * layer_bytes, fit.predict) for m in sizes}
    best = min(sizes[1:-1], key=lambda m: predicted[m]["step"])
    run.note(f"link {pace or 'not paced'}. Measured alone: an all-reduce takes {fit.alpha * 1e3:.2f} ms + bytes / "
             f"{fit.bandwidth / 1e6:.1f} MB/s, a layer's backward {human_seconds(float(np.median(layer_seconds)))}")
    rows = [(m, human_bytes(m * layer_bytes),
             *(f"{measured[m][key] * 1e3:.1f} ({predicted[m][key] * 1e3:.1f})" for key in ("serial", "step")),
             f"{measured[m]['hidden']:.0%} ({predicted[m]['hidden']:.0%})") for m in measured]
    run.table("backward plus all-reduce, best of the repeats, ms measured (predicted)", rows,
              ["layers per bucket", "bucket", "serial", "overlapped", "hidden"])
    for name, values in (("measured", measured), ("predicted", predicted)):
        run.record(name, {key: [values[m][key] for m in values] for key in ("serial", "step", "hidden")})
    run.record("sizes", list(measured))

    shown = min(ranks[0]["taken"][best, True], key=lambda step: step["step"])
    rows = [(f"{top - best + 1}-{top}", *(f"{t * 1e3:.1f}" for t in (full, begin, end)))
            for top, full, (begin, end) in zip(range(layers, 0, -best), shown["done"][best - 1::best], shown["spans"])]
    run.table(f"rank 0, a step with {best} layers per bucket, ms after backward began", rows,
              ["layers", "bucket full", "all-reduce starts", "ends"], f"backward ends at {shown['done'][-1] * 1e3:.1f}")
    run.record("timeline", {"layers": [0.0, *shown["done"]], "buckets": shown["spans"], "layers_per_bucket": best})

    run.claim(f"overlap shortens the step at the model's middle bucket size, {best} layers (serial / overlapped)",
              measured=measured[best]["serial"] / measured[best]["step"], at_least=1.1, timing=True)
    run.claim("one bucket of everything hides under 10 %", measured=measured[layers]["hidden"], below=0.10, timing=True)
    run.claim("the event model predicts the hidden fraction within 15 points at every bucket size (largest gap)",
              measured=max(abs(measured[m]["hidden"] - predicted[m]["hidden"]) for m in sizes), at_most=0.15,
              timing=True)
    run.claim("overlapped gradients equal serial ones bit for bit at equal bucketing (elements that differ)",
              measured=sum(rank["differ"] for rank in ranks), equals=0)
    attention_part(run, workers, sequence, pace, repeats, seed)


def paced_mlp(layers: int, width: int, seconds: float):
    """A torch MLP in which the backward of each linear layer lasts `seconds`, its real arithmetic included."""
    import torch

    class Affine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return x @ weight.T + bias

        @staticmethod
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            with paced(seconds):
                return gradient @ weight, gradient.T @ x, gradient.sum(0)

    class Linear(torch.nn.Linear):
        def forward(self, x):
            return Affine.apply(x, self.weight, self.bias)

    torch.manual_seed(0)  # the same weights on every rank
    model = torch.nn.Sequential(*(module for _ in range(layers) for module in (Linear(width, width), torch.nn.ReLU())))
    for linear in model[::2]:
        torch.nn.init.kaiming_normal_(linear.weight)  # gradients of one size in all layers
    return model


def loss_of(model, width: int, batch: int, seed: Sequence[int]):
    """Mean square error of `model` on a batch of its own, ready for backward()."""
    import torch

    x, target = torch.from_numpy(np.random.default_rng(seed).standard_normal((2, batch, width)).astype(np.float32))
    model.zero_grad(set_to_none=True)
    return torch.nn.functional.mse_loss(model(x), target)


def sweep(net, bucketer, sizes: list[int], layers: int, width: int, batch: int, seconds: float, repeats: int,
          seed: int) -> dict:
    """On one rank: steps with every bucket size, serial and overlapped in turn; gradients compared after each pair."""
    model, group, layer_bytes = paced_mlp(layers, width, seconds), TracedGroup(net), FLOAT * width * (width + 1)
    done: list[float] = []  # when each gradient was there, last layer first
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: done.append(time.perf_counter()))

    def step(layers_per_bucket: int, overlap: bool, repeat: int) -> tuple[dict, list]:
        buckets = bucketer(model.parameters(), layers_per_bucket * layer_bytes, group, overlap)
        loss = loss_of(model, width, batch, (seed, net.rank, repeat))
        done.clear()
        group.spans.clear()
        net.barrier()
        begin = time.perf_counter()
        loss.backward()
        buckets.wait()
        elapsed = time.perf_counter() - begin
        buckets.close()
        times = {"step": elapsed, "done": [t - begin for t in done[1::2]],  # a layer is done with its second parameter
                 "spans": [(a - begin, b - begin) for a, b in group.spans]}
        return times, [parameter.grad for parameter in model.parameters()]

    step(1, True, 2 * repeats)  # warm up
    taken: dict = {(m, overlap): [] for m in sizes for overlap in (False, True)}
    alone: dict[int, list[float]] = {m * layer_bytes: [] for m in (1, sizes[-2], layers)}  # bytes: seconds
    differ = 0
    for repeat in range(2 * repeats):
        if repeat >= repeats and settled(group, taken):
            break
        for nbytes in alone:
            x = np.zeros(nbytes // FLOAT, np.float32)
            alone[nbytes].append(timed(net, lambda: group.iall_reduce(x, op="avg").wait()))
        for m in sizes:
            gradients = {}
            for overlap in (False, True)[::-1 if repeat % 2 else 1]:
                times, gradients[overlap] = step(m, overlap, repeat)
                taken[m, overlap].append(times)
            differ += sum(int((a != b).sum()) for a, b in zip(gradients[False], gradients[True]))
    return {"taken": taken, "alone": alone, "differ": differ}


def settled(group: Group, taken: dict) -> bool:
    """Whether the two best repeats of every step agree within 5 % on every rank: if not, the machine is busy, go on."""
    fastest = np.sort([[step["step"] for step in steps] for steps in taken.values()])[:, :2]
    return not group.all_reduce(np.array([(fastest[:, -1] > 1.05 * fastest[:, 0]).any()], float), op="max")[0]


def combine(ranks: list[dict], sizes: list[int]) -> tuple[AlphaBeta, list[float], dict[int, dict]]:
    """What the model needs (alpha and beta of an all-reduce alone, layers' seconds, last first) and what it predicts.

    All take the slowest rank and the best repeat: in paced work, neighbours on the machine can only add time.
    """
    def best(samples) -> np.ndarray:
        return np.min(np.max(samples, axis=0), axis=0)  # (K, repeats, ...) -> (...)

    alone = {nbytes: best([rank["alone"][nbytes] for rank in ranks]) for nbytes in ranks[0]["alone"]}
    ready = best([[step["done"] for m in sizes for step in rank["taken"][m, False]] for rank in ranks])
    steps = {key: best([[step["step"] for step in rank["taken"][key]] for rank in ranks]) for key in ranks[0]["taken"]}
    measured = {m: timings(*map(float, (ready[-1], steps[m, True], steps[m, False]))) for m in sizes}
    return fit_alpha_beta(list(alone), list(alone.values())), np.diff(ready, prepend=0).tolist(), measured


def attention_part(run: Run, workers: int, sequence: int, pace: Link | None, repeats: int, seed: int) -> None:
    methods = {"ring attention": ring_attention, "all-gather, then attend": gathered_attention}
    ranks = launch(workers, attend, methods, sequence, repeats, seed, fabric=pace, timeout=600)
    shard = ranks[0]["shard"]
    rows = [(name, "causal" if causal else "none", str(slowest([rank[name, causal]["seconds"] for rank in ranks])),
             max(rank[name, causal]["error"] for rank in ranks), max(rank[name, "held"] for rank in ranks))
            for causal in (False, True) for name in methods]
    run.table(f"attention over {sequence} positions, {HEADS} heads of {FEATURES}, {workers} processes", rows,
              ["method", "mask", "time", "largest error", "K/V shards held"],
              note=f"held: peak memory of a pass with one query row, in shards of {human_bytes(shard)}")
    run.claim("ring attention equals full attention (largest difference from float64)", at_most=1e-5,
              measured=max(rank["ring attention", causal]["error"] for rank in ranks for causal in (False, True)))
    run.claim("a rank holds at most two K/V shards (measured memory; scores and small objects tolerated)",
              measured=max(rank["ring attention", "held"] for rank in ranks), at_most=2, tolerance=0.05 + 2**15 / shard)


def attend(net, methods: dict[str, Callable], sequence: int, repeats: int, seed: int) -> dict:
    """On one rank: time, error and resident K/V shards of each method on its stretch of one sequence."""
    whole = np.random.default_rng(seed).standard_normal((3, HEADS, sequence, FEATURES)).astype(np.float32)
    n, first = sequence // net.size, net.rank * sequence // net.size
    queries, shard = whole[0, :, first:first + n].copy(), whole[1:, :, first:first + n].copy()
    results: dict = {"shard": shard.nbytes}
    for causal in (False, True):
        exact = np.stack([full_attention(q[None], k[None], v[None], first if causal else None)[0]  # a head at a time
                          for q, k, v in zip(queries.astype(float), *whole[1:].astype(float))])
        for name, method in methods.items():
            results[name, causal] = {
                "error": float(np.abs(method(net, queries, shard, causal) - exact).max()),
                "seconds": [timed(net, lambda: method(net, queries, shard, causal)) for _ in range(repeats)]}
    for name, method in methods.items():
        tracemalloc.start()
        method(net, queries[:, :1], shard)
        results[name, "held"] = (shard.nbytes + tracemalloc.get_traced_memory()[1]) / shard.nbytes
        tracemalloc.stop()
    return results


def draw(result: dict, axes) -> None:
    records, timeline = result["records"], result["records"]["timeline"]
    axes.set_axis_off()
    above, below = axes.inset_axes([0, 0.7, 1, 0.3]), axes.inset_axes([0, 0, 1, 0.5])
    for lane, edges in enumerate([timeline["buckets"], list(zip(timeline["layers"], timeline["layers"][1:]))]):
        bars = [(begin * 1e3, (end - begin) * 1e3) for begin, end in edges]
        above.broken_barh(bars, (lane - 0.35, 0.7), facecolor=f"C{1 - lane}", edgecolor="white", linewidth=0.5)
    above.set(yticks=[0, 1], yticklabels=["all-reduce", "backward"], xlabel="ms",
              title=f"One overlapped step, {timeline['layers_per_bucket']} layers per bucket")
    for i, (key, label) in enumerate({"serial": "serial", "step": "overlapped"}.items()):
        below.plot(records["sizes"], np.multiply(records["measured"][key], 1e3), "o", color=f"C{i}", label=label)
        below.plot(records["sizes"], np.multiply(records["predicted"][key], 1e3), "-", color=f"C{i}", linewidth=1)
    below.set(xscale="log", xlabel="layers per bucket", ylabel="step (ms)")
    below.set_xticks(records["sizes"], records["sizes"])
    below.set_xticks([], minor=True)
    below.legend(title="points measured, lines modelled")


if __name__ == "__main__":
    main.cli()
