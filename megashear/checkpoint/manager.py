"""What checkpoints of runs and of dense models are on disk, and where they lie.

    run_dir/checkpoints/step-00000100/
        model/              weights: an ordinary Megatron-Core torch_dist checkpoint
        optimizer/          moments, and fp32 weights under bf16, torch_dist
        random/             states of the random generators, a file for each rank
        masks.safetensors   mask logits, multipliers and their optimizer (stage prune)
        checkpoint.json     what this is: shape, stage, step, position in the data, config, versions
        checksums.json      of all other files
    run_dir/checkpoints/latest

A dense model (imported or extracted) is a directory with `model/`, `checkpoint.json` and
`checksums.json` alone.
"""

from __future__ import annotations

import dataclasses
import json
import platform as python_platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron.core
from torch import Tensor

import megashear
from megashear.checkpoint import checksums, sharded, stream
from megashear.checkpoint.agreement import on_first_process
from megashear.checkpoint.hf import HuggingFaceReader
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.files import write_whole

FORMAT = 1
INFO, LATEST, MASKS = "checkpoint.json", "latest", "masks.safetensors"


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
        on_first_process(lambda: (partial / INFO).write_text(info.to_json()))
        checksums.seal(partial, {})
    return info


def open_weights(info: CheckpointInfo) -> sharded.WeightsReader:
    """What reads the weights of a checkpoint tensor by tensor; a collective where there are ranks.

    Raises:
        CheckpointError: they are damaged, or not of the shape that the checkpoint says.
    """
    checksums.verify(info.directory, INFO, "model")
    return sharded.WeightsReader(info.model_directory, info.shape)


def write_durably(file: Path, text: str) -> None:
    """Write a small file so that after a crash it is there whole or as it was before.

    Raises:
        CheckpointError: it cannot be written (a full disk).
    """
    try:
        write_whole(file, text)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error}") from error
