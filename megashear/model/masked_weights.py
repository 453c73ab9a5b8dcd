"""Masks in weight space: fold them into the weights once a step, and the chain rule back to them.

Within a step a mask is one number per unit, so W is replaced by r[:, None] * W * c[None, :] while
all micro-batches run through the unchanged Megatron model. From the gradients G that they leave,

    d r = (G * W * c).sum(columns)    d c = (G * W * r).sum(rows)    d W = r * G * c

(docs/masks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megashear.config.schema import QUERY_GROUP, ModelShape
from megashear.model.build import bound_rules, unwrap
from megashear.model.masked_gpt import BoundRule
from megashear.model.weight_blocks import Blocks, Matrices
from megashear.platform.parallel import Platform
from megashear.pruning.table import HEAD, HIDDEN, INTERMEDIATE, LAYER


class _Group:
    """The rules of one name in all layers of this rank (one, outside the layers).

    Their scales are computed together, so that autograd's graph does not grow with the layers.

    Attributes:
        bound: the rules.
        matrices: their parameters, and the values of their scales.
        scales: row and column scales, differentiable in the masks; None outside a step.
    """

    def __init__(self, bound: Sequence[BoundRule], platform: Platform) -> None:
        self.bound, self.rule = bound, bound[0].rule
        device, tensor = platform.device, (platform.tensor_rank, platform.tensor_size)
        layers = [b.rule.layer for b in bound if b.rule.layer is not None]
        self._layers = torch.tensor(layers, dtype=torch.int64, device=device)
        self._units = [
            axis.shard_blocks(*tensor) if axis.parallel else None for axis in self.rule.axes
        ]
        weights = [_matrix(b.parameter.detach()) for b in bound]
        values = [
            torch.empty(len(bound), length, device=device) if axis.scaled else None
            for axis, length in zip(self.rule.axes, weights[0].shape, strict=False)
        ]
        self.matrices = Matrices(weights, (values[0], values[1] if len(values) > 1 else None))
        self.scales: list[Tensor | None] = [None, None]
        self.blocks: list[Blocks] = []
        self.owned_blocks: list[Blocks] = []
        # A parameter counts once. A shard does on every tensor-parallel rank; a whole one (a norm,
        # the bias of linear_proj), whose gradient Megatron has made equal everywhere, on the
        # first; a tied embedding on the first stage alone.
        is_whole = not self.rule.parallel
        self._counts = not bound[0].copy and (platform.tensor_rank == 0 or not is_whole)

    def compute(self, z: Mapping[str, Tensor], fraction: float) -> None:
        """Compute the scales from masks z; `fraction` is n_kept / hidden_size."""
        self.scales = [None, None]
        for number, (axis, units) in enumerate(zip(self.rule.axes, self._units, strict=True)):
            if not axis.scaled:
                continue
            assert axis.mask is not None
            scale = z[axis.mask].view(-1, axis.units)
            if axis.mask in (HEAD, INTERMEDIATE):
                scale = scale.index_select(0, self._layers)
            if units is not None:  # not an index_select: its gradient on a GPU adds in any order
                assert (axis.block, axis.fixed, axis.tile) == (1, 0, 1)
                scale = scale[:, units.start : units.stop, None].expand(-1, -1, axis.repeat)
                scale = scale.flatten(1)
            if number == 0 and self.rule.scaled_by_layer:
                scale = scale * z[LAYER][0].index_select(0, self._layers)[:, None]
            if self.rule.norm:
                scale = scale * fraction**0.5
            values = self.matrices.scales[number]
            assert values is not None
            values.copy_(scale.detach())
            self.scales[number] = scale.expand_as(values)

    def bind(self, scratch: Tensor) -> None:
        """Bind the gradient buffers of Megatron's data parallelism."""
        gradients = [_matrix(b.parameter.main_grad) for b in self.bound]  # type: ignore[attr-defined]
        for blocks in self.owned_blocks:
            blocks.bind(gradients, scratch)

    def chain_rule(self) -> list[tuple[Tensor, Tensor]]:
        """Return the scales with this rank's part of their gradients; update `main_grad` in place.

        With a distributed optimizer only the owned positions are reduced, so only they count.
        """
        totals = [
            torch.zeros_like(scale) if scale is not None and scale.requires_grad else None
            for scale in self.scales
        ]
        for blocks in self.owned_blocks:
            blocks.chain_rule(totals if self._counts else (None, None))
        pairs = zip(self.scales, totals, strict=True)
        return [(scale, d) for scale, d in pairs if scale is not None and d is not None]


