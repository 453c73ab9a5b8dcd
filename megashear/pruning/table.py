"""The table: which axis of which parameter is indexed by which units, and which axes are scaled.

One statement drives masking, mask gradients, extraction and the shapes of the result. A row is
bound to a tensor-parallel shard by asking its axes for the units of that shard (DESIGN section 2).

Parameters go by their names in a Megatron-Core checkpoint, with the layer number written out, as in
`decoder.layers.3.mlp.linear_fc2.weight`. Imports torch and `config` only; never Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config.schema import ModelShape

LAYER, HIDDEN, HEAD, INTERMEDIATE = "layer", "hidden", "head", "intermediate"
MASKS = (LAYER, HIDDEN, HEAD, INTERMEDIATE)
"""The four kinds of mask. A head unit is a query group: query heads with their key and value."""


def mask_sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(rows, units per row) of each mask of a model; a row is a set that shares one target size.

    layer [1, L]   hidden [1, d]   head [L, num_query_groups]   intermediate [L, ffn_hidden_size]
    """
    return {
        LAYER: (1, shape.num_layers),
        HIDDEN: (1, shape.hidden_size),
        HEAD: (shape.num_layers, shape.num_query_groups),
        INTERMEDIATE: (shape.num_layers, shape.ffn_hidden_size),
    }


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter.

    Attributes:
        mask: the mask whose units index the axis; None where no mask does (the vocabulary).
        units: units in the whole model.
        repeat: consecutive positions that belong to one unit (the rows of a head).
        tile: how often the whole pattern stands in the axis (2 in fc1: gate rows, then up rows).
        scaled: whether the mask multiplies the parameter along this axis; if not it only cuts.
        parallel: whether tensor parallelism splits the axis (by units, each rank a block of them).
    """

    mask: str | None
    units: int
    repeat: int = 1
    tile: int = 1
    scaled: bool = False
    parallel: bool = False

    def length(self, ranks: int = 1) -> int:
        """Positions along the axis on one of `ranks` tensor-parallel ranks."""
        return self.units * self.repeat * self.tile // (ranks if self.parallel else 1)

    def unit_of_position(self, rank: int = 0, ranks: int = 1) -> Tensor:
        """int64 [length]: the unit that each position of this rank's shard belongs to."""
        share = self.units // ranks if self.parallel else self.units
        first = rank * share if self.parallel else 0
        units = torch.arange(first, first + share)
        return units.repeat_interleave(self.repeat).repeat(self.tile)


@dataclass(frozen=True)
class Row:
    """One parameter's line in the table.

    Attributes:
        name: checkpoint name, the layer number written out.
        axes: its one or two axes.
        layer: number of the transformer layer; None outside the layers.
        scaled_by_layer: whether z_layer multiplies the parameter (along axis 0, with z_hidden).
        norm: an RMSNorm weight: while masked it carries sqrt(n/d) as well (n hidden units kept).
    """

    name: str
    axes: tuple[Axis, ...]
    layer: int | None = None
    scaled_by_layer: bool = False
    norm: bool = False

    @property
    def scaled(self) -> bool:
        """Whether masks change the parameter's values while training."""
        return any(axis.scaled for axis in self.axes)

    @property
    def parallel(self) -> bool:
        """Whether tensor parallelism splits the parameter; if not, every rank holds all of it."""
        return any(axis.parallel for axis in self.axes)

    def shape(self, ranks: int = 1) -> tuple[int, ...]:
        """Shape of one tensor-parallel rank's shard."""
        return tuple(axis.length(ranks) for axis in self.axes)

    def shard(self, tensor: Tensor, rank: int, ranks: int) -> Tensor:
        """One tensor-parallel rank's part of the whole parameter."""
        for dim, axis in enumerate(self.axes):
            if axis.parallel and ranks > 1:
                share = axis.units // ranks
                units = tensor.unflatten(dim, (axis.tile, axis.units, axis.repeat))
                tensor = units.narrow(dim + 1, rank * share, share).flatten(dim, dim + 2)
        return tensor


def layer_rows(shape: ModelShape, layer: int) -> tuple[Row, ...]:
    """The rows of one transformer layer, in the order of Megatron's modules."""
    group_rows = shape.kv_channels * (shape.heads_per_group + 2)
    group_columns = shape.kv_channels * shape.heads_per_group
    groups, ffn = shape.num_query_groups, shape.ffn_hidden_size
    prefix = f"decoder.layers.{layer}."
    cut = Axis(HIDDEN, shape.hidden_size)
    residual = Axis(HIDDEN, shape.hidden_size, scaled=True)

    def row(name: str, *axes: Axis, **flags: bool) -> Row:
        return Row(prefix + name, axes, layer, **flags)

    return (
        row("self_attention.linear_qkv.layer_norm_weight", residual, norm=True),
        row(
            "self_attention.linear_qkv.weight",
            Axis(HEAD, groups, repeat=group_rows, parallel=True),
            cut,
        ),
        row(
            "self_attention.linear_proj.weight",
            residual,
            Axis(HEAD, groups, repeat=group_columns, scaled=True, parallel=True),
            scaled_by_layer=True,
        ),
        row("mlp.linear_fc1.layer_norm_weight", residual, norm=True),
        row("mlp.linear_fc1.weight", Axis(INTERMEDIATE, ffn, tile=2, parallel=True), cut),
        row(
            "mlp.linear_fc2.weight",
            residual,
            Axis(INTERMEDIATE, ffn, scaled=True, parallel=True),
            scaled_by_layer=True,
        ),
    )


def outer_rows(shape: ModelShape) -> tuple[Row, ...]:
    """The rows outside the transformer layers: embedding, final norm and output head."""
    vocabulary = Axis(None, shape.vocab_size, parallel=True)
    residual = Axis(HIDDEN, shape.hidden_size, scaled=True)
    rows = [
        Row("embedding.word_embeddings.weight", (vocabulary, residual)),
        Row("decoder.final_layernorm.weight", (residual,), norm=True),
    ]
    if not shape.tied_embeddings:
        rows.append(Row("output_layer.weight", (vocabulary, Axis(HIDDEN, shape.hidden_size))))
    return tuple(rows)


def table(shape: ModelShape) -> Iterator[Row]:
    """Every parameter of a model: embedding, layers, final norm, output head."""
    embedding, *rest = outer_rows(shape)
    yield embedding
    for layer in range(shape.num_layers):
        yield from layer_rows(shape, layer)
    yield from rest
