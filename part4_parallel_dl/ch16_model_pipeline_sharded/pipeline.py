"""One rank of a pipeline: it runs its list of instructions on its chunks of a model and passes activations on.

The backward is cut in two: `DeferredLinear` computes the gradient of its input at once (I) and leaves that of its
weights for later (W). A whole backward (B) is I followed by W, so every schedule runs the same arithmetic. Importing
this module imports torch: scripts do so inside functions.

Source: Huang et al. (2019), GPipe; Qi et al. (2024), Zero bubble pipeline parallelism.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import monotonic

import torch
from torch import Tensor, nn

from part4_parallel_dl.ch15_data_parallel.tiny_gpt import TinyGPT
from part4_parallel_dl.ch16_model_pipeline_sharded.schedules import Do, Span
from shared.fleet import paced


def cut(model: TinyGPT, chunks: int) -> list[nn.Sequential]:
    """The model as `chunks` modules in a row, with the blocks shared out; embedding and head go to the two ends."""
    embedding, *blocks, head = model.stages()
    bounds = [len(blocks) * i // chunks for i in range(chunks + 1)]
    parts = [blocks[a:b] for a, b in zip(bounds, bounds[1:])]
    parts[0].insert(0, embedding)
    parts[-1].append(head)
    return [nn.Sequential(*part) for part in parts]


def chunks_of_rank(model: TinyGPT, total: int, net) -> dict[int, nn.Sequential]:
    """This rank's chunks of `total`, by number: net.rank and every S-th after it."""
    return {i: chunk for i, chunk in enumerate(cut(model, total)) if i % net.size == net.rank}


class DeferredLinear(torch.autograd.Function):
    """x @ weight.T + bias, whose backward returns the input's gradient and puts the rest on the list `later`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, later: list) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.later = weight, bias, later
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.later.append((ctx.weight, ctx.bias, ctx.saved_tensors[0].detach(), gradient))
        return gradient @ ctx.weight, None, None, None


@dataclass(eq=False)
class InFlight:
    """What a chunk keeps of a micro-batch from its forward until its weights have their gradients."""

    x: Tensor
    y: Tensor | None = None
    later: list[tuple] = field(default_factory=list)


class Stage:
    """Rank r's chunks of a pipeline. `chunks` maps a chunk's number, one of r, r+S, ..., to its module.

    loss: (output of the last chunk, target) -> mean loss of a micro-batch.
    pace: seconds that an instruction lasts by kind (F, I, W, B), the real arithmetic inside; None runs flat out.
    """

    def __init__(self, net, chunks: Mapping[int, nn.Module], total: int, loss: Callable[[Tensor, Tensor], Tensor],
                 pace: Mapping[str, float] | None = None) -> None:
        self.net, self.chunks, self.last, self.loss, self.pace = net, chunks, total - 1, loss, pace
        self.later: list[tuple] = []  # of the micro-batch whose forward is running
        for linear in (m for module in chunks.values() for m in module.modules() if isinstance(m, nn.Linear)):
            linear.forward = lambda x, linear=linear: DeferredLinear.apply(x, linear.weight, linear.bias, self.later)

    def run(self, instructions: Sequence[Do], inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Trace:
        """One step: gradients of the mean loss over all micro-batches, left in `.grad`.

        inputs, targets: one of each for every micro-batch; only the first and the last chunk look at theirs.
        """
        self.inputs, self.targets, self.scale = inputs, targets, 1 / len(inputs)
        self.in_flight: dict[tuple[int, int], InFlight] = {}
        self.alive: weakref.WeakSet[InFlight] = weakref.WeakSet()  # what is really still held, by whomever
        self.sends, self.losses = [], []
        for parameter in (p for module in self.chunks.values() for p in module.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        self.net.barrier()
        spans, live = [], []
        for do in instructions:
            message = self.receive(do)
            begin = monotonic()
            with paced(self.pace[do.what] / len(self.chunks)) if self.pace else nullcontext():
                result = getattr(self, do.what)(do.chunk, do.micro_batch, message)
            spans.append(Span(do, begin, monotonic()))
            self.send(do, result)
            live.append(len(self.alive))
        for work in self.sends:
            work.wait()
        return Trace(spans, max(live), sum(self.losses))

    def F(self, chunk: int, m: int, x: Tensor | None) -> Tensor | None:
        x = self.inputs[m] if chunk == 0 else x.requires_grad_()
        held = self.in_flight[chunk, m] = InFlight(x)
        self.alive.add(held)
        self.later = held.later
        held.y = self.chunks[chunk](x)
        if chunk < self.last:
            return held.y.detach()
        held.y = self.scale * self.loss(held.y, self.targets[m])
        self.losses.append(held.y.item())

    def I(self, chunk: int, m: int, gradient: Tensor | None) -> Tensor | None:  # noqa: E743  the field's own letter
        held = self.in_flight[chunk, m]
        held.y.backward(gradient)
        held.y = None
        return held.x.grad

    @torch.no_grad()
    def W(self, chunk: int, m: int, _: None) -> None:
        later = self.in_flight.pop((chunk, m)).later
        while later:
            weight, bias, x, gradient = later.pop()
            gradient = gradient.flatten(0, -2)
            weight.grad += gradient.T @ x.flatten(0, -2)
            if bias is not None:
                bias.grad += gradient.sum(0)

    def B(self, chunk: int, m: int, gradient: Tensor | None) -> Tensor | None:
        result = self.I(chunk, m, gradient)
        self.W(chunk, m, None)
        return result

    def receive(self, do: Do) -> Tensor | None:
        """The activation that a forward waits for, the gradient that a backward waits for, or None."""
        source = do.chunk + (-1 if do.what == "F" else 1)
        if do.what == "W" or not 0 <= source <= self.last:
            return None
        return torch.from_numpy(self.net.recv(source % self.net.size, tag=self.tag(do.what, source, do.micro_batch)))

    def send(self, do: Do, result: Tensor | None) -> None:
        target = do.chunk + (1 if do.what == "F" else -1)
        if do.what != "W" and 0 <= target <= self.last:
            tag = self.tag(do.what, do.chunk, do.micro_batch)
            self.sends.append(self.net.isend(target % self.net.size, result.numpy(), tag))

    def tag(self, what: str, chunk: int, m: int) -> int:
        """Names a message by direction, sending chunk and micro-batch, so that it may be asked for in any order."""
        return 2 * (m * (self.last + 1) + chunk) + (what == "F")


@dataclass(frozen=True)
class Trace:
    """What one rank did in a step: its spans (seconds on the machine's monotonic clock), the most micro-batches it held
    at once (each chunk's counts), and its share of the loss."""

    spans: list[Span]
    live: int
    loss: float
