"""Checkpoints of runs and of dense models: their layout on disk, written whole or not at all.

    run_dir/checkpoints/step-00000100/
        model/              weights: an ordinary Megatron-Core torch_dist checkpoint
        optimizer/          Megatron-Core's optimizer state, torch_dist
        masks.safetensors   mask logits, multipliers and their optimizer (stage prune)
        checkpoint.json     what this is: shape, stage, step, position in the data, config, versions
    run_dir/checkpoints/latest

A dense model (imported or extracted) is a directory with `model/` and `checkpoint.json` alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform as python_platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron.core
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import megashear
from megashear.checkpoint import sharded, stream
from megashear.checkpoint.hf import HuggingFaceReader
from megashear.checkpoint.whole import flush_tree
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.platform.parallel import Platform

FORMAT = 1
INFO, LATEST = "checkpoint.json", "latest"


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of itself (its checkpoint.json).

    Attributes:
        shape: of the weights in it; in stage prune, of the source model.
        stage: pretrain, prune, continue, imported or extracted.
        step: optimizer steps done.
        tokens: trained on in this run.
        target: shape that the masks lead to (stage prune).
        origin: where the weights came from.
        progress: what the trainer needs to go on (position in the data, weights of domains).
        config: the run's resolved configuration, as YAML.
        tokenizer: file or directory of the tokenizer, for exports.
    """

    shape: ModelShape
    stage: str
    step: int = 0
    tokens: int = 0
    target: ModelShape | None = None
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: str | None = None
    tokenizer: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    directory: Path = Path()

    def to_json(self) -> str:
        """The text of checkpoint.json."""
        fields = dataclasses.asdict(self)
        del fields["directory"]
        return json.dumps({"format": FORMAT, **fields}, indent=1)

    @property
    def model_directory(self) -> Path:
        """The Megatron-Core checkpoint of the weights."""
        return self.directory / "model"


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    return {
        "megashear": megashear.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": version("torch"),
        "python": python_platform.python_version(),
    }


