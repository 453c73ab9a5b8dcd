"""Which files of a Hugging Face directory hold its tensors. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megashear.checkpoint.foreign import read_json, refuse
from megashear.errors import CheckpointError

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
SINGLE = (SAFETENSORS, "pytorch_model.bin")

INDICES = (SAFETENSORS_INDEX, "pytorch_model.bin.index.json")


def read_index(directory: Path) -> dict[str, str] | str:
    """The file of each tensor, or the one that holds all."""
    for single, index in zip(SINGLE, INDICES, strict=True):  # the order in which transformers looks
        if (directory / single).is_file():
            return single
        if (directory / index).is_file():
            return _checked_index(directory / index)
    raise CheckpointError(f"{directory}: no weights (none of {', '.join(SINGLE + INDICES)})")


def _checked_index(file: Path) -> dict[str, str]:
    """The index, all of whose files lie beside it and are of its own kind."""
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{file}: must have a mapping weight_map, of tensors to files")
    suffix = Path(file.name.removesuffix(".index.json")).suffix
    problems = [
        f"{tensor} is said to be in {name!r}: not the name of a {suffix} file in this directory"
        for tensor, name in names.items()
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix)
    ]
    if problems:
        refuse(file, problems)
    return names
