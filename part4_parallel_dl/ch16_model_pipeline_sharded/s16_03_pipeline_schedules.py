"""Section 16.3: GPipe, 1F1B, interleaved and zero-bubble pipelines.

Question   A model is cut by depth over S machines: in which order should they work, and how long do they still idle?
Method     S processes hold the layers of one TinyGPT and carry out four instruction lists on the same micro-batches,
           each instruction paced to a declared length with the real arithmetic inside; gradients, live activations
           and messages are checked and counted, and an event model predicts every run.
Read       More micro-batches shrink the bubble of every schedule. 1F1B idles as long as GPipe and holds S micro-batches
           instead of M; interleaving buys half the bubble with twice the messages, cutting the backward buys more.
Source     Huang et al. (2019), GPipe; Narayanan et al. (2021), Megatron-LM; Qi et al. (2024), Zero bubble pipelines.
"""
from __future__ import annotations

from typing import Annotated

import numpy as np
from typer import Option

from part4_parallel_dl.ch16_model_pipeline_sharded.schedules import (
    SCHEDULES,
    UNIT,
    Deadlock,
    Lists,
    Span,
    bubble,
    chunks_of,
    gpipe,
    one_f_one_b,
    timeline,
)
from shared import Run, demo
from shared.errors import UsageError
from shared.fleet import launch
from shared.measure import human_bytes, human_seconds

VOCABULARY, FLOAT = 256, 4  # TinyGPT reads bytes; bytes of a float32


@demo("16.3", needs=("torch",),
      smoke=dict(stages=3, micro_batches=6, layers=6, width=16, tokens=8, pace_ms=8, repeats=2),
      laptop=dict(micro_batches=32, pace_ms=12, repeats=3))
