"""What a stage optimises: the loss (language modelling), or the loss and the masks (pruning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megashear.checkpoint.masks import LOG_ALPHA, MULTIPLIERS, pack_masks, unpack_masks
from megashear.config.schema import ModelShape, RunConfig
from megashear.model.masked_weights import MaskedWeights
from megashear.platform.parallel import Platform
from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.pruning.lagrangian import (
    Lagrangian,
    constraint_targets,
    constraints,
    format_off_target,
    off_target,
)
from megashear.pruning.masks import Masks, resolve_target
from megashear.pruning.table import HIDDEN
from megashear.training.optimizer import WeightOptimizer


class Objective:
    """What a stage optimises besides the loss. Here every hook does nothing.

    Attributes:
        target: shape to prune to; None if there is none.
    """

    target: ModelShape | None = None

    def step_weights(self, step: int) -> AbstractContextManager[None]:
        """Return a context in which the weights are those of the step's micro-batches."""
        return nullcontext()

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the weights are those of an evaluation."""
        return nullcontext()

    def backward(self, step: int) -> None:
        """Add the objective's gradients, after the backward pass of the micro-batches."""

    def update(self, step: int, lr_fraction: float) -> None:
        """Apply the objective's own gradients, at this fraction of their learning rates."""

    def measured(self) -> dict[str, Tensor]:
        """Return the tensors on the device, by name, that `metrics` needs on the host."""
        return {}

    def metrics(self, step: int, measured: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the objective's fields of a `StepRecord`, from `measured` on the host."""
        return {}

    def kept(self) -> dict[str, list[int]]:
        """Return the number of units that are kept now, by mask and row."""
        return {}

    def extracted(self) -> dict[str, list[list[int]]]:
        """Return 1 for each unit that extraction would keep now, else 0, by mask and row."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs, equal on every rank."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""

    def result(self) -> str:
        """Describe the result of the run besides its losses; empty if there is nothing to add."""
        return ""

    def verdict(self) -> str:
        """Return a warning about the result; empty if all is well."""
        return ""


class LanguageModeling(Objective):
    """Optimise the loss alone: stages pretrain and continue."""


@dataclass
class _StepMasks:
    """The masks of one step, drawn while the device is still busy with the step before.

    Attributes:
        step: the step, counted from 0.
        z: masks, with their graph.
        sparsity: expected sparsity of each constraint [rows], with its graph.
        nonzero: number of hidden dimensions whose mask is not exactly 0, on the device.
        kept_hidden: the same number on the host; None until it has arrived.
    """

    step: int
    z: dict[str, Tensor]
    sparsity: dict[str, Tensor]
    nonzero: Tensor
    kept_hidden: int | None = None


class PruningObjective(Objective):
    """Stage prune: masks descend on loss and penalty, multipliers ascend (Sheared LLaMA, 2.1).

    Masks, multipliers and their optimizer are the same on every rank: the noise is a function of
    (seed, step), mask gradients are summed over the ranks of a model, and every rank computes the
    rest identically.

    Args:
        config: configuration of the run.
        weights: the optimizer of the weights, which holds this rank's shard of the model.
        source: shape of the model.
        platform: process group and device.
    """

    def __init__(
        self, config: RunConfig, weights: WeightOptimizer, source: ModelShape, platform: Platform
    ) -> None:
        self.config, self.platform, self._weights = config, platform, weights
        pruning = config.pruning
        if config.target is not None:
            self.target = resolve_target(source, config.target, pruning.head_unit)
        self.masks = Masks(source, self.target, pruning.head_unit).to(platform.device)
        sparsity = constraints(self.masks)
        self.lagrangian = Lagrangian(
            constraint_targets(self.masks, config.target_sparsity),
            {name: len(rows) for name, rows in sparsity.items()},
            pruning.sparsity_warmup_steps,
            pruning.multipliers == "per_layer",
        ).to(platform.device)
        self.masked_weights = MaskedWeights(
            weights.chunks,
            platform,
            weights.owned,
            config.parallel.overlap_param_gather,
            weights.master,
            pruning.head_unit,
        )
        self._groups: dict[str, dict[str, nn.Parameter]] = {
            LOG_ALPHA: dict(self.masks.log_alpha.items()),
            MULTIPLIERS: dict(self.lagrangian.multipliers.items()),
        }
        self._lrs = (pruning.mask_lr, pruning.multiplier_lr)
        betas = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        groups: list[dict[str, Any]] = [
            {"params": list(self._groups[LOG_ALPHA].values())},
            {"params": list(self._groups[MULTIPLIERS].values()), "maximize": True},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, betas=betas, eps=config.optimizer.adam_eps, weight_decay=0.0, foreach=True
        )
        # One tensor for all masks, so that one collective sums it over the ranks.
        log_alphas = self._groups[LOG_ALPHA].values()
        sizes = [log_alpha.numel() for log_alpha in log_alphas]
        self._mask_gradients = torch.zeros(sum(sizes), device=platform.device)
        parts = self._mask_gradients.split(sizes)
        for log_alpha, part in zip(log_alphas, parts, strict=True):
            log_alpha.grad = part.view_as(log_alpha)
        self._next: _StepMasks | None = None

    def _step_masks(self, step: int) -> _StepMasks:
        """Return the masks of a step: already drawn, except at the start of a run."""
        if self._next is None or self._next.step != step:
            z = self.masks.sample(self.config.trainer.seed, step)
            self._next = _StepMasks(step, z, constraints(self.masks), z[HIDDEN].count_nonzero())
        return self._next

    def step_weights(self, step: int) -> AbstractContextManager[None]:
        """Return a context in which the weights are masked by the masks of this step."""
        masks = self._step_masks(step)
        return self.masked_weights.masked(masks.z, masks.kept_hidden)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Mask the weights deterministically, as the current or the target model has them."""
        which: Literal["current", "target"] = (
            "target" if self.config.evaluation.masks == "target" else "current"
        )
        with self.masked_weights.masked(self.masks.deterministic(which)):
            yield
        self._weights.collect()

    def backward(self, step: int) -> None:
        """Apply the chain rule to weights and log_alpha, then add the gradients of the penalty."""
        self._optimizer.zero_grad(set_to_none=False)
        self.masked_weights.backward()
        if self.config.parallel.distributed_optimizer:  # each rank has a shard of the gradients
            self.platform.sum_over_all(self._mask_gradients)
        else:
            self.platform.sum_over_model(self._mask_gradients)
        self._penalty = self.lagrangian.penalty(self._step_masks(step).sparsity, step)
        self._penalty.backward()

    def update(self, step: int, lr_fraction: float) -> None:
        """Descend with the masks, ascend with the multipliers, and draw the next step's masks.

        The gradients of either kind are clipped by their own norm.
        """
        clip_grad, norms = self.config.pruning.clip_grad, {}
        groups = zip(self._groups.items(), self._optimizer.param_groups, self._lrs, strict=True)
        for (kind, parameters), group, lr in groups:
            norms[kind] = nn.utils.clip_grad_norm_(parameters.values(), clip_grad)
            group["lr"] = lr * lr_fraction
        self._optimizer.step()
        self.masks.clamp_()
        self._grad_norms = norms
        self._step_masks(step + 1)

    def measured(self) -> dict[str, Tensor]:
        """Return numbers of the completed step, and the kept hidden dimensions of the next one."""
        assert self._next is not None
        sparsity, multipliers = self._next.sparsity, self._groups[MULTIPLIERS]
        return {
            "next_nonzero": self._next.nonzero,
            "mask_grad_norm": self._grad_norms[LOG_ALPHA],
            "multiplier_grad_norm": self._grad_norms[MULTIPLIERS],
            "penalty": self._penalty,
            **{f"multipliers/{name}": multipliers[name] for name in sparsity},
            **{f"sparsity/{name}": rows.mean() for name, rows in sparsity.items()},
        }

    def metrics(self, step: int, measured: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the fields of a `StepRecord` that only stage prune has."""
        assert self._next is not None
        self._next.kept_hidden = int(measured["next_nonzero"])
        scalars = ("mask_grad_norm", "multiplier_grad_norm", "penalty")
        by_constraint = {
            field: {name: measured[f"{field}/{name}"].tolist() for name in self._next.sparsity}
            for field in ("multipliers", "sparsity")
        }
        return {
            **{name: measured[name].item() for name in scalars},
            **by_constraint,
            "target_sparsity": self.lagrangian.warmed_targets(step),
        }

    def kept(self) -> dict[str, list[int]]:
        """Return the number of units that are kept now, by mask and row."""
        current = self.masks.deterministic("current")
        return {mask: z.count_nonzero(1).tolist() for mask, z in current.items()}

    def extracted(self) -> dict[str, list[list[int]]]:
        """Return 1 for each unit that extraction would keep now, else 0, by mask and row."""
        z = self.masks.deterministic("target")  # the current units if there is no target
        return {mask: (rows > 0).int().tolist() for mask, rows in z.items()}

    def state(self) -> dict[str, Tensor]:
        """Return log_alpha, the multipliers, and the moments of their optimizer."""
        return pack_masks(self._groups, self._optimizer)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load masks, multipliers and moments."""
        unpack_masks(state, self._groups, self._optimizer)
        self._next = None

    @torch.no_grad()
    def result(self) -> str:
        """Describe the expected size, and the units that each mask keeps over its rows."""
        masks, source = self.masks, self.masks.source
        probability = masks.probability_kept()
        count = float(expected_parameter_count(source, probability, masks.head_unit))
        lines = [f"expected parameters {count:,.0f} of {parameter_count(source):,}; units kept:"]
        for mask, z in masks.deterministic("current").items():
            kept = (z > 0).sum(1)
            low, high = int(kept.min()), int(kept.max())
            units = f"{low}" if low == high else f"{low} to {high}"
            several = {source.num_layers: " in each layer", 1: ""}
            rows = several.get(len(kept), " in each query group of each layer")
            lines.append(f"  {mask:<12}  {units} of {z.shape[1]}{rows}")
        return "\n".join(lines)

    def verdict(self) -> str:
        """Return a warning that lists the masks off their targets, and by how much."""
        return format_off_target(
            off_target(self.masks, target_sparsity=self.config.target_sparsity)
        )
