"""Read the weights of a torch_dist checkpoint, one tensor at a time.

Tensors are addressed by their names in the table, the layer number written out; on disk Megatron
stacks the layers, so that a checkpoint loads in any parallel layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megashear.checkpoint.info import dtype_names
from megashear.checkpoint.torch_dist.metadata import check_metadata, reason_of
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.pruning.table import ParamRule, param_rules

_STACKED = re.compile(r"^decoder\.layers\.(?!\d+\.)")

_WEIGHT = re.compile(r"^(embedding|decoder|mtp|output_layer)\.(?!.*_extra_state)")


class _Stored(NamedTuple):
    """Where a tensor is stored: its key, and the layer if the key holds all layers."""

    key: str
    layer: tuple[int, ...]
    shape: tuple[int, ...]


def _stored_weights(metadata: Metadata, num_layers: int) -> dict[str, _Stored]:
    """Return tensors by their names in the table; list one stacked layer too many, if there is."""
    stored = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or not _WEIGHT.match(key):
            continue
        if (stacked := _STACKED.match(key)) is None:
            stored[key] = _Stored(key, (), tuple(entry.size))
            continue
        for layer in range(min((*entry.size[:1], num_layers + 1))):
            name = f"{stacked.group()}{layer}.{key[stacked.end() :]}"
            stored[name] = _Stored(key, (layer,), tuple(entry.size[1:]))
    return stored


def _fits(rule: ParamRule, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape holds the parameter; the vocabulary may be padded there."""
    expected = rule.shape()
    if rule.axes[0].vocabulary and shape >= expected:
        shape = expected[:1] + shape[1:]
    return shape == expected


class WeightsReader:
    """Read the weights of a checkpoint tensor by tensor, without a process group.

    The checkpoint may be Megatron-LM's own: layers stacked or separate, the vocabulary padded (the
    padding is not read), with the optimizer's state.

    Args:
        directory: a torch_dist checkpoint of a model's weights.
        shape: of the model in it.

    Raises:
        CheckpointError: it is no such checkpoint, or its weights are not those of this shape: some
            are missing, or more, or of another shape (all are named).
    """

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        self.directory = directory
        self._metadata = check_metadata(directory)
        self._reader = FileSystemReader(directory)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._stored = _stored_weights(self._metadata, shape.num_layers)
        if shape.num_layers > len(self._stored):  # and never list what a wrong number implies
            text = f"{len(self._stored)} tensors are not a model of {shape.num_layers} layers"
            raise CheckpointError(f"{directory}: {text}")
        self.rules = {rule.name: rule for rule in param_rules(shape)}
        problems = []
        for name in {**self.rules, **self._stored}:
            rule, found = self.rules.get(name), self._stored.get(name)
            if rule is None or found is None or not _fits(rule, found.shape):
                is_there = found.shape if found else "missing"
                problems.append(f"{name}: {is_there}, expected {rule.shape() if rule else 'none'}")
        if problems:
            what = "does not hold the tensors of the model's shape"
            raise CheckpointError(f"{directory}: {what}:\n  " + "\n  ".join(problems))

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of its tensors."""
        stored: Any = self._metadata.state_dict_metadata
        held = (stored[self._stored[name].key] for name in self.rules)
        return dtype_names(entry.properties.dtype for entry in held)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor of the table, in the dtype it is stored in.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        key, layer, _ = self._stored[name]
        entry: Any = self._metadata.state_dict_metadata[key]
        shape, dtype = self.rules[name].shape(), entry.properties.dtype
        offsets = torch.Size((*layer, *(0 for _ in shape)))
        whole = torch.Size((*(1 for _ in layer), *shape))
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, whole)])
        held = sum(prod(item.lengths) for item in items)
        try:
            if held != prod(shape):
                raise EOFError(f"its parts hold {held:,} of {prod(shape):,} elements")
            if len(items) == 1:
                return self._read_part(items[0]).to(dtype).reshape(shape)
            tensor = torch.empty(shape, dtype=dtype)
            self._reader.read_data(LoadPlan(items), _IntoTensor(tensor.view(whole))).wait()
        except Exception as error:  # a damaged checkpoint can fail in any way
            reason = reason_of(error)
            raise CheckpointError(f"{self.directory}: cannot read {name}: {reason}") from error
        return tensor

    def _read_part(self, item: ReadItem) -> Tensor:
        """Return a part as `read_data` would, without its copy."""
        place = self._metadata.storage_data[item.storage_index]
        with (self.directory / place.relative_path).open("rb") as stream:
            view: Any = self._reader._slice_file(stream, place)
            part = torch.load(view, map_location="cpu", weights_only=True)
        return narrow_tensor_by_index(part, item.storage_offsets, item.lengths)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the table, in its order."""
        for name in self.rules:
            yield name, self.read(name)


class _IntoTensor(DefaultLoadPlanner):
    """Put the pieces that a read plan names into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.tensor, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the piece is a view."""
