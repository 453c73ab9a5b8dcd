"""The tables of weights and families, against transformers' own names and layouts by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from megashear.checkpoint.hf.config import hf_config, shape_from_hf_config
from megashear.checkpoint.hf.families import PARTS
from megashear.checkpoint.hf.mapping import hf_tensors, to_hf, to_megatron
from megashear.config.schema import FAMILIES, ModelShape, RotaryScaling
from megashear.errors import CheckpointError
from megashear.pruning.table import param_rules
from tests.support.hf_models import config_of
from tests.support.reference_llama import random_weights

FACTORS = st.floats(1, 40)
SCALINGS = st.one_of(
    st.none(),
    st.builds(RotaryScaling, st.sampled_from(("linear", "dynamic")), FACTORS),
    st.builds(RotaryScaling, st.just("llama3"), FACTORS, st.just(8192)),
    st.builds(
        RotaryScaling,
        *(st.just("yarn"), FACTORS.filter(lambda factor: factor > 1), st.integers(1, 10000)),
        *(st.floats(1, 50), st.floats(0.1, 1), st.booleans(), st.none() | st.floats(0.1, 3)),
    ),
)


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Anything that its family may have."""
    family = draw(st.sampled_from(FAMILIES))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    attention_bias = family in ("llama", "qwen3") and draw(st.booleans())
    return ModelShape(
        num_layers=draw(st.integers(1, 12)),
        hidden_size=heads * draw(st.integers(1, 4)) + (family != "llama") * draw(st.integers(0, 5)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(2, 4)),  # dynamic scaling divides by two less
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 20)),
        max_position_embeddings=draw(st.integers(1, 200000)),
        rotary_base=draw(st.floats(100, 1e7)),
        layernorm_epsilon=draw(st.floats(1e-8, 1e-2)),
        tied_embeddings=draw(st.booleans()),
        qkv_bias=family == "qwen2" or attention_bias,
        proj_bias=attention_bias,
        mlp_bias=family == "llama" and draw(st.booleans()),
        qk_norm=family == "qwen3",
        rotary_scaling=draw(SCALINGS),
        sliding_window=draw(st.none() | st.integers(1, 9)) if family != "llama" else None,
        family=family,
    )


def tensors_of(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """What transformers makes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@given(shapes())
@settings(max_examples=60, deadline=None)
def test_names_and_shapes_are_those_of_transformers(shape: ModelShape) -> None:
    written = hf_config(shape)
    config = AutoConfig.for_model(**written)
    assert hf_tensors(shape) == tensors_of(config)
    assert shape_from_hf_config(written) == shape
    assert shape_from_hf_config(config.to_dict()) == shape  # the form of transformers 5 alone
    assert shape_from_hf_config({**written, "rope_parameters": None}) == shape  # and of 4


def test_a_model_is_written_as_what_has_its_tensors_or_not_at_all() -> None:
    """Every combination of parts, against all that the four architectures can be told to have."""
    known = [
        tensors_of(config_of(model_type=family, sliding_window=None, **switches))
        for family, keys in (
            ("llama", ("attention_bias", "mlp_bias")),
            ("mistral", ()),
            ("qwen2", ()),
            ("qwen3", ("attention_bias",)),
        )
        for values in itertools.product((False, True), repeat=len(keys))
        for switches in [dict(zip(keys, values, strict=True))]
    ]
    plain = shape_from_hf_config(config_of().to_dict())
    written = 0
    for values in itertools.product((False, True), repeat=len(PARTS)):
        shape = replace(plain, **dict(zip(PARTS, values, strict=True)))
        try:
            tensors = tensors_of(AutoConfig.for_model(**hf_config(shape)))
        except CheckpointError:
            assert hf_tensors(shape) not in known
        else:
            assert tensors == hf_tensors(shape)
            written += 1
    assert written == 7  # LLaMA's four, Qwen2's one, Qwen3's two; Mistral's are LLaMA's


@given(shapes(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_there_and_back_is_the_same(shape: ModelShape, seed: int) -> None:
    weights = random_weights(shape, seed)
    hf = {
        hf_name: tensor
        for name, whole in weights.items()
        for hf_name, tensor in to_hf(shape, name, whole)
    }
    assert set(hf) == set(hf_tensors(shape))
    for rule in param_rules(shape):
        assert torch.equal(to_megatron(shape, rule.name, hf.__getitem__), weights[rule.name])


@given(shapes(), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_query_key_value_rows_lie_group_by_group(shape: ModelShape, seed: int) -> None:
    size, per_group = shape.kv_channels, shape.heads_per_group
    rng = np.random.default_rng(seed)
    query = rng.random((shape.num_attention_heads, size, shape.hidden_size), dtype=np.float32)
    key = rng.random((shape.num_query_groups, size, shape.hidden_size), dtype=np.float32)
    value = rng.random((shape.num_query_groups, size, shape.hidden_size), dtype=np.float32)
    rows = []
    for group in range(shape.num_query_groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows += list(query[head])
        rows += [*key[group], *value[group]]
    prefix = "model.layers.0.self_attn."
    hf = {
        prefix + "q_proj.weight": query.reshape(-1, shape.hidden_size),
        prefix + "k_proj.weight": key.reshape(-1, shape.hidden_size),
        prefix + "v_proj.weight": value.reshape(-1, shape.hidden_size),
    }
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    joined = to_megatron(shape, name, lambda hf_name: torch.from_numpy(hf[hf_name]))
    np.testing.assert_array_equal(joined.numpy(), np.stack(rows))