def main(run: Run, stages: Annotated[int, Option(min=2)] = 4, micro_batches: int = 16, layers: int = 8,
         width: Annotated[int, Option(min=4)] = 32, rows: int = 2, tokens: int = 16, pace_ms: float = 10.0,
         repeats: int = 3, seed: int = 0) -> None:
    """Run four schedules of one pipeline.

    Args:
        stages: Processes that share the layers out, at least 2.
        micro_batches: Most micro-batches of a step, at least 2 for each stage; fewer are tried too.
        layers: Blocks of the model, at least 2 for each stage.
        width: Features of an activation, a multiple of 4 heads.
        rows: Sequences in a micro-batch.
        tokens: Length of a sequence.
        pace_ms: Declared milliseconds of a stage's forward, and of each half of its backward.
    """
    if micro_batches < 2 * stages or layers < 2 * stages or width % 4:
        raise UsageError(f"{stages} stages need at least {2 * stages} micro-batches and layers, and a width in fours; "
                         f"got {micro_batches}, {layers} and {width}")
    counts = micro_batch_counts(stages, micro_batches)
    plan = {(name, m): schedule(stages, m) for m in counts for name, schedule in SCHEDULES.items()
            if m % stages == 0 or name in ("GPipe", "1F1B")}
    predicted = {key: bubble(timeline(lists)) for key, lists in plan.items()}  # raises Deadlock before any process runs
    model = (layers, width, rows, tokens, seed)
    ranks = launch(stages, work, plan, *model, pace_ms / 1e3, repeats, timeout=600)
    steps = {key: shortest([rank[key]["spans"] for rank in ranks]) for key in plan}
    measured = {key: bubble(step) for key, step in steps.items()}
    live = {key: [rank[key]["live"] for rank in ranks] for key in plan}
    sent = {key: np.sum([rank[key]["sent"] for rank in ranks], axis=0).tolist() for key in plan}
    exact = {m: whole_model(m, *model) for m in counts}
    wrong = {(name, m): largest_difference(exact[m], [rank[name, m]["gradients"] for rank in ranks])
             for name, m in plan}

    shown = 2 * stages  # micro-batches: of what is compared in detail
    activation = FLOAT * rows * tokens * width
    run.note(f"pace: a stage's forward, input gradient and weight gradient last {pace_ms:g} ms each, real arithmetic "
             f"inside; a message carries {human_bytes(activation)}")
    run.table(f"{shown} micro-batches through {stages} stages", [
        (name, human_seconds(length(steps[name, shown])), f"{measured[name, shown]:.3f}",
         f"{predicted[name, shown]:.3f}", " ".join(map(str, live[name, shown])), *sent[name, shown],
         f"{wrong[name, shown]:.1e}") for name in SCHEDULES],
        ["schedule", "step", "bubble", "predicted", "held by rank", "messages", "bytes", "gradient error"],
        note="held: most micro-batches of a chunk alive at once; an interleaved chunk is half a stage")
    run.table("utilisation, measured (event model)", [
        (name, *(f"{1 - measured[name, m]:.3f} ({1 - predicted[name, m]:.3f})" if (name, m) in plan else None
                 for m in counts)) for name in SCHEDULES], ["schedule", *(f"M={m}" for m in counts)],
        note=f"M micro-batches; the formula for GPipe and 1F1B is M/(M+{stages - 1})")
    deadlock = find_deadlock([*one_f_one_b(stages, shown)[:-1], gpipe(stages, shown)[-1]])
    run.note(f"1F1B with GPipe on its last stage: {deadlock}")
    run.record("gantt", {name: since_start(steps[name, shown]) for name in SCHEDULES})

    formula = {m: (stages - 1) / (m + stages - 1) for m in counts}
    run.claim("the bubble of GPipe and 1F1B is (S-1)/(M+S-1), for every M (largest gap)", at_most=0.06, timing=True,
              measured=max(abs(measured[name, m] - formula[m]) for name in ("GPipe", "1F1B") for m in counts))
    run.claim("the event model predicts the bubble of every schedule and M (largest gap)", at_most=0.1, timing=True,
              measured=max(abs(measured[key] - predicted[key]) for key in plan))
    one, two, zero = (measured[name, stages] for name in ("1F1B", "interleaved", "zero-bubble"))
    run.claim(f"two chunks a rank shrink the bubble of 1F1B (share left, M={stages})", measured=two / one, at_most=0.85,
              timing=True)
    run.claim(f"cutting the backward shrinks it further (zero-bubble / interleaved, M={stages})", measured=zero / two,
              below=1, timing=True)
    run.claim("GPipe holds M micro-batches on every stage", equals=[[m] * stages for m in counts],
              measured=[live["GPipe", m] for m in counts])
    run.claim("1F1B holds min(S-r, M) on stage r", measured=[live["1F1B", m] for m in counts],
              equals=[[min(stages - rank, m) for rank in range(stages)] for m in counts])
    run.claim("zero-bubble holds no more than S, as much as the first stage of 1F1B", at_most=stages,
              measured=max(max(live[name, m]) for name, m in plan if name == "zero-bubble"))
    cuts = {key: chunks_of(lists) - 1 for key, lists in plan.items()}
    run.claim("an activation and a gradient cross each cut for each micro-batch (runs with other messages or bytes)",
              measured=sum(sent[name, m] != [2 * m * cuts[name, m], 2 * m * cuts[name, m] * activation]
                           for name, m in plan), equals=0)
    run.claim("interleaving multiplies the messages of 1F1B by (2S-1)/(S-1)", relative=1e-12,
              measured=sent["interleaved", shown][0] / sent["1F1B", shown][0], equals=(2 * stages - 1) / (stages - 1))
    run.claim("all gradients of all schedules equal those of the unsplit model (largest difference)", at_most=1e-6,
              measured=max(wrong.values()))
    run.claim("the checker stops a mixture of 1F1B and GPipe before it runs (ranks that would wait for ever)",
              measured=deadlock.count("waits"), equals=stages)


def micro_batch_counts(stages: int, most: int) -> list[int]:
    """1, 2, and S times the powers of two, up to `most`."""
    return sorted({1, 2} | {stages << i for i in range(most.bit_length()) if stages << i <= most})


def work(net, plan: dict[tuple[str, int], Lists], layers: int, width: int, rows: int, tokens: int, seed: int,
         pace: float, repeats: int) -> dict[tuple[str, int], dict]:
    """On one rank: every schedule at every M, in turns; the first repeat is also counted."""
    from part4_parallel_dl.ch15_data_parallel.tiny_gpt import cross_entropy
    from part4_parallel_dl.ch16_model_pipeline_sharded.pipeline import Stage, chunks_of_rank

    pipelines = {}
    for total in {chunks_of(lists) for lists in plan.values()}:
        model = make_model(layers, width, tokens, seed)
        stage = Stage(net, chunks_of_rank(model, total, net), total, cross_entropy,
                      pace={what: pace * cost for what, cost in UNIT.items()})
        pipelines[total] = model, stage
    inputs, targets = make_batch(max(m for _, m in plan), rows, tokens, seed)
    results: dict = {}
    for repeat in range(repeats + 1):
        for name, m in list(plan)[::-1 if repeat % 2 else 1] if repeat else list(plan)[:1]:  # 0 warms up
            model, stage = pipelines[chunks_of(plan[name, m])]
            net.reset_stats()
            trace = stage.run(plan[name, m][net.rank], inputs[:m], targets[:m])
            if repeat == 1:
                sent = net.stats().sent_to()
                results[name, m] = {"spans": [], "live": trace.live, "sent": (sent.messages, sent.bytes),
                                    "gradients": gradients(model)}
            if repeat:
                results[name, m]["spans"].append(trace.spans)
    return results


