"""The table of mappings, against transformers' own names and a layout written out by hand."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given, settings
from transformers import LlamaConfig, LlamaForCausalLM

from megashear.checkpoint.hf_config import hf_config, shape_from_hf_config
from megashear.checkpoint.mapping import hf_tensors, to_hf, to_megatron
from megashear.config.schema import ModelShape
from megashear.pruning.table import table
from tests.reference_llama import random_weights


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = groups * per_group
    return ModelShape(
        num_layers=draw(st.integers(1, 12)),
        hidden_size=heads * draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(1, 4)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(1, 20)),
        tied_embeddings=draw(st.booleans()),
    )


@given(shapes())
@settings(max_examples=25, deadline=None)
def test_names_and_shapes_are_those_of_transformers(shape: ModelShape) -> None:
    config = LlamaConfig(**hf_config(shape))
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert hf_tensors(shape) == theirs
    assert shape_from_hf_config(config.to_dict()) == shape


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
    for row in table(shape):
        assert torch.equal(to_megatron(shape, row.name, hf.__getitem__), weights[row.name])


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
