"""Section 4.10 with torch: DistributedDataParallel's bucket_cap_mb beside our Bucketer.

Question   Does DDP bucket and overlap as our hooks do, and what does its bucket cap change?
Method     The same K processes train the same paced MLP under DDP and under our Bucketer in turns, with three bucket
           caps, beside a backward without all-reduce; a profiler trace of one DDP step counts its collectives.
Read       Layouts and gradients are the same, and neither side is reliably faster: both hide the all-reduce behind a
           backward that sets the pace.
Source     Li et al. (2020), PyTorch Distributed; torch.nn.parallel.DistributedDataParallel.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

from typer import Option

from part1_foundations.ch04_communication_primitives.bucketer import Bucket, Bucketer, fill_buckets
from part1_foundations.ch04_communication_primitives.collectives import Group, Progress
from part1_foundations.ch04_communication_primitives.s4_10_overlap_and_buckets import FLOAT, loss_of, paced_mlp
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.measure import human_bytes, human_seconds, ratio


@demo("4.10", library="torch (DistributedDataParallel)", needs=("torch",),
      handles=("bucket order rebuilt from the first backward", "unused parameters", "hook registration",
               "gradient views instead of copies", "communication hooks"),
      smoke=dict(workers=2, layers=8, repeats=3), laptop=dict(workers=4, layers=24, layer_ms=6, repeats=7))
def main(run: Run, workers: Annotated[int, Option(min=2)] = 2, layers: Annotated[int, Option(min=4)] = 8,
         width: int = 256, layer_ms: float = 3.0, batch: int = 16, wire: str = "shm", repeats: int = 9,
         seed: int = 0) -> None:
    """Compare DDP's buckets with ours.

    Args:
        layers: Hidden layers of the MLP.
        width: Units per layer.
        layer_ms: Declared duration of one layer's backward, in milliseconds.
        batch: Examples per rank.
        wire: Transport of our ring: shm, unix or tcp.
    """
    caps = [1, max(2, layers // 4), layers]
    ranks = torch_world.launch(workers, both, caps, layers, width, batch, layer_ms / 1e3, repeats, seed, wire=wire,
                               timeout=600)
    rows = []
    for cap in caps:
        alone, ours, library = (slowest([rank[cap][side] for rank in ranks]) for side in ("alone", "ours", "library"))
        first = ranks[0][cap]
        rows.append((human_bytes(cap * first["layer_bytes"]), first["buckets"], first["collectives"],
                     human_seconds(alone.median), str(ours), str(library), f"{ratio(library, ours).median:.2f}"))
        if cap == caps[1]:
            run.compare(f"backward with all-reduce, {cap} layers per bucket", ours, library)
    run.table(f"backward of {layers} layers paced to {layer_ms:g} ms each, {workers} processes", rows,
              ["cap", "our buckets", "DDP's", "no all-reduce", f"ours on {wire}", "DDP on gloo", "DDP / ours"])
    run.lines_of_code(ours=[Bucketer, Bucket, fill_buckets, Progress], library=[wrap])

    run.claim("DDP's gradients equal ours, largest relative difference", at_most=1e-6,
              measured=max(rank[cap]["difference"] for rank in ranks for cap in caps))
    run.claim("DDP's trace has as many collectives as its hook saw buckets and as we have, for every cap",
              measured=[[(rank[cap]["collectives"], rank[cap]["hooked"]) for cap in caps] for rank in ranks],
              equals=[[(rank[cap]["buckets"],) * 2 for cap in caps] for rank in ranks])


def wrap(model, cap_bytes: float):
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, bucket_cap_mb=cap_bytes / 2**20)


def both(net, caps: list[int], layers: int, width: int, batch: int, seconds: float, repeats: int, seed: int) -> dict:
    """On one rank: backward with all-reduce under both, in turns, the order reversed in every other repeat."""
    layer_bytes, results, group = FLOAT * width * (width + 1), {}, Group(net)
    for cap in caps:
        plain, mine, theirs = (paced_mlp(layers, width, seconds) for _ in range(3))
        buckets, theirs = Bucketer(mine.parameters(), cap * layer_bytes, group), wrap(theirs, cap * layer_bytes)

        def step(name: str, repeat: int) -> float:
            loss = loss_of(models[name], width, batch, (seed, net.rank, repeat))
            return timed(net, lambda: (loss.backward(), buckets.wait() if name == "ours" else None))

        models = {"alone": plain, "ours": mine, "library": theirs}
        samples: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(repeats + 2):  # two to warm up: DDP lays out its buckets anew after its first backward
            for name in list(models)[::-1 if repeat % 2 else 1]:
                samples[name].append(step(name, repeat))
        difference = max(float((a.grad - b.grad).abs().max() / a.grad.abs().max())
                         for a, b in zip(mine.parameters(), theirs.parameters()))
        seen: list[int] = []
        theirs.register_comm_hook(seen, noting_hook)
        results[cap] = {name: taken[2:] for name, taken in samples.items()} | {
            "buckets": len(buckets.buckets), "collectives": traced_collectives(lambda: step("library", 0)),
            "hooked": len(seen), "difference": difference, "layer_bytes": layer_bytes}
        buckets.close()
    return results


def noting_hook(seen: list[int], bucket):
    """A DDP communication hook: the ordinary averaging all-reduce, and a note of each bucket."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    seen.append(bucket.index())
    return allreduce_hook(None, bucket)


def traced_collectives(step: Callable[[], object]) -> int:
    """All-reduces in a profiler trace of one call of `step`."""
    from torch.profiler import ProfilerActivity, profile

    os.environ["KINETO_LOG_LEVEL"] = "99"  # its start and stop are no news
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    return sum(event.name == "gloo:all_reduce" for event in trace.events())


if __name__ == "__main__":
    main.cli()
