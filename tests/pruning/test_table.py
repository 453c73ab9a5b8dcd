"""The table: shards, and which positions belong to which unit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megashear.config.schema import HEAD_UNITS, QUERY_HEAD, ModelShape
from megashear.pruning.table import MASK_KINDS, Axis, ParamRule, mask_sizes, param_rules

SHAPE = ModelShape(3, 24, 8, 40, 50, num_query_groups=4, kv_channels=6, tied_embeddings=False)


@pytest.mark.parametrize("head_unit", HEAD_UNITS)
def test_axes_index_the_units_of_their_masks(head_unit: str) -> None:
    sizes = mask_sizes(SHAPE, head_unit)
    for rule in param_rules(SHAPE, head_unit):
        for axis, length in zip(rule.axes, rule.shape(), strict=True):
            units = axis.unit_of_position()
            assert len(units) == length
            assert units[units >= 0].unique().tolist() == list(range(axis.units))
            if axis.mask is not None:
                rows, per_row = sizes[axis.mask]
                per_layer = rows // SHAPE.num_layers if axis.mask in ("head", "intermediate") else 1
                assert axis.units == per_layer * per_row
    masked = {axis.mask for rule in param_rules(SHAPE, head_unit) for axis in rule.axes}
    assert masked == {None, *MASK_KINDS} - {"layer"}


def test_a_layer_takes_its_own_rows_of_a_mask() -> None:
    masks = {mask: torch.arange(r * u).view(r, u) for mask, (r, u) in
             mask_sizes(SHAPE, QUERY_HEAD).items()}  # fmt: skip
    rules = {rule.name: rule for rule in param_rules(SHAPE, QUERY_HEAD)}
    proj = rules["decoder.layers.1.self_attention.linear_proj.weight"]
    hidden, heads = proj.axes
    assert proj.units(hidden, masks).tolist() == list(range(24))
    assert proj.units(heads, masks).tolist() == list(range(8, 16))  # 4 groups of 2 heads


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_every_unit_once_gate_and_up_alike(ranks: int) -> None:
    axis = Axis("intermediate", 8, tile=2, parallel=True)
    halves = torch.stack([axis.unit_of_position(rank, ranks) for rank in range(ranks)])
    for half in halves.view(ranks, 2, -1).unbind(1):  # gate, then up, of every rank
        assert half.flatten().tolist() == list(range(8))


def test_rows_of_a_head_stay_together() -> None:
    axis = Axis("head", 4, repeat=3, parallel=True)
    assert axis.unit_of_position(1, 2).tolist() == [2, 2, 2, 3, 3, 3]


def test_keys_and_values_belong_to_no_query_head() -> None:
    qkv = Axis("head", 6, repeat=2, block=3, fixed=4, parallel=True)
    assert qkv.unit_of_position().tolist() == [
        *(0, 0, 1, 1, 2, 2, -1, -1, -1, -1),
        *(3, 3, 4, 4, 5, 5, -1, -1, -1, -1),
    ]
    assert qkv.unit_of_position(1, 2).tolist() == [3, 3, 4, 4, 5, 5, -1, -1, -1, -1]
    assert (qkv.length(), qkv.length(2)) == (20, 10)


@given(
    ranks=st.integers(1, 4),
    blocks=st.integers(1, 9),
    block=st.integers(1, 3),
    repeat=st.integers(1, 3),
    fixed=st.integers(0, 3),
    tile=st.integers(1, 2),
    parallel=st.booleans(),
)
def test_a_shard_holds_the_positions_that_its_rank_is_told(
    ranks: int, blocks: int, block: int, parallel: bool, **sizes: int
) -> None:
    """Padding, which is 0, and positions of no unit are not told apart here: both are -1."""
    axis = Axis("head", blocks * block, block=block, parallel=parallel, **sizes)
    rule = ParamRule("", (Axis(None, 2), axis))
    whole = axis.unit_of_position().expand(2, -1) + 1
    for rank in range(ranks):
        shard = rule.shard(whole, rank, ranks)
        assert shard.shape == rule.shape(ranks)
        assert shard[1].tolist() == (axis.unit_of_position(rank, ranks) + 1).tolist()


@given(size=st.integers(1, 12), ranks=st.integers(1, 5))
def test_a_vocabulary_is_padded_with_zeros_at_its_end_and_no_further(size: int, ranks: int) -> None:
    shape = replace(SHAPE, vocab_size=size)
    for rule in (rule for rule in param_rules(shape) if rule.axes[0].vocabulary):
        whole = torch.rand(rule.shape()) + 1
        shards = [rule.shard(whole, rank, ranks) for rank in range(ranks)]
        assert {shard.shape for shard in shards} == {rule.shape(ranks)}
        together = torch.cat(shards)
        assert torch.equal(together[:size], whole)
        assert not together[size:].any()
        assert len(together) - size < ranks


@pytest.mark.parametrize("head_unit", HEAD_UNITS)
def test_bias_goes_with_its_heads_and_norms_of_heads_stay_whole(head_unit: str) -> None:
    shape = replace(SHAPE, qkv_bias=True, qk_norm=True)
    rules = {
        rule.name.removeprefix("decoder.layers.0."): rule for rule in param_rules(shape, head_unit)
    }
    bias, weight = (rules[f"self_attention.linear_qkv.{name}"] for name in ("bias", "weight"))
    assert bias.axes == weight.axes[:1]
    assert (bias.shape(), bias.shape(2), bias.scaled) == ((96,), (48,), False)
    for name in ("q_layernorm", "k_layernorm"):
        norm = rules[f"self_attention.{name}.weight"]
        assert (norm.shape(), norm.shape(2)) == ((6,), (6,))
        assert (norm.scaled, norm.norm, norm.parallel) == (False, False, False)
    assert len(list(param_rules(shape))) == len(list(param_rules(SHAPE))) + 3 * 3


def test_shapes_of_a_rank_are_what_megatron_splits() -> None:
    whole = {rule.name: rule.shape() for rule in param_rules(SHAPE)}
    half = {rule.name: rule.shape(2) for rule in param_rules(SHAPE)}
    changed = {name: (whole[name], half[name]) for name in whole if whole[name] != half[name]}
    layer = "decoder.layers.2."
    assert changed["embedding.word_embeddings.weight"] == ((50, 24), (25, 24))
    assert changed["output_layer.weight"] == ((50, 24), (25, 24))
    assert changed[layer + "self_attention.linear_qkv.weight"] == ((96, 24), (48, 24))
    assert changed[layer + "self_attention.linear_proj.weight"] == ((24, 48), (24, 24))
    assert changed[layer + "mlp.linear_fc1.weight"] == ((80, 24), (40, 24))
    assert changed[layer + "mlp.linear_fc2.weight"] == ((24, 40), (24, 20))
    assert len(changed) == 2 + 3 * 4
