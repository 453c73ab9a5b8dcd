"""Masks in weight space: fold them into the weights once a step, and the chain rule back to them.

Within a step a mask is one number per unit, so W is replaced by r[:, None] * W * c[None, :] while
all micro-batches run through the unchanged Megatron model. From the gradients G that they leave,

    d r = (G * W * c).sum(columns)    d c = (G * W * r).sum(rows)    d W = r * G * c

(docs/design.md, section "Masks live in weight space").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megashear.config.schema import ModelShape
from megashear.model.build import unwrap
from megashear.model.masked_gpt import BoundRow
from megashear.platform.parallel import Platform
from megashear.pruning.table import HIDDEN, LAYER, Axis


@dataclass(frozen=True)
class _Scales:
    """Factors along the axes of one parameter, differentiable in the masks; None is all ones."""

    axis0: Tensor | None
    axis1: Tensor | None

    def factors(self, like: Tensor) -> list[Tensor]:
        """The factors, detached, each shaped to multiply a tensor of the parameter's shape."""
        shapes = ((-1,) + (1,) * (like.dim() - 1), (1, -1))
        return [
            scale.detach().view(shape)
            for scale, shape in zip((self.axis0, self.axis1), shapes, strict=True)
            if scale is not None
        ]


class MaskedWeights:
    """Folds masks into a model's weights, takes them out again, and carries gradients back.

    Args:
        model: this rank's model, whichever wrappers are around it.
        platform: says which tensor-parallel shard this rank holds.
    """

    def __init__(self, model: nn.Module, platform: Platform) -> None:
        gpt = unwrap(model)
        self.shape: ModelShape = gpt.shape
        self.platform = platform
        self.rows: list[BoundRow] = [bound for bound in gpt.bound_rows() if bound.row.scaled]
        self._units = {
            bound.row.name: [self._unit_of_position(axis) for axis in bound.row.axes]
            for bound in self.rows
        }
        self._put_aside: list[Tensor] = []
        self._scales: list[_Scales] = []

    def _unit_of_position(self, axis: Axis) -> Tensor | None:
        if not axis.scaled or not axis.parallel:
            return None  # all positions, in order
        units = axis.unit_of_position(self.platform.tensor_rank, self.platform.tensor_size)
        return units.to(self.platform.device)

    @contextmanager
    def masked(self, z: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context the model's weights carry the masks; afterwards they are as before.

        Args:
            z: masks by kind, [rows, units] each; `backward` continues through their graph.
        """
        device = self.platform.device
        z = {kind: mask.to(device) for kind, mask in z.items()}
        # A count, not differentiated: how many hidden dimensions are not exactly 0.
        kept = int(torch.count_nonzero(z[HIDDEN].detach()))
        share = max(kept, 1) / self.shape.hidden_size  # n/d
        self._scales = [self._scales_of(bound, z, share) for bound in self.rows]
        try:
            self._fold(self.shape.layernorm_epsilon * share)
            yield
        finally:
            self._restore()

    def _scales_of(self, bound: BoundRow, z: Mapping[str, Tensor], share: float) -> _Scales:
        scales: list[Tensor | None] = []
        for axis, units in zip(bound.row.axes, self._units[bound.row.name], strict=True):
            if not axis.scaled or axis.mask is None:
                scales.append(None)
                continue
            mask = z[axis.mask]
            scale = mask[0 if axis.mask == HIDDEN else bound.row.layer]
            scales.append(scale if units is None else scale.index_select(0, units))
        if bound.row.scaled_by_layer:
            assert scales[0] is not None
            scales[0] = scales[0] * z[LAYER][0, bound.row.layer]
        if bound.row.norm:
            assert scales[0] is not None
            scales[0] = scales[0] * share**0.5
        return _Scales(scales[0], scales[1] if len(scales) > 1 else None)

    @torch.no_grad()
    def _fold(self, masked_epsilon: float) -> None:
        self._put_aside = []
        for bound, scales in zip(self.rows, self._scales, strict=True):
            weight = bound.parameter
            self._put_aside.append(weight.detach().clone())
            folded = weight.float() if weight.dtype != torch.float32 else weight
            for factor in scales.factors(weight):
                folded = folded * factor
            weight.copy_(folded)
            if bound.row.norm:
                bound.module.eps = masked_epsilon  # type: ignore[assignment]

    @torch.no_grad()
    def _restore(self) -> None:
        # An error while folding leaves fewer copies than rows: only what was folded is put back.
        for bound, weight in zip(self.rows, self._put_aside, strict=False):
            bound.parameter.copy_(weight)
            if bound.row.norm:
                bound.module.eps = self.shape.layernorm_epsilon  # type: ignore[assignment]
        self._put_aside = []

    def backward(self) -> None:
        """Turn the gradients of the masked weights into those of the weights, and of the masks.

        Call after the context, once all gradients are reduced. Gradients flow on through the graph
        of z; there they are this rank's part, still to be summed over the ranks of one model.
        """
        differentiable: list[Tensor] = []
        gradients: list[Tensor] = []
        for bound, scales in zip(self.rows, self._scales, strict=True):
            scale_gradients = self._chain_rule(bound, scales)
            for scale, gradient in zip((scales.axis0, scales.axis1), scale_gradients, strict=True):
                if scale is not None and scale.requires_grad:
                    differentiable.append(scale)
                    gradients.append(gradient if self._counts(bound) else gradient * 0)
        self._scales = []
        torch.autograd.backward(differentiable, gradients)

    @torch.no_grad()
    def _chain_rule(self, bound: BoundRow, scales: _Scales) -> tuple[Tensor, Tensor]:
        # Megatron's gradient of the masked weight, to become that of the weight.
        grad: Tensor = bound.parameter.main_grad  # type: ignore[attr-defined]
        product = grad * bound.parameter
        axis0 = scales.axis0.detach() if scales.axis0 is not None else None
        axis1 = scales.axis1.detach() if scales.axis1 is not None else None
        if product.dim() == 1:
            d_axis0, d_axis1 = product, product.new_empty(0)
        else:
            d_axis0 = product @ axis1 if axis1 is not None else product.sum(1)
            d_axis1 = axis0 @ product if axis0 is not None else product.sum(0)
        for factor in scales.factors(grad):
            grad.mul_(factor)
        return d_axis0, d_axis1

    def _counts(self, bound: BoundRow) -> bool:
        """Whether this rank's part of the gradient is summed; a parameter is counted once.

        A shard counts on every tensor-parallel rank; a whole parameter (a norm), whose gradient
        Megatron has made equal everywhere, on the first; a tied embedding on the first stage only.
        """
        return not bound.copy and (bound.row.parallel or self.platform.tensor_rank == 0)
