"""Extraction: cut the kept units out of a masked model and fold the masks into their weights.

The result is a dense model with the same logits as the masked model. One tensor is in memory at a
time. Imports torch and `config`; never Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape
from megashear.errors import CheckpointError
from megashear.pruning.table import HEAD, HIDDEN, INTERMEDIATE, LAYER, ParamRule, param_rules


def uniform_shape(
    source: ModelShape, z: dict[str, Tensor], head_unit: str = QUERY_GROUP
) -> ModelShape:
    """Return the shape of the dense model that the masks leave.

    Args:
        source: shape of the masked model.
        z: deterministic masks, all four kinds [rows, units].
        head_unit: what a unit of the head mask is.

    Raises:
        CheckpointError: the kept layers differ in heads or intermediate units, or none are kept.
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
    """Return the kept units of each row of a mask in these layers, by layer and query group."""
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
    """Yield (name, tensor) of every parameter of the extracted model, in the table's order.

    Args:
        source: shape of the masked model.
        z: deterministic masks, all four kinds [rows, units].
        read: returns a whole parameter of the masked model by name, without masks.
        head_unit: what a unit of the head mask is.
        names: the parameters of the result to make; None for all.

    Raises:
        CheckpointError: as `uniform_shape`, or a parameter does not fit the source's shape.
    """
    target = uniform_shape(source, z, head_unit)
    kept_layers = set(_kept(z[LAYER][0]).tolist())
    rules = (r for r in param_rules(source, head_unit) if r.layer is None or r.layer in kept_layers)
    for rule, result in zip(rules, param_rules(target), strict=True):
        if names is None or result.name in names:  # no variable keeps what was read:
            yield result.name, _fold_and_cut(rule, _checked(rule, read(rule.name)), z)


def _checked(rule: ParamRule, weight: Tensor) -> Tensor:
    if tuple(weight.shape) != rule.shape():
        found = f"has shape {tuple(weight.shape)}, and the model's shape says {rule.shape()}"
        raise CheckpointError(f"{rule.name} {found}")
    return weight


def _fold_and_cut(rule: ParamRule, weight: Tensor, z: dict[str, Tensor]) -> Tensor:
    """Cut a parameter and multiply it by its masks, in float32 or a wider dtype.

    A norm's sqrt(n/d) is not folded: it accounts for dimensions that are cut here.
    """
    dtype, z_layer = weight.dtype, z[LAYER][0]
    for dim, axis in enumerate(rule.axes):
        if axis.mask is None:
            continue
        units = rule.units(axis, z).to(weight.device)
        always = units.new_ones(1)  # for positions without a unit, whose index is -1
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
    """Return the indices of units that are not 0, int64, ascending."""
    return units.nonzero().flatten()
