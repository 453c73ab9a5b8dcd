"""Build this rank's shard of a masked model from its shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megashear.config.schema import QUERY_GROUP, ModelShape, ParallelConfig, RotaryScaling
from megashear.model.masked_gpt import BoundRule, MaskedGPTModel
from megashear.model.specs import block_spec
from megashear.platform.kernels import can_compile
from megashear.platform.parallel import Platform


def transformer_config(
    shape: ModelShape, platform: Platform, parallel: ParallelConfig, seq_length: int
) -> TransformerConfig:
    """Return Megatron-Core's configuration of a LLaMA-type model for sequences of this length.

    The loss is summed over tokens and divided once by the number of tokens of the whole step
    (`calculate_per_token_loss`), so that it does not depend on how samples are spread.
    """
    fused = platform.layers == "transformer_engine"
    compiled = can_compile(platform.device)
    on_cpu, bf16 = platform.device.type == "cpu", platform.dtype == torch.bfloat16
    window = shape.sliding_window
    assert shape.qkv_bias or not shape.proj_bias  # Megatron-Core would add a bias without a rule
    config = TransformerConfig(
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
        add_bias_linear=shape.mlp_bias,  # MaskedSelfAttention has its own
        # Left out where it hides nothing: attention without one is faster.
        window_size=(window - 1, 0) if window and window < seq_length else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_layout(parallel),
        # gloo may still be sending what would be freed.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and not on_cpu,
        params_dtype=platform.dtype,
        pipeline_dtype=platform.dtype,
        bf16=bf16,
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,
        persist_layer_norm=False,
        # Fusions that need Apex, Transformer Engine or torch.compile stay off elsewhere.
        bias_activation_fusion=fused or compiled,
        cross_entropy_loss_fusion=compiled and bf16,  # it rounds the gradient of logits to bf16
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=False,
    )
    if shape.rotary_scaling and shape.rotary_scaling.rope_type == "yarn":
        for name, value in _yarn(shape.rotary_scaling).items():
            setattr(config, f"yarn_{name}", value)
        config.apply_rope_fusion = False  # the fused kernel does not scale cos and sin
    return config


def _yarn(scaling: RotaryScaling) -> dict[str, Any]:
    """Return the `yarn_` attributes that Megatron-Core reads, which are no fields.

    It has no attention factor, but the ratio of `0.1 m ln(factor) + 1` for m and m_all_dim.
    """
    mscale = 1.0
    if scaling.attention_factor is not None and scaling.factor > 1:
        mscale = (scaling.attention_factor - 1) / (0.1 * math.log(scaling.factor))
    return {
        "rotary_scaling_factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "mscale": mscale,
        "mscale_all_dim": 0.0,
        "correction_range_round_to_int": scaling.truncate,
    }


def _rotary(shape: ModelShape) -> dict[str, Any]:
    """Return Megatron-Core's arguments for the position embedding."""
    arguments = {"position_embedding_type": "rope", "rotary_base": shape.rotary_base}
    scaling = shape.rotary_scaling
    if scaling is None:
        return arguments
    match scaling.rope_type:
        case "linear":
            arguments["seq_len_interpolation_factor"] = scaling.factor
        case "llama3":
            arguments |= {"rope_scaling": True, "rope_scaling_factor": scaling.factor}
        case "yarn":
            arguments["position_embedding_type"] = "yarn"
    return arguments


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of Megatron-Core's configuration for parallel layout and recomputation."""
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
    """Build this rank's shard of the model, with random weights, on the platform's device.

    One chunk of layers, or one for each virtual pipeline stage. Under bf16 each is wrapped in
    Megatron-Core's Float16Module; `unwrap` gives the MaskedGPTModel. Where it will be given
    attention masks, `masked_attention` says so: Transformer Engine must know.
    """
    config = transformer_config(shape, platform, parallel, seq_length)
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
        transformer_layer_spec=block_spec(platform.layers, num_layers, shape, masked_attention),
        vocab_size=shape.vocab_size + -shape.vocab_size % config.tensor_model_parallel_size,
        max_sequence_length=seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        vp_stage=vp_stage,
        **_rotary(shape),
    )
    model.shape = shape
    model.clear_padding()
    model.to(platform.device)
    return Float16Module(config, model) if config.bf16 else model


def unwrap(model: Any) -> MaskedGPTModel:
    """Return the MaskedGPTModel inside Megatron-Core's wrappers (data parallelism, bf16)."""
    while not isinstance(model, MaskedGPTModel):
        model = model.module
    return model


def bound_rules(chunks: Iterable[Any], head_unit: str = QUERY_GROUP) -> Iterator[BoundRule]:
    """Yield every rule whose parameter this rank holds, over all chunks of its model."""
    for chunk in chunks:
        yield from unwrap(chunk).bound_rules(head_unit)
