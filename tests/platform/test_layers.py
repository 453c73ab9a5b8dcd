"""The torch layers against their equations in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.platform import layers, parallel
from megashear.platform.layers import RMSNorm, SDPAttention
from tests.support.distributed import run_distributed

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


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    document: int | None = None,
) -> Tensor:
    """Causal attention as it is defined, position by position and head by head.

    A position sees `window` keys, its own among them, and none of before `document` if it is later.
    """
    s, b, heads, _ = query.shape
    per_group = heads // key.shape[2]
    rows = []
    for position in range(s):
        of_heads = []
        begin = max(0, position + 1 - window) if window else 0
        if document is not None and position >= document:
            begin = max(begin, document)
        for head in range(heads):
            seen = slice(begin, position + 1)
            k, v = key[seen, :, head // per_group], value[seen]
            scores = torch.einsum("bc,tbc->bt", query[position, :, head], k) * scale
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            of_heads.append(torch.einsum("bt,tbc->bc", weights, v[:, :, head // per_group]))
        rows.append(torch.cat(of_heads, dim=1))
    return torch.stack(rows).view(s, b, -1)


def documents_mask(length: int, document: int) -> Tensor:
    """Of two documents, the second from `document` on: [b, 1, s, s], True where not to look."""
    rows, columns = torch.arange(length)[:, None], torch.arange(length)
    hidden = (columns > rows) | ((rows >= document) & (columns < document))
    return hidden.expand(BATCH, 1, -1, -1)


def windowed(window: int | None, **changes: Any) -> TransformerConfig:
    return config(window_size=(window - 1, 0) if window else None, **changes)


@pytest.mark.parametrize(
    ("groups", "scale", "window", "document"),
    [
        *((groups, scale, None, None) for groups in (1, 2, 4) for scale in (None, 0.7)),
        *((2, None, window, None) for window in (2, 4, SEQUENCE - 1, SEQUENCE, 99)),
        *((4, 0.7, window, 5) for window in (None, 3, 99)),
    ],
)
def test_attention_is_a_causal_softmax_over_groups(
    groups: int, scale: float | None, window: int | None, document: int | None
) -> None:
    """Values and gradients, float64; a scale of None is 1 / sqrt(head size)."""
    attention = SDPAttention(windowed(window), 1, AttnMaskType.causal, "self", softmax_scale=scale)
    mask = None if document is None else documents_mask(SEQUENCE, document)
    results = []
    by_equation = partial(
        attend,
        scale=CHANNELS**-0.5 if scale is None else scale,
        window=window,
        document=document,
    )
    for compute in (partial(attention, attention_mask=mask), by_equation):
        query = random(SEQUENCE, BATCH, 4, CHANNELS, seed=1)
        key, value = (random(SEQUENCE, BATCH, groups, CHANNELS, seed=s) for s in (2, 3))
        out = compute(query, key, value)
        assert out.shape == (SEQUENCE, BATCH, 4 * CHANNELS)
        (out * random(*out.shape, seed=4).detach()).sum().backward()
        results.append((out, query.grad, key.grad, value.grad))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() < 1e-13 * expected.abs().max()


@pytest.mark.parametrize(("window", "masked"), [(None, False), (SEQUENCE, False), (4, True)])
def test_a_window_as_long_as_the_sequence_needs_no_mask(
    window: int | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flash kernel of torch takes none."""
    given = []
    compute = layers.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> Tensor:
        given.append(kwargs)
        return compute(*args, **kwargs)

    monkeypatch.setattr(layers.functional, "scaled_dot_product_attention", record)
    qkv = [random(SEQUENCE, BATCH, 4, CHANNELS, seed=seed) for seed in (1, 2, 3)]
    SDPAttention(windowed(window), 1, AttnMaskType.causal, "self")(*qkv, None)
    assert [(g["attn_mask"] is not None, g["is_causal"]) for g in given] == [(masked, not masked)]


def attend_in_context(
    ranks: int, groups: int, window: int | None, document: int | None
) -> list[Tensor]:
    """A context-parallel rank's attention and gradients, over its two blocks of the sequence."""
    parallel_config = ParallelConfig(context=ranks)
    platform = parallel.start(PlatformConfig(device="cpu", precision="fp32"), parallel_config, 0)
    attention = SDPAttention(
        windowed(window, context_parallel_size=ranks),
        *(1, AttnMaskType.causal, "self"),
        softmax_scale=0.7,
    )
    rank = platform.rank
    whole = [random(4 * ranks, BATCH, n, CHANNELS, seed=n) for n in (4, groups, groups)]
    upstream = random(4 * ranks, BATCH, 4 * CHANNELS, seed=5).detach()
    mine = [mine_of(t.detach(), rank, ranks).requires_grad_() for t in whole]
    mask = None
    if document is not None:  # a rank has the rows of its queries
        mask = documents_mask(4 * ranks, document)
        mask = mine_of(mask.transpose(0, 2), rank, ranks).transpose(0, 2)
    out = attention(*mine, mask)
    (out * mine_of(upstream, rank, ranks)).sum().backward()
    expected = attend(whole[0], whole[1], whole[2], 0.7, window, document)
    (expected * upstream).sum().backward()
    parallel.stop()
    pairs = [(out, expected), *((t.grad, w.grad) for t, w in zip(mine, whole, strict=True))]
    return [(ours - mine_of(theirs, rank, ranks)).abs().max() for ours, theirs in pairs]


def mine_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """The blocks of a rank: one counted from the beginning, one from the end."""
    blocks = tensor.detach().chunk(2 * ranks)
    return torch.cat([blocks[rank], blocks[2 * ranks - 1 - rank]])


@pytest.mark.parametrize(
    ("ranks", "groups", "window", "document"),
    [(2, 4, None, None), (2, 1, 3, None), (3, 2, 7, None), (2, 4, 3, 5)],
)
def test_context_parallel_attention_is_that_of_the_whole_sequence(
    ranks: int, groups: int, window: int | None, document: int | None
) -> None:
    """Values and gradients of query, key and value on every rank, float64."""
    for differences in run_distributed(attend_in_context, ranks, ranks, groups, window, document):
        assert len(differences) == 4
        assert all(0 <= difference < 1e-13 for difference in differences), differences
