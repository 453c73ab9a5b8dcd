"""Measure the validation losses of a checkpoint or a Hugging Face model, outside of training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tqdm import tqdm

from megashear.checkpoint import models
from megashear.checkpoint.models import Model
from megashear.config.schema import RunConfig
from megashear.config.validate import problems
from megashear.config.values import Problem
from megashear.data.dataset import build_valid_datasets
from megashear.data.fingerprint import check_one_tokenizer
from megashear.errors import ConfigError, DataError, ShearError
from megashear.model.build import build_model
from megashear.model.masked_weights import MaskedWeights
from megashear.platform.launched import launched_rank, world_size
from megashear.platform.parallel import Platform
from megashear.pruning.counting import expected_parameter_count, parameter_count
from megashear.training.evaluation import DomainLoss, Evaluator
from megashear.training.tokenizer_check import check_tokenizer


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


def open_all(paths: Sequence[str], config: RunConfig) -> list[Model]:
    """Open models, and refuse all at once, before weights are read, what cannot be measured.

    Raises:
        ConfigError: names the models that cannot be read, and the options that one does not allow.
        DataError: validation files are missing, damaged, too short or of several tokenizers.
    """
    found: list[Problem] = []
    opened: list[Model] = []
    for model in paths:
        try:
            opened.append(models.open(model))
        except ShearError as error:
            found.append((model, str(error).removeprefix(f"{model}: ")))
            continue
        for path, text in problems(config, opened[-1].shape, world_size(), check_files=False):
            found.append((model if path == "init_from" else path, text))
    if found:
        raise ConfigError("evaluation", list(dict.fromkeys(found)))
    valid = [domain.valid for domain in config.data.domains]
    check_one_tokenizer(valid)
    if launched_rank() == 0:
        _warn_of_other_tokenizers(opened, valid, config.data.other_tokenizer)
    build_valid_datasets(config.data, min(model.shape.vocab_size for model in opened))
    return opened


def _warn_of_other_tokenizers(opened: Sequence[Model], valid: Sequence[str], meant: bool) -> None:
    """Warn on stderr of models whose tokenizer is known not to have made the validation files."""
    for model in opened:
        if model.tokenizer is None:
            continue
        try:
            check_tokenizer(valid, model.tokenizer, {}, other_tokenizer=meant)
        except DataError as error:
            print(f"{model.path}: its losses mean little: {error}", file=sys.stderr)


def measure(model: Model, config: RunConfig, platform: Platform) -> Measured:
    """Measure one model on the validation sets of a configuration that `open_all` passed.

    A collective. The weights are distributed as `config.parallel` says, whatever layout wrote them.

    Raises:
        CheckpointError: the model is damaged.
        DataError: validation tokens cannot be read.
        TrainingError: a loss is not finite.
    """
    model = model.shared()
    data, shape = config.data, model.shape
    chunks = build_model(
        shape,
        platform,
        config.parallel,
        data.seq_length,
        masked_attention=data.reset_attention_mask,
    )
    platform.heartbeat.mark("loading of weights")
    model.fill(chunks, platform)
    evaluator = Evaluator(
        build_valid_datasets(data, shape.vocab_size),
        config.evaluation.sequences_per_domain,
        config.trainer.micro_batch_size,
        platform,
    )
    title, parameters = model.title, parameter_count(shape)
    masked: AbstractContextManager[None] = nullcontext()
    if model.is_pruning:
        masks = model.masks.masks
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
