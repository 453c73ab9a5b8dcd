"""The layers of a model: Transformer Engine's where chosen, else plain torch ones.

No other module imports Transformer Engine. The torch norm and attention replace Megatron-Core's
local ones, whose norm refuses sequence parallelism and whose attention materialises all scores.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
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
    """Causal attention by torch's scaled_dot_product_attention (its flash kernel on a GPU).

    A mask [b, 1, s, s] must be causal itself; it is True where a query must not look. With
    `config.window_size` = (w - 1, 0) a query sees the w keys that end with its own.

    Under context parallelism a rank has two blocks of each sequence, one from either end
    (Megatron's order, which balances the work). It gathers the keys and values of all ranks. A mask
    then has only the rows of this rank's queries.
    """

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
        self.window = config.window_size[0] + 1 if config.window_size else None
        self.context_group = parallel_state.get_context_parallel_group(check_initialized=False)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Attend: query [s, b, np, hn], key and value [s, b, ng, hn] -> [s, b, np * hn]."""
        seen = None if attention_mask is None else ~attention_mask
        if self.config.context_parallel_size == 1:
            return self._attend(0, query, key, value, seen)
        ranks, rank = self.context_group.size(), self.context_group.rank()
        key, value = (self._gather_in_order(t) for t in (key, value))
        length = query.shape[0] // 2
        masks = (None, None) if seen is None else seen.chunk(2, dim=2)
        blocks = (rank, 2 * ranks - 1 - rank)
        parts = zip(blocks, query.chunk(2), masks, strict=True)
        return torch.cat([self._attend(n * length, q, key, value, mask) for n, q, mask in parts])

    def _gather_in_order(self, part: Tensor) -> Tensor:
        """Gather all ranks' blocks in the order of the sequence; backward sums their gradients."""
        blocks = gather_from_sequence_parallel_region(part, group=self.context_group)
        blocks = blocks.chunk(2 * self.context_group.size())
        return torch.cat([*blocks[0::2], *reversed(blocks[1::2])])

    def _attend(
        self, first: int, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None
    ) -> Tensor:
        """Attend from the queries from position `first` on to the keys in their window and mask."""
        end = first + query.shape[0]
        window = min(self.window or end, end)
        mask = None if seen is None else seen[..., :end]
        if window < end or (mask is None and first > 0):
            in_window = _in_window(first, end, window, query.device)
            mask = in_window if mask is None else mask & in_window
        # [b, n, s, hn]
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key[:end], value[:end]))
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context.permute(2, 0, 1, 3).flatten(2)


@lru_cache(maxsize=2)  # all layers use the same; a context-parallel rank has two blocks
def _in_window(first: int, end: int, window: int, device: torch.device) -> Tensor:
    """Return which keys are in the window of each query: bool [end - first, end]."""
    ones = torch.ones(end - first, end, dtype=torch.bool, device=device)
    return ones.tril(first).triu(first + 1 - window)


def context_part(sequences: Tensor) -> Tensor:
    """Return a context-parallel rank's part of sequences [b, s]: a block from either end.

    As Megatron-Core's `get_batch_on_this_cp_rank`, whose arguments differ between its releases.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return sequences
    rank = parallel_state.get_context_parallel_rank()
    blocks = sequences.chunk(2 * ranks, dim=1)
    return torch.cat([blocks[rank], blocks[2 * ranks - 1 - rank]], dim=1)


def transformer_engine_spec(qk_norm: bool, masked_attention: bool) -> Any:
    """Return Megatron-Core's layer spec with Transformer Engine's fused layers (needs a GPU).

    Its attention applies a mask only if `masked_attention` is set.
    """
    import transformer_engine  # noqa: F401  (fails here, with its own message, rather than later)
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    if masked_attention:
        spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    return spec


def transformer_engine_norm() -> Any:
    """Return Transformer Engine's norm, for the end of the decoder."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm
