"""The masks of a pruning run as its checkpoints hold them: the format of masks.safetensors.

Its keys are `log_alpha.MASK` and `multipliers.CONSTRAINT`; those of the moments of their optimizer
have its own names appended (`log_alpha.MASK.exp_avg`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from yaml import YAMLError

from megashear.checkpoint.checksums import verify
from megashear.checkpoint.info import INFO, MASKS_FILE, CheckpointInfo
from megashear.config.loader import from_yaml
from megashear.config.schema import QUERY_GROUP
from megashear.console import table as text_table
from megashear.errors import CheckpointError, ConfigError
from megashear.pruning.lagrangian import (
    OffTarget,
    constraint_targets,
    constraints,
    format_off_target,
    off_target,
)
from megashear.pruning.masks import Masks

LOG_ALPHA, MULTIPLIERS = "log_alpha", "multipliers"

Groups = Mapping[str, Mapping[str, nn.Parameter]]
"""Parameters by their names, for LOG_ALPHA and MULTIPLIERS."""


def _key(group: str, name: str) -> str:
    return f"{group}.{name}"


def pack_masks(groups: Groups, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the content of masks.safetensors: parameters, and the moments of their optimizer."""
    tensors = {}
    for group, parameters in groups.items():
        for name, parameter in parameters.items():
            key = _key(group, name)
            tensors[key] = parameter
            tensors |= {
                f"{key}.{kind}": value for kind, value in optimizer.state[parameter].items()
            }
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


@torch.no_grad()
def unpack_masks(
    tensors: Mapping[str, Tensor], groups: Groups, optimizer: torch.optim.Optimizer
) -> None:
    """Fill parameters and the moments of their optimizer with what `pack_masks` returned."""
    for group, parameters in groups.items():
        for name, parameter in parameters.items():
            key = _key(group, name)
            parameter.copy_(tensors[key])
            optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter)
                for full, value in tensors.items()
                if (kind := full.removeprefix(f"{key}.")) != full
            }


@dataclass(frozen=True)
class MaskState:
    """The state of one mask: of all its rows that are on target, or of one that is not.

    Attributes:
        mask: its name, with that of the row if it is off target.
        rows: number of rows.
        expected_sparsity: lowest and highest of the rows.
        target: target sparsity; None where the mask has none of its own.
        kept: units that extraction keeps in a row, fewest and most; None for the whole model.
        units: number of units in a row.
        off_target: whether the row is off its target.
    """

    mask: str
    rows: int
    expected_sparsity: tuple[float, float]
    target: float | None
    kept: tuple[int, int] | None
    units: int | None
    off_target: bool


@dataclass(frozen=True)
class LearnedMasks:
    """The masks in a checkpoint of a pruning run.

    Attributes:
        masks: as learned so far.
        off_target: the masks that are off their targets, as text; empty if none is.
        states: of every mask.
    """

    masks: Masks
    off_target: str
    states: list[MaskState]

    @property
    def report(self) -> str:
        """A table of the expected sparsity, target and kept units of every mask."""
        lines = [
            (
                state.mask if state.rows == 1 else f"{state.mask} ({state.rows} rows)",
                _range(state.expected_sparsity, ".3f"),
                "none" if state.target is None else f"{state.target:.3f}",
                f"{_range(state.kept, 'd')} of {state.units}" if state.kept else "",
                "OFF TARGET" if state.off_target else "",
            )
            for state in self.states
        ]
        return text_table(lines, ("mask", "expected sparsity", "target", "units kept", ""))

    @property
    def z(self) -> dict[str, Tensor]:
        """The deterministic masks that extraction folds in."""
        return self.masks.deterministic("target")


def read_masks(info: CheckpointInfo) -> LearnedMasks:
    """Read the masks of a pruning run's checkpoint.

    Raises:
        CheckpointError: they are damaged.
    """
    verify(info.directory, INFO, MASKS_FILE)
    file = info.directory / MASKS_FILE
    try:
        config = from_yaml(info.config) if info.config else None
    except (ConfigError, YAMLError) as error:
        raise CheckpointError(f"{info.directory / INFO}: damaged: {error}") from None
    head_unit = config.pruning.head_unit if config else QUERY_GROUP
    target_sparsity = config.target_sparsity if config else None
    masks = Masks(info.shape, info.target, head_unit)
    try:
        stored = load_file(file)
        with torch.no_grad():
            for name, log_alpha in masks.log_alpha.items():
                log_alpha.copy_(_like(log_alpha, stored[_key(LOG_ALPHA, name)]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged or of another model: {error}") from error
    off = off_target(masks, target_sparsity=target_sparsity)
    return LearnedMasks(masks, format_off_target(off), _states(masks, off, target_sparsity))


def _like(expected: Tensor, stored: Tensor) -> Tensor:
    if stored.shape != expected.shape:
        raise ValueError(f"a mask of {list(stored.shape)} in place of {list(expected.shape)}")
    return stored


def _states(masks: Masks, off: list[OffTarget], target_sparsity: float | None) -> list[MaskState]:
    """Return, for every mask, one state for its rows on target and one for each row off it."""
    targets, z = constraint_targets(masks, target_sparsity), masks.deterministic("target")
    wrong = {(mask, row): name for mask, row, _, _, name in off}
    states = []
    for mask, expected in {**masks.expected_sparsity(), **constraints(masks)}.items():
        good = [row for row in range(len(expected)) if (mask, row) not in wrong]
        named = [(mask, good, False)] if good else []
        named += [(name, [row], True) for (of, row), name in wrong.items() if of == mask]
        for name, rows, is_off in named:
            kept = _ends(z[mask][rows].count_nonzero(1)) if mask in z else None
            units = z[mask].shape[1] if mask in z else None
            sparsity = _ends(expected[rows])
            states.append(
                MaskState(name, len(rows), sparsity, targets.get(mask), kept, units, is_off)
            )
    return states


def _ends(values: Tensor) -> tuple[Any, Any]:
    lowest, highest = values.aminmax()
    return lowest.item(), highest.item()


def _range(ends: tuple[float, float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(end, form) for end in ends))
