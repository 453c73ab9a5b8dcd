"""The optimizer's state as sharded tensors that load in every parallel layout.

Moments (and under bf16 the fp32 weights) have the shape of their parameter and are stored under
its name. A rank writes and reads its part as blocks: its whole shard of the parameter or, under a
distributed optimizer, the range of elements that it owns, as at most three rectangles. So nothing
is gathered, and the optimizer may be distributed or not on either side. The number of steps that
AdamW keeps is that of the run; the rest is in the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_KINDS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Owned:
    """The state that a rank's optimizer holds for one parameter.

    Attributes:
        tensors: flat, by kind: the moments, and the fp32 weights under bf16.
        begin: index of their first element in the rank's flat shard of the parameter.
        distributed: whether other data-parallel ranks hold the rest.
    """

    tensors: dict[str, Tensor]
    begin: int
    distributed: bool


def optimizer_state(weights: Mapping[str, Any], optimizer: Any) -> dict[str, ShardedTensor]:
    """Return the optimizer's tensors as a sharded state dict, to be written or filled.

    Args:
        weights: sharded state dict of the rank's part of the model.
        optimizer: Megatron-Core's.
    """
    owned = _owned(optimizer)
    state: dict[str, ShardedTensor] = {}
    for entry in nested_values(dict(weights)):
        if entry.data not in owned:  # the name of tied embeddings on a stage without them
            continue
        part = owned[entry.data]
        for shard in _built(entry):
            for kind, tensor in part.tensors.items():
                for block in _blocks(shard, tensor, part, entry.data):
                    block.key = f"optimizer.state.{kind}.{shard.key}"
                    state[f"{block.key}.{'.'.join(map(str, block.global_offset))}"] = block
    return state


@torch.no_grad()
def load_optimizer_state(
    state: Mapping[str, ShardedTensor], loaded: Mapping[str, Tensor], optimizer: Any, step: int
) -> None:
    """Load what was read for `optimizer_state`.

    Args:
        state: the sharded state dict that was requested.
        loaded: the tensors that were read.
        optimizer: Megatron-Core's.
        step: of the run; AdamW corrects its moments by it.
    """
    for name, tensor in loaded.items():
        if (block := state.get(name)) is not None:
            block.data.copy_(tensor.view_as(block.data))
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for main in group["params"]:  # a tensor each: AdamW counts in place
                    part.optimizer.state[main]["step"] = torch.tensor(float(step))
            else:
                group["step"] = step


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _owned(optimizer: Any) -> dict[Tensor, _Owned]:
    """Return what the rank holds for each parameter; moments before the first step are zeros."""
    owned = {}
    for part in _parts(optimizer):
        distributed = isinstance(part, DistributedOptimizer)
        for parameter, main, begin in _main_parameters(part):
            state = part.optimizer.state[main]
            for kind in _KINDS:
                if kind not in state:
                    state[kind] = torch.zeros_like(main)
            if isinstance(part.optimizer, torch.optim.AdamW):
                state.setdefault("step", torch.tensor(0.0))
            tensors = {kind: state[kind].view(-1) for kind in _KINDS}
            if main.dtype != parameter.dtype:
                tensors["fp32_param"] = main.detach().view(-1)
            owned[parameter] = _Owned(tensors, begin, distributed)
    return owned


def _main_parameters(part: Any) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield each parameter, the tensor that AdamW updates for it here, and where that begins."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            main = part.optimizer.param_groups[group]["params"][place]
            yield parameter, main, part._get_model_param_range_map(parameter)["param"].start
        return
    groups = ("float16_groups", "fp32_from_float16_groups")  # under bf16 AdamW has copies in fp32
    low, high = (list(chain(*getattr(part, name, ()))) for name in groups)
    copied = dict(zip(map(id, high), low, strict=True))
    for main in part.get_parameters():
        yield copied.get(id(main), main), main, 0


def _built(entry: Any) -> list[ShardedTensor]:
    """Return the stored shards of a parameter: one, or two for gate and up rows."""
    if not isinstance(entry, ShardedTensorFactory):
        return [entry]
    return list(nested_values(entry.build()))


def _blocks(
    shard: ShardedTensor, tensor: Tensor, part: _Owned, parameter: Tensor
) -> Iterator[ShardedTensor]:
    """Yield the rectangles of a shard that the rank owns."""
    first = shard.data.storage_offset() - parameter.storage_offset()
    begin = max(part.begin, first)
    end = min(part.begin + tensor.numel(), first + shard.data.numel())
    replica = (*shard.replica_id[:-1], 0) if part.distributed else shard.replica_id
    stacked = shard.prepend_axis_num
    for offset, size in rectangles(tuple(shard.data.shape), begin - first, end - first):
        shape = (1,) * stacked + size
        data = tensor[begin - part.begin :][: prod(size)].view(shape)
        begin += prod(size)
        yield ShardedTensor(
            key="",
            data=data,
            dtype=data.dtype,
            local_shape=shape,
            global_shape=shard.global_shape,
            global_offset=tuple(
                a + b for a, b in zip(shard.global_offset, (0,) * stacked + offset, strict=True)
            ),
            axis_fragmentations=None,  # no regular grid
            replica_id=replica,
        )


def rectangles(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of the blocks that make up a range of a flattened tensor.

    Args:
        shape: of the tensor; of one or two dimensions.
        begin: first position.
        end: position after the last one.
    """
    if len(shape) == 1:
        if begin < end:
            yield (begin,), (end - begin,)
        return
    _, width = shape
    while begin < end:
        row, column = divmod(begin, width)
        if column or end - begin < width:
            size = (1, min(width - column, end - begin))
        else:
            size = ((end - begin) // width, width)
        yield (row, column), size
        begin += prod(size)
