"""Models at a path: Hugging Face's, checkpoints, runs and Megatron-LM's."""

from __future__ import annotations

import dataclasses
import platform as python_platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import megatron.core
import torch
from torch import Tensor, nn

import megashear
from megashear.checkpoint import checksums
from megashear.checkpoint.hf.reader import HuggingFaceReader
from megashear.checkpoint.info import (
    HUGGINGFACE,
    INFO,
    MEGATRON_LM,
    CheckpointInfo,
    Record,
    is_megatron_lm,
    read_info,
)
from megashear.checkpoint.torch_dist import stream
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.checkpoint.torch_dist.state import fill_from_checkpoint
from megashear.config.schema import ModelShape
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.model.build import bound_rules
from megashear.platform.collectives import on_first_process
from megashear.platform.parallel import Platform


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "megashear": megashear.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": str(torch.__version__),
        "python": python_platform.python_version(),
    }


def is_huggingface(path: str | Path) -> bool:
    """Whether a path is a Hugging Face model directory."""
    return (Path(path) / "config.json").is_file()


def history_of(path: str | Path | None) -> tuple[Record, ...]:
    """The stages that led to the model at a path, as of `read_shape`; none to random weights.

    Raises:
        CheckpointError: as `read_shape`.
    """
    if path is None:
        return ()
    if is_huggingface(path):
        return (Record(HUGGINGFACE, str(Path(path).resolve()), read_shape(path)),)
    return read_info(path).records


def generation_of(path: str | Path | None) -> dict[str, Any]:
    """What the model at a path says of special tokens and generation; nothing of random weights.

    Raises:
        CheckpointError: as `read_shape`.
    """
    if path is None:
        return {}
    if is_huggingface(path):
        return HuggingFaceReader(path).generation
    return read_info(path).generation


def read_shape(path: str | Path, shape_file: Path | None = None) -> ModelShape:
    """Shape of the model at a path: a checkpoint, a run, or a Hugging Face directory.

    Of Megatron-LM's own checkpoint, and of no other, it is what `shape_file` says.

    Raises:
        CheckpointError: there is no such thing, or its description cannot be read.
    """
    if is_huggingface(path):
        return HuggingFaceReader(Path(path)).shape
    return read_info(path, shape_file if is_megatron_lm(path) else None).shape


@torch.no_grad()
def fill_from_reader(
    chunks: Iterable[nn.Module], read: Callable[[str], Tensor], platform: Platform
) -> None:
    """Give each parameter of this rank its tensor-parallel shard of what `read` returns.

    Args:
        chunks: this rank's part of the model.
        read: returns a whole tensor by its name in the table.
        platform: says which shard this rank holds.

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


def load_model(path: str | Path, chunks: Sequence[Any], platform: Platform) -> None:
    """Fill this rank's part of a model from a checkpoint, a run or a Hugging Face directory.

    A collective.

    Raises:
        CheckpointError: there is none, or it is damaged, or of another model.
    """
    if is_huggingface(path):
        fill_from_reader(chunks, HuggingFaceReader(Path(path)).read, platform)
    else:
        info = read_info(path)
        checksums.verify(info.directory, INFO, "model")
        fill_from_checkpoint(info, chunks)


def write_model(
    directory: Path,
    info: CheckpointInfo,
    weights: Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
) -> CheckpointInfo:
    """Write a dense model's checkpoint: beside its place, then renamed; a collective.

    Args:
        directory: where it is to lie.
        info: of it; `versions` are filled in here.
        weights: every tensor of `table(info.shape)`; of several processes, each its `share`.
        overwrite: whether an existing checkpoint there is replaced.

    Raises:
        CheckpointError: the directory exists, or the weights do not fit the shape.
    """
    info = dataclasses.replace(info, versions=versions(), directory=directory)
    known = {"content": (INFO, checksums.FILE, "model/"), "overwrite": overwrite}
    with stream.processes(), stream.shared_directory(directory, **known) as partial:
        sums = stream.write_weights(partial / "model", info.shape, weights)
        on_first_process(lambda: (partial / INFO).write_text(info.to_json()))
        checksums.seal(partial, {str(file.relative_to(partial)): sums[file] for file in sums})
    return info


def open_weights(info: CheckpointInfo) -> WeightsReader:
    """What reads the weights of a checkpoint tensor by tensor; a collective where there are ranks.

    Raises:
        CheckpointError: they are damaged, or not of the shape that the checkpoint says.
    """
    if info.stage != MEGATRON_LM:  # which has no checksums
        checksums.verify(info.directory, INFO, "model")
    return WeightsReader(info.model_directory, info.shape)


@contextmanager
def reading_weights(info: CheckpointInfo) -> Iterator[WeightsReader]:
    """The same in one process, for a block beside which a thread looks for damage.

    Raises:
        CheckpointError: as `open_weights`, of damage at the end of the block.
    """
    is_ours = info.stage != MEGATRON_LM
    with checksums.verifying(info.directory, INFO, "model") if is_ours else nullcontext():
        yield WeightsReader(info.model_directory, info.shape)
