"""Translate a Hugging Face config.json into the shape of a model, and back.

No setting is ignored: it becomes a field of the shape; or it is in `FIXED` and must have a value
listed there; or it is in `NEUTRAL`, the keys known not to change the mathematics. Any other key
that is set is an error, because only its author knows what it does to the logits. `families` has
what sets families apart, `rotary` reads rotary embeddings. Imports neither torch, Megatron nor
transformers.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megashear.checkpoint.foreign import refuse
from megashear.checkpoint.hf.families import FAMILIES, PARTS, Family
from megashear.checkpoint.hf.rotary import NESTED, THETA, positive, read_rotary, rotary_settings
from megashear.config.schema import ModelShape

MAX_SIZE = 2**20
"""Largest size accepted; a config that claims more is damaged (positions may be more)."""

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

NO_BIAS = "this architecture has no such biases in transformers"

NO_WINDOW = "this architecture has no sliding window in transformers"

NO_DROPOUT = ((0,), "dropout is not supported; write 0.0 to train without it")

FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "only the gated SiLU feed-forward is supported"),
    "attention_bias": ((False,), NO_BIAS),
    "mlp_bias": ((False,), NO_BIAS),
    "bias": ((False,), NO_BIAS),
    "attention_dropout": NO_DROPOUT,
    "hidden_dropout": NO_DROPOUT,
    "resid_pdrop": NO_DROPOUT,
    "embd_pdrop": NO_DROPOUT,
    "pretraining_tp": ((1,), "write 1: the same mathematics, rounded in another order"),
    "rope_interleaved": ((False,), "only rotary embeddings that rotate halves are supported"),
    "partial_rotary_factor": ((1,), "only rotary embeddings of the whole head are supported"),
    "sliding_window": ((), NO_WINDOW),
    "use_sliding_window": ((False,), NO_WINDOW),
    "use_mrope": ((False,), "only rotary embeddings of one position are supported"),
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
    "transformers.js_config max_sequence_length padding_side"
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

NORM, TIED, LAYER_TYPES = "rms_norm_eps", "tie_word_embeddings", "layer_types"

FULL, SLIDING = "full_attention", "sliding_attention"

EMPTY: tuple[Any, ...] = (None, {}, [], "")


def shape_from_hf_config(config: Mapping[str, Any], source: object = "config.json") -> ModelShape:
    """Return the shape of the model that a config.json describes.

    Raises:
        CheckpointError: listing every setting that is missing, impossible or not supported.
    """
    family = family_of(config, source)
    settings = {**family.defaults, **config}
    problems: list[str] = []
    sizes = _sizes(settings, problems)
    rotary_base, rotary_scaling = read_rotary(
        config, family.defaults[THETA], sizes["max_position_embeddings"], problems
    )
    switched = {
        part
        for key, parts in family.switches.items()
        for part in (parts if _boolean(settings, key, problems) else ())
    }
    shape = ModelShape(
        **sizes,
        **dict.fromkeys(switched | family.always, True),
        rotary_base=rotary_base,
        rotary_scaling=rotary_scaling,
        layernorm_epsilon=positive(settings[NORM], NORM, problems),
        tied_embeddings=_boolean(settings, TIED, problems),
        sliding_window=_window(settings, family, sizes["num_layers"], problems),
        family=family.model_type,
    )
    problems += _not_understood(config, family)
    if not problems:
        problems += _impossible(shape)
    if problems:
        refuse(source, problems)
    return shape


def family_of(config: Mapping[str, Any], source: object = "config.json") -> Family:
    """Return the family that a config.json names.

    Raises:
        CheckpointError: the family is not in the table.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if architectures == ["LLaMAForCausalLM"]:  # as the first conversions of LLaMA wrote it
        architectures = ["LlamaForCausalLM"]
    for family in FAMILIES.values():
        if (
            (architectures or [family.architecture]) == [family.architecture]
            and (model_type or family.model_type) == family.model_type
            and (architectures or model_type)
        ):
            return family
    named = f"architectures = {reprlib.repr(architectures)} with model_type = "
    text = f"{named}{reprlib.repr(model_type)} is not supported"
    supported = ", ".join(family.architecture for family in FAMILIES.values())
    refuse(source, [f"{text}; supported: {supported}"])


