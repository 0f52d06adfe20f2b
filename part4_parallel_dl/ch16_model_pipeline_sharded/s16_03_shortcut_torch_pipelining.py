"""Section 16.3 with torch.distributed.pipelining: ScheduleGPipe, Schedule1F1B, interleaved and zero-bubble.

Question   What does torch's pipeline package do for us, and does it run the schedules that we wrote down?
Method     The same processes train the same TinyGPT on the same micro-batches both ways in turns, ours over Unix
           sockets, torch's over gloo; losses, gradients and instruction lists are compared.
Read       The same gradients from the same lists. The more instructions a schedule has, the further ours is ahead:
           torch posts and awaits a gloo request over loopback TCP around each, ours one message on a Unix socket.
Source     torch.distributed.pipelining; Narayanan et al. (2021); Qi et al. (2024).
"""
from __future__ import annotations

from typing import Annotated

from typer import Option

from part1_foundations.ch04_communication_primitives.timing import slowest, timed
from part4_parallel_dl.ch16_model_pipeline_sharded import schedules
from part4_parallel_dl.ch16_model_pipeline_sharded.s16_03_pipeline_schedules import (
    gradients,
    largest_difference,
    make_batch,
    make_model,
)
from part4_parallel_dl.ch16_model_pipeline_sharded.schedules import SCHEDULES, chunks_of
from shared import Run, demo, torch_world
from shared.errors import UsageError
from shared.fleet import preload


@demo("16.3", library="torch.distributed.pipelining", needs=("torch",),
      handles=("splitting a batch into micro-batches", "shapes of messages inferred", "a tracer that cuts a model",
               "any autograd graph cut into I and W", "composition with FSDP and tensor parallelism"),
      smoke=dict(stages=2, micro_batches=4, layers=4, width=32, repeats=3),
      laptop=dict(stages=4, micro_batches=16, width=128, repeats=9))
def main(run: Run, stages: Annotated[int, Option(min=2)] = 4, micro_batches: int = 8, layers: int = 8,
         width: Annotated[int, Option(min=4)] = 64, rows: int = 2, tokens: int = 32, repeats: int = 5,
         seed: int = 0) -> None:
    """Run four schedules with torch and with our own code, neither paced.

    Args:
        stages: Processes that share the layers out, at least 2.
        micro_batches: Micro-batches of a step, a multiple of the stages.
        layers: Blocks of the model, at least 2 for each stage.
        width: Features of an activation, a multiple of 4 heads.
        rows: Sequences in a micro-batch.
        tokens: Length of a sequence.
    """
    if micro_batches % stages or layers < 2 * stages or width % 4:
        raise UsageError(f"{stages} stages need micro-batches in multiples of {stages}, at least {2 * stages} layers "
                         f"and a width in fours; got {micro_batches}, {layers} and {width}")
    preload("torch")  # in the background, while this process imports it too
    ranks = torch_world.launch(stages, both, micro_batches, (layers, width, tokens, seed), rows, repeats, seed,
                               wire="unix", timeout=600)
    rows_, errors = [], {}
    for name in SCHEDULES:
        found = [rank[name] for rank in ranks]
        ours, library = (slowest([rank["seconds"][side] for rank in found]) for side in ("ours", "library"))
        whole = {key: g for rank in found for key, g in rank["gradients"]["ours"].items()}
        loss = {side: sum(rank["loss"][side] for rank in found) for side in ("ours", "library")}
        errors[name] = {"gradients": largest_difference(whole, [rank["gradients"]["library"] for rank in found]),
                        "loss": abs(loss["ours"] - loss["library"])}
        rows_.append((name, f"{loss['ours']:.6f}", f"{loss['library']:.6f}", f"{errors[name]['gradients']:.1e}"))
        run.compare(f"one step, {name}", ours, library)
    run.table(f"one step of TinyGPT, {layers} layers of width {width}, through {stages} stages, not paced", rows_,
              ["schedule", "our loss", "torch's loss", "gradient difference"])
    from part4_parallel_dl.ch16_model_pipeline_sharded import pipeline

    run.lines_of_code(ours=[schedules, pipeline], library=[library_schedule, library_step])

    run.claim("the losses agree (largest difference)", measured=max(e["loss"] for e in errors.values()), at_most=1e-5)
    run.claim("the gradients agree (largest difference)", at_most=1e-5,
              measured=max(e["gradients"] for e in errors.values()))
    for name in ("interleaved", "zero-bubble"):
        mine = [[f"{do.chunk}{do.what}{do.micro_batch}" for do in rank]
                for rank in SCHEDULES[name](stages, micro_batches)]
        theirs = ranks[0][name]["order"]
        run.claim(f"torch's instruction lists for {name} are ours (instructions that differ)", equals=0,
                  measured=sum(a != b for ours, library in zip(mine, theirs) for a, b in zip(ours, library))
                  + sum(abs(len(ours) - len(library)) for ours, library in zip(mine, theirs)))


