"""Losses of short runs are those that were recorded: the proof of a change of names or structure.

Bit for bit in an environment that losses.json has; elsewhere (another CPU or release) nearly.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.golden.runs import FILE, compute, environment


def test_losses_are_those_recorded() -> None:
    golden = json.loads(FILE.read_text())
    found = json.loads(json.dumps(compute()))
    if environment() in golden:
        assert found == golden[environment()]
    else:
        for name, records in next(iter(golden.values())).items():
            assert _numbers(found[name]) == pytest.approx(_numbers(records), rel=1e-3, abs=1e-5)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [] if isinstance(value, str) else [float(value)]
