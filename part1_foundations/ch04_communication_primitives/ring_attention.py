"""Ring attention: exact attention over a sequence that no rank holds whole.

Each rank keeps the queries of its stretch of the sequence. The keys and values travel around the ring, one shard per
hop, while the rank attends to the shard that it has; an online softmax merges the shards as if they had come at once.

Shapes: H heads, n positions per rank (the same on all), d features per head; rank r has positions r n .. (r + 1) n - 1.
Sources: Liu, Zaharia & Abbeel (2023), Ring Attention with Blockwise Transformers for Near-Infinite Context;
Milakov & Gimelshein (2018), Online normalizer calculation for softmax.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from part1_foundations.ch04_communication_primitives.collectives import Group


class OnlineSoftmax:
    """Attention of `queries`, shape (H, n, d), built up from one block of keys and values after another.

    Per row it keeps the largest score so far, the sum of exp(score - largest), and the values weighted alike; a block
    with a larger score rescales what was there. Any order of blocks gives the same result up to rounding.
    """

    def __init__(self, queries: np.ndarray) -> None:
        self.queries = queries / np.sqrt(queries.dtype.type(queries.shape[-1]))
        self.largest = np.full((*queries.shape[:2], 1), -np.inf, queries.dtype)
        self.total = np.zeros_like(self.largest)
        self.values = np.zeros_like(queries)

    def add(self, keys: np.ndarray, values: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Attend to `keys` and `values`, shape (H, m, d); `mask`, shape (n, m), is True where a query may look."""
        scores = self.queries @ keys.swapaxes(1, 2)  # (H, n, m)
        if mask is not None:
            scores[:, ~mask] = -np.inf
        largest = np.maximum(self.largest, scores.max(axis=-1, keepdims=True))
        reference = np.where(np.isneginf(largest), 0, largest)  # a row that has seen nothing yet: exp(-inf - 0) = 0
        scores -= reference
        np.exp(scores, out=scores)
        kept = np.exp(self.largest - reference)
        self.total = kept * self.total + scores.sum(axis=-1, keepdims=True)
        self.values = kept * self.values + scores @ values
        self.largest = largest

    def result(self) -> np.ndarray:
        """Weighted averages of the values, shape (H, n, d). Rows that were allowed to see nothing are NaN."""
        return self.values / self.total

    def log_sum_exp(self) -> np.ndarray:
        """Logarithm of the softmax denominators, shape (H, n): what a backward pass needs to recompute the weights."""
        return (self.largest + np.log(self.total))[..., 0]


def circulate(net, shard: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (owner, shard) for the shards of all ranks, one's own first; the next arrives while the caller works.

    `shard` has the same shape and dtype everywhere. Two buffers serve the whole tour, `shard` itself and a spare: the
    K-th hop brings it home unchanged. Do not write to what is yielded, nor keep it, nor use `net` in between.
    """
    here, spare = shard, np.empty_like(shard)
    right, left = (net.rank + 1) % net.size, (net.rank - 1) % net.size

    def hop(outgoing: np.ndarray, incoming: np.ndarray) -> None:
        sent = net.isend(right, outgoing)
        net.recv(left, incoming)
        sent.wait()

    with ThreadPoolExecutor(1, "ring") as lane:
        for step in range(net.size):
            arrival = lane.submit(hop, here, spare) if net.size > 1 else None
            yield (net.rank - step) % net.size, here
            if arrival:
                arrival.result()
                here, spare = spare, here
    if here is not shard:
        np.copyto(shard, here)


def ring_attention(net, queries: np.ndarray, kv: np.ndarray, causal: bool = False) -> np.ndarray:
    """Attention of this rank's `queries`, shape (H, n, d), to the keys and values of all ranks.

    kv: keys and values of this rank, shape (2, H, n, d), the same floating dtype everywhere. causal: position i sees
    positions up to i. Each rank sends K messages of `kv`. Returns shape (H, n, d).
    """
    return merge_shards(queries, circulate(net, kv), net.rank, causal)


def merge_shards(queries: np.ndarray, shards: Iterable[tuple[int, np.ndarray]], rank: int, causal: bool) -> np.ndarray:
    """Attend to (owner, kv) shards in the order given. Causal: one that lies wholly in the future is passed over."""
    softmax = OnlineSoftmax(queries)
    for owner, (keys, values) in shards:
        if not causal or owner < rank:
            softmax.add(keys, values)
        elif owner == rank:
            softmax.add(keys, values, mask=np.tri(queries.shape[1], keys.shape[1], dtype=bool))
    return softmax.result()


def gathered_attention(net, queries: np.ndarray, kv: np.ndarray, causal: bool = False) -> np.ndarray:
    """The plain way to what `ring_attention` does: all-gather every shard first, then attend. Holds K more shards."""
    return merge_shards(queries, enumerate(Group(net).all_gather(kv)), net.rank, causal)


def full_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, first: int | None = None) -> np.ndarray:
    """Softmax attention in one piece: `queries` (H, n, d), `keys` and `values` (H, N, d). The reference.

    first: position of the first query under a causal mask; None for no mask.
    """
    scores = queries @ keys.swapaxes(1, 2) / np.sqrt(queries.shape[-1])
    if first is not None:
        n, m = scores.shape[1:]
        scores[:, ~np.tri(n, m, first, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ values / weights.sum(axis=-1, keepdims=True)