def _sizes(settings: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Return the sizes of the shape; a wrong one is 1, and added to `problems`."""
    sizes: dict[str, Any] = dict.fromkeys(SIZES, 1)
    for field, key in SIZES.items():
        value = settings.get(key)
        largest = 2**31 if key == "max_position_embeddings" else MAX_SIZE
        if value is None and key in DERIVED:
            sizes[field] = 0  # the shape derives it
        elif value is None:
            problems.append(f"{key} is missing")
        elif type(value) is not int or not 1 <= value <= largest:
            text = f"{key} = {reprlib.repr(value)} must be a whole number from 1 to {largest}"
            problems.append(text)
        else:
            sizes[field] = value
    return sizes


def _boolean(settings: Mapping[str, Any], key: str, problems: list[str]) -> bool:
    if not isinstance(settings[key], bool):
        problems.append(f"{key} = {reprlib.repr(settings[key])} must be true or false")
    return settings[key] is True


def _window(
    settings: Mapping[str, Any], family: Family, num_layers: int, problems: list[str]
) -> int | None:
    """Return the attention window of every layer, None for all tokens; mixed layers are refused."""
    window = settings.get("sliding_window") if family.window else None
    if "use_sliding_window" in family.window:
        window = window if _boolean(settings, "use_sliding_window", problems) else None
    if window is not None and (type(window) is not int or not 1 <= window <= 2**31):
        problems.append(f"sliding_window = {reprlib.repr(window)} must be a whole number above 0")
        return None
    full_layers = num_layers if window is None else 0
    if window is not None and "max_window_layers" in family.window:
        full_layers = settings["max_window_layers"]  # the first ones
        if type(full_layers) is not int or full_layers < 0:
            text = f"max_window_layers = {reprlib.repr(full_layers)} must be a whole number"
            problems.append(text)
            return None
    implied = [FULL if layer < full_layers else SLIDING for layer in range(num_layers)]
    types = settings.get(LAYER_TYPES) or implied
    if types != implied and LAYER_TYPES not in family.window:
        text = f"is not what this architecture does with sliding_window = {window}"
        problems.append(f"{LAYER_TYPES} = {reprlib.repr(types)} {text}")
    elif types == [FULL] * num_layers:
        return None
    elif window is None or types != [SLIDING] * num_layers:
        text = "a sliding window in some of the layers only, or of no size, is not supported"
        key = LAYER_TYPES if settings.get(LAYER_TYPES) else "max_window_layers"
        problems.append(f"{key} = {reprlib.repr(settings.get(key))}: {text}")
    return window


def _not_understood(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return problems: settings with a value that is not supported, and unknown keys."""
    understood = {*NEUTRAL, *SIZES.values(), *NESTED, NORM, TIED, THETA, LAYER_TYPES}
    understood |= {*family.switches, *family.window}
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
    """Return problems between the sizes of a shape."""
    problems = []
    if shape.num_attention_heads % shape.num_query_groups:
        problems.append(
            f"num_attention_heads = {shape.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {shape.num_query_groups}"
        )
    if shape.kv_channels < 2 or shape.kv_channels % 2:
        problems.append(f"head_dim = {shape.kv_channels} must be even for rotary embeddings")
    return problems


def hf_config(shape: ModelShape) -> dict[str, Any]:
    """Return the config.json of a shape, in a form that transformers 4 and 5 both read.

    The architecture is the shape's own family, or else the first one that has all features of the
    model and no others: a LLaMA with q/k norms is a Qwen3.

    Raises:
        CheckpointError: no architecture fits.
    """
    family = _family_for(shape)
    if family is None:
        refuse("no supported architecture of transformers is this model", _why_none(shape))
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: getattr(shape, field) for field, key in SIZES.items()},
        "hidden_act": "silu",
        NORM: shape.layernorm_epsilon,
        **rotary_settings(shape),
        TIED: shape.tied_embeddings,
        **{key: getattr(shape, min(parts)) for key, parts in family.switches.items()},
        "attention_dropout": 0.0,
    }
    if family.window:
        config["sliding_window"] = shape.sliding_window
    if "use_sliding_window" in family.window:
        windowed = shape.sliding_window is not None
        full_layers = 0 if windowed else shape.num_layers
        config |= {"use_sliding_window": windowed, "max_window_layers": full_layers}
    return config


def export_problem(shape: ModelShape) -> str | None:
    """Return why a shape cannot be exported, with the nearest sizes that can; None if it can.

    Megatron can train such a shape, so commands say it before hours are spent on one.
    """
    if _family_for(shape):
        return None
    text = "cannot be exported to Hugging Face: no supported architecture of transformers is this "
    text += f"model ({'; '.join(_why_none(shape))})"
    heads = shape.num_attention_heads
    below = shape.hidden_size // heads * heads
    sizes = [size for size in (below, below + heads) if size]
    if _family_for(replace(shape, hidden_size=sizes[-1])):
        text += f". hidden_size = {' or '.join(map(str, sizes))} can be exported"
    return text


def _family_for(shape: ModelShape) -> Family | None:
    """Return the architecture of a shape: its own family's if that fits, else the first that does.

    None if none fits.
    """
    candidates = sorted(FAMILIES.values(), key=lambda family: family.model_type != shape.family)
    return next((family for family in candidates if not _unfit(family, shape)), None)


def _why_none(shape: ModelShape) -> list[str]:
    """Return why each architecture does not fit."""
    families = sorted(FAMILIES.values(), key=lambda family: family.model_type != shape.family)
    return [f"{family.architecture}: {', '.join(_unfit(family, shape))}" for family in families]


def _unfit(family: Family, shape: ModelShape) -> list[str]:
    """Return why an architecture does not fit a shape."""
    has = {part for part in PARTS if getattr(shape, part)}
    may_have = family.always.union(*family.switches.values())
    problems = [f"has no {PARTS[part]}" for part in PARTS if part in has - may_have]
    problems += [f"always has {PARTS[part]}" for part in sorted(family.always - has)]
    problems += [
        f"has {' and '.join(PARTS[part] for part in sorted(parts))} together"
        for parts in family.switches.values()
        if parts & has and not parts <= has
    ]
    if shape.sliding_window is not None and not family.window:
        problems.append("has no sliding window")
    if family.whole_heads and shape.hidden_size % shape.num_attention_heads:
        sizes = f"hidden_size ({shape.hidden_size}) to be a multiple of num_attention_heads"
        problems.append(f"needs {sizes} ({shape.num_attention_heads})")
    return problems
