"""Measure the validation losses of a checkpoint or a Hugging Face model, outside of training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tqdm import tqdm

from megashear.checkpoint.info import read_info
from megashear.checkpoint.masks import read_pruned
from megashear.checkpoint.models import is_huggingface, load_model, read_shape
from megashear.config.schema import RunConfig
from megashear.config.validate import problems
from megashear.config.values import Problem
from megashear.data.dataset import build_valid_datasets
from megashear.data.fingerprint import check_one_tokenizer
from megashear.errors import ConfigError, ShearError
from megashear.model.build import build_model
from megashear.model.masked_weights import MaskedWeights
from megashear.platform.launched import world_size
from megashear.platform.parallel import Platform
from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.training.evaluation import DomainLoss, Evaluator


@dataclass(frozen=True)
class Measured:
    """Losses of one model.

    Attributes:
        model: its path, stage, step and masks, as a title.
        parameters: number of parameters, under its masks.
        domains: loss and number of tokens by domain.
    """

    model: str
    parameters: int
    domains: dict[str, DomainLoss]


def check(models: Sequence[str], config: RunConfig) -> None:
    """Refuse what cannot be measured, for all models at once and before anything is loaded.

    Raises:
        ConfigError: names the models that cannot be read, and the options that one does not allow.
        DataError: validation files are missing, damaged, too short or of several tokenizers.
    """
    found: list[Problem] = []
    shapes = []
    for model in models:
        try:
            shapes.append(read_shape(model))
        except ShearError as error:
            found.append((model, str(error).removeprefix(f"{model}: ")))
            continue
        for path, text in problems(config, shapes[-1], world_size(), check_files=False):
            found.append((model if path == "init_from" else path, text))
    if found:
        raise ConfigError("evaluation", list(dict.fromkeys(found)))
    check_one_tokenizer([domain.valid for domain in config.data.domains])
    build_valid_datasets(config.data, min(shape.vocab_size for shape in shapes))


def measure(model: str, config: RunConfig, platform: Platform) -> Measured:
    """Measure one model on the validation sets of a configuration that `check` passed.

    A collective. The weights are distributed as `config.parallel` says, whatever layout wrote them.

    Raises:
        CheckpointError: the model is damaged.
        DataError: validation tokens cannot be read.
        TrainingError: a loss is not finite.
    """
    info = None if is_huggingface(model) else read_info(model)
    data, shape = config.data, info.shape if info else read_shape(model)
    chunks = build_model(
        shape,
        platform,
        config.parallel,
        data.seq_length,
        masked_attention=data.reset_attention_mask,
    )
    platform.heartbeat.mark("loading of weights")
    # Not by the path: the latest checkpoint of a run that goes on may be another one by now.
    load_model(info.directory if info else model, chunks, platform)
    evaluator = Evaluator(
        build_valid_datasets(data, shape.vocab_size),
        config.evaluation.sequences_per_domain,
        config.trainer.micro_batch_size,
        platform,
    )
    title, parameters = f"{model} (Hugging Face)", parameter_count(shape)
    masked: AbstractContextManager[None] = nullcontext()
    if info is not None:
        title = f"{info.directory} ({info.stage}, step {info.step})"
    if info is not None and info.stage == "prune":
        masks = read_pruned(info.directory).masks
        z = masks.deterministic(config.evaluation.masks)  # type: ignore[arg-type]
        masked = MaskedWeights(chunks, platform, head_unit=masks.head_unit).masked(z)
        kept = {kind: mask > 0 for kind, mask in z.items()}
        parameters = int(expected_parameter_count(shape, kept, masks.head_unit))
        title = f"{title[:-1]}, {config.evaluation.masks} masks)"
    total = sum(map(len, evaluator.batches.values()))
    hidden = None if platform.rank == 0 else True
    with masked, tqdm(total=total, unit=" batches", leave=False, disable=hidden) as bar:
        chunks[0].register_forward_hook(lambda *_: bar.update() and None)
        return Measured(title, parameters, evaluator.measure(chunks))