def library_schedule(name: str, chunks: dict, total: int, micro_batches: int, loss):
    from torch.distributed import pipelining as torch_pipelining
    from torch.distributed.pipelining import schedules as library

    stages = [torch_pipelining.PipelineStage(chunk, index, total, "cpu") for index, chunk in chunks.items()]
    if name in ("GPipe", "1F1B"):
        single = {"GPipe": library.ScheduleGPipe, "1F1B": library.Schedule1F1B}[name]
        return single(*stages, micro_batches, loss_fn=loss)
    several = {"interleaved": library.ScheduleInterleaved1F1B, "zero-bubble": library.ScheduleInterleavedZeroBubble}
    return several[name](stages, micro_batches, loss_fn=loss)


def library_step(schedule, first: bool, last: bool, x, y) -> list:
    """One step on the whole batch; the losses of the micro-batches on the last rank."""
    losses: list = []
    schedule.step(*[x] * first, **(dict(target=y, losses=losses) if last else {}))
    return losses


def both(net, micro_batches: int, model_shape: tuple[int, int, int, int], rows: int, repeats: int, seed: int) -> dict:
    """On one rank: each schedule both ways in turns, on two copies of the model with the same weights."""
    from part4_parallel_dl.ch15_data_parallel.tiny_gpt import cross_entropy
    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage, chunks_of_rank

    inputs, targets = make_batch(micro_batches, rows, model_shape[2], seed)
    x, y = inputs.flatten(0, 1), targets.flatten(0, 1)
    results = {}
    for name, make in SCHEDULES.items():
        lists = make(net.size, micro_batches)
        total = chunks_of(lists)
        models = {side: make_model(*model_shape) for side in ("ours", "library")}
        ours = Stage(net, chunks_of_rank(models["ours"], total, net), total, cross_entropy)
        library = library_schedule(name, chunks_of_rank(models["library"], total, net), total, micro_batches,
                                   cross_entropy)
        loss: dict = {}

        def run_ours() -> None:
            loss["ours"] = ours.run(lists[net.rank], inputs, targets).loss

        def run_library() -> None:
            models["library"].zero_grad()
            losses = library_step(library, net.rank == 0, net.rank == net.size - 1, x, y)
            loss["library"] = sum(loss.item() for loss in losses) / micro_batches

        turns, seconds = {"ours": run_ours, "library": run_library}, {"ours": [], "library": []}
        for repeat in range(repeats + 1):
            for side in list(turns)[::-1 if repeat % 2 else 1]:
                elapsed = timed(net, turns[side])
                if repeat:  # the first one warms up, and lets torch infer its shapes
                    seconds[side].append(elapsed)
        order = getattr(library, "pipeline_order", {})
        results[name] = {"seconds": seconds, "loss": loss,
                         "gradients": {side: gradients(model) for side, model in models.items()},
                         "order": [[str(action) for action in order[rank] if action] for rank in sorted(order)]}
    return results


if __name__ == "__main__":
    main.cli()
