"""Section 4.1 with torch: DDP under torch.profiler beside our own split of the step.

Question   Can a profiler alone tell whether a real DDP step is network-bound?
Method     Two processes take the same steps through our ring over TCP and through DDP on gloo, in turns, both links
           paced alike; the profiler's collective events give DDP's gamma.
Read       Both agree on which side of 1 a batch falls. DDP's step is the shorter one at the small batch: its gradients
           lie in the bucket already, ours are gathered and written back by Python.
Source     torch.profiler; torch.nn.parallel.DistributedDataParallel; gloo backend.
"""
from __future__ import annotations

import os

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import ring
from part1_foundations.ch04_communication_primitives.costs import seconds as all_reduce_seconds
from part1_foundations.ch04_communication_primitives.s4_01_comm_compute_ratio import examples, mlp, step, train, update
from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from shared import Run, demo, torch_world
from shared.fleet import paced
from shared.measure import ratio
from shared.transport import Link

COLLECTIVES = ("paced", "gloo:", "nccl:")  # how the profiler names them; a paced one holds gloo's within it


@demo("4.1", library="torch (torch.profiler, DDP; gloo)", needs=("torch",),
      handles=("event capture", "collective naming", "trace export"),
      smoke=dict(parameters=250_000, small=1, large=1024, repeats=5),
      laptop=dict(parameters=1_000_000, small=1, large=2048, repeats=11))
def main(run: Run, parameters: int = 250_000, small: int = 1, large: int = 1024, repeats: int = 11, link: str = "1gbe",
         seed: int = 0) -> None:
    """Measure gamma of the same step by our split and by the profiler.

    Args:
        parameters: Weights of the MLP, approximately.
        small: Examples per worker of the batch that should leave the network in charge.
        large: Examples per worker of the batch that should leave compute in charge.
        link: Pace of the link between the two; none leaves loopback as it is.
    """
    pace = Link.named(link)
    ranks = torch_world.launch(2, both, parameters, (small, large), repeats, seed, pace, wire="tcp", fabric=pace,
                               timeout=600)
    run.note(f"links paced to {pace}" if pace else "links are not paced")
    gammas, rows = {"ours": [], "library": []}, []
    for batch in (small, large):
        for side in gammas:
            gammas[side].append(float(np.median([rank[batch][f"{side} gamma"] for rank in ranks])))
        ours, library = (slowest([rank[batch][side] for rank in ranks]) for side in ("ours", "library"))
        rows.append((batch, f"{gammas['ours'][-1]:.2f}", f"{gammas['library'][-1]:.2f}", str(ours), str(library)))
        run.compare(f"one step, {batch} examples a worker", ours, library, ratio(library, ours))
    run.table("gamma = all-reduce / everything else, 2 processes", rows,
              ["local batch", "our split", "profiler", "our step", "DDP step"])
    run.lines_of_code(ours=[train, step, update], library=[profiled_gamma, paced_hook])
    run.record("batch", [small, large])
    run.record("gamma", gammas)
    for i, (name, batch) in enumerate({"small": small, "large": large}.items()):
        run.claim(f"{name} batch ({batch}): the profiler's gamma is on the same side of 1 as ours (above 1)",
                  measured=gammas["library"][i] > 1, equals=gammas["ours"][i] > 1, timing=True)
    run.claim("after the same steps DDP's weights equal ours (largest difference)", at_most=1e-6,
              measured=max(rank[batch]["difference"] for rank in ranks for batch in (small, large)))


def profiled_gamma(model, optimizer, x, y, repeats: int) -> list[float]:
    """Gamma of each of `repeats` DDP steps: time in collective events over the rest of forward and backward."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            with record_function("step"):
                torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    collectives = [event.time_range for event in profiler.events() if event.name.startswith(COLLECTIVES)]
    steps = [event.time_range for event in profiler.events() if event.name == "step"]
    inside = [max(c.elapsed_us() for c in collectives if s.start <= c.start < s.end) for s in steps]
    return [spent / (s.elapsed_us() - spent) for spent, s in zip(inside, steps, strict=True)]


def paced_hook(link: Link, bucket):
    """DDP's all-reduce, held back until `link` would have delivered a ring's messages: our side's pace."""
    import torch
    import torch.distributed as dist

    gradient, k, done = bucket.buffer(), dist.get_world_size(), torch.futures.Future()
    seconds = all_reduce_seconds("ring", k, gradient.nbytes, link.latency + link.overhead, 1 / link.bandwidth)
    with torch.profiler.record_function("paced all_reduce"), paced(seconds):
        dist.all_reduce(gradient)
    done.set_result(gradient / k)
    return done


def ddp_step(model, optimizer, x, y) -> None:
    import torch

    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def both(net, parameters: int, batches: tuple[int, int], repeats: int, seed: int, link: Link | None) -> dict:
    """On one rank: steps of both sides in turns on the same data from the same weights; then DDP under the profiler."""
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler announces itself on stderr
    import torch
    from torch.nn.parallel import DistributedDataParallel

    results = {}
    for batch in batches:
        torch.manual_seed(seed)
        mine, theirs = mlp(parameters), mlp(parameters)
        theirs.load_state_dict(mine.state_dict())
        x, y = examples(batch, seed + net.rank)
        # one bucket: no collective overlaps backward or another, so the parts add up
        ddp = DistributedDataParallel(theirs, bucket_cap_mb=1000, gradient_as_bucket_view=True)
        if link:
            ddp.register_comm_hook(link, paced_hook)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.01)
        parts: list = []
        calls = {"ours": lambda: parts.append(step(net, ring, mine, x, y)),
                 "library": lambda: ddp_step(ddp, optimizer, x, y)}
        seconds: dict = {name: [] for name in calls}
        for repeat in range(repeats + 2):
            for name in list(calls)[::-1 if repeat % 2 else 1]:
                seconds[name].append(timed(net, calls[name]))
        pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
        difference = max(float((a - b).detach().abs().max()) for a, b in pairs)
        results[batch] = {name: s[2:] for name, s in seconds.items()} | {
            "difference": difference, "library gamma": profiled_gamma(ddp, optimizer, x, y, repeats),
            "ours gamma": [all_reduce / (forward + backward) for forward, backward, all_reduce, _ in parts[2:]]}
    return results


def draw(result: dict, axes) -> None:
    records = result["records"]
    for side, label in {"ours": "our split", "library": "torch.profiler on DDP"}.items():
        axes.plot(records["batch"], records["gamma"][side], "o-", label=label)
    axes.axhline(1, color="gray", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="examples per worker", ylabel="gamma",
             title="Two workers: above 1 the network decides")
    axes.legend()


if __name__ == "__main__":
    main.cli()
