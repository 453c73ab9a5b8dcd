"""The layers a model is built of: Transformer Engine's where chosen, else plain torch ones.

The only home of Transformer Engine. The torch norm and attention stand where Megatron-Core's local
ones do not serve: its norm refuses sequence parallelism, its attention materialises all scores.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, [s, b, h] -> [s, b, h] (Zhang and Sennrich 2019).

    Its weight is marked for Megatron's gradient all-reduce when sequence parallelism is on.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SDPAttention(MegatronModule):
    """Causal attention by torch's scaled_dot_product_attention (its flash kernel on a GPU)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Attend: query [s, b, np, hn], key and value [s, b, ng, hn] -> [s, b, np * hn]."""
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, n, s, hn]
        context = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def transformer_engine_spec() -> Any:
    """Megatron-Core's layer spec with Transformer Engine's fused layers (needs a GPU)."""
    import transformer_engine  # noqa: F401  (fails here, with its own message, rather than later)
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    return get_gpt_layer_with_transformer_engine_spec()


def transformer_engine_norm() -> Any:
    """Transformer Engine's norm, for the end of the decoder."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
