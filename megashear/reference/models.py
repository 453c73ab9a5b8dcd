"""Read models of a family with their measured losses from files.

Imports yaml, `config` and `errors` only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megashear.config.values import Problem, show
from megashear.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """A model of a family."""

    name: str
    parameters: int  # with embeddings
    losses: dict[str, float]  # nats per token, by domain
    seq_length: Any = None  # of the measurement, like the next; None if unknown
    sequences_per_domain: Any = None


def read_models(files: Sequence[Path], domains: Sequence[str]) -> list[Model]:
    """Return the models that files (YAML or JSON) list as `models`, with their losses by domain.

    Raises:
        ConfigError: with every problem of the files.
    """
    models: list[Model] = []
    found: list[Problem] = []
    for file in files:
        try:
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            found.append((str(file), f"cannot be read: {' '.join(str(error).split())}"))
            continue
        records = tree.get("models") if isinstance(tree, Mapping) else None
        if not isinstance(records, list) or not all(isinstance(r, Mapping) for r in records):
            found.append((str(file), "has no list `models`. See megashear reference-loss --help"))
            continue
        for index, record in enumerate(records):
            given = record["losses"] if isinstance(record.get("losses"), Mapping) else {}
            values = {"parameters": record.get("parameters")}
            values |= {f"losses.{name}": given.get(name) for name in domains}
            for path, value in values.items():
                if not 0 < _number(value) < math.inf:
                    text = f"= {show(value)}: expected a number above 0"
                    found.append((f"{file}: models[{index}].{path}", text))
            parameters, *losses = map(_number, values.values())
            if not found:
                name = str(record.get("name", f"{file} {index}"))
                measured_on = map(record.get, ("seq_length", "sequences_per_domain"))
                by_domain = dict(zip(domains, losses, strict=True))
                models.append(Model(name, int(parameters), by_domain, *measured_on))
    if found:
        raise ConfigError("models", found)
    return models


def _number(value: Any) -> float:
    """Return a number, also from text (YAML takes 1.3e9 for text); NaN if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
