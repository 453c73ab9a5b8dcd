"""Write a Hugging Face directory completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear.checkpoint.atomic import whole_directory
from megashear.checkpoint.hf import safetensors as shards
from megashear.checkpoint.hf.config import hf_config
from megashear.checkpoint.hf.index import SAFETENSORS_INDEX
from megashear.checkpoint.hf.mapping import hf_tensors, to_hf
from megashear.checkpoint.hf.tokenizer import (
    CONFIG,
    GENERATION,
    READERS,
    TEMPLATES,
    Generation,
    check_generation,
    copy_tokenizer,
    settings_of,
)
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError, DataError
from megashear.pruning.table import param_rules
from megashear.tokenizer.check import difference_from_transformers
from megashear.tokenizer.files import HUGGING_FACE

CONTENT = (
    *(CONFIG, GENERATION, "README.md", "*.safetensors", SAFETENSORS_INDEX),
    *(*READERS, f"{TEMPLATES}/"),
)
"""Files in a directory that we write: patterns for `whole_directory`."""


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file that people read too."""
    file.write_text(json.dumps(value, indent=2) + "\n")


def write_huggingface(
    directory: str | Path,
    shape: ModelShape,
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    generation: Generation | None = None,
    other_tokenizer: bool = False,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Write a model as transformers loads it.

    Args:
        directory: of the result.
        shape: of the model.
        weights: every tensor of `param_rules(shape)`, under its name; one is held at a time.
        dtype: `float32`, `bfloat16` or `float16`; None keeps the dtype of each tensor.
        tokenizer: directory or file of the tokenizer to copy.
        generation: special tokens and generation settings of its source.
        other_tokenizer: whether the tokenizer replaces the source's, so that its ids win.
        card: text of README.md.
        max_shard_bytes: size that no file exceeds unless one tensor does.
        overwrite: as for `whole_directory`.

    Raises:
        CheckpointError: the weights do not fit the shape or are not finite, transformers cannot
            express the shape or reads the tokenizer otherwise than it was trained with, or the
            directory exists or cannot be written.
    """
    # Without the version transformers 5 takes a Mistral's tokenizer for one with a known fault.
    config = {**hf_config(shape), "transformers_version": version("transformers")}
    kept = generation or {}
    check_generation(kept, shape.vocab_size, "special tokens and generation of the checkpoint")
    with whole_directory(directory, overwrite=overwrite, content=CONTENT) as partial:
        stated: Generation = {}
        if tokenizer is not None:
            stated = copy_tokenizer(Path(tokenizer), partial, shape.vocab_size)
        ids, settings = settings_of(kept, stated, other_tokenizer)
        write_json(partial / CONFIG, {**config, **ids})  # transformers reads it for the tokenizer
        _check_tokenizer(partial)
        tensors = _hf_tensors_of(shape, weights, None if dtype is None else getattr(torch, dtype))
        names = hf_tensors(shape)
        config["torch_dtype"] = shards.write_shards(partial, tensors, names, max_shard_bytes)
        write_json(partial / CONFIG, {**config, **ids})
        write_json(partial / GENERATION, settings)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    return Path(directory)


def _check_tokenizer(directory: Path) -> None:
    """Refuse a tokenizer that transformers replaces by another one, before the weights are written.

    Raises:
        CheckpointError: with the ids of both.
    """
    if not (directory / HUGGING_FACE).is_file():
        return  # of a kind that transformers converts with packages of its own choice
    try:
        different = difference_from_transformers(directory)
    except DataError:
        return  # it names no eos, say, so no token files of ours were made with it
    if different:
        raise CheckpointError(
            f"the tokenizer would not be the model's in transformers: {different}. Export with "
            "--tokenizer none, and load tokenizer.json by PreTrainedTokenizerFast in its place"
        )


def _hf_tensors_of(
    shape: ModelShape, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors under Hugging Face's names and in its layouts, each checked."""
    expected = {rule.name: rule.shape() for rule in param_rules(shape)}
    for name, whole in weights:
        if expected.pop(name, None) != tuple(whole.shape):
            text = f"{name} {list(whole.shape)} is unexpected, comes twice or has another shape"
            raise CheckpointError(f"{text} than the model's")
        for hf_name, part in to_hf(shape, name, whole.detach()):
            tensor = part.to("cpu", dtype or part.dtype).contiguous()
            if not torch.isfinite(torch.stack(tensor.aminmax())).all():
                raise CheckpointError(f"{name} holds values that are not finite in {tensor.dtype}")
            yield hf_name, tensor
    if expected:
        raise CheckpointError(f"weights are missing: {', '.join(expected)}")
