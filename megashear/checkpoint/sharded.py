"""Weights as an ordinary Megatron-Core checkpoint (torch_dist), one tensor at a time or by rank.

Tensors are addressed by their names in the table, the layer number written out; on disk Megatron
stacks the layers, so that a checkpoint loads in any parallel layout.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megashear.checkpoint.shards import dtype_names
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.platform.checkpoints import layout_of_newer_release, weights_only
from megashear.pruning.table import ParamRule, param_rules

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STACKED = re.compile(r"^decoder\.layers\.(?!\d+\.)")
_WEIGHT = re.compile(r"^(embedding|decoder|mtp|output_layer)\.(?!.*_extra_state)")

# What the pickled table of contents of a torch_dist checkpoint may name: plain descriptions, which
# do no harm whatever they are called with. Of these modules only the classes they define.
_METADATA_MODULES = tuple(
    f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")
)
_METADATA_NAMES = {
    ("torch", "Size"), ("torch", "device"), ("torch._utils", "_get_layout"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"), ("pathlib", "Path"), ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"), ("pathlib._local", "PosixPath"), ("_codecs", "encode"),
}  # fmt: skip


def place_on_disk(name: str) -> tuple[str, tuple[int, ...]]:
    """The name under which a tensor is stored, and its place in it: the layer, if it is of one."""
    match = _LAYER.match(name)
    if match is None:
        return name, ()
    return "decoder.layers." + name[match.end() :], (int(match.group(1)),)


def load(state: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Read what a sharded state dict asks for; a collective over all ranks.

    Args:
        state: the values are Megatron-Core ShardedTensors and the like, to be filled.
        directory: the checkpoint.

    Raises:
        CheckpointError: the directory lacks something asked for, or is not a checkpoint.
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
        reason = layout_of_newer_release(directory, stored) or _reason(error)
        raise CheckpointError(f"{directory}: cannot be loaded: {reason}") from error


def check_metadata(directory: Path) -> Metadata:
    """The table of contents of a checkpoint, if it and the files that it lists are whole.

    torch_dist keeps it as a pickle, which Megatron-Core reads without a check; a foreign one could
    run any code there, and is refused if it names anything but torch's own descriptions.

    Raises:
        CheckpointError: it is missing, damaged or names something unexpected, or files of the
            checkpoint are missing or cut short.
    """
    file = directory / ".metadata"
    try:
        if not file.is_file():  # of a pipe or a device there would be no end
            raise FileNotFoundError
        with file.open("rb") as stream:
            metadata: Metadata = _MetadataUnpickler(stream).load()
        short = _files_cut_short(directory, metadata)
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not a torch_dist checkpoint (no .metadata)") from None
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if short:
        raise CheckpointError(f"{directory}: missing or cut short: {', '.join(short)}")
    return metadata


def _files_cut_short(directory: Path, metadata: Metadata) -> list[str]:
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    sizes = {
        name: (directory / name).stat().st_size
        for name in ends
        if (directory / name).is_file() and name == Path(name).name  # not of another directory
    }
    return [name for name, end in sorted(ends.items()) if sizes.get(name, -1) < end]


def _reason(error: BaseException) -> str:
    """What went wrong, on whichever rank it was; torch wraps tracebacks of all ranks around it."""
    if isinstance(error, CheckpointException):
        if not error.failures:
            return "rank 0 says why"
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if "." not in name:  # a dotted name could reach through a module to what it imports
            if (module, name) in _METADATA_NAMES:
                return super().find_class(module, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if module in _METADATA_MODULES:
                found = super().find_class(module, name)
                if isinstance(found, type) and found.__module__ == module:
                    return found
        raise CheckpointError(
            f"refused: reading it would run {module}.{name}, which a torch_dist checkpoint does "
            "not contain. Do not load it"
        )


def without_extra_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A sharded state dict without Megatron's `_extra_state` objects.

    They hold fp8 scales of Transformer Engine, are empty otherwise, and are the one thing in a
    torch_dist checkpoint that torch would unpickle without a check.
    """
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


class _Stored(NamedTuple):
    """Where a tensor of a model lies: under which key, and in which layer if the key holds all."""

    key: str
    layer: tuple[int, ...]
    shape: tuple[int, ...]


def _stored_weights(metadata: Metadata, num_layers: int) -> dict[str, _Stored]:
    """Tensors of a model by their names in the table; of stacked layers one more than there are."""
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
    """Reads the weights of a checkpoint tensor by tensor, in one process and without a group.

    The checkpoint may be Megatron-LM's own: layers stacked or apart, the vocabulary padded (what is
    beyond it is not read), an optimizer's state beside the weights.

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
        """Types of its tensors."""
        stored: Any = self._metadata.state_dict_metadata
        held = (stored[self._stored[name].key] for name in self.rules)
        return dtype_names(entry.properties.dtype for entry in held)

    def read(self, name: str) -> Tensor:
        """A whole tensor of the table, in the dtype it is stored in.

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
            reason = _reason(error)
            raise CheckpointError(f"{self.directory}: cannot read {name}: {reason}") from error
        return tensor

    def _read_part(self, item: ReadItem) -> Tensor:
        """A part as `read_data` reads it, without the copy that it makes."""
        place = self._metadata.storage_data[item.storage_index]
        with (self.directory / place.relative_path).open("rb") as stream:
            view: Any = self._reader._slice_file(stream, place)
            part = torch.load(view, map_location="cpu", weights_only=True)
        return narrow_tensor_by_index(part, item.storage_offsets, item.lengths)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the table, in its order."""
        for name in self.rules:
            yield name, self.read(name)


class _IntoTensor(DefaultLoadPlanner):
    """Puts the pieces that a read plan names into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return narrow_tensor_by_index(self.tensor, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the piece is a view."""
