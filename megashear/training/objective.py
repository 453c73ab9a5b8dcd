"""What a stage optimises besides the loss: nothing (language modelling), or the masks (pruning)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megashear.config.schema import ModelShape, RunConfig
from megashear.model.masked_weights import MaskedWeights
from megashear.platform.parallel import Platform
from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.pruning.extract import format_off_target, off_target
from megashear.pruning.lagrangian import Lagrangian, constraint_targets, constraints
from megashear.pruning.masks import Masks, resolve_target
from megashear.pruning.table import HIDDEN
from megashear.training.optimizer import WeightOptimizer


class LanguageModeling:
    """Stages pretrain and continue: the loss alone."""

    target: ModelShape | None = None

    def step_weights(self, step: int) -> AbstractContextManager[None]:
        """The weights as they are during the micro-batches of a step."""
        return nullcontext()

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """The weights as they are during an evaluation."""
        return nullcontext()

    def backward(self, step: int) -> None:
        """After the micro-batches' backward: what the objective adds."""

    def update(self, step: int, lr_share: float) -> None:
        """Apply the objective's own gradients, at this share of their learning rates."""

    def numbers(self) -> list[Tensor]:
        """What `metrics` needs of the device, to be brought to the host."""
        return []

    def metrics(self, step: int, numbers: Sequence[Tensor]) -> dict[str, Any]:
        """What the record of a step says of the objective, from `numbers` on the host."""
        return {}

    def kept(self) -> dict[str, list[int]]:
        """Units of each mask that are kept by now, of each row."""
        return {}

    def extracted(self) -> dict[str, list[list[int]]]:
        """1 for each unit of each mask's rows that extraction would keep now, else 0."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Everything to resume from, equal on every rank."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up a state again."""

    def result(self) -> str:
        """What the run came to, besides losses; empty if there is nothing to say."""
        return ""

    def verdict(self) -> str:
        """What must be said of the result at the end of the run; empty if all is well."""
        return ""


@dataclass
class _Ahead:
    """What a step needs of the masks, drawn while the device is busy with the step before.

    Attributes:
        step: that it is for, counted from 0.
        z: masks, with their graph.
        sparsity: of each constraint [rows], with its graph.
        nonzero: hidden dimensions whose mask is not exactly 0, on the device.
        kept: the same, once the host has it.
    """

    step: int
    z: dict[str, Tensor]
    sparsity: dict[str, Tensor]
    nonzero: Tensor
    kept: int | None = None


class PruningObjective(LanguageModeling):
    """Stage prune: masks that descend on loss and penalty, multipliers that ascend.

    Masks, multipliers and their optimizer are the same on every rank: the noise is a function of
    (seed, step), mask gradients are summed over the ranks of a model, and all that follows is
    computed everywhere alike.

    Args:
        config: of the run.
        weights: the model's optimizer, with this rank's part of the model in it.
        source: the model's shape.
        platform: where it stands.
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
            "log_alpha": dict(self.masks.log_alpha.items()),
            "multipliers": dict(self.lagrangian.multipliers.items()),
        }
        self._lrs = (pruning.mask_lr, pruning.multiplier_lr)
        betas = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        groups: list[dict[str, Any]] = [
            {"params": list(self._groups["log_alpha"].values())},
            {"params": list(self._groups["multipliers"].values()), "maximize": True},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            betas=betas,
            eps=config.optimizer.adam_eps,
            weight_decay=0.0,
            foreach=True,
        )
        # Of all masks in one tensor, which is summed over the ranks at once.
        log_alphas = self._groups["log_alpha"].values()
        sizes = [log_alpha.numel() for log_alpha in log_alphas]
        self._mask_gradients = torch.zeros(sum(sizes), device=platform.device)
        parts = self._mask_gradients.split(sizes)
        for log_alpha, part in zip(log_alphas, parts, strict=True):
            log_alpha.grad = part.view_as(log_alpha)
        self._next: _Ahead | None = None

    def _ahead(self, step: int) -> _Ahead:
        """What a step needs: already drawn, unless the run has just begun."""
        if self._next is None or self._next.step != step:
            z = self.masks.sample(self.config.trainer.seed, step)
            self._next = _Ahead(step, z, constraints(self.masks), z[HIDDEN].count_nonzero())
        return self._next

    def step_weights(self, step: int) -> AbstractContextManager[None]:
        """The weights under the masks drawn for this step."""
        ahead = self._ahead(step)
        return self.masked_weights.masked(ahead.z, ahead.kept)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The weights under deterministic masks, of the current or the target model."""
        which: Literal["current", "target"] = (
            "target" if self.config.evaluation.masks == "target" else "current"
        )
        with self.masked_weights.masked(self.masks.deterministic(which)):
            yield
        self._weights.collect()

    def backward(self, step: int) -> None:
        """Chain rule to the weights and log_alpha, then the penalty, which needs no data."""
        self._optimizer.zero_grad(set_to_none=False)
        self.masked_weights.backward()
        if self.config.parallel.distributed_optimizer:  # each rank has a part of the gradients
            self.platform.sum_over_all(self._mask_gradients)
        else:
            self.platform.sum_over_model(self._mask_gradients)
        self._penalty = self.lagrangian.penalty(self._ahead(step).sparsity, step)
        self._penalty.backward()

    def update(self, step: int, lr_share: float) -> None:
        """Masks descend, multipliers ascend; each kind's gradients are clipped by its own norm.

        Then the masks of the next step are drawn.
        """
        groups = zip(self._groups.values(), self._optimizer.param_groups, self._lrs, strict=True)
        self._grad_norms = []
        for parameters, group, lr in groups:
            clip_grad = self.config.pruning.clip_grad
            self._grad_norms.append(nn.utils.clip_grad_norm_(parameters.values(), clip_grad))
            group["lr"] = lr * lr_share
        self._optimizer.step()
        self.masks.clamp_()
        self._ahead(step + 1)

    def numbers(self) -> list[Tensor]:
        """Of the step that was done, and of the next one."""
        assert self._next is not None
        multipliers = [self._groups["multipliers"][name] for name in self._next.sparsity]
        sparsity = [rows.mean() for rows in self._next.sparsity.values()]
        return [self._next.nonzero, self._penalty, *self._grad_norms, *sparsity, *multipliers]

    def metrics(self, step: int, numbers: Sequence[Tensor]) -> dict[str, Any]:
        """Of the step that was done: what `StepRecord` says of stage prune."""
        assert self._next is not None
        sparsity = self._next.sparsity
        nonzero, *others = numbers
        self._next.kept = int(nonzero)
        penalty, mask_grad_norm, multiplier_grad_norm, *rest = [n.tolist() for n in others]
        return {
            "mask_grad_norm": mask_grad_norm,
            "multiplier_grad_norm": multiplier_grad_norm,
            "penalty": penalty,
            "multipliers": dict(zip(sparsity, rest[len(sparsity) :], strict=True)),
            "sparsity": dict(zip(sparsity, rest, strict=False)),
            "target_sparsity": self.lagrangian.warmed_targets(step),
        }

    def kept(self) -> dict[str, list[int]]:
        """Units of each mask that are kept by now, of each row."""
        current = self.masks.deterministic("current")
        return {mask: z.count_nonzero(1).tolist() for mask, z in current.items()}

    def extracted(self) -> dict[str, list[list[int]]]:
        """1 for each unit of each mask's rows that extraction would keep now, else 0."""
        z = self.masks.deterministic("target")  # of the current model where there is no target
        return {mask: (rows > 0).int().tolist() for mask, rows in z.items()}

    def state(self) -> dict[str, Tensor]:
        """log_alpha, multipliers, and the moments of their optimizer."""
        state = {}
        for kind, parameters in self._groups.items():
            for name, parameter in parameters.items():
                state[f"{kind}.{name}"] = parameter.detach().cpu().clone()
                for key, value in self._optimizer.state[parameter].items():
                    state[f"{kind}.{name}.{key}"] = value.detach().cpu().clone()
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up masks, multipliers and moments again."""
        for kind, parameters in self._groups.items():
            for name, parameter in parameters.items():
                parameter.copy_(state[f"{kind}.{name}"])
                prefix = f"{kind}.{name}."
                self._optimizer.state[parameter] = {
                    key.removeprefix(prefix): value
                    if key.endswith(".step")
                    else value.to(parameter)
                    for key, value in state.items()
                    if key.startswith(prefix)
                }
        self._next = None

    @torch.no_grad()
    def result(self) -> str:
        """Units that the masks keep by now, over the rows of each mask, and the expected size."""
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
        """The masks that did not reach their targets, each by how much."""
        return format_off_target(
            off_target(self.masks, target_sparsity=self.config.target_sparsity)
        )
