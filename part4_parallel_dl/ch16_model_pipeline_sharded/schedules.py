"""Pipeline schedules as instruction lists, and what they cost before any process runs them.

A schedule gives each of S stages (ranks) the list of what it does, in order, with M micro-batches:

    F  forward of a micro-batch through a chunk of layers      B  its whole backward: I, then W
    I  backward as far as the gradient of the chunk's input    W  the gradients of the chunk's weights

Chunk c belongs to rank c mod S; with v chunks a rank there are v S of them. Messages need no instructions of their own:
a chunk's forward waits for the chunk before it, its backward for the chunk after it. `timeline` plays the lists against
these dependencies. It finds a deadlock, or tells when each instruction would begin and end.

Source: Huang et al. (2019), GPipe; Narayanan et al. (2021), Efficient large-scale language model training on GPU
clusters; Qi et al. (2024), Zero bubble pipeline parallelism (their ZB-H1).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from shared.errors import ReaderError


class Do(NamedTuple):
    """One instruction: `what` is F, B, I or W."""

    what: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.what}{self.micro_batch} of chunk {self.chunk}"


class Span(NamedTuple):
    """An instruction, and when it began and ended: in seconds, or in whatever unit its costs were given."""

    do: Do
    begin: float
    end: float


Lists = list[list[Do]]  # by rank
UNIT = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}  # both gradients cost a forward each


class Deadlock(ReaderError):
    """Every rank that has not finished waits for another one."""


def gpipe(stages: int, micro_batches: int) -> Lists:
    """All forwards, then all backwards. Each stage holds the activations of all M micro-batches in between."""
    return [[*(Do("F", rank, m) for m in range(micro_batches)), *(Do("B", rank, m) for m in range(micro_batches))]
            for rank in range(stages)]


def one_f_one_b(stages: int, micro_batches: int) -> Lists:
    """A backward as soon as there is one: stage r begins with S-r-1 forwards, so it holds at most S-r micro-batches."""
    return [in_turns(forwards=[Do("F", rank, m) for m in range(micro_batches)],
                     backwards=[Do("B", rank, m) for m in range(micro_batches)], ahead=stages - rank - 1)
            for rank in range(stages)]


def interleaved(stages: int, micro_batches: int, v: int = 2) -> Lists:
    """1F1B with v chunks a rank: S micro-batches go through a chunk, the next chunk has its turn, and so round again.

    A pipeline is filled by chunks of 1/v of a stage, so the bubble is v times smaller, and each micro-batch crosses
    vS-1 boundaries instead of S-1. ValueError unless M is a multiple of S.
    """
    if micro_batches % stages:
        raise ValueError(f"interleaving needs micro-batches in multiples of {stages} stages, not {micro_batches}")
    rounds = [(m, turn) for first in range(0, micro_batches, stages) for turn in range(v)
              for m in range(first, first + stages)]
    return [in_turns(forwards=[Do("F", turn * stages + rank, m) for m, turn in rounds],
                     backwards=[Do("B", (v - 1 - turn) * stages + rank, m) for m, turn in rounds],
                     ahead=2 * (stages - rank - 1) + (v - 1) * stages)
            for rank in range(stages)]


def zero_bubble(stages: int, micro_batches: int) -> Lists:
    """1F1B whose backward is cut in two. Only I is on the way to the stage before, so W waits to fill a gap.

    Stage r does the W of a micro-batch r turns late. It holds S-r micro-batches as in 1F1B and r more for their W.
    """
    return [with_late_weights(instructions, late=rank)
            for rank, instructions in enumerate(one_f_one_b(stages, micro_batches))]


def in_turns(forwards: list[Do], backwards: list[Do], ahead: int) -> list[Do]:
    """`ahead` forwards, then one of each in turn, then the backwards that are left."""
    ahead = min(ahead, len(forwards))
    steady = [do for pair in zip(forwards[ahead:], backwards) for do in pair]
    return [*forwards[:ahead], *steady, *backwards[len(forwards) - ahead:]]


def with_late_weights(instructions: list[Do], late: int) -> list[Do]:
    """Each B becomes an I, followed by the W of the B that lies `late` before; what is left of W comes last."""
    result: list[Do] = []
    waiting: list[Do] = []
    for do in instructions:
        result.append(do if do.what == "F" else do._replace(what="I"))
        if do.what == "B":
            waiting.append(do._replace(what="W"))
        if len(waiting) > late:
            result.append(waiting.pop(0))
    return result + waiting


SCHEDULES: dict[str, Callable[[int, int], Lists]] = {
    "GPipe": gpipe, "1F1B": one_f_one_b, "interleaved": interleaved, "zero-bubble": zero_bubble}


def chunks_of(lists: Lists) -> int:
    """Chunks of the model that a schedule cuts it into."""
    return 1 + max(do.chunk for instructions in lists for do in instructions)


def needs(do: Do, chunks: int) -> list[Do]:
    """What must have ended before `do`: its own earlier half, and what its message comes from. B counts as I and W."""
    if do.what == "F":
        return [do._replace(chunk=do.chunk - 1)] if do.chunk else []
    if do.what == "W":
        return [do._replace(what="I")]
    after = [Do("I", do.chunk + 1, do.micro_batch)] if do.chunk + 1 < chunks else []
    return [do._replace(what="F"), *after]


def timeline(lists: Lists, cost: Mapping[str, float] = UNIT) -> list[list[Span]]:
    """When each instruction begins and ends, by rank: in its list's order, and as soon as what it needs has ended.

    cost: duration of an instruction over all layers of a rank; with v chunks each takes 1/v of it. Messages are free.
    Raises: Deadlock, naming what each rank waits for.
    """
    chunks, spans = chunks_of(lists), [[] for _ in lists]
    share, ended, left = len(lists) / chunks, {}, sum(map(len, lists))
    while left:
        before = left
        for mine, instructions in zip(spans, lists):
            while len(mine) < len(instructions):
                do = instructions[len(mine)]
                required = needs(do, chunks)
                if any(need not in ended for need in required):
                    break
                begin = max([mine[-1].end if mine else 0.0, *(ended[need] for need in required)])
                mine.append(Span(do, begin, begin + cost[do.what] * share))
                ended |= {do._replace(what=half): mine[-1].end for half in ("IW" if do.what == "B" else do.what)}
                left -= 1
        if left == before:
            waiting = [(rank, instructions[len(mine)]) for rank, (mine, instructions) in enumerate(zip(spans, lists))
                       if len(mine) < len(instructions)]
            raise Deadlock("; ".join(
                f"rank {rank} waits to do {do}, which needs "
                f"{next(need for need in needs(do, chunks) if need not in ended)}" for rank, do in waiting))
    return spans


def bubble(spans: list[list[Span]]) -> float:
    """The share of all ranks' time, from the first instruction to the last one's end, in which they did nothing."""
    flat = [span for mine in spans for span in mine]
    length = max(span.end for span in flat) - min(span.begin for span in flat)
    return 1 - sum(span.end - span.begin for span in flat) / (len(spans) * length)


def messages_sent(lists: Lists) -> list[int]:
    """Messages that each rank sends: one for each F but of the last chunk, one for each backward but of the first."""
    last = chunks_of(lists) - 1
    return [sum(do.what == "F" and do.chunk < last or do.what in "BI" and do.chunk > 0 for do in instructions)
            for instructions in lists]