def find(path: str | Path) -> Path:
    """The checkpoint directory that a path means: itself, or the latest of a run directory.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / INFO).is_file():
        return path
    latest = path / "checkpoints" / LATEST
    if latest.is_file():
        directory = latest.parent / latest.read_text(errors="replace").strip()
        if (directory / INFO).is_file():
            return directory
        raise CheckpointError(f"{latest} names {directory}, which is no checkpoint")
    what = "is neither a checkpoint nor a run with one" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path}: {what}. Give a checkpoint directory (with {INFO}), or a run directory "
        "(with checkpoints/latest)"
    )


def read_info(path: str | Path) -> CheckpointInfo:
    """What the checkpoint at a path (its own or a run's directory) says of itself.

    Raises:
        CheckpointError: there is none, or its checkpoint.json is damaged or of another format.
    """
    directory = find(path)
    file = directory / INFO
    try:
        fields = json.loads(file.read_text())
        if fields.pop("format") != FORMAT:
            raise CheckpointError(f"{file}: written by another version of megashear")
        fields["shape"] = ModelShape(**fields["shape"])
        if fields["target"] is not None:
            fields["target"] = ModelShape(**fields["target"])
        return CheckpointInfo(**fields, directory=directory)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error


def is_huggingface(path: str | Path) -> bool:
    """Whether a path is a Hugging Face model directory."""
    return (Path(path) / "config.json").is_file()


def read_shape(path: str | Path) -> ModelShape:
    """Shape of the model at a path: a checkpoint, a run, or a Hugging Face directory.

    Raises:
        CheckpointError: there is no such thing, or its description cannot be read.
    """
    return HuggingFaceReader(Path(path)).shape if is_huggingface(path) else read_info(path).shape


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
    known = {"marker": INFO, "parts": ["model"], "overwrite": overwrite}
    with stream.processes(), stream.shared_directory(directory, **known) as partial:
        stream.write_weights(partial / "model", info.shape, weights)
        stream.on_first_process(lambda: write_durably(partial / INFO, info.to_json()))
    return info


class CheckpointManager:
    """Saves and loads the checkpoints of one run; its methods are collectives over all ranks."""

    def __init__(self, run_dir: Path, platform: Platform, keep: int) -> None:
        self.directory = run_dir / "checkpoints"
        self.platform = platform
        self.keep = keep

    def save(
        self,
        info: CheckpointInfo,
        chunks: Sequence[Any],
        optimizer: Any,
        tensors: Mapping[str, Tensor],
    ) -> Path:
        """Write a checkpoint beside its place, rename it, then move `latest`; keep the newest.

        Args:
            info: of it; its step names it.
            chunks: this rank's part of the model.
            optimizer: Megatron-Core's.
            tensors: small state that is equal on every rank (masks and their optimizer).
        """
        final = self.directory / f"step-{info.step:08d}"
        partial = final.with_name(f".{final.name}.partial")
        if self.platform.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.platform.barrier()
        sharded.save(_sharded_weights(chunks), partial / "model")
        state = optimizer.sharded_state_dict(_sharded_weights(chunks))
        sharded.save(state, partial / "optimizer")
        if self.platform.rank == 0:
            written = dataclasses.replace(info, versions=versions(), directory=final)
            write_durably(partial / INFO, written.to_json())
            if tensors:
                save_file(dict(tensors), partial / "masks.safetensors")
                # safetensors writes for the owner alone; a checkpoint is as readable as its folder.
                shutil.copymode(partial / INFO, partial / "masks.safetensors")
            flush_tree(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
            write_durably(self.directory / LATEST, final.name + "\n")
            self._remove_old(final)
        self.platform.barrier()
        return final

    def _remove_old(self, newest: Path) -> None:
        """Keep the newest; remove what saves that were killed have left half-written."""
        # A later one, which `latest` did not get to name, would else be kept in place of `newest`.
        saved = sorted(path for path in self.directory.glob("step-*") if path.name <= newest.name)
        for old in (*saved[: -self.keep], *self.directory.glob(".step-*.partial")):
            shutil.rmtree(old)

    def latest(self) -> CheckpointInfo | None:
        """The newest checkpoint of this run, or None where the run has not saved yet."""
        if not (self.directory / LATEST).is_file():
            return None
        return read_info(self.directory.parent)

    def load(
        self, info: CheckpointInfo, chunks: Sequence[Any], optimizer: Any
    ) -> dict[str, Tensor]:
        """Fill the model and the optimizer from a checkpoint; returns its small tensors.

        Raises:
            CheckpointError: it is damaged, or parts of it are missing.
        """
        load_weights(info, chunks)
        state = optimizer.sharded_state_dict(_sharded_weights(chunks), is_loading=True)
        optimizer.load_state_dict(sharded.load(state, info.directory / "optimizer"))
        file = info.directory / "masks.safetensors"
        try:
            return load_file(file) if info.stage == "prune" else {}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: damaged: {error}") from error


def load_weights(info: CheckpointInfo, chunks: Sequence[Any]) -> None:
    """Fill this rank's part of a model from a checkpoint of any parallel layout; a collective."""
    state = _sharded_weights(chunks)
    loaded = sharded.load(state, info.model_directory)
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        part, filled = (tree if name is None else tree[name] for tree in (state, loaded))
        chunk.load_state_dict(filled, strict=False)  # not strict for _extra_state alone:
        missing = [key for key, value in part.items() if key not in filled and value is not None]
        if missing:
            raise CheckpointError(f"{info.model_directory}: lacks {', '.join(missing)}")


def _chunk_names(chunks: Sequence[Any]) -> list[str | None]:
    """Names in a sharded state dict, as Megatron-Core's optimizers expect them."""
    return [f"model{number}" for number in range(len(chunks))] if len(chunks) > 1 else [None]


def _sharded_weights(chunks: Sequence[Any]) -> dict[str, Any]:
    """The sharded state dict of this rank's part of a model; of several chunks one of each."""
    states = [sharded.without_extra_state(chunk.sharded_state_dict()) for chunk in chunks]
    names = _chunk_names(chunks)
    return states[0] if names == [None] else dict(zip(names, states, strict=True))  # type: ignore


def write_durably(file: Path, text: str) -> None:
    """Write a small file so that after a crash it is there whole or as it was before."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
