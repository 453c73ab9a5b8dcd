"""A model at a path: opened once, and the same for all ranks.

`open` reads descriptions only, without torch or Megatron-Core, which are imported when weights or
masks are read. What a path means is decided then: a run that saves a newer checkpoint meanwhile
changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.checkpoint.foreign import read_json
from megashear.checkpoint.hf.config import shape_from_hf_config
from megashear.checkpoint.hf.index import read_index
from megashear.checkpoint.hf.tokenizer import has_tokenizer, read_generation
from megashear.checkpoint.info import (
    HUGGINGFACE,
    INFO,
    MEGATRON_LM,
    CheckpointInfo,
    Record,
    read_info,
)
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from megashear.checkpoint.hf.reader import HuggingFaceReader
    from megashear.checkpoint.masks import LearnedMasks
    from megashear.checkpoint.torch_dist.reader import WeightsReader
    from megashear.platform.parallel import Platform


@dataclass(frozen=True)
class Model:
    """A model on disk: a checkpoint of ours, the latest of a run, or Megatron-LM's.

    Attributes:
        path: as it was given.
        info: its description. `info.directory` is the checkpoint that the path meant.
    """

    path: str
    info: CheckpointInfo

    @property
    def shape(self) -> ModelShape:
        """Shape of the weights; in stage prune, that of the source model."""
        return self.info.shape

    @property
    def stage(self) -> str:
        """One of CHECKPOINT_STAGES, `huggingface` or `megatron-lm`."""
        return self.info.stage

    @property
    def history(self) -> tuple[Record, ...]:
        """The stages that led to the model, oldest first; the last one is the model itself."""
        return self.info.records

    @property
    def tokenizer(self) -> str | None:
        """Path of its tokenizer; None where it names none."""
        return self.info.tokenizer

    @property
    def generation(self) -> dict[str, Any]:
        """Its special tokens and generation settings, for exports."""
        return self.info.generation

    @property
    def title(self) -> str:
        """A line that names the model in a report."""
        return f"{self.info.directory} ({self.stage}, step {self.info.step})"

    @property
    def is_pruning(self) -> bool:
        """Whether it is of a pruning run: its weights are those of the source, under masks."""
        return self.stage == "prune"

    def without_masks(self) -> Model:
        """Return the model if its weights are all of it.

        Raises:
            CheckpointError: it is of a pruning run.
        """
        if self.is_pruning:
            raise CheckpointError(
                f"{self.path} is of a pruning run: its weights are those of the source model, "
                "whose masks this would drop. Extract the pruned model first: "
                f"megashear extract --run {self.path}"
            )
        return self

    def shared(self) -> Model:
        """Return what the first process opened, to all; a collective where there are ranks."""
        return _on_first_process(lambda: self)

    @cached_property
    def weights(self) -> WeightsReader | HuggingFaceReader:
        """What reads its tensors one by one, without looking at checksums.

        Raises:
            CheckpointError: the tensors are not those of the shape.
        """
        from megashear.checkpoint.torch_dist.reader import WeightsReader

        return WeightsReader(self.info.model_directory, self.shape)

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of its tensors on disk."""
        return self.weights.dtypes

    @cached_property
    def masks(self) -> LearnedMasks:
        """The masks of a pruning run.

        Raises:
            CheckpointError: the model is of another stage, or its masks are damaged.
        """
        if not self.is_pruning:
            text = f"is of stage {self.stage}: there are no masks in it"
            raise CheckpointError(f"{self.info.directory} {text}")
        from megashear.checkpoint.masks import read_masks

        return read_masks(self.info)

    def verify(self) -> None:
        """Refuse damaged weights; once, and a collective where there are ranks.

        Raises:
            CheckpointError: files are missing or not as they were written; all are named.
        """
        _ = self._verified

    @cached_property
    def _verified(self) -> bool:
        from megashear.checkpoint import checksums

        if self.stage != MEGATRON_LM:  # which has no checksums
            checksums.verify(self.info.directory, INFO, "model")
        return True

    def read(self, name: str) -> Tensor:
        """Return a whole tensor of the parameter table, verified, in the dtype it is stored in.

        Where ranks read different tensors, `verify` first: it is a collective.

        Raises:
            CheckpointError: the weights are damaged.
        """
        self.verify()
        return self.weights.read(name)

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        """Give a `read` at once, and verify concurrently, in a thread; no collective.

        Raises:
            CheckpointError: the weights are damaged; raised at the end of the block at the latest.
        """
        from megashear.checkpoint import checksums

        has_checksums = self.stage != MEGATRON_LM
        directory = self.info.directory
        with checksums.verifying(directory, INFO, "model") if has_checksums else nullcontext():
            yield self.weights.read

    def fill(self, chunks: Sequence[Any], platform: Platform) -> None:
        """Fill this rank's part of a model, in any parallel layout; a collective.

        Args:
            chunks: this rank's part of the model.
            platform: names the shard that this rank holds.

        Raises:
            CheckpointError: the weights are damaged, or of another model.
        """
        from megashear.checkpoint.torch_dist import state

        self.verify()
        if self.stage == MEGATRON_LM:
            state.fill_from_reader(chunks, self.read, platform)
        else:
            state.fill_from_checkpoint(self.info, chunks)


