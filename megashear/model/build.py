"""Builds this rank's part of a masked model from its shape."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megashear.config.schema import ModelShape, ParallelConfig
from megashear.model.masked_gpt import MaskedGPTModel
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
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
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


def build_model(
    shape: ModelShape, platform: Platform, parallel: ParallelConfig, seq_length: int
) -> torch.nn.Module:
    """This rank's part of the model, with random weights, on the platform's device.

    Under bf16 it is wrapped in Megatron-Core's Float16Module; `unwrap` gives the MaskedGPTModel.
    """
    config = transformer_config(shape, platform, parallel)
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    model = MaskedGPTModel(
        config=config,
        transformer_layer_spec=block_spec(platform.layers, get_num_layers_to_build(config)),
        vocab_size=shape.vocab_size,
        max_sequence_length=seq_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
    )
    model.shape = shape
    model.to(platform.device)
    return Float16Module(config, model) if config.bf16 else model


def unwrap(model: Any) -> MaskedGPTModel:
    """The MaskedGPTModel inside Megatron-Core's wrappers (data parallelism, bf16)."""
    while not isinstance(model, MaskedGPTModel):
        model = model.module
    return model
