"""Parameter counts against published sizes, and expected ones against enumeration."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from megashear.config.schema import HEAD_UNITS, QUERY_HEAD, ModelShape
from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.pruning.table import mask_sizes

LLAMA_2_7B = ModelShape(32, 4096, 32, 11008, 32000)
QWEN_2_5 = ModelShape(  # 0.5B
    24, 896, 14, 4864, 151936, num_query_groups=2, tied_embeddings=True, qkv_bias=True
)
QWEN_3 = ModelShape(  # 0.6B
    *(28, 1024, 16, 3072, 151936),
    num_query_groups=8,
    kv_channels=128,
    tied_embeddings=True,
    qk_norm=True,
)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (ModelShape(40, 5120, 40, 13824, 32000), 13_015_864_320),
        (ModelShape(80, 8192, 64, 28672, 32000, num_query_groups=8), 68_976_648_192),
        (ModelShape(32, 2560, 20, 6912, 32000), 2_701_560_320),
        (ModelShape(24, 2048, 16, 5504, 32000), 1_345_423_360),
        (ModelShape(24, 1024, 8, 2816, 32000), 373_867_520),
        (QWEN_2_5, 494_032_768),
        (QWEN_3, 596_049_920),
    ],
)
def test_published_sizes(shape: ModelShape, count: int) -> None:
    assert parameter_count(shape) == count


def test_a_tied_embedding_counts_once() -> None:
    tied = replace(LLAMA_2_7B, tied_embeddings=True)
    assert parameter_count(LLAMA_2_7B) - parameter_count(tied) == 32000 * 4096


def test_the_count_is_that_of_a_transformers_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )
    shape = ModelShape(2, 24, 4, 40, 50, num_query_groups=2, kv_channels=8, tied_embeddings=True)
    assert parameter_count(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_expected_count_is_the_mean_over_all_states_of_the_units(tied: bool) -> None:
    """All 2^12 ways to switch 2 layers, 2 hidden, 2 x 2 groups and 2 x 2 intermediate units."""
    shape = ModelShape(2, 2, 4, 2, 7, num_query_groups=2, kv_channels=6, tied_embeddings=tied)
    sizes = mask_sizes(shape)
    generator = np.random.default_rng(0)
    p = {mask: generator.uniform(0.05, 0.95, size) for mask, size in sizes.items()}

    states = np.array(list(product((0, 1), repeat=12)))
    flat = np.concatenate([p[mask].ravel() for mask in sizes])
    likelihood = np.where(states == 1, flat, 1 - flat).prod(1)
    layer, hidden, head, intermediate = np.split(states, (2, 4, 8), axis=1)
    d, heads, ffn = hidden.sum(1), head.reshape(-1, 2, 2).sum(2), intermediate.reshape(-1, 2, 2)
    ffn = ffn.sum(2)
    count = d * (7 * (1 if tied else 2) + 1)
    for number in range(2):  # q and o of two heads, k and v of one; gate, up, down; two norms
        attention = heads[:, number] * 6 * d * (2 + 2 + 1 + 1)
        count = count + layer[:, number] * (attention + 3 * d * ffn[:, number] + 2 * d)
    expected = (likelihood * count).sum()

    result = expected_parameter_count(shape, {mask: torch.tensor(v) for mask, v in p.items()})
    assert float(result) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("qwen", [False, True])
def test_expected_count_of_query_heads_is_the_mean_over_all_states(qwen: bool) -> None:
    """All 2^14 ways to switch 2 layers, 2 hidden units, 2 x 2 x 2 query heads and 2 x 1 units."""
    shape = ModelShape(
        2, 2, 4, 1, 7, num_query_groups=2, kv_channels=6, qkv_bias=qwen, qk_norm=qwen
    )
    sizes = mask_sizes(shape, QUERY_HEAD)
    generator = np.random.default_rng(0)
    p = {mask: generator.uniform(0.05, 0.95, size) for mask, size in sizes.items()}

    states = np.array(list(product((0, 1), repeat=14)))
    flat = np.concatenate([p[mask].ravel() for mask in sizes])
    likelihood = np.where(states == 1, flat, 1 - flat).prod(1)
    layer, hidden, head, intermediate = np.split(states, (2, 4, 12), axis=1)
    d, heads = hidden.sum(1), head.reshape(-1, 2, 4).sum(2)
    count = d * (7 * 2 + 1)
    for number in range(2):  # q and o of each head that is on; k and v of both groups, always
        attention = d * 6 * (2 * heads[:, number] + 2 * 2)
        attention += qwen * (6 * (heads[:, number] + 2 * 2) + 2 * 6)
        count = count + layer[:, number] * (attention + 3 * d * intermediate[:, number] + 2 * d)
    expected = (likelihood * count).sum()

    tensors = {mask: torch.tensor(v) for mask, v in p.items()}
    result = expected_parameter_count(shape, tensors, QUERY_HEAD)
    assert float(result) == pytest.approx(expected, rel=1e-12)


def test_expected_count_of_a_7b_model_in_float32_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    p = {
        mask: torch.rand(size, generator=generator) for mask, size in mask_sizes(LLAMA_2_7B).items()
    }
    kept = {mask: value.numpy().astype(np.float64).sum(1) for mask, value in p.items()}
    d = kept["hidden"][0]
    layers = 4 * 128 * d * kept["head"] + 3 * d * kept["intermediate"] + 2 * d
    layers = (p["layer"][0].numpy().astype(np.float64) * layers).sum()
    expected = 2 * 32000 * d + d + layers
    assert float(expected_parameter_count(LLAMA_2_7B, p)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("head_unit", HEAD_UNITS)
@pytest.mark.parametrize("shape", [LLAMA_2_7B, QWEN_2_5, QWEN_3])
def test_all_kept_is_the_dense_count_exactly(shape: ModelShape, head_unit: str) -> None:
    ones = {mask: torch.ones(size) for mask, size in mask_sizes(shape, head_unit).items()}
    assert int(expected_parameter_count(shape, ones, head_unit)) == parameter_count(shape)


@pytest.mark.parametrize("head_unit", HEAD_UNITS)
def test_gradient_of_the_expected_count(head_unit: str) -> None:
    shape = ModelShape(3, 5, 4, 6, 7, num_query_groups=2, kv_channels=2)
    sizes = mask_sizes(shape, head_unit)
    inputs = [torch.rand(size, dtype=torch.float64, requires_grad=True) for size in sizes.values()]
    assert torch.autograd.gradcheck(
        lambda *p: expected_parameter_count(shape, dict(zip(sizes, p, strict=True)), head_unit),
        inputs,
    )
