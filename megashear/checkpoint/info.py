"""The layout of checkpoints on disk, and their description in checkpoint.json.

    run_dir/checkpoints/step-00000100/
        model/              weights: an ordinary Megatron-Core torch_dist checkpoint
        optimizer/          moments, and fp32 weights under bf16, torch_dist
        random/             states of the random generators, a file for each rank
        masks.safetensors   mask logits, multipliers and their optimizer (stage prune)
        checkpoint.json     what this is: shape, stage, step, position in the data, config, versions
        checksums.json      of all other files
    run_dir/checkpoints/latest

A dense model (imported or extracted) is a directory with `model/`, `checkpoint.json` and
`checksums.json` only. Megatron-LM's own checkpoints (`iter_0000100/`) do not state the shape of
their model; a YAML file does. Imports neither torch nor Megatron.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megashear
from megashear.checkpoint.foreign import refuse
from megashear.config.decode import stored
from megashear.config.loader import load_shape
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError, ConfigError
from megashear.files import read_small

if TYPE_CHECKING:
    import torch

FORMAT = 1

INFO, LATEST, MASKS_FILE = "checkpoint.json", "latest", "masks.safetensors"

HUGGINGFACE, MEGATRON_LM = "huggingface", "megatron-lm"
"""Stages of models that other software wrote."""

CHECKPOINT_STAGES = ("pretrain", "prune", "continue", "imported", "extracted")
"""Stages of our own checkpoints."""

ITERATION = "latest_checkpointed_iteration.txt"
"""File in which Megatron-LM keeps the number of its newest checkpoint."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One stage on the way to a checkpoint.

    Attributes:
        stage: one of CHECKPOINT_STAGES, or huggingface.
        path: of its result, when the next stage read it.
        shape: of the weights in it; None in checkpoints that did not record it.
        steps: optimizer steps in this stage.
        tokens: tokens trained on in this stage.
        losses: validation losses at its end, by domain, in nats per token.
        samples: [first, end) of the samples that the stage read of each domain, where it is known.
    """

    stage: str
    path: str
    shape: ModelShape | None = None
    steps: int = 0
    tokens: int = 0
    losses: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The description of a checkpoint (its checkpoint.json).

    Attributes:
        shape: of the weights in it; in stage prune, of the source model.
        stage: one of CHECKPOINT_STAGES, megatron-lm or huggingface.
        step: optimizer steps done in this stage.
        tokens: tokens trained on in this stage.
        target: shape of the pruned model (stage prune).
        history: the stages before this one, oldest first.
        progress: what the trainer resumes from (position in the data, domain weights).
        config: the run's resolved configuration, as YAML.
        tokenizer: file or directory of the tokenizer, for exports.
        generation: special tokens and generation settings of the source, for exports.
    """

    shape: ModelShape
    stage: str
    step: int = 0
    tokens: int = 0
    target: ModelShape | None = None
    history: tuple[Record, ...] = ()
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: str | None = None
    tokenizer: str | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    directory: Path = Path()

    def to_json(self) -> str:
        """Return the text of checkpoint.json."""
        fields = dataclasses.asdict(self)
        del fields["directory"]
        return json.dumps({"format": FORMAT, **fields}, indent=1)

    @property
    def model_directory(self) -> Path:
        """The Megatron-Core checkpoint of the weights."""
        return self.directory if self.stage == MEGATRON_LM else self.directory / "model"

    @property
    def records(self) -> tuple[Record, ...]:
        """The history, and this stage itself as its last record."""
        losses, samples = (self.progress.get(part) or {} for part in ("losses", "samples"))
        this = (self.stage, str(self.directory), self.shape, self.step, self.tokens)
        return (*self.history, Record(*this, losses, samples))


