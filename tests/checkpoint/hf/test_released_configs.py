"""config.json of models as they were released: every key understood, every parameter counted."""

from __future__ import annotations

from typing import Any

import pytest

from megashear.checkpoint.hf.config import shape_from_hf_config
from megashear.config.schema import RotaryScaling
from megashear.pruning.counting import parameter_count

LLAMA_1_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 2048, "max_sequence_length": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_2_7B: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_2_70B = {
    **LLAMA_2_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8,
}  # fmt: skip
CODE_LLAMA_7B = {
    **LLAMA_2_7B, "max_position_embeddings": 16384, "rope_theta": 1000000, "vocab_size": 32016
}  # fmt: skip
DEEPSEEK_CODER_1_3B = {
    **LLAMA_2_7B, "bos_token_id": 32013, "eos_token_id": 32014, "hidden_size": 2048,
    "intermediate_size": 5504, "max_position_embeddings": 16384, "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "vocab_size": 32256,
}  # fmt: skip
TINY_LLAMA = {
    **LLAMA_2_7B, "attention_bias": False, "hidden_size": 2048, "intermediate_size": 5632,
    "max_position_embeddings": 2048, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "rope_theta": 10000.0,
}  # fmt: skip
YI_6B = {
    **LLAMA_2_7B, "num_key_value_heads": 4, "pad_token_id": 0, "rope_theta": 5000000.0,
    "vocab_size": 64000,
}  # fmt: skip
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_1_SCALING = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
LLAMA_3_1_8B = {
    **LLAMA_3_8B, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
    "mlp_bias": False, "rope_scaling": LLAMA_3_1_SCALING,
}  # fmt: skip
LLAMA_3_2_1B = {
    **LLAMA_3_1_8B, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "rope_scaling": {**LLAMA_3_1_SCALING, "factor": 32.0},
    "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM2_135M = {
    **LLAMA_2_7B, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "vocab_size": 49152,
}  # fmt: skip
MISTRAL_7B_V1: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B_V3 = {
    **MISTRAL_7B_V1, "attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None,
    "vocab_size": 32768,
}  # fmt: skip
MISTRAL_NEMO = {
    **MISTRAL_7B_V3, "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 131072,
    "num_hidden_layers": 40, "vocab_size": 131072,
}  # fmt: skip
QWEN_2_5_0_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_2_5_7B = {
    **QWEN_2_5_0_5B, "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "sliding_window": 131072,
    "tie_word_embeddings": False, "vocab_size": 152064,
}  # fmt: skip
QWEN_2_5_7B_LONG = {  # as its card says for texts above 32,768 tokens
    **QWEN_2_5_7B,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}
QWEN_3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3_8B = {
    **QWEN_3_0_6B, "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36,
    "num_attention_heads": 32, "num_hidden_layers": 36, "tie_word_embeddings": False,
}  # fmt: skip

RELEASED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "LLaMA 7B": (LLAMA_1_7B, 6_738_415_616, {"layernorm_epsilon": 1e-6, "rotary_base": 1e4}),
    "LLaMA-2-7B": (LLAMA_2_7B, 6_738_415_616, {"num_query_groups": 32, "kv_channels": 128}),
    "LLaMA-2-70B": (LLAMA_2_70B, 68_976_648_192, {"num_query_groups": 8}),
    "CodeLlama-7B": (CODE_LLAMA_7B, 6_738_546_688, {"rotary_base": 1e6}),
    "deepseek-coder-1.3b": (
        DEEPSEEK_CODER_1_3B, 1_346_471_936, {"rotary_scaling": RotaryScaling("linear", 4.0)}
    ),
    "TinyLlama-1.1B": (TINY_LLAMA, 1_100_048_384, {"num_query_groups": 4, "kv_channels": 64}),
    "Yi-6B": (YI_6B, 6_061_035_520, {"rotary_base": 5e6, "layernorm_epsilon": 1e-5}),
    "Llama-3-8B": (LLAMA_3_8B, 8_030_261_248, {"rotary_scaling": None, "rotary_base": 5e5}),
    "Llama-3.1-8B": (
        LLAMA_3_1_8B, 8_030_261_248, {"rotary_scaling": RotaryScaling("llama3", 8.0, 8192)}
    ),
    "Llama-3.2-1B": (
        LLAMA_3_2_1B, 1_235_814_400, {"rotary_scaling": RotaryScaling("llama3", 32.0, 8192)}
    ),
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008, {"kv_channels": 64, "rotary_base": 1e5}),
    "Mistral-7B-v0.1": (MISTRAL_7B_V1, 7_241_732_096, {"sliding_window": 4096}),
    "Mistral-7B-v0.3": (MISTRAL_7B_V3, 7_248_023_552, {"sliding_window": None}),
    "Mistral-Nemo": (MISTRAL_NEMO, 12_247_782_400, {"kv_channels": 128}),
    "Qwen2.5-0.5B": (QWEN_2_5_0_5B, 494_032_768, {"qkv_bias": True, "sliding_window": None}),
    "Qwen2.5-7B": (QWEN_2_5_7B, 7_615_616_512, {"proj_bias": False, "tied_embeddings": False}),
    "Qwen2.5-7B over 131,072 tokens": (
        QWEN_2_5_7B_LONG, 7_615_616_512, {"rotary_scaling": RotaryScaling("yarn", 4.0, 32768)}
    ),
    "Qwen3-0.6B": (QWEN_3_0_6B, 596_049_920, {"qk_norm": True, "kv_channels": 128}),
    "Qwen3-8B": (QWEN_3_8B, 8_190_735_360, {"qkv_bias": False, "num_query_groups": 8}),
}  # fmt: skip
"""config.json, parameters as published, and fields of the shape."""


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_understood(name: str) -> None:
    config, parameters, fields = RELEASED[name]
    shape = shape_from_hf_config(config)
    assert parameter_count(shape) == parameters
    assert shape.family == config["model_type"]
    assert {field: getattr(shape, field) for field in fields} == fields
