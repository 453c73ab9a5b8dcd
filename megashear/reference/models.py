"""Models of a family with their measured losses, as files hold them.

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
    parameters: int  # embeddings too
    losses: dict[str, float]  # nats per token, by domain
    seq_length: Any = None  # of what it was measured on, where that is known, as is the next
    sequences_per_domain: Any = None


def read_models(files: Sequence[Path], domains: Sequence[str]) -> list[Model]:
    """The models that files (YAML or JSON) list as `models`, with their losses on these domains.

    Raises:
        ConfigError: with everything that is wrong with any of the files.
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
    """A number, also as the text that YAML takes 1.3e9 for; NaN if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
