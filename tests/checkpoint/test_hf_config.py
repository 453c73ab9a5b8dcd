"""What config.json says becomes the shape, or is refused by name; nothing is passed over."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from megashear.checkpoint.hf_config import hf_config, shape_from_hf_config
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from tests.hf_models import SIZES, VARIANTS

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    ffn_hidden_size=48,
    vocab_size=96,
    max_position_embeddings=64,
    rotary_base=500000.0,
    layernorm_epsilon=1e-6,
    tied_embeddings=True,
)


def written(**changes: Any) -> dict[str, Any]:
    """A good config.json, changed."""
    return {**hf_config(SHAPE), **changes}


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        shape_from_hf_config(config, "m/config.json")
    return str(caught.value)


def test_there_and_back_is_the_same() -> None:
    assert shape_from_hf_config(hf_config(SHAPE)) == SHAPE


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_reads_what_is_written_as_what_was_meant(variant: str) -> None:
    theirs = LlamaConfig(**{**SIZES, **VARIANTS[variant]})
    shape = shape_from_hf_config({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]})
    again = LlamaConfig(**hf_config(shape))
    for key in (*SIZES, "head_dim", "tie_word_embeddings", "rope_parameters", "hidden_act"):
        assert getattr(again, key) == getattr(theirs, key), key


def test_what_is_left_out_is_what_transformers_takes() -> None:
    sizes = {"vocab_size", "hidden_size", "intermediate_size"}
    sizes |= {"num_hidden_layers", "num_attention_heads"}
    minimal = {key: SIZES[key] for key in sizes}
    shape = shape_from_hf_config({"model_type": "llama", **minimal})
    theirs = LlamaConfig(**minimal)
    assert shape.layernorm_epsilon == theirs.rms_norm_eps
    assert shape.max_position_embeddings == theirs.max_position_embeddings
    assert shape.num_query_groups == theirs.num_key_value_heads
    assert shape.kv_channels == theirs.head_dim
    assert shape.rotary_base == theirs.rope_parameters["rope_theta"]
    assert shape.tied_embeddings == theirs.tie_word_embeddings


def test_rotary_base_of_older_and_newer_transformers() -> None:
    config = written()
    del config["rope_parameters"]
    assert shape_from_hf_config(config).rotary_base == 500000.0
    config = written()
    del config["rope_theta"]
    assert shape_from_hf_config(config).rotary_base == 500000.0
    older = written(rope_parameters=None, rope_scaling={"type": "default"})
    assert shape_from_hf_config(older).rotary_base == 500000.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("pretraining_tp", 2),
        ("sliding_window", 4096),
        ("use_sliding_window", True),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_interleaved", True),
        ("auto_map", {"AutoModelForCausalLM": "modeling_mine.Mine"}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("per_layer_config", {"0": {"intermediate_size": 4}}),
        ("final_logit_softcapping", 30.0),
        ("residual_multiplier", 0.22),
        ("use_rope", False),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "3"),
        ("num_hidden_layers", True),
        ("vocab_size", 96.0),
        ("hidden_size", 2**62),
        ("rms_norm_eps", -1),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", "10000"),
        ("tie_word_embeddings", "yes"),
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0}),
        ("rope_parameters", {"rope_theta": 500000.0, "partial_rotary_factor": 0.5}),
        ("rope_parameters", {"rope_theta": 10000.0}),
        ("rope_parameters", [500000.0]),
    ],
)
def test_what_is_not_understood_is_refused_by_name(key: str, value: Any) -> None:
    message = refusal(written(**{key: value}))
    assert message.startswith("m/config.json: ")
    assert key in message


def test_scaled_rotary_embeddings_name_their_type() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    message = refusal(written(rope_scaling=scaling, rope_parameters=None))
    assert "rope_scaling.rope_type = 'llama3'" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_cache", False),
        ("torch_dtype", "bfloat16"),
        ("pretraining_tp", 1),
        ("sliding_window", None),
        ("rope_scaling", None),
        ("eos_token_id", [2, 3]),
        ("temperature", 0.7),
        ("a_key_of_the_future", None),
    ],
)
def test_what_does_not_change_the_mathematics_is_accepted(key: str, value: Any) -> None:
    assert shape_from_hf_config(written(**{key: value})) == SHAPE


def test_config_of_a_released_model_is_read() -> None:
    config = {  # SmolLM2-135M's, as it was published
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "vocab_size": 49152,
    }  # fmt: skip
    shape = shape_from_hf_config(config)
    assert (shape.num_layers, shape.kv_channels, shape.rotary_base) == (30, 64, 100000.0)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [{}]},
        {"model_type": "qwen2"},
        {"architectures": None, "model_type": None},
        {"architectures": None, "model_type": []},
    ],
)
def test_other_architectures_are_refused(change: dict[str, Any]) -> None:
    message = refusal(written(**change))
    assert "architectures" in message
    assert "supported: LlamaForCausalLM" in message


def test_all_problems_are_told_at_once() -> None:
    config = written(attention_bias=True, hidden_act="relu", mystery=3, rms_norm_eps=None)
    del config["num_hidden_layers"]
    message = refusal(config)
    assert message.startswith("m/config.json: 4 problems\n")
    for text in ("num_hidden_layers is missing", "attention_bias = True", "'relu'", "mystery = 3"):
        assert text in message


def test_shape_that_transformers_refuses_is_not_written() -> None:
    shape = ModelShape(2, hidden_size=20, num_attention_heads=3, ffn_hidden_size=8, vocab_size=9)
    with pytest.raises(CheckpointError, match="multiple of num_attention_heads"):
        hf_config(shape)
