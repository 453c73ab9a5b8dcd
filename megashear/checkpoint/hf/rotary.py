"""Read and write rotary embeddings in a config.json, in the forms of transformers 4 and 5.

Version 4 has `rope_theta` and a mapping `rope_scaling`, version 5 one mapping `rope_parameters`.
Imports neither Megatron nor transformers.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from megashear.config.schema import ModelShape, RotaryScaling

THETA = "rope_theta"
NESTED = ("rope_parameters", "rope_scaling")
ORIGINAL = "original_max_position_embeddings"
MAX_POSITIONS = 2**20
"""Largest ORIGINAL accepted; Megatron-Core keeps a cosine and a sine for each position."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
"""The values that are fixed in Megatron-Core."""
YARN = (ORIGINAL, "beta_fast", "beta_slow", "truncate", "attention_factor")
SETTINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", *LLAMA3),
    "yarn": ("factor", *YARN, "mscale", "mscale_all_dim"),
}
"""Settings of each type of rotary embedding, besides the base."""
UNREAD = {"yarn": ("attn_factor",)}
"""Settings in published files that transformers never reads."""


def positive(value: Any, path: str, problems: list[str], least: float = 0.0) -> float:
    """Return a finite number above 0 and at least `least`; else 1, and add a problem."""
    if type(value) in (int, float) and 0 < value < 1e30 and value >= least:
        return float(value)
    range_ = f"from {least:g}" if least else "above 0"
    problems.append(f"{path} = {reprlib.repr(value)} must be a number {range_}")
    return 1.0


def read_rotary(
    config: Mapping[str, Any], default: float, positions: int, problems: list[str]
) -> tuple[float, RotaryScaling | None]:
    """Return the base and the scaling that a config.json states.

    Args:
        config: the content of the file.
        default: base where none is given.
        positions: max_position_embeddings.
        problems: problems are appended.
    """
    bases = {THETA: config[THETA]} if config.get(THETA) is not None else {}
    scalings = []
    for key in NESTED:
        settings = config.get(key) or {}
        if not isinstance(settings, dict):
            problems.append(f"{key} = {reprlib.repr(settings)} must be a mapping")
            continue
        given = {
            name: value
            for name, value in settings.items()
            if value is not None or name == "truncate"  # which transformers takes for false
        }
        if THETA in given:
            bases[f"{key}.{THETA}"] = given.pop(THETA)
        if given:
            scalings.append(_read_scaling(key, given, positions, problems))
    if all(config.get(key) for key in NESTED) and THETA not in bases:
        problems.append(f"{THETA} is missing, with both {' and '.join(NESTED)} there; keep one")
    bases = {path: positive(value, path, problems) for path, value in bases.items()}
    if len(set(bases.values())) > 1:
        given_bases = ", ".join(f"{path} = {base:g}" for path, base in bases.items())
        problems.append(f"the rotary embedding has more than one base: {given_bases}; keep one")
    if len(set(scalings)) > 1:
        problems.append(f"{' and '.join(NESTED)} differ; keep one")
    return next(iter(bases.values()), default), next(iter(scalings), None)


def _read_scaling(
    key: str, given: Mapping[str, Any], positions: int, problems: list[str]
) -> RotaryScaling | None:
    """Return the scaling that one mapping states; None for plain rotary embeddings."""
    types = {name: given[name] for name in ("rope_type", "type") if name in given}
    kind = next(iter(types.values()), "default")
    if not isinstance(kind, str) or any(other != kind for other in types.values()):
        problems.append(f"{key}: rope_type and type must be one name, not {reprlib.repr(types)}")
        return None
    if kind not in SETTINGS:
        text = f"is not supported; these are: {', '.join(SETTINGS)}"
        problems.append(f"{key}.rope_type = {kind!r} {text}")
        return None
    for name, value in given.items():
        whole_head = name == "partial_rotary_factor" and value == 1
        if name not in (*SETTINGS[kind], *types, *UNREAD.get(kind, ())) and not whole_head:
            text = f"is not supported with rope_type = {kind}"
            problems.append(f"{key}.{name} = {reprlib.repr(value)} {text}")
    if kind == "default":
        return None
    factor = positive(given.get("factor"), f"{key}.factor", problems, least=1)
    original = None
    if ORIGINAL in SETTINGS[kind]:
        original = given.get(ORIGINAL, positions)
        if type(original) is not int or not 1 <= original <= MAX_POSITIONS:
            number = f"a whole number from 1 to {MAX_POSITIONS}"
            text = f"{key}.{ORIGINAL} = {reprlib.repr(original)} must be {number}"
            problems.append(text)
            original = 1
    if kind == "llama3":
        _check_llama3(key, {ORIGINAL: original, **given}, problems)
    if kind == "yarn":
        return _read_yarn(key, given, factor, original, problems)
    return RotaryScaling(kind, factor, original)


def _check_llama3(key: str, given: Mapping[str, Any], problems: list[str]) -> None:
    problems += [
        f"{key}.{name} = {reprlib.repr(given.get(name))}: Megatron-Core knows {value} alone"
        for name, value in LLAMA3.items()
        if given.get(name) != value
    ]


def _read_yarn(
    key: str, given: Mapping[str, Any], factor: float, original: int | None, problems: list[str]
) -> RotaryScaling:
    def number(name: str) -> float | None:
        return positive(given[name], f"{key}.{name}", problems) if name in given else None

    truncate = given.get("truncate", True)
    if not isinstance(truncate, bool):
        problems.append(f"{key}.truncate = {reprlib.repr(truncate)} must be true or false")
        truncate = True
    mscale, all_dim = number("mscale"), number("mscale_all_dim")
    attention = number("attention_factor")
    if attention is None and mscale is not None and all_dim is not None:
        grown = 0.1 * math.log(factor)
        attention = (mscale * grown + 1) / (all_dim * grown + 1)
    if factor == 1 and attention not in (None, 1):
        text = f"{key}.attention_factor = {attention}: Megatron-Core knows 1 alone with factor = 1"
        problems.append(text)
    return RotaryScaling(
        "yarn",
        factor,
        original,
        beta_fast=number("beta_fast") or RotaryScaling.beta_fast,
        beta_slow=number("beta_slow") or RotaryScaling.beta_slow,
        truncate=truncate,
        attention_factor=attention,
    )


def rotary_settings(shape: ModelShape) -> dict[str, Any]:
    """Return the rotary settings of a shape for config.json, in both forms.

    Each form is complete: transformers 5 prefers `rope_scaling` where both are present.
    """
    scaling = shape.rotary_scaling
    stated: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        stated = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling is not None and scaling.rope_type == "llama3":
        stated |= LLAMA3
    if scaling is not None and scaling.rope_type == "yarn":
        stated |= {name: getattr(scaling, name) for name in YARN}
        stated[ORIGINAL] = scaling.original_max_position_embeddings or shape.max_position_embeddings
    stated = {name: value for name, value in stated.items() if value is not None}
    return {
        THETA: shape.rotary_base,
        "rope_parameters": {THETA: shape.rotary_base, **stated},
        "rope_scaling": stated if scaling is not None else None,
    }
