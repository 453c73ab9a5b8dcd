"""Self-attention that states how head and hidden masks act on its weights."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class MaskedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention; a unit of its head mask is a query group or a query head.

    linear_qkv [qkv/tp, d] holds, group after group, the group's query heads, its key and its value;
    linear_proj [d, heads * dh / tp] has the query heads of the same groups along axis 1.

    Args:
        config: Megatron-Core's; its `add_bias_linear` counts for the MLP alone.
        proj_bias: whether linear_proj has a bias.
        arguments: of Megatron-Core's class.
    """

    def __init__(self, config: TransformerConfig, *, proj_bias: bool, **arguments: Any) -> None:
        config = copy.copy(config)  # not dataclasses.replace: it would lose what is no field (yarn)
        config.add_bias_linear = proj_bias
        super().__init__(config=config, **arguments)

    def masked_modules(self) -> dict[str, nn.Module]:
        """Return the modules by the names that their parameters may have in the table."""
        modules = {
            "self_attention.linear_qkv.weight": self.linear_qkv,
            "self_attention.linear_qkv.bias": self.linear_qkv,
            "self_attention.q_layernorm.weight": self.q_layernorm,
            "self_attention.k_layernorm.weight": self.k_layernorm,
            "self_attention.linear_proj.weight": self.linear_proj,
            "self_attention.linear_proj.bias": self.linear_proj,
        }
        if hasattr(self.linear_qkv, "layer_norm_weight"):  # Transformer Engine fuses the norm
            modules["self_attention.linear_qkv.layer_norm_weight"] = self.linear_qkv
        return modules
