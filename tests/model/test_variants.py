"""The Megatron model of every variant computes what transformers' model of it computes.

transformers is the oracle: of logits, and of the cosines and sines of its rotary embedding.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megashear.checkpoint.torch_dist.state import fill_from_reader
from megashear.config.schema import ModelShape, ParallelConfig, PlatformConfig, RotaryScaling
from megashear.model.build import build_model
from megashear.platform import parallel
from megashear.platform.layers import context_part
from tests.model.test_reference_llama import hf_weights
from tests.support.distributed import run_distributed
from tests.support.reference_llama import random_weights

LENGTH, POSITIONS = 48, 512
TOKENS = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    ffn_hidden_size=48,
    vocab_size=64,
    max_position_embeddings=POSITIONS,
)
SCALINGS: dict[str, tuple[RotaryScaling, dict[str, Any]]] = {
    "linear": (RotaryScaling("linear", 3.0), {"factor": 3.0}),
    "dynamic": (RotaryScaling("dynamic", 2.0), {"factor": 2.0}),
    "llama3": (
        RotaryScaling("llama3", 32.0, 8192),
        {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        RotaryScaling("yarn", 4.0, 128),
        {"factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "yarn-attention-factor": (
        RotaryScaling("yarn", 4.0, 64, attention_factor=0.8),
        {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.8},
    ),
    "yarn-ramp": (
        RotaryScaling("yarn", 8.0, 64, beta_fast=4.0, beta_slow=0.25, truncate=False),
        {
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.25,
            "truncate": False,
        },
    ),
}


def scaled(name: str, **changes: Any) -> tuple[str, ModelShape, dict[str, Any]]:
    scaling, parameters = SCALINGS[name]
    rope = {"rope_type": scaling.rope_type, "rope_theta": 10000.0, **parameters}
    return "Llama", replace(SHAPE, rotary_scaling=scaling, **changes), {"rope_parameters": rope}


YARN_WINDOW = scaled("yarn-ramp", sliding_window=7)[1:]
VARIANTS: dict[str, tuple[str, ModelShape, dict[str, Any]]] = {
    **{name: scaled(name) for name in SCALINGS},
    "llama-theta": (
        "Llama",
        replace(SHAPE, rotary_base=500000.0),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "llama-attention-bias": (
        "Llama",
        replace(SHAPE, qkv_bias=True, proj_bias=True),
        {"attention_bias": True},
    ),
    "llama-mlp-bias": ("Llama", replace(SHAPE, mlp_bias=True), {"mlp_bias": True}),
    "llama-biases": (
        "Llama",
        replace(SHAPE, qkv_bias=True, proj_bias=True, mlp_bias=True, tied_embeddings=True),
        {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2", replace(SHAPE, qkv_bias=True), {}),
    "qwen3": (
        "Qwen3",
        replace(SHAPE, qkv_bias=True, proj_bias=True, qk_norm=True),
        {"attention_bias": True},
    ),
    "mistral": ("Mistral", replace(SHAPE, sliding_window=7), {"sliding_window": 7}),
    "mistral-one-token-more": (
        "Mistral",
        replace(SHAPE, sliding_window=LENGTH - 1),
        {"sliding_window": LENGTH - 1},
    ),
    "mistral-whole": ("Mistral", replace(SHAPE, sliding_window=LENGTH), {"sliding_window": LENGTH}),
    "mistral-yarn": ("Mistral", YARN_WINDOW[0], {**YARN_WINDOW[1], "sliding_window": 7}),
}
CONTEXT = ("linear", "yarn", "mistral", "mistral-yarn")
"""Those whose positions or attention depend on where a context-parallel rank stands."""


def theirs(name: str) -> Any:
    """The model in transformers, with the same random weights."""
    architecture, shape, settings = VARIANTS[name]
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.layernorm_epsilon,
        tie_word_embeddings=shape.tied_embeddings,
        attn_implementation="eager",
        **settings,
    )
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    model.load_state_dict(hf_weights(shape, random_weights(shape, seed=0)))
    return model


@torch.no_grad()
def logits_and_rotary(names: tuple[str, ...], context: int) -> dict[str, list[Tensor]]:
    """A rank's logits [b, s, vocab] of each variant; on one rank also cos and sin of POSITIONS."""
    layout = ParallelConfig(context=context)
    platform = parallel.start(PlatformConfig(device="cpu", precision="fp32"), layout, 0)
    found = {}
    for name in names:
        shape = VARIANTS[name][1]
        (model,) = chunks = build_model(shape, platform, layout, seq_length=LENGTH)
        fill_from_reader(chunks, random_weights(shape, seed=0).__getitem__, platform)
        positions = torch.arange(LENGTH).expand(2, -1)
        found[name] = [model(context_part(TOKENS), context_part(positions), None)]
        if context == 1:
            yarn = shape.rotary_scaling and shape.rotary_scaling.rope_type == "yarn"
            rotary = model.rotary_pos_emb(POSITIONS)
            angles, scale = rotary if yarn else (rotary, 1.0)
            found[name] += [angles[:, 0, 0].cos() * scale, angles[:, 0, 0].sin() * scale]
    parallel.stop()
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, list[Tensor]]:
    return run_distributed(logits_and_rotary, 1, tuple(VARIANTS), 1)[0]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_and_rotary_embeddings_are_those_of_transformers(
    name: str, ours: dict[str, list[Tensor]]
) -> None:
    """Of rotary embeddings over 512 positions, more than the logits have."""
    logits, *cos_and_sin = ours[name]
    model = theirs(name)
    expected = model(TOKENS).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    rotary = model.model.rotary_emb(expected, torch.arange(POSITIONS)[None])
    for part, expected_part in zip(cos_and_sin, rotary, strict=True):
        assert (part - expected_part[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "dynamic"])
def test_scaled_rotary_embeddings_differ(name: str, ours: dict[str, list[Tensor]]) -> None:
    """By more than the comparison above lets through; `dynamic` acts on longer texts only."""
    for part, plain in zip(ours[name], ours["dynamic"], strict=True):
        assert (part - plain).abs().max() > 1e-3


@torch.no_grad()
def test_context_parallel_ranks_have_their_part_of_the_same_logits(
    ours: dict[str, list[Tensor]],
) -> None:
    ranks = run_distributed(logits_and_rotary, 2, CONTEXT, 2)
    for name in CONTEXT:
        blocks = ours[name][0].chunk(4, dim=1)
        for rank, found in enumerate(ranks):
            expected = torch.cat([blocks[rank], blocks[3 - rank]], dim=1)
            assert (found[name][0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["linear", "yarn"])
@torch.no_grad()
def test_nothing_of_a_model_is_left_when_its_process_group_is(name: str) -> None:
    """Megatron-Core caches what embeddings return; a fork that empties the cache would hang."""
    shape, layout = VARIANTS[name][1], ParallelConfig()
    with parallel.single_process() as platform:
        (model,) = build_model(shape, platform, layout, seq_length=LENGTH)
        model(TOKENS, torch.arange(LENGTH).expand(2, -1), None)
        embedding = weakref.ref(model.rotary_pos_emb)
        del model
    gc.collect()
    assert embedding() is None
