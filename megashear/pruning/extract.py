"""Cuts the kept units out of a masked model, folding the masks into the weights that stay.

The result is an ordinary dense model: a masked model gives the same logits as what is extracted
from it. One tensor is in memory at a time. Imports torch and `config`; never Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape
from megashear.errors import CheckpointError
from megashear.pruning import hard_concrete
from megashear.pruning.lagrangian import MODEL, constraint_targets, constraints
from megashear.pruning.masks import Masks
from megashear.pruning.table import HEAD, HIDDEN, INTERMEDIATE, LAYER, ParamRule, param_rules


def uniform_shape(
    source: ModelShape, z: dict[str, Tensor], head_unit: str = QUERY_GROUP
) -> ModelShape:
    """Shape of the dense model that the masks leave; layers that are off do not count.

    Args:
        source: shape of the masked model.
        z: deterministic masks, all four kinds [rows, units].
        head_unit: what a unit of the head mask is.

    Raises:
        CheckpointError: the kept layers differ in heads or intermediate units, or nothing is left.
    """
    layers = _kept(z[LAYER][0]).tolist()
    heads = "query heads" if head_unit == QUERY_HEAD else "query groups"
    counts = {
        "layers": {"": len(layers)},
        "hidden dimensions": {"": len(_kept(z[HIDDEN][0]))},
        heads: _counts(z[HEAD], source.num_layers, layers),
        "intermediate units": _counts(z[INTERMEDIATE], source.num_layers, layers),
    }
    reasons = []
    for what, kept in counts.items():
        if len(set(kept.values())) > 1:
            listed = ", ".join(f"{n} in {where}" for where, n in kept.items())
            reasons.append(f"the kept layers differ in {what}: {listed}")
        elif 0 in kept.values():
            reasons.append(f"no {what} are kept")
    if reasons:
        raise CheckpointError(
            "these masks do not leave a uniform dense model:\n  "
            + "\n  ".join(reasons)
            + "\nPrune to a `target` shape, whose masks keep the same number in every layer"
        )
    sizes = {what: next(iter(kept.values())) for what, kept in counts.items()}
    groups, per_group = sizes[heads], source.heads_per_group
    if head_unit == QUERY_HEAD:
        groups, per_group = source.num_query_groups, sizes[heads]
    return replace(
        source,
        num_layers=len(layers),
        hidden_size=sizes["hidden dimensions"],
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        ffn_hidden_size=sizes["intermediate units"],
    )


def _counts(mask: Tensor, num_layers: int, layers: list[int]) -> dict[str, int]:
    """Units kept in each row of a mask, by where it is, of the layers that are named."""
    kept_LR = mask.count_nonzero(1).view(num_layers, -1).tolist()
    return {
        f"{layer} group {row}" if len(kept_LR[layer]) > 1 else f"{layer}": kept
        for layer in layers
        for row, kept in enumerate(kept_LR[layer])
    }


def extract(
    source: ModelShape,
    z: dict[str, Tensor],
    read: Callable[[str], Tensor],
    head_unit: str = QUERY_GROUP,
    names: Container[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of the extracted model, in the order of its table.

    Args:
        source: shape of the masked model.
        z: deterministic masks, all four kinds [rows, units].
        read: gives a parameter of the masked model by name, whole and without masks.
        head_unit: what a unit of the head mask is.
        names: of the result's parameters, those to make; None for all.

    Raises:
        CheckpointError: as `uniform_shape`, or a parameter that is read does not fit the source.
    """
    target = uniform_shape(source, z, head_unit)
    kept_layers = set(_kept(z[LAYER][0]).tolist())
    rules = (r for r in param_rules(source, head_unit) if r.layer is None or r.layer in kept_layers)
    for rule, result in zip(rules, param_rules(target), strict=True):
        if names is None or result.name in names:  # and no name holds on to what was read:
            yield result.name, _fold_and_cut(rule, _checked(rule, read(rule.name)), z)


def _checked(rule: ParamRule, weight: Tensor) -> Tensor:
    if tuple(weight.shape) != rule.shape():
        found = f"has shape {tuple(weight.shape)}, and the model's shape says {rule.shape()}"
        raise CheckpointError(f"{rule.name} {found}")
    return weight


def _fold_and_cut(rule: ParamRule, weight: Tensor, z: dict[str, Tensor]) -> Tensor:
    """What is left of a parameter, times its masks; computed in float32 at least.

    A norm's sqrt(n/d) is not folded: it stands for the dimensions that are missing from here on.
    """
    dtype, z_layer = weight.dtype, z[LAYER][0]
    for dim, axis in enumerate(rule.axes):
        if axis.mask is None:
            continue
        units = rule.units(axis, z).to(weight.device)
        always = units.new_ones(1)  # for the positions of no unit, whose number is -1
        values = torch.cat((units, always))[axis.unit_of_position().to(weight.device)]
        positions = _kept(values)
        weight = weight.index_select(dim, positions)
        if axis.scaled:
            scale = values[positions]
            if dim == 0 and rule.scaled_by_layer:
                scale = scale * z_layer[rule.layer].to(weight.device)
            scale = scale.view(-1, *[1] * (weight.dim() - dim - 1))
            weight = weight.to(torch.promote_types(dtype, torch.float32)) * scale
    return weight.to(dtype)


def _kept(units: Tensor) -> Tensor:
    """Positions of what is not cut, int64, ascending."""
    return units.nonzero().flatten()


class OffTarget(NamedTuple):
    """A row of a mask (or the whole model, row 0) that did not reach its target sparsity."""

    mask: str
    row: int
    expected: float
    target: float
    name: str


def off_target(
    masks: Masks, tolerance: float = 0.02, target_sparsity: float | None = None
) -> list[OffTarget]:
    """Every row whose expected sparsity is `tolerance` or more from where it should be.

    That is at its target, or where a row reads that has decided for exactly the target's units:
    since log_alpha is clamped, P(z > 0) of a unit that is off or on is not quite 0 or 1.

    Args:
        masks: at the end of pruning.
        tolerance: absolute difference of sparsities.
        target_sparsity: the whole model's, in a run without a target shape.
    """
    targets = constraint_targets(masks, target_sparsity)
    on, off = hard_concrete.probability_kept(
        torch.tensor([1.0, -1.0]) * hard_concrete.LOG_ALPHA_LIMIT
    ).tolist()
    found = []
    for mask, sparsity in constraints(masks).items():
        target = targets[mask]
        decided = target if mask == MODEL else 1 - (target * off + (1 - target) * on)
        low, high = sorted((target, decided))
        for row, expected in enumerate(sparsity.tolist()):
            if not low - tolerance < expected < high + tolerance:  # so that a NaN is listed too
                found.append(OffTarget(mask, row, expected, target, masks.row_name(mask, row)))
    return found


def format_off_target(rows: list[OffTarget]) -> str:
    """The list of `off_target` as text, one line for each; empty if all are on target."""
    if not rows:
        return ""
    cut = " Extraction cuts them by rank all the same." if rows[0].mask != MODEL else ""
    lines = [f"MASKS OFF THEIR TARGETS: {len(rows)}.{cut}"]
    for _, _, expected, target, name in rows:
        sparsities = f"expected sparsity {expected:.3f}, target {target:.3f}"
        lines.append(f"  {name:<24}  {sparsities}  ({expected - target:+.3f})")
    return "\n".join(lines)
