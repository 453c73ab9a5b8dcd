"""Write safetensors files of bounded size tensor by tensor, with the index transformers reads.

The library's own writer needs all tensors of a file at once: with the usual 5 GB, most of a small
machine's memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.hf.index import SAFETENSORS, SAFETENSORS_INDEX
from megashear.checkpoint.info import dtype_names

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of plain weights, by their names in safetensors; others are quantised."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Shard:
    """A file that grows by tensors; space for its header, written last, is reserved."""

    def __init__(self, file: Path, room: int) -> None:
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.size, self.file, self._room = 0, file, room
        self._stream = file.open("wb")
        self._stream.seek(8 + room)

    def add(self, name: str, tensor: Tensor) -> None:
        end = self.size + tensor.nbytes
        self.header[name] = _entry(_NAMES[tensor.dtype], tensor.shape, self.size, end)
        self._stream.write(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.size = end

    def close(self) -> None:
        header = _encoded(self.header).ljust(self._room)  # spaces may follow it
        with self._stream:
            self._stream.seek(0)
            self._stream.write(len(header).to_bytes(8, "little") + header)


def _entry(dtype: str, shape: Iterable[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [start, end]}


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Iterable[int]],
    max_bytes: int,
) -> str:
    """Write named tensors, contiguous on the CPU; return the dtype that holds all of theirs.

    Args:
        directory: to write into.
        tensors: with dtypes in `DTYPES`; one is held at a time.
        shapes: of all tensors that may come, by name.
        max_bytes: of tensors in a file, unless a single one has more.

    Raises:
        OSError: they cannot be written.
    """
    largest = {name: _entry("BF16", shape, 10**18, 10**18) for name, shape in shapes.items()}
    room = -(-len(_encoded({"__metadata__": {"format": "pt"}, **largest})) // 8) * 8
    shards: list[_Shard] = []
    home: dict[str, int] = {}
    dtypes: set[torch.dtype] = set()
    numel = 0
    for name, tensor in tensors:
        if not shards or (shards[-1].size and shards[-1].size + tensor.nbytes > max_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(directory / f"{len(shards)}.part", room))
        shards[-1].add(name, tensor)
        home[name] = len(shards)
        numel += tensor.numel()
        dtypes.add(tensor.dtype)
    shards[-1].close()
    count = len(shards)
    files = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    files = files if count > 1 else {1: SAFETENSORS}
    for number, shard in enumerate(shards, start=1):
        shard.file.rename(directory / files[number])
    if count > 1:
        size = sum(shard.size for shard in shards)
        metadata = {"total_parameters": numel, "total_size": size}
        index = {"metadata": metadata, "weight_map": {n: files[home[n]] for n in sorted(home)}}
        (directory / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return dtype_names([functools.reduce(torch.promote_types, dtypes)])[0]
