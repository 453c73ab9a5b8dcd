"""Values of a configuration as checks see them: problems, faulty values, and their wording.

Imports the standard library and `schema` only; never torch or Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from megashear.config.schema import ModelShape, RunConfig

Problem = tuple[str, str]
"""Path of a field, and what is wrong with it and how to fix it."""

PRUNED_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
"""Sizes that pruning changes."""


class Unreadable(Exception):
    """A check used a value that could not be read; the loader has already reported it."""


class Faulty:
    """Stands for a value that could not be read, and ends any check that uses it.

    Otherwise a wrong `trainer.steps` would hide every other problem of the file or, with a default
    in its place, cause problems that the file does not have.
    """

    def _end_check(self, *_: object) -> Any:
        raise Unreadable

    __getattr__ = __bool__ = __str__ = __float__ = __fspath__ = __iter__ = __len__ = _end_check
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _end_check
    __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _end_check


FAULTY: Any = Faulty()


@dataclass(frozen=True)
class CheckContext:
    """What checks look at."""

    config: RunConfig
    source: ModelShape | None  # the shape at init_from, if it is known
    world_size: int | None  # processes of the run, if they are known
    check_files: bool  # whether data files and checkpoints must exist


Check = Callable[[CheckContext], Iterator[Problem]]
"""A rule; it yields the problems that it finds."""


def show(value: object) -> str:
    """Return a value as in the YAML file, cut to one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def join(path: str, name: str) -> str:
    """`path.name`, or the name alone at the top of a file."""
    return f"{path}.{name}" if path else name


def either(options: Sequence[object]) -> str:
    """`1, 2 or 4`."""
    *most, last = map(str, options)
    return f"{', '.join(most)} or {last}" if most else last


def options(cls: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, type) of every option below a dataclass, except those in lists."""
    for name, hint in get_type_hints(cls).items():
        kind = hint if get_origin(hint) is None else get_args(hint)[0]  # X | None
        if not is_dataclass(kind):
            yield above + name, kind
        elif get_origin(hint) is not tuple:
            yield from options(kind, f"{above}{name}.")


def field(config: RunConfig, path: str) -> Any:
    """Return the value at a dotted path; None below a section that is not given."""
    value: Any = config
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def given(config: RunConfig, paths: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of the fields that are given and could be read."""
    for path in paths:
        try:
            value = field(config, path)
        except Unreadable:
            continue
        if value is not None and not isinstance(value, Faulty):
            yield path, value


def divisors(number: int) -> list[int]:
    """Return the divisors up to 1024; as advice, larger ones are of no use."""
    return [n for n in range(1, min(number, 1024) + 1) if number % n == 0]


def multiples(number: int, unit: int) -> str:
    """Return the multiples of `unit` on both sides of `number`: `8 or 12`."""
    below = number // unit * unit
    return either([n for n in (below, below + unit) if n > 0])
