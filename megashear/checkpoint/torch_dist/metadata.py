"""Read the table of contents of a torch_dist checkpoint, a pickle, without running any code."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    Metadata,
)

from megashear.errors import CheckpointError

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")

# Names that the pickled table of contents may hold: plain descriptions, harmless with whatever
# arguments. From these modules, only the classes that they define.
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
    """Return the key under which a tensor is stored, and its index in it: its layer, if any."""
    match = _LAYER.match(name)
    if match is None:
        return name, ()
    return "decoder.layers." + name[match.end() :], (int(match.group(1)),)


def check_metadata(directory: Path) -> Metadata:
    """Return the table of contents of a checkpoint; check that the files it lists are complete.

    It is a pickle, which Megatron-Core reads without a check. A foreign one could run any code, so
    it is refused if it names anything but torch's own descriptions.

    Raises:
        CheckpointError: it is missing, damaged or names something unexpected, or files of the
            checkpoint are missing or cut short.
    """
    file = directory / ".metadata"
    try:
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


def reason_of(error: BaseException) -> str:
    """Return the error of whichever rank failed, without the tracebacks that torch adds."""
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
