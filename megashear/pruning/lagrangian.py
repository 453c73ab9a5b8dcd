"""The constraints that drive the masks to their target, and the penalty that enforces them.

Sheared LLaMA, section 2.1: a min-max problem with two multipliers per constraint. The trainer's
optimizer descends in the masks and ascends in the multipliers. Imports torch and `config`; never
Megatron.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megashear.pruning import hard_concrete
from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.pruning.masks import Masks

MODEL = "model"
"""The only constraint of a run without a target shape: the size of the whole model."""


class Lagrangian(nn.Module):
    """Multipliers lambda1 and lambda2 of each constraint, and the penalty for missing its target.

    Args:
        targets: target sparsity of each constraint.
        rows: number of rows of each constraint (for example layers).
        warmup_steps: steps over which the targets rise linearly from 0.
        per_row: one pair of multipliers for each row, instead of one for the constraint.

    Attributes:
        multipliers: float32 [2, 1 or rows] per constraint: lambda1, then lambda2.
    """

    def __init__(
        self, targets: dict[str, float], rows: dict[str, int], warmup_steps: int, per_row: bool
    ) -> None:
        super().__init__()
        self.targets, self.warmup_steps = dict(targets), warmup_steps
        self.multipliers = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(2, rows[name] if per_row else 1)) for name in targets}
        )

    def warmed_targets(self, step: int) -> dict[str, float]:
        """Return the target sparsities after `step` completed steps."""
        fraction = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return {name: fraction * target for name, target in self.targets.items()}

    def penalty(self, sparsity: dict[str, Tensor], step: int) -> Tensor:
        """Return the sum over constraints of mean over rows (lambda1 (e - t) + lambda2 (e - t)^2).

        Args:
            sparsity: expected sparsity e [rows] of each constraint.
            step: completed steps, for the warm-up of t.
        """
        total = torch.zeros(())
        for name, target in self.warmed_targets(step).items():
            lambda1, lambda2 = self.multipliers[name]
            excess = sparsity[name] - target
            total = total + (lambda1 * excess + lambda2 * excess.square()).mean()
        return total


def constraints(masks: Masks) -> dict[str, Tensor]:
    """Return the expected sparsity [rows] of every constraint, differentiable.

    With a target shape each mask is a constraint; without one, MODEL is the only one: the fraction
    of the source's parameters that the masks are expected to remove.
    """
    if masks.target is not None:
        return masks.expected_sparsity()
    count = expected_parameter_count(masks.source, masks.probability_kept(), masks.head_unit)
    return {MODEL: (1 - count / parameter_count(masks.source)).float()[None]}


def constraint_targets(masks: Masks, target_sparsity: float | None = None) -> dict[str, float]:
    """Return the target of each constraint; `target_sparsity` is that of a run without a shape."""
    if masks.target is not None:
        return masks.target_sparsity
    assert target_sparsity is not None, "masks without a target shape need target_sparsity"
    return {MODEL: target_sparsity}


class OffTarget(NamedTuple):
    """A row of a mask (or row 0 of MODEL) that did not reach its target sparsity."""

    mask: str
    row: int
    expected: float
    target: float
    name: str


def off_target(
    masks: Masks, tolerance: float = 0.02, target_sparsity: float | None = None
) -> list[OffTarget]:
    """Return the rows whose expected sparsity is `tolerance` or more away from their target.

    A row on target may also have the sparsity of a row with the target's number of units fully on
    and the rest fully off: log_alpha is clamped, so their P(z > 0) is not quite 1 or 0.

    Args:
        masks: at the end of pruning.
        tolerance: absolute difference of sparsities.
        target_sparsity: of the whole model, in a run without a target shape.
    """
    targets = constraint_targets(masks, target_sparsity)
    on, off = hard_concrete.probability_kept(
        torch.tensor([1.0, -1.0]) * hard_concrete.LOG_ALPHA_LIMIT
    ).tolist()
    rows = []
    for mask, sparsity in constraints(masks).items():
        target = targets[mask]
        decided = target if mask == MODEL else 1 - (target * off + (1 - target) * on)
        low, high = sorted((target, decided))
        for row, expected in enumerate(sparsity.tolist()):
            if not low - tolerance < expected < high + tolerance:  # lists a NaN too
                rows.append(OffTarget(mask, row, expected, target, masks.row_name(mask, row)))
    return rows


def format_off_target(rows: list[OffTarget]) -> str:
    """Format the rows of `off_target` as text, one line each; empty if there are none."""
    if not rows:
        return ""
    cut = " Extraction cuts them by rank all the same." if rows[0].mask != MODEL else ""
    lines = [f"MASKS OFF THEIR TARGETS: {len(rows)}.{cut}"]
    for _, _, expected, target, name in rows:
        sparsities = f"expected sparsity {expected:.3f}, target {target:.3f}"
        lines.append(f"  {name:<24}  {sparsities}  ({expected - target:+.3f})")
    return "\n".join(lines)