def find(path: str | Path) -> Path:
    """Return the checkpoint directory that a path means: itself, or the latest of a run.

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
    if is_megatron_lm(path):
        raise CheckpointError(
            f"{path}: a checkpoint of Megatron-LM, which does not state its shape. "
            "Give its sizes with --shape FILE.yaml"
        )
    what = "is neither a checkpoint nor a run with one" if path.exists() else "does not exist"
    raise CheckpointError(
        f"{path}: {what}. Give a checkpoint directory (with {INFO}), or a run directory "
        "(with checkpoints/latest)"
    )


def read_info(path: str | Path, shape_file: Path | None = None) -> CheckpointInfo:
    """Read the description of the checkpoint at a path (its directory or a run's).

    Args:
        path: to read from.
        shape_file: YAML file of the sizes, for Megatron-LM's own checkpoints only.

    Raises:
        CheckpointError: there is none, or its checkpoint.json is damaged or of another format.
        ConfigError: the file of the shape is wrong.
    """
    if shape_file is not None:
        return _read_megatron_lm(Path(path), load_shape(shape_file))
    directory = find(path)
    file = directory / INFO
    try:
        fields = json.loads(read_small(file))
        if fields.pop("format") != FORMAT:
            raise CheckpointError(f"{file}: written by another version of megashear")
        if "origin" in fields:  # what was written before there was a history, newest first
            origin = reversed(fields.pop("origin").items())
            fields["history"] = [{"stage": how, "path": where} for how, where in origin if where]
        fields.pop("directory", None)
        info = stored(CheckpointInfo, fields)
    except ConfigError as error:
        refuse(f"{file}: damaged", [f"{path} {text}" for path, text in error.problems])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r:.500}") from None
    if problems := _impossible(info):
        refuse(f"{file}: damaged", problems)
    return dataclasses.replace(info, directory=directory)


def _impossible(info: CheckpointInfo) -> list[str]:
    """Return values of the right type that no checkpoint of ours has."""
    problems = (
        []
        if info.stage in CHECKPOINT_STAGES
        else [f"stage = {info.stage!r} is none of {CHECKPOINT_STAGES}"]
    )
    counts = {"step": info.step, "tokens": info.tokens}
    for index, record in enumerate(info.history):
        counts |= {f"history[{index}].{n}": getattr(record, n) for n in ("steps", "tokens")}
    problems += [
        f"{name} = {count} must be 0 or more" for name, count in counts.items() if count < 0
    ]
    losses = {"progress.": info.progress.get("losses") or {}}
    losses |= {f"history[{i}].": record.losses for i, record in enumerate(info.history)}
    problems += [
        f"{path}losses must be a mapping of domains to numbers"
        for path, given in losses.items()  # a run that diverged has NaN
        if not isinstance(given, dict) or any(type(loss) is not float for loss in given.values())
    ]
    return problems


def _read_megatron_lm(path: Path, shape: ModelShape) -> CheckpointInfo:
    """Describe a checkpoint of Megatron-LM's own training, of a known shape."""
    if (path / INFO).is_file() or (path / "checkpoints" / LATEST).is_file():
        raise CheckpointError(f"{path}: states its shape itself. Leave --shape out")
    number = path.name.removeprefix("iter_")
    if (path / ITERATION).is_file():
        with (path / ITERATION).open("rb") as stream:
            number = stream.read(100).decode("ascii", errors="replace").strip()
        if number != "release" and not _is_iteration(number):
            problem = f"must be the number of an iteration, or release, not {number[:20]!r}"
            raise CheckpointError(f"{path / ITERATION}: {problem}")
        path = path / (f"iter_{int(number):07d}" if number != "release" else number)
    if not (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path}: no torch_dist checkpoint of Megatron-LM (no .metadata). Give the directory "
            f"of an iteration, or the one with {ITERATION}"
        )
    step = int(number) if _is_iteration(number) else 0
    return CheckpointInfo(shape, MEGATRON_LM, step, directory=path)


def _is_iteration(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 12


def is_megatron_lm(path: str | Path) -> bool:
    """Whether Megatron-LM's own training wrote the checkpoint at a path, as torch_dist."""
    return any((Path(path) / name).is_file() for name in (ITERATION, ".metadata"))


def is_megatron(path: str | Path) -> bool:
    """Whether a path has a checkpoint in Megatron's format: ours, a run's or Megatron-LM's."""
    ours = (INFO, Path("checkpoints") / LATEST)
    return is_megatron_lm(path) or any((Path(path) / name).is_file() for name in ours)


def dtype_names(dtypes: Iterable[torch.dtype]) -> list[str]:
    """`bfloat16` and the like, each once."""
    return sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})


def versions() -> dict[str, str]:
    """Return the versions of what writes a checkpoint now."""
    import megatron.core
    import torch

    return {
        "megashear": megashear.__version__,
        "megatron-core": megatron.core.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
