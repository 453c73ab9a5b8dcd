"""The constraints that drive the masks to their target, and the penalty that enforces them.

Sheared LLaMA, section 2.1: a min-max problem with two multipliers per constraint. The optimizer
that descends in the masks and ascends in the multipliers is the trainer's. Imports torch and
`config`; never Megatron.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.pruning.masks import Masks

MODEL = "model"
"""Name of the one constraint of a run without a target shape: the size of the whole model."""


class Lagrangian(nn.Module):
    """Multipliers lambda1, lambda2 of each constraint, and the penalty of being off its target.

    Args:
        targets: target sparsity of each constraint.
        rows: rows of each constraint (layers, for head and intermediate masks).
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
        """Target sparsities after `step` completed steps."""
        share = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return {name: share * target for name, target in self.targets.items()}

    def penalty(self, sparsity: dict[str, Tensor], step: int) -> Tensor:
        """Sum over constraints of the mean over rows of lambda1 (e - t) + lambda2 (e - t)^2.

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
    """Expected sparsity [rows] of everything that a run constrains, differentiable.

    With a target shape each mask is a constraint; without one, the share of the source's parameters
    that the masks are expected to remove is the only one, under the name "model".
    """
    if masks.target is not None:
        return masks.expected_sparsity()
    count = expected_parameter_count(masks.source, masks.probability_kept(), masks.head_unit)
    return {MODEL: (1 - count / parameter_count(masks.source)).float()[None]}


def constraint_targets(masks: Masks, target_sparsity: float | None = None) -> dict[str, float]:
    """Target sparsity of each of `constraints`; `target_sparsity` is a run's without a shape."""
    if masks.target is not None:
        return masks.target_sparsity
    assert target_sparsity is not None, "masks without a target shape need target_sparsity"
    return {MODEL: target_sparsity}
