"""Decode plain lists and mappings into the dataclasses of a configuration or a checkpoint.

The type hints of a dataclass are the only description of its format. Every problem is collected
with the path of its field. Imports the standard library and `config` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megashear.config.schema import FAMILIES, ROPE_TYPES, ModelShape, RunConfig
from megashear.config.values import FAULTY, Faulty, Problem, Unreadable, join, options, show
from megashear.errors import ConfigError

MAX_LAYERS = 2**14
"""Layers that a stored shape may have: the names of all its tensors are listed in memory."""

T = TypeVar("T")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def decode(hint: Any, raw: Any, path: str, found: list[Problem], *, strict: bool = True) -> Any:
    """Return `raw` as a value of the type `hint`; FAULTY, and a problem in `found`, if it is none.

    Args:
        hint: a dataclass, a plain type, `X | None`, `tuple[X, ...]` or `dict[str, X]`.
        raw: what YAML or JSON gave.
        path: of the value in its file; empty for the whole file.
        found: where problems are added.
        strict: report unknown options of a dataclass; else drop them.
    """
    if isinstance(raw, Faulty):
        return raw
    if get_origin(hint) in (Union, UnionType):  # X | None
        inner = get_args(hint)[0]
        return None if raw is None else decode(inner, raw, path, found, strict=strict)
    if get_origin(hint) is tuple:
        if not isinstance(raw, list):
            return _wrong("a list", raw, path, found)
        item = get_args(hint)[0]
        items = ((f"{path}[{index}]", each) for index, each in enumerate(raw))
        return tuple(decode(item, each, at, found, strict=strict) for at, each in items)
    if get_origin(hint) is dict:
        if not isinstance(raw, dict):
            return _wrong("a mapping", raw, path, found)
        if (item := get_args(hint)[1]) is Any:
            return raw
        pairs = ((name, join(path, name), each) for name, each in raw.items())
        return {name: decode(item, each, at, found, strict=strict) for name, at, each in pairs}
    if is_dataclass(hint):
        return _section(hint, {} if raw is None else raw, path, found, strict)
    return _plain(hint, raw, path, found)


def _plain(hint: Any, raw: Any, path: str, found: list[Problem]) -> Any:
    """A number, a truth value or text."""
    if hint is float and isinstance(raw, (int, str)) and not isinstance(raw, bool):
        try:
            raw = float(raw)  # YAML 1.1 takes 1e-4 for text
        except (ValueError, OverflowError):
            return _wrong(_EXPECTED[hint], raw, path, found)
    if type(raw) is not hint or (hint is float and not math.isfinite(raw)):
        return _wrong(_EXPECTED[hint], raw, path, found)
    return raw


def _wrong(expected: str, raw: Any, path: str, found: list[Problem]) -> Any:
    quotes = ". Put it in quotes" if expected == "text" and isinstance(raw, (bool, int)) else ""
    found.append((path or "(file)", f"= {show(raw)}: expected {expected}{quotes}"))
    return FAULTY


def _section(cls: Any, raw: Any, path: str, found: list[Problem], strict: bool) -> Any:
    """A dataclass from a mapping of its options."""
    if not isinstance(raw, dict):
        return _wrong("a mapping of options", raw, path, found)
    hints = get_type_hints(cls)
    given = _known(cls, raw, path, found) if strict else raw
    values = {}
    for field in fields(cls):
        at = join(path, field.name)
        if field.name in given:
            values[field.name] = decode(
                hints[field.name], given[field.name], at, found, strict=strict
            )
        elif field.default is MISSING and field.default_factory is MISSING:
            expected = _EXPECTED.get(hints[field.name], "a mapping of options")
            found.append((at, f"is missing: expected {expected}"))
            values[field.name] = FAULTY
    try:
        return cls(**values)
    except Unreadable:  # a default is computed from a faulty value
        return FAULTY


def _known(cls: Any, raw: dict[Any, Any], path: str, found: list[Problem]) -> dict[str, Any]:
    """Return the known options of a mapping; report the others.

    A misspelt option is read as what was meant, so that `wieght` makes one problem, not two.
    """
    names = [field.name for field in fields(cls)]
    given = {name: raw[name] for name in names if name in raw}
    for key in [key for key in raw if key not in names]:
        close = get_close_matches(str(key), names, n=1)
        elsewhere = [option for option, _ in options(RunConfig) if option.split(".")[-1] == key]
        if close:
            given.setdefault(close[0], raw[key])
        meant = (*close, *elsewhere)
        hint = f"Did you mean {meant[0]!r}?" if meant else f"Known here: {', '.join(names)}"
        found.append((join(path, str(key)), f"unknown option. {hint}"))
    return given


def stored(cls: type[T], raw: Any) -> T:
    """Return the dataclass whose fields a checkpoint has stored as a mapping.

    Raises:
        ConfigError: fields are missing or of another type, or no model can have a shape.
    """
    found: list[Problem] = []
    value: T = decode(cls, raw, "", found)
    if not found:
        for path, shape in _shapes(value, ""):
            found += [(join(path, name), text) for name, text in _impossible(shape)]
    if found:
        raise ConfigError("damaged", found)
    return value


def _shapes(value: Any, path: str) -> Iterator[tuple[str, ModelShape]]:
    """The model shapes in a value, with their paths."""
    if isinstance(value, ModelShape):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _shapes(item, f"{path}[{index}]")
    elif is_dataclass(value):  # a checkpoint's description, or a record of its history
        for name, item in vars(value).items():
            yield from _shapes(item, join(path, name))


def _impossible(shape: ModelShape) -> list[Problem]:
    """Why no model can have a shape."""
    sizes = {name: value for name, value in vars(shape).items() if type(value) is int}
    found = [(name, f"= {size} must be >= 1") for name, size in sizes.items() if size < 1]
    if shape.num_layers > MAX_LAYERS:
        found.append(("num_layers", f"= {shape.num_layers} must be <= {MAX_LAYERS}"))
    if shape.family not in FAMILIES:
        found.append(("family", f"= {show(shape.family)} is none of {FAMILIES}"))
    if shape.rotary_scaling and shape.rotary_scaling.rope_type not in ROPE_TYPES:
        found.append(("rotary_scaling.rope_type", f"must be one of {ROPE_TYPES}"))
    return found
