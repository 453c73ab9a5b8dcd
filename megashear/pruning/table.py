"""The table: which units index which axis of each parameter, and which axes the masks scale.

This one statement drives masking, mask gradients, extraction and the shapes of the result. The axes
of a rule give the units of each tensor-parallel shard. Parameters have their names in a
Megatron-Core checkpoint, with the layer number, as in `decoder.layers.3.mlp.linear_fc2.weight`.
Imports torch and `config`; never Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape

LAYER, HIDDEN, HEAD, INTERMEDIATE = "layer", "hidden", "head", "intermediate"
MASK_KINDS = (LAYER, HIDDEN, HEAD, INTERMEDIATE)
"""The four kinds of mask.

`pruning.head_unit` says what a unit of the head mask is: a query group (its query heads, key and
value), or a query head; each group then keeps its key and value and the same number of heads.
"""


def mask_sizes(shape: ModelShape, head_unit: str = QUERY_GROUP) -> dict[str, tuple[int, int]]:
    """Return (rows, units per row) of each mask; a row is a set of units with one target size.

    layer [1, L]   hidden [1, d]   intermediate [L, ffn_hidden_size]
    head [L, num_query_groups], or [L * num_query_groups, heads_per_group] of query heads
    """
    groups = shape.num_query_groups
    heads = (shape.num_layers, groups)
    if head_unit == QUERY_HEAD:
        heads = (shape.num_layers * groups, shape.heads_per_group)
    return {
        LAYER: (1, shape.num_layers),
        HIDDEN: (1, shape.hidden_size),
        HEAD: heads,
        INTERMEDIATE: (shape.num_layers, shape.ffn_hidden_size),
    }


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter.

    Attributes:
        mask: the mask whose units index the axis; None if no mask does (the vocabulary).
        units: units along the axis of the whole parameter, from one or several rows of the mask
            (the query heads of all groups of a layer).
        repeat: consecutive positions of one unit (the rows of a head).
        block: consecutive units (the query heads of a group).
        fixed: positions after each block that belong to no unit (the group's key and value).
        tile: repetitions of the whole pattern (2 in fc1: gate rows, then up rows).
        scaled: whether the mask multiplies the parameter along this axis; if not, it only cuts.
        parallel: whether tensor parallelism splits the axis, between blocks. If they do not divide
            evenly (the vocabulary), padding makes the last shards as long as the others.
    """

    mask: str | None
    units: int
    repeat: int = 1
    block: int = 1
    fixed: int = 0
    tile: int = 1
    scaled: bool = False
    parallel: bool = False

    @property
    def vocabulary(self) -> bool:
        """Whether this is the axis of the vocabulary."""
        return self.mask is None and self.parallel

    @property
    def block_length(self) -> int:
        """Return the positions of a block with the fixed ones after it."""
        return self.block * self.repeat + self.fixed

    def blocks(self, ranks: int = 1) -> int:
        """Return the blocks in one tile on one of `ranks` tensor-parallel ranks, with padding."""
        return -(-self.units // self.block // (ranks if self.parallel else 1))

    def shard_blocks(self, rank: int, ranks: int) -> range:
        """Return the blocks of a tile in this rank's shard, without padding."""
        number, end = self.blocks(ranks), self.blocks()
        first = min(rank * number, end)
        return range(first, min(first + number, end))

    def length(self, ranks: int = 1) -> int:
        """Return the positions along the axis on one of `ranks` tensor-parallel ranks."""
        return self.blocks(ranks) * self.block_length * self.tile

    def unit_of_position(self, rank: int = 0, ranks: int = 1) -> Tensor:
        """Return the unit of each position of this rank's shard, or -1 for none, int64 [length]."""
        number = self.blocks(ranks) * self.block
        first = rank * number if self.parallel else 0
        units = torch.arange(first, first + number)
        units = units.masked_fill(units >= self.units, -1).repeat_interleave(self.repeat)
        blocks = units.view(-1, self.block * self.repeat)
        return functional.pad(blocks, (0, self.fixed), value=-1).flatten().repeat(self.tile)


@dataclass(frozen=True)
class ParamRule:
    """How masks act on one parameter: its line in the table.

    Attributes:
        name: checkpoint name, with the layer number.
        axes: its one or two axes.
        layer: number of the transformer layer; None outside the layers.
        scaled_by_layer: whether z_layer multiplies the parameter (along axis 0, with z_hidden).
        norm: the weight of an RMSNorm over hidden units; while n of d are kept, it is multiplied
            by sqrt(n/d) as well.
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
        """Return the shape of one tensor-parallel rank's shard."""
        return tuple(axis.length(ranks) for axis in self.axes)

    def shard(self, tensor: Tensor, rank: int, ranks: int) -> Tensor:
        """Return one tensor-parallel rank's shard of the whole parameter; padding is 0."""
        for dim, axis in enumerate(self.axes):
            if axis.parallel and ranks > 1:
                own = axis.shard_blocks(rank, ranks)
                blocks = tensor.unflatten(dim, (axis.tile, -1, axis.block_length))
                part = blocks.narrow(dim + 1, own.start, len(own))
                padding = (0, 0) * (blocks.dim() - dim - 2) + (0, axis.blocks(ranks) - len(own))
                tensor = functional.pad(part, padding).flatten(dim, dim + 2)
        return tensor

    def units(self, axis: Axis, masks: Mapping[str, Tensor]) -> Tensor:
        """Return the units [axis.units] of the masks [rows, units] that index an axis."""
        assert axis.mask is not None
        per_layer = axis.mask in (HEAD, INTERMEDIATE)
        return masks[axis.mask].view(-1, axis.units)[self.layer if per_layer else 0]


def layer_rules(
    shape: ModelShape, layer: int, head_unit: str = QUERY_GROUP
) -> tuple[ParamRule, ...]:
    """Return the rules of one transformer layer, in the order of Megatron's modules."""
    ffn = shape.ffn_hidden_size
    prefix = f"decoder.layers.{layer}."
    cut = Axis(HIDDEN, shape.hidden_size)
    residual = Axis(HIDDEN, shape.hidden_size, scaled=True)
    qkv, heads = _head_axes(shape, head_unit)

    def rule(name: str, *axes: Axis, **flags: bool) -> ParamRule:
        return ParamRule(prefix + name, axes, layer, **flags)

    rules = [
        rule("self_attention.linear_qkv.layer_norm_weight", residual, norm=True),
        rule("self_attention.linear_qkv.weight", qkv, cut),
    ]
    if shape.qkv_bias:
        rules.append(rule("self_attention.linear_qkv.bias", qkv))
    if shape.qk_norm:
        channels = Axis(None, shape.kv_channels)  # one norm for all heads
        rules.append(rule("self_attention.q_layernorm.weight", channels))
        rules.append(rule("self_attention.k_layernorm.weight", channels))
    rules.append(rule("self_attention.linear_proj.weight", residual, heads, scaled_by_layer=True))
    if shape.proj_bias:
        rules.append(rule("self_attention.linear_proj.bias", residual, scaled_by_layer=True))
    gate_and_up = Axis(INTERMEDIATE, ffn, tile=2, parallel=True)
    rules.append(rule("mlp.linear_fc1.layer_norm_weight", residual, norm=True))
    rules.append(rule("mlp.linear_fc1.weight", gate_and_up, cut))
    if shape.mlp_bias:
        rules.append(rule("mlp.linear_fc1.bias", gate_and_up))
    intermediate = Axis(INTERMEDIATE, ffn, scaled=True, parallel=True)
    rules.append(rule("mlp.linear_fc2.weight", residual, intermediate, scaled_by_layer=True))
    if shape.mlp_bias:
        rules.append(rule("mlp.linear_fc2.bias", residual, scaled_by_layer=True))
    return tuple(rules)


def _head_axes(shape: ModelShape, head_unit: str) -> tuple[Axis, Axis]:
    """Return axis 0 of linear_qkv (by group: queries, key, value) and axis 1 of linear_proj."""
    size, per_group = shape.kv_channels, shape.heads_per_group
    if head_unit == QUERY_HEAD:
        number = shape.num_attention_heads
        qkv = Axis(HEAD, number, repeat=size, block=per_group, fixed=2 * size, parallel=True)
        return qkv, Axis(HEAD, number, repeat=size, scaled=True, parallel=True)
    groups = shape.num_query_groups
    qkv = Axis(HEAD, groups, repeat=(per_group + 2) * size, parallel=True)
    return qkv, Axis(HEAD, groups, repeat=per_group * size, scaled=True, parallel=True)


def outer_rules(shape: ModelShape) -> tuple[ParamRule, ...]:
    """Return the rules outside the transformer layers: embedding, final norm, output head."""
    vocabulary = Axis(None, shape.vocab_size, parallel=True)
    residual = Axis(HIDDEN, shape.hidden_size, scaled=True)
    rules = [
        ParamRule("embedding.word_embeddings.weight", (vocabulary, residual)),
        ParamRule("decoder.final_layernorm.weight", (residual,), norm=True),
    ]
    if not shape.tied_embeddings:
        rules.append(
            ParamRule("output_layer.weight", (vocabulary, Axis(HIDDEN, shape.hidden_size)))
        )
    return tuple(rules)


def param_rules(shape: ModelShape, head_unit: str = QUERY_GROUP) -> Iterator[ParamRule]:
    """Yield the rules of a model in the order embedding, layers, final norm, output head."""
    embedding, *rest = outer_rules(shape)
    yield embedding
    for layer in range(shape.num_layers):
        yield from layer_rules(shape, layer, head_unit)
    yield from rest
