"""Write dense models: import from Hugging Face, extract from a pruning run, export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from megashear.checkpoint import checksums
from megashear.checkpoint.description import model_card
from megashear.checkpoint.hf.writer import write_huggingface
from megashear.checkpoint.info import (
    INFO,
    CheckpointInfo,
    is_megatron,
    versions,
)
from megashear.checkpoint.models import Model, open_huggingface
from megashear.checkpoint.torch_dist.stream import (
    processes,
    shared_directory,
    tensors_of_rank,
    write_weights,
)
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.platform.collectives import on_first_process
from megashear.platform.launched import launched_rank
from megashear.pruning.extract import (
    extract,
    uniform_shape,
)
from megashear.pruning.table import param_rules


def import_huggingface(
    source: str | Path, out: str | Path, *, overwrite: bool = False
) -> CheckpointInfo:
    """Write a Hugging Face model as a Megatron checkpoint that loads in any parallel layout.

    Args:
        source: Hugging Face directory.
        out: directory of the checkpoint.
        overwrite: whether an existing checkpoint there is replaced.

    Raises:
        CheckpointError: the model is incomplete or not supported, or `out` exists.
    """
    if not (Path(source) / "config.json").is_file() and is_megatron(source):
        text = "a Megatron checkpoint, not a Hugging Face model; there is nothing to import"
        raise CheckpointError(f"{source}: {text}. `megashear export` exports it")
    model = open_huggingface(source)
    model.verify()
    info = CheckpointInfo(
        shape=model.shape,
        stage="imported",
        history=model.history,
        tokenizer=model.tokenizer,
        generation=model.generation,
    )
    with processes():
        names = tensors_of_rank(info.shape)
        weights = _read(model.read, names, "importing")
        return write_model(Path(out), info, weights, overwrite=overwrite)


def export_huggingface(
    model: Model,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    other_tokenizer: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the model of a dense checkpoint as transformers loads it, with a model card.

    Args:
        model: to export.
        out: Hugging Face directory to write.
        dtype: of the weights; None keeps the checkpoint's.
        tokenizer: directory or file of the tokenizer that goes with it.
        other_tokenizer: whether it replaces the checkpoint's, so that its special tokens win.
        overwrite: whether an existing model there is replaced.

    Raises:
        CheckpointError: the checkpoint is of a pruning run or damaged, no architecture of
            transformers computes the model, or `out` exists.
    """
    info = model.without_masks().info
    with closing(_verified(model)) as weights:
        return write_huggingface(
            out,
            info.shape,
            weights,
            dtype=dtype,
            tokenizer=tokenizer,
            generation=model.generation,
            other_tokenizer=other_tokenizer,
            card=model_card(info, Path(out).resolve().name),
            overwrite=overwrite,
        )


def _verified(model: Model) -> Generator[tuple[str, Tensor], None, None]:
    """Yield the tensors of a model; raise at the end if it is damaged."""
    with model.reading() as read:
        yield from _read(read, [rule.name for rule in param_rules(model.shape)], "exporting")


def _read(
    read: Callable[[str], Tensor], names: Sequence[str], what: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name; the progress bar iterates over names, since it would hold a tensor."""
    for name in progress(names, what, len(names), "tensors", speaks=launched_rank() == 0):
        yield name, read(name)


def extract_checkpoint(model: Model, out: Path, *, overwrite: bool = False) -> CheckpointInfo:
    """Write the dense target model of a pruning run; each process writes some of its files.

    Args:
        model: of a pruning run.
        out: directory of the dense checkpoint.
        overwrite: whether an existing one is replaced.

    Raises:
        CheckpointError: the layers would differ in shape, or `out` exists.
    """
    with processes():
        model = model.shared()
        model.verify()
        z, head_unit = model.masks.z, model.masks.masks.head_unit
        shape = uniform_shape(model.shape, z, head_unit)
        dense = CheckpointInfo(
            shape=shape,
            stage="extracted",
            history=model.history,
            tokenizer=model.tokenizer,
            generation=model.generation,
        )
        names = tensors_of_rank(shape)
        weights = extract(model.shape, z, model.read, head_unit, names)
        shown = progress(weights, "extracting", len(names), "tensors", speaks=launched_rank() == 0)
        return write_model(out, dense, shown, overwrite=overwrite)


def write_model(
    directory: Path,
    info: CheckpointInfo,
    weights: Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
) -> CheckpointInfo:
    """Write a dense model's checkpoint atomically; a collective.

    Args:
        directory: of the checkpoint.
        info: its description; `versions` are filled in here.
        weights: the tensors of `tensors_of_rank(info.shape)`, in this order.
        overwrite: whether an existing checkpoint there is replaced.

    Raises:
        CheckpointError: the directory exists, or the weights do not fit the shape.
    """
    info = dataclasses.replace(info, versions=versions(), directory=directory)
    known = {"content": (INFO, checksums.FILE, "model/"), "overwrite": overwrite}
    with processes(), shared_directory(directory, **known) as partial:
        sums = write_weights(partial / "model", info.shape, weights)
        on_first_process(lambda: (partial / INFO).write_text(info.to_json()))
        checksums.seal(partial, {str(file.relative_to(partial)): sums[file] for file in sums})
    return info
