"""A rank's part of a model as a sharded state dict, to be written or filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensorFactory
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
)
from torch.nn import functional

from megashear.checkpoint.info import CheckpointInfo
from megashear.checkpoint.torch_dist.metadata import check_metadata, reason_of
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.model.build import bound_rules, unwrap
from megashear.platform.checkpoints import layout_of_newer_release, weights_only
from megashear.platform.parallel import Platform
from megashear.pruning.table import outer_rules


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sharded state dict without Megatron's `_extra_state` objects.

    They hold fp8 scales of Transformer Engine and are empty otherwise. Torch would unpickle them
    without a check.
    """
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _chunk_names(chunks: Sequence[Any]) -> list[str | None]:
    """Return the names of chunks that Megatron-Core's optimizers expect in a state dict."""
    return [f"model{number}" for number in range(len(chunks))] if len(chunks) > 1 else [None]


def _without_padding(chunk: Any) -> dict[str, Any]:
    """Return the sharded state dict of a chunk, without the padding of the vocabulary."""
    state = without_extra_state(chunk.sharded_state_dict())
    rules = outer_rules(unwrap(chunk).shape)
    sizes = {rule.name: rule.axes[0].units for rule in rules if rule.axes[0].vocabulary}
    for name, entry in state.items():
        if entry.key in sizes:
            state[name] = _cut(entry, sizes[entry.key])
    return state


def _cut(entry: ShardedTensor, size: int) -> ShardedTensor | ShardedTensorFactory:
    """Return this rank's part of a vocabulary of `size` rows, without the padding in memory."""
    entry = dataclasses.replace(entry, allow_shape_mismatch=False)
    if entry.global_shape[0] == size:
        return entry
    offset, length = entry.global_offset[0], entry.local_shape[0]
    rows = len(range(size)[offset : offset + length])

    def build(key: str, data: Tensor, replica_id: Any, _: None) -> list[ShardedTensor]:
        part = dataclasses.replace(
            entry,
            key=key,
            data=data.detach()[:rows],
            local_shape=(rows, *entry.local_shape[1:]),
            global_shape=(size, *entry.global_shape[1:]),
            global_offset=(min(offset, size), *entry.global_offset[1:]),
            axis_fragmentations=None,  # no regular grid
            replica_id=replica_id,
        )
        return [part]

    def merge(parts: list[Tensor]) -> Tensor:
        return functional.pad(parts[0], (0, 0, 0, length - rows))

    return ShardedTensorFactory(entry.key, entry.data, build, merge, entry.replica_id)


def sharded_weights(chunks: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state dict of this rank's part of a model; by chunk if it has several."""
    states = [_without_padding(chunk) for chunk in chunks]
    names = _chunk_names(chunks)
    return states[0] if names == [None] else dict(zip(names, states, strict=True))  # type: ignore


def load(state: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Read the tensors that a sharded state dict requests; a collective.

    Args:
        state: Megatron-Core's ShardedTensors and factories.
        directory: the checkpoint.

    Raises:
        CheckpointError: the directory lacks a requested tensor, or is not a checkpoint.
    """
    stored = check_metadata(directory).state_dict_metadata
    parts = [part for part in nested_values(dict(state)) if isinstance(part, ShardedBase)]
    objects = [p.key for p in parts if isinstance(stored.get(p.key), BytesStorageMetadata)]
    if objects:  # torch would unpickle these without a check
        raise CheckpointError(
            f"{directory}: refused: holds pickled objects instead of tensors as "
            f"{', '.join(objects)}. Do not load it"
        )
    try:
        with weights_only():
            return dist_checkpointing.load(dict(state), str(directory))
    except (Exception, CheckpointException) as error:  # a damaged checkpoint can fail in any way
        reason = layout_of_newer_release(directory, stored) or reason_of(error)
        raise CheckpointError(f"{directory}: cannot be loaded: {reason}") from error


def fill_from_checkpoint(info: CheckpointInfo, chunks: Sequence[Any]) -> None:
    """Fill this rank's part of a model from a verified checkpoint of any layout; a collective.

    Raises:
        CheckpointError: it is of another model.
    """
    state = sharded_weights(chunks)
    loaded = load(state, info.model_directory)
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        part, filled = (tree if name is None else tree[name] for tree in (state, loaded))
        chunk.load_state_dict(filled, strict=False)  # not strict for _extra_state alone:
        missing = [key for key, value in part.items() if key not in filled and value is not None]
        if missing:
            raise CheckpointError(f"{info.model_directory}: lacks {', '.join(missing)}")


@torch.no_grad()
def fill_from_reader(
    chunks: Iterable[nn.Module], read: Callable[[str], Tensor], platform: Platform
) -> None:
    """Give each parameter of this rank its tensor-parallel shard of what `read` returns.

    Args:
        chunks: this rank's part of the model.
        read: returns a whole tensor by its name in the table.
        platform: names the shard that this rank holds.

    Raises:
        CheckpointError: a tensor has another shape than the model's.
    """
    rules = list(bound_rules(chunks))
    for bound in progress(rules, "loading", len(rules), "tensors", speaks=platform.rank == 0):
        whole = read(bound.rule.name)
        if tuple(whole.shape) != bound.rule.shape():
            raise CheckpointError(
                f"{bound.rule.name} is {tuple(whole.shape)}; the model needs {bound.rule.shape()}"
            )
        shard = bound.rule.shard(whole, platform.tensor_rank, platform.tensor_size)
        bound.parameter.copy_(shard)
