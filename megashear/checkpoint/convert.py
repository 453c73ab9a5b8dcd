"""The two ways between Hugging Face and Megatron: import a model, export a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from megashear.checkpoint.description import model_card
from megashear.checkpoint.hf import HuggingFaceReader, write_huggingface
from megashear.checkpoint.manager import (
    HUGGINGFACE,
    CheckpointInfo,
    Record,
    is_huggingface,
    is_megatron,
    reading_weights,
    write_model,
)
from megashear.checkpoint.stream import processes, share
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.platform.launched import launched_rank


def import_huggingface(
    source: str | Path, out: str | Path, *, overwrite: bool = False
) -> CheckpointInfo:
    """Write a Hugging Face model as a Megatron checkpoint that loads in any parallel layout.

    Args:
        source: Hugging Face directory.
        out: directory of the checkpoint.
        overwrite: whether an existing checkpoint there is replaced.

    Raises:
        CheckpointError: the model is incomplete or not understood, or `out` exists.
    """
    if not is_huggingface(source) and is_megatron(source):
        text = "a Megatron checkpoint, not a Hugging Face model; there is nothing to import"
        raise CheckpointError(f"{source}: {text}. tools/checkpoint/megatron_to_hf.py exports it")
    reader = HuggingFaceReader(source)
    reader.check()
    info = CheckpointInfo(
        shape=reader.shape,
        stage="imported",
        history=(Record(HUGGINGFACE, str(reader.directory.resolve()), reader.shape),),
        tokenizer=reader.tokenizer,
        generation=reader.generation,
    )
    with processes():
        names = share(info.shape)
        weights = _read(reader.read, names, "importing")
        return write_model(Path(out), info, weights, overwrite=overwrite)


def export_huggingface(
    info: CheckpointInfo,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    other_tokenizer: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the model of a dense checkpoint as transformers loads it, with a model card.

    Args:
        info: of the checkpoint.
        out: Hugging Face directory to write.
        dtype: of the weights; None keeps the checkpoint's.
        tokenizer: directory or file of the tokenizer that goes with it.
        other_tokenizer: whether it need not be the checkpoint's, so that its special tokens count.
        overwrite: whether an existing model there is replaced.

    Raises:
        CheckpointError: the checkpoint is of a pruning run, or of a model that no architecture of
            transformers is, or lacks a weight, or `out` exists.
    """
    if info.stage == "prune":
        raise CheckpointError(
            f"{info.directory} is of a pruning run, whose model has masks. Cut the target model "
            "out first: python tools/checkpoint/extract.py --run <run>"
        )
    with closing(_checked(info)) as weights:
        return write_huggingface(
            out,
            info.shape,
            weights,
            dtype=dtype,
            tokenizer=tokenizer,
            generation=info.generation,
            other_tokenizer=other_tokenizer,
            card=model_card(info, Path(out).resolve().name),
            overwrite=overwrite,
        )


def _checked(info: CheckpointInfo) -> Generator[tuple[str, Tensor], None, None]:
    """The tensors of a checkpoint; where it is damaged they end in the error."""
    with reading_weights(info) as reader:
        yield from _read(reader.read, list(reader.rules), "exporting")


def _read(
    read: Callable[[str], Tensor], names: Sequence[str], what: str
) -> Iterator[tuple[str, Tensor]]:
    """Tensors by their names; the progress bar counts names, since it would hold a tensor."""
    for name in progress(names, what, len(names), "tensors", speaks=launched_rank() == 0):
        yield name, read(name)
