"""Masks in weight space: fold them into the weights once a step, and the chain rule back to them.

Within a step a mask is one number per unit, so W is replaced by r[:, None] * W * c[None, :] while
all micro-batches run through the unchanged Megatron model. From the gradients G that they leave,

    d r = (G * W * c).sum(columns)    d c = (G * W * r).sum(rows)    d W = r * G * c

(docs/design.md, section "Masks live in weight space").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megashear.config.schema import QUERY_GROUP, ModelShape
from megashear.model.build import bound_rows, unwrap
from megashear.model.masked_gpt import BoundRow
from megashear.platform.parallel import Platform
from megashear.pruning.table import HIDDEN, LAYER, Axis


@dataclass(frozen=True)
class _Scales:
    """Factors along the axes of one parameter, differentiable in the masks; None is all ones."""

    axis0: Tensor | None
    axis1: Tensor | None

    def multiply_(self, tensor: Tensor, rows: slice) -> Tensor:
        """Multiply what stands in these rows of a tensor of the parameter's shape, in place."""
        if self.axis0 is not None:
            factor = self.axis0.detach()[rows]
            tensor.mul_(factor if tensor.dim() == 1 else factor[:, None])
        if self.axis1 is not None:
            tensor.mul_(self.axis1.detach())
        return tensor


def _block(parameter: Tensor, positions: range) -> tuple[slice, slice]:
    """The rows that flattened positions of a parameter touch, and the positions among theirs."""
    width = parameter[0].numel()
    rows = slice(positions.start // width, -(-positions.stop // width))
    first = rows.start * width
    return rows, slice(positions.start - first, positions.stop - first)


class MaskedWeights:
    """Folds masks into a model's weights, takes them out again, and carries gradients back.

    Args:
        chunks: this rank's part of the model, whichever wrappers are around it.
        platform: says which tensor-parallel shard this rank holds.
        owned: positions of a parameter, flattened, whose reduced gradient this rank has (those of
            its shard of a distributed optimizer); None is all of them, on every rank.
        gathered: whether weights are gathered from their owners after masks are folded in
            (`overlap_param_gather`); each rank then folds what it owns.
        head_unit: what a unit of the head mask is.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        platform: Platform,
        owned: Callable[[nn.Parameter], range] | None = None,
        gathered: bool = False,
        head_unit: str = QUERY_GROUP,
    ) -> None:
        self.shape: ModelShape = unwrap(chunks[0]).shape
        self.platform = platform
        rows = bound_rows(chunks, head_unit)
        self.rows: list[BoundRow] = [bound for bound in rows if bound.row.scaled]
        whole = [range(bound.parameter.numel()) for bound in self.rows]
        self._owned = [owned(bound.parameter) for bound in self.rows] if owned else whole
        self._folded = self._owned if gathered else whole
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
            scale = bound.row.units(axis, z)
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
        for bound, scales, positions in zip(self.rows, self._scales, self._folded, strict=True):
            weight = bound.parameter.detach()
            rows, inside = _block(weight, positions)
            self._put_aside.append(weight[rows].flatten()[inside].clone())
            masked = scales.multiply_(weight[rows].to(torch.float32, copy=True), rows)
            weight[rows].view(-1)[inside] = masked.view(-1)[inside].to(weight.dtype)
            if bound.row.norm:
                bound.module.eps = masked_epsilon  # type: ignore[assignment]

    @torch.no_grad()
    def _restore(self) -> None:
        # An error while folding leaves fewer copies than rows: only what was folded is put back.
        for bound, positions, weight in zip(self.rows, self._folded, self._put_aside, strict=False):
            rows, inside = _block(bound.parameter, positions)
            bound.parameter.detach()[rows].view(-1)[inside] = weight
            if bound.row.norm:
                bound.module.eps = self.shape.layernorm_epsilon  # type: ignore[assignment]
        self._put_aside = []

    def backward(self) -> None:
        """Turn the gradients of the masked weights into those of the weights, and of the masks.

        Call after the context, once all gradients are reduced. Gradients flow on through the graph
        of z; there they are this rank's part, still to be summed over the ranks of one model, and
        of a distributed optimizer.
        """
        differentiable: list[Tensor] = []
        gradients: list[Tensor] = []
        for bound, scales, positions in zip(self.rows, self._scales, self._owned, strict=True):
            scale_gradients = self._chain_rule(bound, scales, positions)
            for scale, gradient in zip((scales.axis0, scales.axis1), scale_gradients, strict=True):
                if scale is not None and scale.requires_grad:
                    differentiable.append(scale)
                    gradients.append(gradient if self._counts(bound) else gradient * 0)
        self._scales = []
        torch.autograd.backward(differentiable, gradients)

    @torch.no_grad()
    def _chain_rule(
        self, bound: BoundRow, scales: _Scales, positions: range
    ) -> tuple[Tensor, Tensor]:
        """This rank's part of the gradients of both scales; `main_grad` becomes the weight's.

        Of a distributed gradient only the owned positions are reduced: what else stands in their
        first and last row does not count.
        """
        rows, inside = _block(bound.parameter, positions)
        grad: Tensor = bound.parameter.main_grad[rows]  # type: ignore[attr-defined]
        product = grad * bound.parameter[rows]
        product.view(-1)[: inside.start] = 0
        product.view(-1)[inside.stop :] = 0
        axis0 = None if scales.axis0 is None else scales.axis0.detach()[rows]
        axis1 = None if scales.axis1 is None else scales.axis1.detach()
        d_axis0 = product.new_zeros(bound.parameter.shape[0])
        if product.dim() == 1:
            d_axis0[rows], d_axis1 = product, product.new_empty(0)
        else:
            d_axis0[rows] = product @ axis1 if axis1 is not None else product.sum(1)
            d_axis1 = axis0 @ product if axis0 is not None else product.sum(0)
        scales.multiply_(grad, rows)
        return d_axis0, d_axis1

    def _counts(self, bound: BoundRow) -> bool:
        """Whether this rank's part of the gradient is summed; a parameter is counted once.

        A shard counts on every tensor-parallel rank; a whole parameter (a norm, the bias of
        linear_proj), whose gradient Megatron has made equal everywhere, on the first; a tied
        embedding on the first stage only.
        """
        return not bound.copy and (bound.row.parallel or self.platform.tensor_rank == 0)
