"""The torch layers against their equations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.platform import parallel
from megashear.platform.layers import RMSNorm, SDPAttention
from tests.distributed import run_distributed

SEQUENCE, BATCH, CHANNELS = 9, 2, 6


def config(**changes: Any) -> TransformerConfig:
    settings = {"num_layers": 1, "hidden_size": 24, "num_attention_heads": 4, **changes}
    return TransformerConfig(**settings)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_norm_is_x_over_its_root_mean_square(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    x, weight, eps = rng.normal(size=(SEQUENCE, BATCH, 24)), rng.normal(size=24), 0.3
    norm = RMSNorm(config(params_dtype=dtype), 24, eps=eps)
    assert norm.weight.dtype == dtype
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(weight))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    found = norm(torch.from_numpy(x).to(dtype)).detach().double().numpy()
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_norm_is_marked_for_the_gradients_of_sequence_parallelism() -> None:
    for on in (False, True):
        norm = RMSNorm(config(sequence_parallel=on, tensor_model_parallel_size=2), 24)
        assert norm.weight.sequence_parallel is on


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention as it is defined, position by position and head by head."""
    s, b, heads, _ = query.shape
    per_group = heads // key.shape[2]
    rows = []
    for position in range(s):
        of_heads = []
        for head in range(heads):
            k, v = key[: position + 1, :, head // per_group], value[: position + 1, :]
            scores = torch.einsum("bc,tbc->bt", query[position, :, head], k) * scale
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            of_heads.append(torch.einsum("bt,tbc->bc", weights, v[:, :, head // per_group]))
        rows.append(torch.cat(of_heads, dim=1))
    return torch.stack(rows).view(s, b, -1)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_a_causal_softmax_over_groups(groups: int, scale: float | None) -> None:
    """Values and gradients, float64; None is 1 / sqrt(head size)."""
    attention = SDPAttention(config(), 1, AttnMaskType.causal, "self", softmax_scale=scale)
    results = []
    for compute in (
        lambda *qkv: attention(*qkv, None),
        lambda *qkv: attend(*qkv, CHANNELS**-0.5 if scale is None else scale),
    ):
        query = random(SEQUENCE, BATCH, 4, CHANNELS, seed=1)
        key, value = (random(SEQUENCE, BATCH, groups, CHANNELS, seed=s) for s in (2, 3))
        out = compute(query, key, value)
        assert out.shape == (SEQUENCE, BATCH, 4 * CHANNELS)
        (out * random(*out.shape, seed=4).detach()).sum().backward()
        results.append((out, query.grad, key.grad, value.grad))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() < 1e-13 * expected.abs().max()


def attend_in_context(ranks: int, groups: int) -> list[Tensor]:
    """A context-parallel rank's attention and gradients, over its two blocks of the sequence."""
    parallel_config = ParallelConfig(context=ranks)
    platform = parallel.start(PlatformConfig(device="cpu", precision="fp32"), parallel_config, 0)
    attention = SDPAttention(
        config(context_parallel_size=ranks), 1, AttnMaskType.causal, "self", softmax_scale=0.7
    )
    rank = platform.rank
    whole = [random(4 * ranks, BATCH, n, CHANNELS, seed=n) for n in (4, groups, groups)]
    upstream = random(4 * ranks, BATCH, 4 * CHANNELS, seed=5).detach()
    mine = [mine_of(t.detach(), rank, ranks).requires_grad_() for t in whole]
    out = attention(*mine, None)
    (out * mine_of(upstream, rank, ranks)).sum().backward()
    expected = attend(*whole, 0.7)
    (expected * upstream).sum().backward()
    parallel.stop()
    pairs = [(out, expected), *((t.grad, w.grad) for t, w in zip(mine, whole, strict=True))]
    return [(ours - mine_of(theirs, rank, ranks)).abs().max() for ours, theirs in pairs]


def mine_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The blocks of a rank: one counted from the beginning, one from the end."""
    blocks = tensor.detach().chunk(2 * ranks)
    return torch.cat([blocks[rank], blocks[2 * ranks - 1 - rank]])


@pytest.mark.parametrize(("ranks", "groups"), [(2, 4), (2, 1), (3, 2)])
def test_context_parallel_attention_is_that_of_the_whole_sequence(ranks: int, groups: int) -> None:
    """Values and gradients of query, key and value on every rank, float64."""
    for differences in run_distributed(attend_in_context, ranks, ranks, groups):
        assert len(differences) == 4
        assert all(0 <= difference < 1e-13 for difference in differences), differences