class HuggingFaceModel(Model):
    """A model in a Hugging Face directory."""

    @property
    def generation(self) -> dict[str, Any]:
        """Its special tokens and generation settings, for exports.

        Raises:
            CheckpointError: a file is damaged, or a special token is not in the vocabulary.
        """
        return read_generation(self.info.directory, self.shape.vocab_size)

    @property
    def title(self) -> str:
        """A line that names the model in a report."""
        return f"{self.path} (Hugging Face)"

    @cached_property
    def weights(self) -> HuggingFaceReader:
        """What reads its tensors one by one; each is checked.

        Raises:
            CheckpointError: the index of the weights is missing or damaged.
        """
        from megashear.checkpoint.hf.reader import HuggingFaceReader

        return HuggingFaceReader(self.info.directory, self.shape)

    @cached_property
    def _verified(self) -> bool:
        self.weights.check()
        return True

    @contextmanager
    def reading(self) -> Iterator[Callable[[str], Tensor]]:
        """Give `read`, which checks what it reads."""
        yield self.read

    def fill(self, chunks: Sequence[Any], platform: Platform) -> None:
        """Fill this rank's part of a model, tensor by tensor."""
        from megashear.checkpoint.torch_dist.state import fill_from_reader

        fill_from_reader(chunks, self.read, platform)


def open(path: str | Path, shape: Path | None = None) -> Model:
    """Open the model at a path; a collective where there are ranks.

    The first process resolves the path (of a run, its latest checkpoint) and reads the description
    for all.

    Args:
        path: of a checkpoint, a run, a Hugging Face directory or Megatron-LM's checkpoint.
        shape: YAML file of the sizes; for Megatron-LM's checkpoints, which do not state them.

    Raises:
        CheckpointError: there is no model, or its description is damaged or not supported.
        ConfigError: the file of the shape is wrong.
    """
    return _on_first_process(lambda: _open(path, shape))


def _open(path: str | Path, shape: Path | None) -> Model:
    if shape is None and (Path(path) / "config.json").is_file():
        return open_huggingface(path)
    return Model(str(path), read_info(path, shape))


def open_huggingface(path: str | Path) -> HuggingFaceModel:
    """Open a Hugging Face directory, in this process.

    Raises:
        CheckpointError: config.json or the index of the weights is missing, damaged or refused.
    """
    directory = Path(path).resolve()
    file = Path(path) / "config.json"
    shape = shape_from_hf_config(read_json(file), file)
    read_index(Path(path))
    tokenizer = str(directory) if has_tokenizer(directory) else None
    info = CheckpointInfo(shape, HUGGINGFACE, tokenizer=tokenizer, directory=directory)
    return HuggingFaceModel(str(path), info)


def _on_first_process(work: Callable[[], Any]) -> Any:
    """Run `work` on the first process for all ranks; here where there is no process group."""
    torch_distributed = sys.modules.get("torch.distributed")  # not imported for this alone
    if torch_distributed is None or not torch_distributed.is_initialized():
        return work()
    from megashear.platform.collectives import on_first_process

    return on_first_process(work)
