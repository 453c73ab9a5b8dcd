"""The masks of a pruning run, as its checkpoints have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megashear.checkpoint.checksums import verify
from megashear.checkpoint.info import INFO, MASKS_FILE, CheckpointInfo, read_info
from megashear.config.schema import QUERY_GROUP
from megashear.console import table as text_table
from megashear.errors import CheckpointError
from megashear.pruning.extract import (
    OffTarget,
    format_off_target,
    off_target,
)
from megashear.pruning.lagrangian import constraint_targets, constraints
from megashear.pruning.masks import Masks


@dataclass(frozen=True)
class MaskState:
    """How far a mask has come: all of its rows that are on target, or one that is not.

    Attributes:
        mask: its name; of a row that is off target, with the row's.
        rows: how many.
        expected_sparsity: lowest and highest of the rows.
        target: sparsity; None where the mask has none of its own.
        kept: units that extraction keeps in a row, fewest and most; None for the whole model.
        units: in a row.
        off_target: whether it is.
    """

    mask: str
    rows: int
    expected_sparsity: tuple[float, float]
    target: float | None
    kept: tuple[int, int] | None
    units: int | None
    off_target: bool


@dataclass(frozen=True)
class PrunedRun:
    """A checkpoint of a pruning run with its masks.

    Attributes:
        info: of the checkpoint.
        masks: as learned so far.
        off_target: which masks are not where they should be, as text; empty if all are.
        states: of every mask.
    """

    info: CheckpointInfo
    masks: Masks
    off_target: str
    states: list[MaskState]

    @property
    def report(self) -> str:
        """Expected sparsity, target and kept units of every mask, as text."""
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


def read_pruned(path: Path) -> PrunedRun:
    """Read a pruning run's latest checkpoint, or one of its checkpoints, without its weights.

    Raises:
        CheckpointError: there is none, or it is not of a pruning run, or it is damaged.
    """
    info = read_info(path)
    file = info.directory / MASKS_FILE
    if info.stage != "prune":
        raise CheckpointError(
            f"{info.directory} is of stage {info.stage}: there are no masks in it"
        )
    verify(info.directory, INFO, MASKS_FILE)
    config = yaml.safe_load(info.config or "{}")
    head_unit = config.get("pruning", {}).get("head_unit", QUERY_GROUP)
    masks = Masks(info.shape, info.target, head_unit)
    try:
        stored = load_file(file)
        masks.load_state_dict({name: stored[name] for name in masks.state_dict()})
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: damaged or of another model: {error}") from error
    target_sparsity = config.get("target_sparsity")
    off = off_target(masks, target_sparsity=target_sparsity)
    return PrunedRun(info, masks, format_off_target(off), _states(masks, off, target_sparsity))


def _states(masks: Masks, off: list[OffTarget], target_sparsity: float | None) -> list[MaskState]:
    """For every mask its rows that are on target, as one, and each that is not."""
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
