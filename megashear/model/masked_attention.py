"""Self-attention whose output projection has a bias of its own setting."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig


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
