"""TinyGPT: counted parameters, causality, one seed one model, cuts that change nothing, and a corpus it can learn."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from part4_parallel_dl.ch15_data_parallel.tiny_gpt import GPTConfig, TinyGPT, batches, cross_entropy

SMALL = GPTConfig(context=16, width=32, heads=2, layers=2)


@pytest.mark.parametrize("config", [
    SMALL, GPTConfig(), GPTConfig(vocabulary=17, context=5, width=12, heads=3, layers=1)])
def test_the_formula_counts_its_parameters(config):
    assert sum(p.numel() for p in TinyGPT(config).parameters()) == config.parameters


def test_what_comes_later_changes_nothing_before():
    model, tokens = TinyGPT(SMALL), torch.from_numpy(batches(1, 2, 16)[0])
    changed = tokens[:, :-1].clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens[:, :-1]), model(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


def test_a_seed_is_a_model_and_leaves_the_callers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (TinyGPT(SMALL, seed).head.out.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and torch.equal(torch.rand(1), expected)


def test_attention_against_its_formula():
    block = TinyGPT(SMALL).double().blocks[0]
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = block.attention.qkv(x).split(32, dim=-1)
    heads = []
    for h in (slice(0, 16), slice(16, 32)):
        scores = q[..., h] @ k[..., h].mT / 4 + torch.full((7, 7), -torch.inf).triu(1)
        heads.append(torch.softmax(scores, -1) @ v[..., h])
    torch.testing.assert_close(block.attention(x), block.attention.out(torch.cat(heads, -1)), rtol=0, atol=1e-12)


def test_it_learns_the_corpus():
    model, data = TinyGPT(SMALL), torch.from_numpy(batches(30, 16, 16))
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for rows in data:
        optimizer.zero_grad()
        losses.append(cross_entropy(model(rows[:, :-1]), rows[:, 1:]))
        losses[-1].backward()
        optimizer.step()
    assert abs(losses[0].item() - np.log(256)) < 0.1, "an untrained model knows nothing: uniform over 256 bytes"
    assert losses[-1].item() < 4


def test_batches_are_shifted_text():
    data = batches(3, 4, 10, seed=1)
    assert data.shape == (3, 4, 11) and data.dtype == np.int64
    np.testing.assert_array_equal(data, batches(3, 4, 10, seed=1))
    assert bytes(data[0, 0].astype(np.uint8)).isascii()


@pytest.mark.parametrize("sizes", [dict(width=30, heads=4), dict(layers=0)])
def test_sizes_that_make_no_model(sizes):
    with pytest.raises(ValueError, match="multiple of heads"):
        GPTConfig(**sizes)
