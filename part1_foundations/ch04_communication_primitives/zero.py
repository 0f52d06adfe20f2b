"""A sharded trainer: Adam whose states, gradients and weights are divided by K, one ZeRO stage at a time.

`Zero` holds the model state of one rank as a list of layers and knows three moves: `gathered` (give me a layer's
weights), `reduce` (here is my gradient of that layer) and `step` (Adam on what I own). A network brings its own forward
and backward and calls them layer by layer; `Mlp` is one, in NumPy. Sections 4.5 and Chapter 16 train on it.

Source: Rajbhandari et al. (2020), ZeRO: Memory optimizations toward training trillion parameter models.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import (
    chunks,
    flat,
    ring,
    ring_all_gather,
    ring_reduce_scatter,
)


class Zero:
    """One rank's share of the model state, and the collectives that make up for what it lacks.

    stage 0 replicates everything; 1 shards Adam's two moments; 2 the gradients too; 3 the weights too. Rank r owns
    `chunks(layer, K)[r]` of every layer. Weights are C-contiguous arrays of one dtype, equal on all ranks; they are
    copied, never kept. Adam sees the mean of the ranks' gradients.
    Errors: ValueError for another stage.
    """

    def __init__(self, net, weights: Iterable[np.ndarray], stage: int, rate: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"ZeRO has stages 0 to 3, not {stage}")
        self.net, self.stage, self.rate, self.betas, self.eps, self.steps = net, stage, rate, betas, eps, 0
        self.shapes: list[tuple[int, ...]] = []
        self.weights, self.gradients, self.moments = [], [], []
        for layer in weights:  # may come from a generator, so that no rank ever holds them all
            self.shapes.append(layer.shape)
            self.weights.append(self.kept(layer, sharded=stage >= 3))
            self.gradients.append(np.zeros_like(self.kept(layer, sharded=stage >= 2)))
            self.moments.append([np.zeros_like(self.kept(layer, sharded=stage >= 1)) for _ in "mv"])

    def kept(self, layer: np.ndarray, sharded: bool) -> np.ndarray:
        """A copy of what this rank keeps: a view of its chunk would keep the whole layer in memory."""
        return (chunks(layer, self.net.size)[self.net.rank] if sharded else layer).copy()

    def owned(self, kept: np.ndarray, whole: bool) -> np.ndarray:
        """The part of a buffer that this rank's Adam works on, flat."""
        return chunks(kept, self.net.size)[self.net.rank] if whole and self.stage else flat(kept)

    def gathered(self, i: int) -> np.ndarray:
        """Weights of layer `i`, complete. In stage 3 they are fetched for the occasion: drop them after use."""
        if self.stage < 3:
            return self.weights[i]
        whole = np.empty(self.shapes[i], self.weights[i].dtype)
        chunks(whole, self.net.size)[self.net.rank][:] = self.weights[i]
        return ring_all_gather(self.net, whole)

    def gradient_buffer(self, i: int) -> np.ndarray:
        """Where backward writes this rank's gradient of layer `i`: the resident buffer, or from stage 2 a new one."""
        return self.gradients[i] if self.stage < 2 else np.empty(self.shapes[i], self.weights[i].dtype)

    def reduce(self, i: int, gradient: np.ndarray) -> None:
        """Average layer `i`'s gradient over the ranks: for everyone in stage 0, only for its owners in the others."""
        if self.stage == 0:
            mine = flat(ring(self.net, gradient))
        else:
            mine = ring_reduce_scatter(self.net, gradient)
        mine /= self.net.size
        if self.stage >= 2:
            self.gradients[i][:] = mine

    def step(self) -> None:
        """Adam on the owned part of every layer; in stages 1 and 2 the updated parts are then gathered again."""
        self.steps += 1
        for weights, gradients, moments in zip(self.weights, self.gradients, self.moments):
            self.adam(self.owned(weights, whole=self.stage < 3), self.owned(gradients, whole=self.stage < 2),
                      *map(flat, moments))
            if self.stage in (1, 2):
                ring_all_gather(self.net, weights)

    def adam(self, w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray) -> None:
        """Kingma & Ba (2015), in place, with bias correction."""
        (b1, b2), t = self.betas, self.steps
        m *= b1
        m += (1 - b1) * g
        v *= b2
        v += (1 - b2) * g * g
        w -= self.rate / (1 - b1**t) * m / (np.sqrt(v / (1 - b2**t)) + self.eps)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the memory that this rank's weights, gradients and moments keep alive between two steps."""
        moments = [moment for pair in self.moments for moment in pair]
        return {"weights": resident(self.weights), "gradients": resident(self.gradients), "moments": resident(moments)}


def resident(buffers: Sequence[np.ndarray]) -> int:
    """Bytes kept alive by these arrays: a view counts as the whole array that it looks into, once."""
    owners = {}
    for buffer in buffers:
        while isinstance(buffer.base, np.ndarray):
            buffer = buffer.base
        owners[id(buffer)] = buffer.nbytes
    return sum(owners.values())


class Mlp:
    """Square tanh layers without biases and a linear last one; mean squared error. Forward and backward by hand."""

    def __init__(self, state: Zero) -> None:
        self.state, self.layers = state, len(state.shapes)

    def loss_and_gradients(self, x: np.ndarray, y: np.ndarray) -> float:
        """This rank's mean squared error on `x`, `y`, shape (rows, width); gradients go to the state layer by layer."""
        inputs, last = [], self.layers - 1
        for i in range(self.layers):
            inputs.append(x)
            x = x @ self.state.gathered(i)
            x = x if i == last else np.tanh(x)
        error = x - y
        upstream = 2 / error.size * error
        for i in reversed(range(self.layers)):
            gradient = self.state.gradient_buffer(i)
            np.matmul(inputs[i].T, upstream, out=gradient)
            weights = self.state.gathered(i)  # of every layer, as FSDP does, though the first one could do without
            upstream = (upstream @ weights.T) * (1 - inputs[i] ** 2)  # inputs[i] is a tanh, its derivative 1 - tanh^2
            del weights
            self.state.reduce(i, gradient)
        return float(np.mean(error * error))
