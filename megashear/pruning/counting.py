"""Parameters of a shape, and the number that a masked model is expected to keep, by the table.

Imports torch and `config`; never Megatron.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megashear.config.schema import QUERY_GROUP, ModelShape
from megashear.pruning.table import LAYER, ParamRule, layer_rules, outer_rules


def parameter_count(shape: ModelShape) -> int:
    """Return the parameters of a dense model; a tied embedding counts once."""
    outer, layer = (
        sum(math.prod(rule.shape()) for rule in rules)
        for rules in (outer_rules(shape), layer_rules(shape, 0))
    )
    return outer + shape.num_layers * layer


def flops_per_token(shape: ModelShape, seq_length: int) -> float:
    """Return the FLOP of training on one token, forward and backward, without recomputation.

    6 for each weight of a matrix product, and 12 seq_length for each dimension of each layer's
    heads: full attention, as the PaLM paper (appendix B) counts, though half of it is masked.
    """
    lookups = 0 if shape.tied_embeddings else shape.vocab_size * shape.hidden_size
    attention = shape.num_layers * shape.num_attention_heads * shape.kv_channels * seq_length
    return 6.0 * (parameter_count(shape) - lookups) + 12.0 * attention


def expected_parameter_count(
    shape: ModelShape, probability_kept: dict[str, Tensor], head_unit: str = QUERY_GROUP
) -> Tensor:
    """Return the expected parameters of a masked model, float64 scalar, differentiable.

    Units are independent, so the expectation of a product is the product of expectations: the sums
    over the units of each axis, and the layer's. All layers of a source have the same rules, so
    those of one are evaluated as vectors over the layers.

    Args:
        shape: shape of the source model.
        probability_kept: P(z > 0) of all four masks, [rows, units].
        head_unit: what a unit of the head mask is.
    """
    p = {mask: kept.double() for mask, kept in probability_kept.items()}
    layer_L = p[LAYER][0]
    outer = sum((_expected(rule, p) for rule in outer_rules(shape)), torch.zeros(()))
    rules = layer_rules(shape, 0, head_unit)
    per_layer_L = sum((_expected(rule, p) for rule in rules), torch.zeros(()))
    return outer.sum() + (layer_L * per_layer_L).sum()


def _expected(rule: ParamRule, probability_kept: dict[str, Tensor]) -> Tensor:
    """Return the expected size of a parameter in a kept layer: [1], or [L] if masks differ."""
    count = torch.ones(1, dtype=torch.float64, device=probability_kept[LAYER].device)
    for axis in rule.axes:
        if axis.mask is None:
            count = count * axis.length()
        else:
            units = probability_kept[axis.mask].view(-1, axis.units).sum(1)
            fixed = axis.blocks() * axis.fixed
            count = count * (axis.tile * (axis.repeat * units + fixed))
    return count
