"""What a Hugging Face config.json says, as the shape of a model, and back.

A setting is taken in one of three ways and never ignored: it becomes a field of the shape; it is in
`FIXED` and must have a value written there; or it is in `NEUTRAL`, the keys known not to change the
mathematics. Any other key that is set to something is an error, because only its author knows what
it does to the logits. Imports neither Megatron nor transformers.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megashear.checkpoint.mapping import FAMILIES, LLAMA, Family
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError

MOST_LINES = 50
"""Problems that one message lists; a wrong config can make thousands of them."""

LARGEST = 2**20
"""Largest size believed; a config that claims more is damaged (positions may be more)."""

SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fields of the shape that are sizes, and their keys in config.json."""
DERIVED = ("num_key_value_heads", "head_dim")
"""Sizes that follow from the others where they are left out."""

NO_BIAS = "biases are not supported"
NO_WINDOW = "attention over a sliding window is not supported"
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "only the gated SiLU feed-forward is supported"),
    "attention_bias": ((False,), NO_BIAS),
    "mlp_bias": ((False,), NO_BIAS),
    "attention_dropout": ((0,), "dropout is not supported; write 0.0 to train without it"),
    "pretraining_tp": ((1,), "write 1: the same mathematics, rounded in another order"),
    "rope_interleaved": ((False,), "only rotary embeddings that rotate halves are supported"),
    "partial_rotary_factor": ((1,), "only rotary embeddings of the whole head are supported"),
    "sliding_window": ((), NO_WINDOW),
    "use_sliding_window": ((False,), NO_WINDOW),
    "quantization_config": ((), "quantised weights are not supported; dequantise them first"),
    "auto_map": ((), "the model comes with code of its own, which is never run"),
    "is_encoder_decoder": ((False,), "only decoders are supported"),
    "add_cross_attention": ((False,), "only decoders are supported"),
    "is_llama_config": ((True,), "only LLaMA's mathematics is supported"),
}
"""Settings that change the mathematics: the values understood (null always is), and why."""

ORIGIN = (
    "_name_or_path name_or_path _commit_hash architectures model_type transformers_version dtype "
    "torch_dtype use_bfloat16 torchscript tokenizer_class unsloth_version unsloth_fixed "
    "transformers.js_config max_sequence_length"
)
RUNNING = (
    "initializer_range use_cache output_attentions output_hidden_states return_dict "
    "return_dict_in_generate output_scores chunk_size_feed_forward tf_legacy_loss is_decoder "
    "_attn_implementation_autoset attn_implementation _attn_implementation"
)
GENERATION = (
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id "
    "forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens "
    "begin_suppress_tokens prefix do_sample temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty remove_invalid_values early_stopping max_length "
    "max_new_tokens min_length num_beams num_beam_groups diversity_penalty num_return_sequences"
)
OTHER_MODELS = (
    "id2label label2id num_labels problem_type task_specific_params finetuning_task "
    "tie_encoder_decoder cross_attention_hidden_size"
)
NEUTRAL = frozenset(f"{ORIGIN} {RUNNING} {GENERATION} {OTHER_MODELS}".split())
"""Keys known not to change the mathematics of a causal language model, whatever their value."""

NORM, TIED, THETA = "rms_norm_eps", "tie_word_embeddings", "rope_theta"
NESTED = ("rope_parameters", "rope_scaling")  # of transformers 5, and of older ones
PLAIN = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
EMPTY: tuple[Any, ...] = (None, {}, [], "")


def refuse(source: object, problems: Sequence[str]) -> NoReturn:
    """Raise one CheckpointError that lists every problem found in `source`."""
    count = len(problems)
    lines = [f"{source}: {count} problem{'s' if count != 1 else ''}"]
    lines += [f"  {problem}" for problem in problems[:MOST_LINES]]
    lines += [f"  and {count - MOST_LINES} more"] if count > MOST_LINES else []
    raise CheckpointError("\n".join(lines))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: it is missing or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must be a mapping")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that people read too."""
    file.write_text(json.dumps(value, indent=2) + "\n")


def shape_from_hf_config(config: Mapping[str, Any], source: object = "config.json") -> ModelShape:
    """The shape of the model that a config.json describes.

    Raises:
        CheckpointError: listing everything in it that is missing, impossible or not understood.
    """
    defaults = family_of(config, source).defaults
    config = {key: value for key, value in config.items() if value is not None}
    settings = {**defaults, **config}
    problems: list[str] = []
    shape = ModelShape(
        **_sizes(settings, problems),
        rotary_base=_rotary_base(config, defaults[THETA], problems),
        layernorm_epsilon=_positive(settings[NORM], NORM, problems),
        tied_embeddings=settings[TIED],
        qkv_bias=False,  # the keys that would say so are refused
        qk_norm=False,
    )
    if not isinstance(shape.tied_embeddings, bool):
        problems.append(f"{TIED} = {shape.tied_embeddings!r} must be true or false")
    problems += _not_understood(config)
    if not problems:
        problems += _impossible(shape)
    if problems:
        refuse(source, problems)
    return shape


