"""Read a Hugging Face directory tensor by tensor, checked as a whole.

Nothing in a directory is ever executed: safetensors, or .bin files through torch's weights-only
loader. Imports neither Megatron nor transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megashear.checkpoint.foreign import refuse
from megashear.checkpoint.hf.index import read_index
from megashear.checkpoint.hf.mapping import hf_tensors, to_megatron
from megashear.checkpoint.hf.safetensors import DTYPES
from megashear.checkpoint.info import dtype_names
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.pruning.table import param_rules

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

DAMAGED = (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError)
"""Errors that the libraries raise for missing, truncated or damaged files."""

Found = dict[str, tuple[Path, tuple[int, ...], str]]
"""File, shape and type of tensors, by name."""


class HuggingFaceReader:
    """Reads the weights of a Hugging Face directory, in the parameter table's names and layouts.

    Args:
        directory: of the model.
        shape: as its config.json describes it.

    Raises:
        CheckpointError: the index of the weights is missing, damaged or refused.
    """

    def __init__(self, directory: Path, shape: ModelShape) -> None:
        self.directory, self.shape = directory, shape
        self._index = read_index(directory)

    def check(self) -> None:
        """Check the whole directory, reading no more than the headers of its files.

        Raises:
            CheckpointError: listing every tensor that is missing, unexpected, of another shape
                than config.json implies or of a dtype that holds no plain weights.
        """
        _ = self._held

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of its tensors; checks as `check`."""
        return dtype_names(DTYPES[dtype] for _, _, dtype in self._held.values())

    def read(self, name: str) -> Tensor:
        """Return a whole tensor of the parameter table, in the dtype it is stored in.

        Raises:
            CheckpointError: as `check`, or the tensor cannot be read or is not finite.
        """
        return to_megatron(self.shape, name, self._tensor)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the parameter table, in its order, one in memory at a time."""
        for rule in param_rules(self.shape):
            yield rule.name, self.read(rule.name)

    @functools.cached_property
    def _held(self) -> Found:
        """The tensors in its files, checked against config.json and the index."""
        found, problems = _scan(self.directory, self._index)
        problems += self._misfits(found)
        if problems:
            refuse(self.directory, problems)
        if self.shape.tied_embeddings and HEAD in found:
            head, embedding = (_read(found[name][0], name) for name in (HEAD, EMBEDDING))
            if not torch.equal(head, embedding):
                text = f"tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}"
                refuse(self.directory, [f"{text}; one of the two is wrong"])
        return found

    def _misfits(self, found: Found) -> list[str]:
        if self.shape.num_layers > len(found):  # and never list what a wrong number implies
            text = f"num_hidden_layers = {self.shape.num_layers} in config.json, but the files"
            return [f"{text} hold only {len(found)} tensors"]
        expected = hf_tensors(self.shape)
        problems = [f"{name} is missing" for name in expected if name not in found]
        if self.shape.tied_embeddings:
            expected[HEAD] = expected[EMBEDDING]
        for name, (file, shape, dtype) in found.items():
            if name not in expected:
                problems.append(f"{name} in {file.name} is unexpected")
            elif shape != expected[name]:
                text = f"is {list(shape)} in {file.name}, but config.json says"
                problems.append(f"{name} {text} {list(expected[name])}")
            elif dtype not in DTYPES:
                problems.append(f"{name} in {file.name} has type {dtype}; use {', '.join(DTYPES)}")
        return problems

    def _tensor(self, name: str) -> Tensor:
        file = self._held[name][0]
        tensor = _read(file, name)
        lowest, highest = tensor.aminmax()
        if not (torch.isfinite(lowest) and torch.isfinite(highest)):
            raise CheckpointError(f"{file}: {name} holds values that are not finite")
        return tensor


def _scan(directory: Path, index: Mapping[str, str] | str) -> tuple[Found, list[str]]:
    """Return the tensors in the files, and where they differ from the index."""
    found: Found = {}
    problems = []
    for name in [index] if isinstance(index, str) else sorted(set(index.values())):
        file = directory / name
        try:
            if not file.is_file():
                raise FileNotFoundError("missing, or not an ordinary file")
            held = _describe(file)
        except DAMAGED as error:
            problems.append(f"{name} cannot be read: {error}")
            continue
        for tensor, (shape, dtype) in held.items():
            if tensor.endswith("rotary_emb.inv_freq"):
                continue  # follows from rope_theta; old releases of transformers wrote it
            found[tensor] = (file, shape, dtype)
            if not isinstance(index, str) and index.get(tensor) != name:
                problems.append(f"{tensor} is in {name}, but the index does not say so")
        if not isinstance(index, str):
            lost = [tensor for tensor, home in index.items() if home == name and tensor not in held]
            problems += [f"{tensor} is not in {name}, where the index has it" for tensor in lost]
    return found, problems


def _describe(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor in a file."""
    if file.suffix == ".bin":
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {
            name: (tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in _load_bin(file, file.stat().st_mtime_ns).items()
        }
    with safe_open(file, framework="pt") as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
        return {
            name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()
        }


def _read(file: Path, name: str) -> Tensor:
    """Return one tensor; the file is opened anew, so that no more of it stays in memory."""
    try:
        if file.suffix == ".bin":
            return _load_bin(file, file.stat().st_mtime_ns)[name]
        with safe_open(file, framework="pt") as reader:
            return reader.get_tensor(name)
    except DAMAGED as error:
        raise CheckpointError(f"{file}: {name} cannot be read: {error}") from error


@functools.lru_cache(maxsize=1)
def _load_bin(file: Path, mtime_ns: int) -> dict[str, Tensor]:
    """Return the tensors of a .bin file, mapped into memory; loads weights only."""
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError):
        raise
    except Exception:  # a damaged pickle fails in any way; torch's text advises to drop the check
        held = None
    if not isinstance(held, dict) or not all(_is_plain(*item) for item in held.items()):
        raise ValueError("damaged, or holds something else than named, plain tensors")
    return held


def _is_plain(name: Any, tensor: Any) -> bool:
    """Whether it is a named tensor with its numbers in memory."""
    named = isinstance(name, str) and isinstance(tensor, Tensor)
    return named and tensor.layout == torch.strided and tensor.device.type == "cpu"
