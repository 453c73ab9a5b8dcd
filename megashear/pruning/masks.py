"""The learned masks of a model: one log_alpha per unit, and the target shape that they must reach.

Every rank holds the masks of the whole model, in float32. Imports torch and `config`; never
Megatron.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Literal

import torch
from torch import Tensor, nn

from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape, TargetShape
from megashear.pruning import hard_concrete
from megashear.pruning.table import HEAD, INTERMEDIATE, MASK_KINDS, mask_sizes


def resolve_target(
    source: ModelShape, target: TargetShape, head_unit: str = QUERY_GROUP
) -> ModelShape:
    """Return the full shape of a valid target; sizes that it does not name stay as in the source.

    Query groups keep their number of heads; with query heads as units, the groups themselves stay.
    """
    sizes = {name: size for name, size in asdict(target).items() if size is not None}
    heads = sizes.get("num_attention_heads", source.num_attention_heads)
    if head_unit != QUERY_HEAD:
        sizes["num_query_groups"] = heads // source.heads_per_group
    return replace(source, **sizes)


class Masks(nn.Module):
    """log_alpha of every masked unit; computes z for training, evaluation and extraction.

    Args:
        source: shape of the model that is pruned.
        target: shape to reach; a kind whose size it does not change has no mask. With None (a
            constraint on the size of the whole model) all four kinds have one.
        head_unit: what a unit of the head mask is (see `table.MASK_KINDS`).

    Attributes:
        log_alpha: float32 [rows, units] by masked kind.
        sizes: (rows, units per row) by masked kind.
        target_units: units to keep per row, by masked kind; empty without a target.
        target_sparsity: 1 - target / size, by masked kind; empty without a target.
    """

    def __init__(
        self, source: ModelShape, target: ModelShape | None, head_unit: str = QUERY_GROUP
    ) -> None:
        super().__init__()
        self.source, self.target, self.head_unit = source, target, head_unit
        self.all_sizes = mask_sizes(source, head_unit)
        target_sizes = mask_sizes(target, head_unit) if target else {}
        wanted = {mask: units for mask, (_, units) in target_sizes.items()}
        self.sizes = {
            mask: size for mask, size in self.all_sizes.items() if wanted.get(mask) != size[1]
        }
        self.target_units = {mask: units for mask, units in wanted.items() if mask in self.sizes}
        self.target_sparsity = {
            mask: 1 - units / self.sizes[mask][1] for mask, units in self.target_units.items()
        }
        self.log_alpha = nn.ParameterDict(
            {
                mask: nn.Parameter(torch.full(size, hard_concrete.INITIAL_LOG_ALPHA))
                for mask, size in self.sizes.items()
            }
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp log_alpha itself to +-log(100); every use of the masks does so first."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(-hard_concrete.LOG_ALPHA_LIMIT, hard_concrete.LOG_ALPHA_LIMIT)

    def sample(self, seed: int, step: int) -> dict[str, Tensor]:
        """Sample the masks of a step, all four kinds [rows, units], differentiable in log_alpha."""
        self.clamp_()
        generator = hard_concrete.generator(seed, step)
        z = {}
        for mask, size in self.sizes.items():  # not log_alpha: a ParameterDict may sort its names
            log_alpha, uniform = self.log_alpha[mask], hard_concrete.noise(size, generator)
            if log_alpha.is_cuda:  # from pinned memory the copy does not wait for the device
                uniform = uniform.pin_memory().to(log_alpha.device, non_blocking=True)
            z[mask] = hard_concrete.sample(log_alpha, uniform)
        return self._with_unmasked(z)

    @torch.no_grad()
    def deterministic(self, which: Literal["current", "target"]) -> dict[str, Tensor]:
        """Return the evaluation masks, all four kinds [rows, units], detached.

        Args:
            which: `target` keeps the target's number of units in each row; `current` keeps the
                number that each row is expected to keep now, as both do without a target shape.
        """
        self.clamp_()
        z = {}
        for mask, log_alpha in self.log_alpha.items():
            units = log_alpha.shape[1]
            if which == "target" and self.target is not None:
                removed = torch.tensor(units - self.target_units[mask])
            else:
                kept_R = hard_concrete.probability_kept(log_alpha).double().sum(1)
                removed = (units - kept_R).round().long()
            z[mask] = hard_concrete.deterministic(log_alpha, removed)
        return self._with_unmasked(z)

    def probability_kept(self) -> dict[str, Tensor]:
        """Return P(z > 0), all four kinds [rows, units]; exactly 1 for a kind without a mask."""
        self.clamp_()
        return self._with_unmasked(
            {mask: hard_concrete.probability_kept(a) for mask, a in self.log_alpha.items()}
        )

    def expected_sparsity(self) -> dict[str, Tensor]:
        """Return the expected fraction of units removed [rows], by masked kind."""
        probability = self.probability_kept()
        return {mask: 1 - probability[mask].mean(1) for mask in self.sizes}

    def row_name(self, mask: str, row: int) -> str:
        """Return the name of a row of a mask or constraint, such as `head of layer 3, group 1`."""
        if mask == HEAD and self.head_unit == QUERY_HEAD:
            layer, group = divmod(row, self.source.num_query_groups)
            return f"{mask} of layer {layer}, group {group}"
        return f"{mask} of layer {row}" if mask in (HEAD, INTERMEDIATE) else mask

    def _with_unmasked(self, masked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all four kinds in the order of MASK_KINDS, with ones for those without a mask."""
        device = next((value.device for value in masked.values()), None)
        return {
            mask: masked[mask]
            if mask in masked
            else torch.ones(self.all_sizes[mask], device=device)
            for mask in MASK_KINDS
        }