def family_of(config: Mapping[str, Any], source: object = "config.json") -> Family:
    """The family that a config.json names.

    Raises:
        CheckpointError: the family is not in the table.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for family in FAMILIES.values():
        if (
            (architectures or [family.architecture]) == [family.architecture]
            and (model_type or family.model_type) == family.model_type
            and (architectures or model_type)
        ):
            return family
    text = f"architectures = {architectures!r} with model_type = {model_type!r} is not supported"
    refuse(source, [f"{text}; supported: {', '.join(FAMILIES)}"])


def _sizes(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """The fields of the shape that are sizes; a wrong one stands as 1 and is in `problems`."""
    sizes: dict[str, Any] = dict.fromkeys(SIZES, 1)
    for field, key in SIZES.items():
        value = settings.get(key)
        largest = 2**31 if key == "max_position_embeddings" else LARGEST
        if value is None and key in DERIVED:
            sizes[field] = 0  # the shape derives it
        elif value is None:
            problems.append(f"{key} is missing")
        elif type(value) is not int or not 1 <= value <= largest:
            problems.append(f"{key} = {value!r} must be a whole number from 1 to {largest}")
        else:
            sizes[field] = value
    return sizes


def _positive(value: Any, path: str, problems: list[str]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        problems.append(f"{path} = {value!r} must be a number above 0")
        return 1.0
    return float(value)


def _rotary_base(config: Mapping[str, Any], default: float, problems: list[str]) -> float:
    """The base of plain rotary embeddings, from the form of transformers 5 or the older one."""
    places = {THETA: config.get(THETA)}
    for key in NESTED:
        settings = config.get(key) or {}
        if not isinstance(settings, dict):
            problems.append(f"{key} = {reprlib.repr(settings)} must be a mapping")
            continue
        places[f"{key}.{THETA}"] = settings.get(THETA)
        problems += [
            f"{key}.{name} = {value!r} is not supported; only plain rotary embeddings are"
            for name, value in settings.items()
            if name != THETA and value is not None and PLAIN.get(name, EMPTY) != value
        ]
    bases = {
        path: _positive(value, path, problems)
        for path, value in places.items()
        if value is not None
    }
    if len(set(bases.values())) > 1 or all(config.get(key) for key in NESTED):
        given = ", ".join(f"{path} = {base:g}" for path, base in bases.items())
        problems.append(f"the rotary embedding is given more than once: {given}; keep one")
    return next(iter(bases.values()), default)


def _not_understood(config: Mapping[str, Any]) -> list[str]:
    """Settings that are refused for their value, and keys that nobody has looked at."""
    understood = {*NEUTRAL, *SIZES.values(), *NESTED, NORM, TIED, THETA}
    problems = []
    for key, value in config.items():
        if key in understood or value in EMPTY:
            continue
        if key not in FIXED:
            text = "is not understood; remove it from the file if the logits do not depend on it"
            problems.append(f"{key} = {reprlib.repr(value)} {text}")
        elif value not in FIXED[key][0]:
            problems.append(f"{key} = {reprlib.repr(value)}: {FIXED[key][1]}")
    return problems


def _impossible(shape: ModelShape) -> list[str]:
    """What is wrong between the sizes of a shape."""
    problems = []
    if shape.num_attention_heads % shape.num_query_groups:
        problems.append(
            f"num_attention_heads = {shape.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {shape.num_query_groups}"
        )
    if shape.kv_channels < 2 or shape.kv_channels % 2:
        problems.append(f"head_dim = {shape.kv_channels} must be even for rotary embeddings")
    return problems


def hf_config(shape: ModelShape, family: Family = LLAMA) -> dict[str, Any]:
    """What config.json says about a shape, in a form that transformers 4 and 5 both read.

    Raises:
        CheckpointError: transformers would refuse the shape.
    """
    if shape.hidden_size % shape.num_attention_heads:
        raise CheckpointError(
            f"transformers loads a {family.architecture} only where hidden_size "
            f"({shape.hidden_size}) is a multiple of num_attention_heads "
            f"({shape.num_attention_heads}); choose such a target shape"
        )
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(shape, field) for field, key in SIZES.items()},
        "hidden_act": "silu",
        NORM: shape.layernorm_epsilon,
        THETA: shape.rotary_base,
        "rope_parameters": {THETA: shape.rotary_base, "rope_type": "default"},
        TIED: shape.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
