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

from megashear.model.masked_attention import MaskedSelfAttention
from megashear.model.masked_gpt import MaskedTransformerLayer
from megashear.model.masked_mlp import MaskedMLP
from megashear.platform import layers


def block_spec(
    backend: str, num_layers: int, qk_norm: bool, masked_attention: bool
) -> TransformerBlockSubmodules:
    """The decoder of a masked model on this rank.

    Args:
        backend: `torch` or `transformer_engine` (see `platform.layers`).
        num_layers: transformer layers that this rank holds.
        qk_norm: whether queries and keys are normed, head by head.
        masked_attention: whether the model will be given attention masks.
    """
    if backend == "transformer_engine":
        layer, norm = (
            layers.transformer_engine_spec(qk_norm, masked_attention),
            layers.transformer_engine_norm(),
        )
        submodules = layer.submodules
        attention = submodules.self_attention.submodules
    else:
        norm = layers.RMSNorm
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        submodules = dataclasses.replace(
            layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm
        )
        attention = dataclasses.replace(
            submodules.self_attention.submodules,
            core_attention=layers.SDPAttention,
            **(dict.fromkeys(("q_layernorm", "k_layernorm"), norm) if qk_norm else {}),
        )
    masked = dataclasses.replace(
        submodules,
        self_attention=dataclasses.replace(
            submodules.self_attention, module=MaskedSelfAttention, submodules=attention
        ),
        mlp=_masked_mlp(submodules.mlp),
    )
    spec = ModuleSpec(module=MaskedTransformerLayer, submodules=masked)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm)


def _masked_mlp(mlp: Any) -> Any:
    if isinstance(mlp, ModuleSpec):  # megatron-core 0.16
        return dataclasses.replace(mlp, module=MaskedMLP)
    return functools.partial(MaskedMLP.as_mlp_submodule, *mlp.args, **mlp.keywords)  # 0.19
