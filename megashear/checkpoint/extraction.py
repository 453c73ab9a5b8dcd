"""Cuts the target model out of a pruning run's checkpoint, into a dense checkpoint of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megashear.checkpoint.checksums import verify
from megashear.checkpoint.convert import shown
from megashear.checkpoint.manager import (
    INFO,
    MASKS,
    CheckpointInfo,
    open_weights,
    read_info,
    write_model,
)
from megashear.checkpoint.stream import processes, share
from megashear.config.schema import QUERY_GROUP
from megashear.console import table as text_table
from megashear.errors import CheckpointError
from megashear.pruning.extract import (
    OffTarget,
    extract,
    format_off_target,
    off_target,
    uniform_shape,
)
from megashear.pruning.lagrangian import constraint_targets, constraints
from megashear.pruning.masks import Masks


@dataclass(frozen=True)
class PrunedRun:
    """A checkpoint of a pruning run with its masks.

    Attributes:
        info: of the checkpoint.
        masks: as learned so far.
        off_target: which masks are not where they should be, as text; empty if all are.
        report: expected sparsity, target and kept units of every mask, as text.
    """

    info: CheckpointInfo
    masks: Masks
    off_target: str
    report: str

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
    file = info.directory / MASKS
    if info.stage != "prune":
        raise CheckpointError(
            f"{info.directory} is of stage {info.stage}: there are no masks in it"
        )
    verify(info.directory, INFO, MASKS)
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
    return PrunedRun(info, masks, format_off_target(off), _report(masks, off, target_sparsity))


def _report(masks: Masks, off: list[OffTarget], target_sparsity: float | None) -> str:
    """A line for all rows of a mask that are on target, and one for each that is not."""
    targets, z = constraint_targets(masks, target_sparsity), masks.deterministic("target")
    wrong = {(mask, row): name for mask, row, _, _, name in off}
    lines = []
    for mask, expected in {**masks.expected_sparsity(), **constraints(masks)}.items():
        target = f"{targets[mask]:.3f}" if mask in targets else "none"
        good = [row for row in range(len(expected)) if (mask, row) not in wrong]
        named = [(f"{mask} ({len(good)} rows)" if len(good) > 1 else mask, good, "")]
        named += [(name, [row], "OFF TARGET") for (of, row), name in wrong.items() if of == mask]
        for name, rows, flag in named if good else named[1:]:
            units = ""
            if mask in z:
                kept = z[mask][rows].count_nonzero(1)
                units = f"{_range(kept, 'd')} of {z[mask].shape[1]}"
            lines.append((name, _range(expected[rows], ".3f"), target, units, flag))
    return text_table(lines, ("mask", "expected sparsity", "target", "units kept", ""))


def _range(values: Tensor, form: str) -> str:
    ends = (format(end.item(), form) for end in values.aminmax())
    return " to ".join(dict.fromkeys(ends))


def extract_checkpoint(pruned: PrunedRun, out: Path, *, overwrite: bool = False) -> CheckpointInfo:
    """Write the dense target model of a pruning run; each process cuts and writes its share.

    Args:
        pruned: what `read_pruned` returned.
        out: directory of the dense checkpoint.
        overwrite: whether an existing one is replaced.

    Raises:
        CheckpointError: the layers do not come out alike, or `out` exists.
    """
    info, z = pruned.info, pruned.z
    head_unit = pruned.masks.head_unit
    shape = uniform_shape(info.shape, z, head_unit)
    dense = CheckpointInfo(
        shape=shape,
        stage="extracted",
        step=info.step,
        tokens=info.tokens,
        origin={"pruned": str(info.directory), **info.origin},
        progress={"losses": info.progress.get("losses", {})},
        tokenizer=info.tokenizer,
    )
    with processes():
        names = share(shape)
        weights = extract(info.shape, z, open_weights(info).read, head_unit, names)
        return write_model(
            out, dense, shown(weights, "extracting", len(names)), overwrite=overwrite
        )