class MaskedWeights:
    """Folds masks into a model's weights, restores them, and propagates gradients to the masks.

    Args:
        chunks: this rank's shard of the model, with any wrappers.
        platform: the device and the tensor-parallel rank.
        owned: returns the positions of a parameter, flattened, whose reduced gradient this rank has
            (its shard of a distributed optimizer); None stands for all, on every rank.
        gathered: whether weights are gathered from their owners after masks are folded in
            (`overlap_param_gather`); each rank then folds what it owns.
        master: returns the optimizer's float32 weights of the owned positions, flattened; None if
            it has none: then a copy of the parameter is put aside.
        head_unit: what a unit of the head mask is.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        platform: Platform,
        owned: Callable[[nn.Parameter], range] | None = None,
        gathered: bool = False,
        master: Callable[[nn.Parameter], Tensor | None] | None = None,
        head_unit: str = QUERY_GROUP,
    ) -> None:
        self.shape: ModelShape = unwrap(chunks[0]).shape
        self.platform = platform
        named: dict[tuple[str, bool], list[BoundRule]] = {}
        for bound in bound_rules(chunks, head_unit):
            if bound.rule.scaled:
                name = bound.rule.name.removeprefix(f"decoder.layers.{bound.rule.layer}.")
                named.setdefault((name, bound.copy), []).append(bound)
        self._groups = [_Group(rules, platform) for rules in named.values()]
        self._norms = [b.module for group in self._groups for b in group.bound if b.rule.norm]
        self._is_bound = False
        for group in self._groups:
            parameters = [bound.parameter for bound in group.bound]
            whole = [range(parameter.numel()) for parameter in parameters]
            mine = [owned(parameter) for parameter in parameters] if owned else whole
            masters = [master(p) if master else None for p in parameters]
            group.owned_blocks = Blocks.of(group.matrices, mine)
            for blocks in group.owned_blocks:
                blocks.set_masters(masters, mine)
            is_same = gathered or mine == whole
            group.blocks = group.owned_blocks if is_same else Blocks.of(group.matrices, whole)

    @contextmanager
    def masked(self, z: Mapping[str, Tensor], kept: int | None = None) -> Iterator[None]:
        """Fold the masks into the model's weights while the block runs.

        Afterwards the weights that this rank owns are restored; the caller gathers the others.

        Args:
            z: masks by kind, [rows, units] each; `backward` continues through their graph.
            kept: hidden dimensions whose mask is not exactly 0, where the caller knows how many;
                else the host waits for the device to count them.
        """
        device = self.platform.device
        z = {kind: mask.to(device) for kind, mask in z.items()}
        if kept is None:
            kept = int(torch.count_nonzero(z[HIDDEN].detach()))
        fraction = max(kept, 1) / self.shape.hidden_size  # n/d; a count, not differentiated
        for group in self._groups:
            group.compute(z, fraction)
        with torch.no_grad():
            for group in self._groups:
                for blocks in group.owned_blocks:
                    blocks.put_aside()
        try:
            self._fold(self.shape.layernorm_epsilon * fraction)
            yield
        finally:
            self._restore()

    @torch.no_grad()
    def _fold(self, masked_epsilon: float) -> None:
        for group in self._groups:
            for blocks in group.blocks:
                blocks.multiply()
        for norm in self._norms:
            norm.eps = masked_epsilon  # type: ignore[assignment]

    @torch.no_grad()
    def _restore(self) -> None:
        for group in self._groups:
            for blocks in group.owned_blocks:
                blocks.restore()
        for norm in self._norms:
            norm.eps = self.shape.layernorm_epsilon  # type: ignore[assignment]

    def backward(self) -> None:
        """Turn the gradients of the masked weights into those of the weights, and of the masks.

        Call after the context, once all gradients are reduced. Gradients flow on through the graph
        of z; there they are this rank's part, still to be summed over the ranks of one model, and
        of a distributed optimizer.
        """
        if not self._is_bound:
            self._bind()
        scales: list[Tensor] = []
        gradients: list[Tensor] = []
        with torch.no_grad():
            for group in self._groups:
                for scale, gradient in group.chain_rule():
                    scales.append(scale)
                    gradients.append(gradient)
                group.scales = [None, None]
        torch.autograd.backward(scales, gradients)

    def _bind(self) -> None:
        sizes = [blocks.size for group in self._groups for blocks in group.owned_blocks]
        scratch = torch.empty(max(sizes, default=0), device=self.platform.device)
        for group in self._groups:
            group.bind(scratch)
        self._is_bound = True


def _matrix(tensor: Tensor) -> Tensor:
    """View a vector as a column."""
    return tensor.view(len(tensor), -1)