def make_model(layers: int, width: int, tokens: int, seed: int):
    from part4_parallel_dl.ch15_data_parallel.tiny_gpt import GPTConfig, TinyGPT

    return TinyGPT(GPTConfig(VOCABULARY, tokens, width, heads=4, layers=layers), seed)


def make_batch(micro_batches: int, rows: int, tokens: int, seed: int):
    """Inputs and targets, each (micro-batches, rows, tokens) int64; the first M of them are the same for every M."""
    import torch

    from part4_parallel_dl.ch15_data_parallel.tiny_gpt import batches

    text = torch.from_numpy(batches(micro_batches, rows, tokens, seed))
    return text[..., :-1], text[..., 1:]


def gradients(model) -> dict[str, np.ndarray]:
    """By the name of the parameter; those of other ranks' chunks have none."""
    return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


def whole_model(m: int, layers: int, width: int, rows: int, tokens: int, seed: int) -> dict[str, np.ndarray]:
    """Gradients of the unsplit model on all `m` micro-batches as one batch, by torch's autograd alone."""
    from part4_parallel_dl.ch15_data_parallel.tiny_gpt import cross_entropy

    model = make_model(layers, width, tokens, seed)
    inputs, targets = make_batch(m, rows, tokens, seed)
    cross_entropy(model(inputs.flatten(0, 1)), targets.flatten(0, 1)).backward()
    return gradients(model)


def largest_difference(exact: dict[str, np.ndarray], by_rank: list[dict[str, np.ndarray]]) -> float:
    """Over all parameters, each of which must come from exactly one rank."""
    ours = {name: gradient for rank in by_rank for name, gradient in rank.items()}
    if sum(map(len, by_rank)) != len(exact) or ours.keys() != exact.keys():
        return float("inf")
    return max(float(np.abs(ours[name] - exact[name]).max()) for name in exact)


def shortest(by_rank: list[list[list[Span]]]) -> list[list[Span]]:
    """The repeat whose step was shortest, as one list of spans for each rank: in paced work, neighbours on the machine
    can only add time."""
    return min(map(list, zip(*by_rank)), key=length)


def length(spans: list[list[Span]]) -> float:
    """From the first instruction to the end of the last."""
    return max(mine[-1].end for mine in spans) - min(mine[0].begin for mine in spans)


def since_start(spans: list[list[Span]]) -> list[list[Span]]:
    """The same spans in microseconds, rounded, from the first instruction on."""
    start = min(mine[0].begin for mine in spans)
    return [[Span(do, round(1e6 * (begin - start)), round(1e6 * (end - start))) for do, begin, end in mine]
            for mine in spans]


def find_deadlock(lists: Lists) -> str:
    """Who would wait for what, or "" if the lists run to their end."""
    try:
        timeline(lists)
    except Deadlock as found:
        return str(found)
    return ""


def draw(result: dict, axes) -> None:
    axes.set_axis_off()
    axes.figure.set_figheight(5.6)
    schedules = result["records"]["gantt"]
    longest = max(ranks[0][-1][2] for ranks in schedules.values())  # the first rank ends last
    for i, (name, ranks) in enumerate(schedules.items()):
        panel = axes.inset_axes([0.04, 0.76 - 0.24 * i, 0.96, 0.21])
        for rank, spans in enumerate(ranks):
            for (what, chunk, _), begin, end in spans:
                panel.barh(rank, (end - begin) / 1e3, left=begin / 1e3, height=0.9,
                           color=f"C{'FBIW'.index(what)}", alpha=0.55 if chunk >= len(ranks) else 1,
                           edgecolor="white", linewidth=0.4)
        panel.set(ylabel=name, xlim=(0, 1.01e-3 * longest), yticks=range(len(ranks)), ylim=(len(ranks) - 0.5, -0.5))
        panel.grid(False)
        if i + 1 < len(schedules):
            panel.set_xticklabels([])
    panel.set_xlabel("ms (rows are ranks; a rank's second chunk is pale)")
    words = ["forward", "backward", "input gradient", "weight gradient"]
    for kind, word in enumerate(words):
        panel.barh(0, 0, color=f"C{kind}", label=word)
    axes.legend(*panel.get_legend_handles_labels(), ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.97))


if __name__ == "__main__":
    main.cli()
