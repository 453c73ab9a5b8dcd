"""The table: shards, and which positions belong to which unit."""

from __future__ import annotations

import pytest
import torch

from megashear.config.schema import ModelShape
from megashear.pruning.table import MASKS, Axis, mask_sizes, table

SHAPE = ModelShape(3, 24, 8, 40, 50, num_query_groups=4, kv_channels=6, tied_embeddings=False)


def test_axes_index_the_units_of_their_masks() -> None:
    sizes = mask_sizes(SHAPE)
    for row in table(SHAPE):
        for axis, length in zip(row.axes, row.shape(), strict=True):
            units = axis.unit_of_position()
            assert len(units) == length
            assert units.unique().tolist() == list(range(axis.units))
            assert axis.mask is None or axis.units == sizes[axis.mask][1]
    masked = {axis.mask for row in table(SHAPE) for axis in row.axes}
    assert masked == {None, *MASKS} - {"layer"}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_hold_every_unit_once_gate_and_up_alike(ranks: int) -> None:
    axis = Axis("intermediate", 8, tile=2, parallel=True)
    halves = torch.stack([axis.unit_of_position(rank, ranks) for rank in range(ranks)])
    for half in halves.view(ranks, 2, -1).unbind(1):  # gate, then up, of every rank
        assert half.flatten().tolist() == list(range(8))


def test_rows_of_a_head_stay_together() -> None:
    axis = Axis("head", 4, repeat=3, parallel=True)
    assert axis.unit_of_position(1, 2).tolist() == [2, 2, 2, 3, 3, 3]


def test_shapes_of_a_rank_are_what_megatron_splits() -> None:
    whole = {row.name: row.shape() for row in table(SHAPE)}
    half = {row.name: row.shape(2) for row in table(SHAPE)}
    changed = {name: (whole[name], half[name]) for name in whole if whole[name] != half[name]}
    layer = "decoder.layers.2."
    assert changed["embedding.word_embeddings.weight"] == ((50, 24), (25, 24))
    assert changed["output_layer.weight"] == ((50, 24), (25, 24))
    assert changed[layer + "self_attention.linear_qkv.weight"] == ((96, 24), (48, 24))
    assert changed[layer + "self_attention.linear_proj.weight"] == ((24, 48), (24, 24))
    assert changed[layer + "mlp.linear_fc1.weight"] == ((80, 24), (40, 24))
    assert changed[layer + "mlp.linear_fc2.weight"] == ((24, 40), (24, 20))
    assert len(changed) == 2 + 3 * 4
