"""Megatron-Core's layer specs with the masked classes in them; differences between its releases.

Checked with megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megashear.config.schema import ModelShape
from megashear.model.masked_attention import MaskedSelfAttention
from megashear.model.masked_gpt import MaskedTransformerLayer
from megashear.model.masked_mlp import MaskedMLP
from megashear.platform import layers


def block_spec(
    backend: str, num_layers: int, shape: ModelShape, masked_attention: bool
) -> TransformerBlockSubmodules:
    """Return the spec of a masked model's decoder on this rank.

    Args:
        backend: `torch` or `transformer_engine` (see `platform.layers`).
        num_layers: transformer layers that this rank holds.
        shape: decides which modules and biases a layer has.
        masked_attention: whether the model will be given attention masks.
    """
    if backend == "transformer_engine":
        norm = layers.transformer_engine_norm()
        spec = layers.transformer_engine_spec(shape.qk_norm, masked_attention)
        submodules, attention = spec.submodules, spec.submodules.self_attention
    else:
        norm = layers.RMSNorm
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        submodules = dataclasses.replace(
            spec.submodules, input_layernorm=norm, pre_mlp_layernorm=norm
        )
        within = dataclasses.replace(
            submodules.self_attention.submodules,
            core_attention=layers.SDPAttention,
            **(dict.fromkeys(("q_layernorm", "k_layernorm"), norm) if shape.qk_norm else {}),
        )
        attention = dataclasses.replace(submodules.self_attention, submodules=within)
    params = {**attention.params, "proj_bias": shape.proj_bias}
    masked = dataclasses.replace(
        submodules,
        self_attention=dataclasses.replace(attention, module=MaskedSelfAttention, params=params),
        mlp=_masked_mlp(submodules.mlp),
    )
    layer = ModuleSpec(module=MaskedTransformerLayer, submodules=masked)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _masked_mlp(mlp: Any) -> Any:
    if isinstance(mlp, ModuleSpec):  # megatron-core 0.16
        return dataclasses.replace(mlp, module=MaskedMLP)
    return functools.partial(MaskedMLP.as_mlp_submodule, *mlp.args, **mlp.keywords)  # 0.19
