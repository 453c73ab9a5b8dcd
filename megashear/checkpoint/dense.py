"""Dense models: imported from Hugging Face, cut out of a pruning run, exported."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from torch import Tensor

from megashear.checkpoint.description import model_card
from megashear.checkpoint.hf.reader import HuggingFaceReader
from megashear.checkpoint.hf.writer import write_huggingface
from megashear.checkpoint.info import (
    HUGGINGFACE,
    CheckpointInfo,
    Record,
    is_megatron,
)
from megashear.checkpoint.masks import PrunedRun
from megashear.checkpoint.models import is_huggingface, open_weights, reading_weights, write_model
from megashear.checkpoint.torch_dist.stream import processes, share
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.platform.launched import launched_rank
from megashear.pruning.extract import (
    extract,
    uniform_shape,
)


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


def extract_checkpoint(pruned: PrunedRun, out: Path, *, overwrite: bool = False) -> CheckpointInfo:
    """Write the dense target model of a pruning run; each process cuts and writes its share.

    Args:
        pruned: what `read_pruned` returned.
        out: directory of the dense checkpoint.
        overwrite: whether an existing one is replaced.

    Raises:
        CheckpointError: the layers do not come out alike, or `out` exists.
    """
    info, z = pruned.info, pruned.z
    head_unit = pruned.masks.head_unit
    shape = uniform_shape(info.shape, z, head_unit)
    dense = CheckpointInfo(
        shape=shape,
        stage="extracted",
        history=info.records,
        tokenizer=info.tokenizer,
        generation=info.generation,
    )
    with processes():
        names = share(shape)
        weights = extract(info.shape, z, open_weights(info).read, head_unit, names)
        shown = progress(weights, "extracting", len(names), "tensors", speaks=launched_rank() == 0)
        return write_model(out, dense, shown, overwrite=overwrite)
