"""Builds this rank's part of a masked model from its shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megashear.config.schema import QUERY_GROUP, ModelShape, ParallelConfig
from megashear.model.masked_gpt import BoundRow, MaskedGPTModel
from megashear.model.specs import block_spec
from megashear.platform.parallel import Platform


def transformer_config(
    shape: ModelShape, platform: Platform, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron-Core's configuration of a LLaMA-architecture model.

    The loss is summed over tokens and divided once by the number of tokens of the whole step
    (`calculate_per_token_loss`), so that it does not depend on how samples are spread.
    """
    fused = platform.layers == "transformer_engine"
    on_cpu = platform.device.type == "cpu"
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=shape.ffn_hidden_size,
        layernorm_epsilon=shape.layernorm_epsilon,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_layout(parallel),
        # gloo may still be sending what would be freed.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not on_cpu,
        params_dtype=platform.dtype,
        pipeline_dtype=platform.dtype,
        bf16=platform.dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,
        persist_layer_norm=False,
        # Fusions that need Apex, Transformer Engine or torch.compile stay off elsewhere.
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=False,
    )


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    """What Megatron-Core's configuration says of the parallel layout and of recomputing."""
    interleaved = parallel.virtual_pipeline > 1
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.sequence,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "context_parallel_size": parallel.context,
        # Interleaved stages that batch their messages are silently wrong with two stages.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }
    if parallel.recompute == "selective":
        layout |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif parallel.recompute == "full":
        layout |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return layout


def build_model(
    shape: ModelShape,
    platform: Platform,
    parallel: ParallelConfig,
    seq_length: int,
    *,
    masked_attention: bool = False,
) -> list[torch.nn.Module]:
    """This rank's part of the model, with random weights, on the platform's device.

    One chunk of layers, or one for each virtual pipeline stage. Under bf16 each is wrapped in
    Megatron-Core's Float16Module; `unwrap` gives the MaskedGPTModel. Where it will be given
    attention masks, `masked_attention` says so: Transformer Engine must know.
    """
    config = transformer_config(shape, platform, parallel)
    interleaved = parallel.virtual_pipeline > 1
    stages = range(parallel.virtual_pipeline) if interleaved else (None,)
    return [
        _build_chunk(shape, platform, config, seq_length, masked_attention, stage)
        for stage in stages
    ]


def _build_chunk(
    shape: ModelShape,
    platform: Platform,
    config: TransformerConfig,
    seq_length: int,
    masked_attention: bool,
    vp_stage: int | None,
) -> torch.nn.Module:
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    num_layers = get_num_layers_to_build(config, vp_stage)
    model = MaskedGPTModel(
        config=config,
        transformer_layer_spec=block_spec(
            platform.layers, num_layers, shape.qk_norm, masked_attention
        ),
        vocab_size=shape.vocab_size,
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        vp_stage=vp_stage,
    )
    model.shape = shape
    model.to(platform.device)
    return Float16Module(config, model) if config.bf16 else model


def unwrap(model: Any) -> MaskedGPTModel:
    """The MaskedGPTModel inside Megatron-Core's wrappers (data parallelism, bf16)."""
    while not isinstance(model, MaskedGPTModel):
        model = model.module
    return model


def bound_rows(chunks: Iterable[Any], head_unit: str = QUERY_GROUP) -> Iterator[BoundRow]:
    """Every row of the table whose parameter this rank holds, over all chunks of its model."""
    for chunk in chunks:
        yield from unwrap(chunk).bound_rows(head_unit)
