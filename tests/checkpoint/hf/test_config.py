"""What config.json says becomes the shape, or is refused by name; nothing is passed over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megashear.checkpoint.hf.config import export_problem, hf_config, shape_from_hf_config
from megashear.checkpoint.hf.families import FAMILIES
from megashear.config import schema
from megashear.config.schema import ModelShape, RotaryScaling
from megashear.errors import CheckpointError
from tests.support.hf_models import LLAMA3, SIZES, VARIANTS, WINDOW, YARN, YARN_IN_FULL, config_of

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
    theirs = config_of(**VARIANTS[variant])
    shape = shape_from_hf_config(theirs.to_dict())
    again = AutoConfig.for_model(**hf_config(shape))
    assert type(again) is type(theirs)
    switches = {"attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types"}
    others = switches & theirs.to_dict().keys()
    for key in (*SIZES, "tie_word_embeddings", "hidden_act", *others):
        assert getattr(again, key) == getattr(theirs, key), key
    meant, written = LlamaRotaryEmbedding(theirs), LlamaRotaryEmbedding(again)
    assert written.rope_type == meant.rope_type
    assert torch.equal(written.inv_freq, meant.inv_freq)
    assert written.attention_scaling == pytest.approx(meant.attention_scaling)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("windowed", [False, True])
def test_what_is_left_out_is_what_transformers_takes(family: str, windowed: bool) -> None:
    """All that changes the mathematics: to_dict() states every setting with its value."""
    required = {"vocab_size", "hidden_size", "intermediate_size"}
    required |= {"num_hidden_layers", "num_attention_heads"}
    minimal: dict[str, Any] = {**{key: SIZES[key] for key in required}, "model_type": family}
    minimal["num_attention_heads"] = 32  # as many as keys and values in a Qwen, if nothing is said
    minimal["hidden_size"] = 64
    if windowed:
        minimal |= {"use_sliding_window": True, "max_window_layers": 0}
    if windowed and family in ("llama", "mistral"):
        assert "use_sliding_window = True" in refusal(minimal)
        return
    stated = AutoConfig.for_model(**minimal).to_dict()
    assert {*FAMILIES[family].defaults, "rms_norm_eps"} - {"rope_theta"} <= stated.keys()
    shape = shape_from_hf_config(minimal)
    assert shape == shape_from_hf_config(stated)
    assert shape.sliding_window == (4096 if windowed or family == "mistral" else None)
    assert (shape.num_query_groups, shape.kv_channels) == {
        "llama": (32, 2), "mistral": (8, 2), "qwen2": (32, 2), "qwen3": (32, 128)
    }[family]  # fmt: skip


def test_families_are_those_that_a_shape_may_name() -> None:
    assert tuple(FAMILIES) == schema.FAMILIES


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
        ("attention_bias", 1),
        ("mlp_bias", None),
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
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),  # rope_parameters say default
        ("rope_parameters", {"rope_theta": 10000.0}),  # and rope_theta 500000
        ("rope_parameters", {"rope_theta": 500000.0, "partial_rotary_factor": 0.5}),
        ("rope_parameters", [500000.0]),
        ("layer_types", ["full_attention"] * 2),
        ("layer_types", "full_attention"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(key: str, value: Any) -> None:
    message = refusal(written(**{key: value}))
    assert message.startswith("m/config.json: ")
    assert key in message


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"rope_type": "longrope", "factor": 4.0}, "rope_type = 'longrope' is not supported"),
        ({"type": "mrope", "mrope_section": [1]}, "rope_type = 'mrope' is not supported"),
        ({"type": ["yarn"], "factor": 4.0}, "must be one name"),
        ({"type": "yarn", "rope_type": "linear", "factor": 4.0}, "must be one name"),
        ({"factor": 4.0}, "factor = 4.0 is not supported with rope_type = default"),
        ({"type": "linear"}, "factor = None must be a number from 1"),
        ({"type": "linear", "factor": "2"}, "factor = '2' must be a number from 1"),
        ({"type": "linear", "factor": 0.5}, "factor = 0.5 must be a number from 1"),
        ({"type": "dynamic", "factor": 2.0, "alpha": 1000}, "alpha = 1000 is not supported"),
        (
            {**LLAMA3, "low_freq_factor": 2.0},
            "low_freq_factor = 2.0: Megatron-Core knows 1.0",
        ),
        ({**LLAMA3, "high_freq_factor": None}, "high_freq_factor = None: Megatron-Core knows 4"),
        (
            {**LLAMA3, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings = 4096: Megatron-Core knows 8192 alone",
        ),
        ({**YARN, "original_max_position_embeddings": 0}, "embeddings = 0 must be a whole number"),
        ({**YARN, "truncate": None}, "truncate = None must be true or false"),
        ({**YARN, "beta_fast": -1}, "beta_fast = -1 must be a number above 0"),
        ({**YARN, "attention_factor": 0.0}, "attention_factor = 0.0 must be a number above 0"),
        ({**YARN, "factor": 1.0, "attention_factor": 2.0}, "attention_factor = 2.0: Megatron-Core"),
        ({**YARN, "finetuned": True}, "finetuned = True is not supported with rope_type = yarn"),
    ],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_embeddings_that_are_not_understood(
    key: str, stated: dict[str, Any], message: str
) -> None:
    config = written(rope_scaling=None, rope_parameters=None, rope_theta=None)
    text = refusal({**config, key: stated})
    assert f"  {key}" in text
    assert message in text


@pytest.mark.parametrize(
    ("stated", "scaling"),
    [
        ({"type": "linear", "factor": 2}, RotaryScaling("linear", 2.0)),
        ({"type": "dynamic", "rope_type": "dynamic", "factor": 2.5}, RotaryScaling("dynamic", 2.5)),
        (LLAMA3, RotaryScaling("llama3", 8.0, 8192)),
        ({"type": "yarn", "factor": 4.0}, RotaryScaling("yarn", 4.0, 64)),
        (YARN, RotaryScaling("yarn", 4.0, 16)),
        (
            {**YARN, "attn_factor": 2.0},
            RotaryScaling("yarn", 4.0, 16),
        ),  # transformers never reads it
        ({**YARN, "mscale": 0.7}, RotaryScaling("yarn", 4.0, 16)),  # nothing alone
        ({**YARN, "attention_factor": 1.5}, RotaryScaling("yarn", 4.0, 16, attention_factor=1.5)),
    ],
)
def test_rotary_embeddings_of_older_and_newer_transformers(
    stated: dict[str, Any], scaling: RotaryScaling
) -> None:
    config = written(rope_scaling=None, rope_parameters=None, rope_theta=500000.0)
    stated = {**stated, "rope_theta": 500000.0}
    newer = shape_from_hf_config({**config, "rope_theta": None, "rope_parameters": stated})
    del stated["rope_theta"]
    older = shape_from_hf_config({**config, "rope_scaling": stated})
    assert newer == older
    assert older.rotary_base == 500000.0
    assert older.rotary_scaling == scaling


def test_of_two_forms_that_differ_none_is_taken() -> None:
    both = hf_config(shape_from_hf_config(config_of(rope_parameters=YARN_IN_FULL).to_dict()))
    assert shape_from_hf_config(both).rotary_scaling is not None
    other = {**both["rope_scaling"], "beta_slow": 3.0}
    assert "rope_parameters and rope_scaling differ" in refusal({**both, "rope_scaling": other})
    del both["rope_theta"]  # transformers would take its default, not that of rope_parameters
    assert "rope_theta is missing" in refusal(both)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 8}, None),
        ({"use_sliding_window": False, "max_window_layers": 2, "sliding_window": 8}, None),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, None),
        ({"layer_types": ["full_attention"] * 3}, None),
        ({**WINDOW, "layer_types": ["full_attention"] * 3}, None),
        (WINDOW, 5),
        ({**WINDOW, "max_window_layers": 3, "layer_types": ["sliding_attention"] * 3}, 5),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_qwen(family: str, changes: dict[str, Any], window: int | None) -> None:
    config = {**SIZES, "model_type": family, **changes}
    assert shape_from_hf_config(config).sliding_window == window
    theirs = AutoConfig.for_model(**config)  # its models attend as layer_types say
    kind = "full_attention" if window is None else "sliding_attention"
    assert theirs.layer_types == [kind] * 3
    assert window in (None, theirs.sliding_window)


@pytest.mark.parametrize(
    "changes",
    [
        {**WINDOW, "max_window_layers": 1},
        {**WINDOW, "max_window_layers": None},
        {**WINDOW, "sliding_window": 0},
        {**WINDOW, "sliding_window": 5.0},
        {**WINDOW, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {**WINDOW, "layer_types": ["sliding_attention"] * 2},
        {**WINDOW, "layer_types": ["chunked_attention"] * 3},
        {**WINDOW, "layer_types": [{}] * 3},
        {"layer_types": ["sliding_attention"] * 3},
        {"use_sliding_window": 1},
        {"model_type": "mistral", "layer_types": ["full_attention"] * 3},  # has a window of 4096
        {"model_type": "mistral", "sliding_window": -1},
        {"model_type": "llama", "layer_types": ["sliding_attention"] * 3},
        {"model_type": "llama", "sliding_window": 8},
    ],
)
def test_windows_that_are_refused(changes: dict[str, Any]) -> None:
    message = refusal({"model_type": "qwen2", **SIZES, **changes})
    assert any(key in message for key in changes.keys() - {"model_type"})
    assert "1 problem\n" in message


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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LLaMAForCausalLM"]),  # of the first conversions of LLaMA
        ("hidden_dropout", 0.0),
        ("resid_pdrop", 0),
        ("bias", False),
        ("padding_side", "left"),
    ],
)
def test_what_trainers_write_without_effect_is_accepted(key: str, value: Any) -> None:
    assert shape_from_hf_config(written(**{key: value})) == SHAPE


def test_dropout_is_refused_whatever_its_name() -> None:
    assert "hidden_dropout = 0.1: dropout is not supported" in refusal(written(hidden_dropout=0.1))


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        {"architectures": ["MistralForCausalLM"]},
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
    assert "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM" in message


def test_all_problems_are_told_at_once() -> None:
    config = written(attention_bias=3, hidden_act="relu", mystery=3, rms_norm_eps=None)
    del config["num_hidden_layers"]
    message = refusal(config)
    assert message.startswith("m/config.json: 5 problems\n")
    for text in (
        *("num_hidden_layers is missing", "rms_norm_eps = None", "attention_bias = 3"),
        *("hidden_act = 'relu'", "mystery = 3"),
    ):
        assert text in message


NO_MULTIPLE = replace(SHAPE, hidden_size=30)  # of four heads


@pytest.mark.parametrize(
    ("shape", "model_type"),
    [
        (SHAPE, "llama"),
        (replace(SHAPE, family="qwen2"), "llama"),
        (replace(SHAPE, family="mistral"), "mistral"),
        (replace(SHAPE, sliding_window=8), "mistral"),
        (NO_MULTIPLE, "mistral"),  # the same mathematics, and transformers loads it
        (replace(NO_MULTIPLE, qkv_bias=True), "qwen2"),
        (replace(SHAPE, qk_norm=True), "qwen3"),
        (replace(SHAPE, qk_norm=True, qkv_bias=True, proj_bias=True, family="qwen2"), "qwen3"),
    ],
)
def test_the_first_architecture_that_has_all_the_model_has(
    shape: ModelShape, model_type: str
) -> None:
    config = hf_config(shape)
    assert config["model_type"] == model_type
    assert shape_from_hf_config(config) == replace(shape, family=model_type)
    AutoConfig.for_model(**config)


def test_a_model_that_no_architecture_has_is_not_written() -> None:
    shape = replace(NO_MULTIPLE, mlp_bias=True, sliding_window=8)
    with pytest.raises(CheckpointError) as caught:
        hf_config(shape)
    message = str(caught.value)
    assert "LlamaForCausalLM: has no sliding window, needs hidden_size (30) to be a mul" in message
    assert "MistralForCausalLM: has no biases of the feed-forward\n" in message
    assert "Qwen3ForCausalLM: has no biases of the feed-forward, always has q/k norms" in message
    with pytest.raises(CheckpointError, match="has a bias of the attention's output and biases"):
        hf_config(replace(SHAPE, proj_bias=True))


def test_what_cannot_be_exported_is_known_from_the_shape() -> None:
    assert export_problem(SHAPE) is None and export_problem(NO_MULTIPLE) is None
    biased = replace(NO_MULTIPLE, qkv_bias=True, proj_bias=True)
    problem = export_problem(biased) or ""
    assert "LlamaForCausalLM: needs hidden_size (30) to be a multiple" in problem
    assert problem.endswith("hidden_size = 28 or 32 can be exported")
    hf_config(replace(biased, hidden_size=28))
    assert "can be exported" not in (export_problem(replace(SHAPE, proj_bias=True)) or "")
