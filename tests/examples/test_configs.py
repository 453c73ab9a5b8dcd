"""The recipes of examples/configs against the published figures, which stand here once more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megashear.config.loader import domains_to_yaml, load_config
from megashear.config.schema import ModelShape, RunConfig
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import resolve_target
from tests.support.make_tokenizer import REPOSITORY
from tests.support.published import LLAMA2_7B

PARAMETERS = {"1.3b": 1_345_423_360, "2.7b": 2_701_560_320}
START = {
    **{"cc": 0.67, "github": 0.045, "book": 0.045, "stackexchange": 0.02, "wiki": 0.045},
    **{"arxiv": 0.025, "c4": 0.15},
}
REFERENCES = {
    "1.3b": {
        **{"cc": 1.9643, "github": 0.7459, "book": 2.1393, "stackexchange": 1.6117},
        **{"wiki": 1.7590, "arxiv": 1.4449, "c4": 2.1251},
    },
    "2.7b": {
        **{"cc": 1.8712, "github": 0.6883, "book": 2.0325, "stackexchange": 1.5353},
        **{"wiki": 1.6297, "arxiv": 1.3560, "c4": 2.0328},
    },
}
TOKENS = {"prune": 419_430_400, "continue": 50_331_648_000}
BOTH = pytest.mark.parametrize("size", PARAMETERS)


def recipe(size: str, stage: str) -> Path:
    return REPOSITORY / "examples" / "configs" / f"llama2-7b-to-{size}" / f"{stage}.yaml"


def load(size: str, stage: str, gpus: int, shape: ModelShape, *overrides: str) -> RunConfig:
    """A recipe for its model, which is not there, on so many GPUs."""
    here = f"init_from={REPOSITORY}"  # a path that exists; the shape is given
    return load_config(
        recipe(size, stage),
        (here, *overrides),
        source_shape=lambda _: shape,
        world_size=gpus,
        check_files=False,
    )


def target_shape(size: str) -> ModelShape:
    config = load(size, "prune", 8, LLAMA2_7B)
    assert config.target is not None
    return resolve_target(LLAMA2_7B, config.target, config.pruning.head_unit)


@BOTH
def test_the_target_is_the_published_model(size: str) -> None:
    assert parameter_count(LLAMA2_7B) == 6_738_415_616
    target = target_shape(size)
    assert parameter_count(target) == PARAMETERS[size] and target.kv_channels == 128


@BOTH
def test_domains_begin_at_the_published_weights_and_go_for_their_own_models_references(
    size: str,
) -> None:
    domains = load(size, "prune", 8, LLAMA2_7B).data.domains
    assert {domain.name: domain.weight for domain in domains} == START
    assert {domain.name: domain.reference_loss for domain in domains} == REFERENCES[size]
    assert sum(START.values()) == pytest.approx(1, abs=1e-12)
    files = [file for domain in domains for file in (domain.train, domain.valid)]
    assert files == [f"data/{name}_{part}" for name in START for part in ("train", "valid")]


@BOTH
@pytest.mark.parametrize("gpus", [8, 16, 64])
def test_continuing_takes_what_pruning_left(size: str, gpus: int, tmp_path: Path) -> None:
    """Also on other numbers of GPUs than its 16."""
    prune = load(size, "prune", 8, LLAMA2_7B)
    plain = load_config(recipe(size, "continue"), check_files=False)
    assert plain.data.domains_from == prune.run_dir
    assert plain.init_from == f"{prune.run_dir}/extracted"
    moved = [replace(domain, weight=1 / 7) for domain in prune.data.domains]
    (tmp_path / "domains.yaml").write_text(domains_to_yaml(moved))
    there = f"data.domains_from={tmp_path}"
    config = load(size, "continue", gpus, target_shape(size), there)
    assert config.data.domains == tuple(moved)


@BOTH
@pytest.mark.parametrize("stage", TOKENS)
def test_steps_rates_and_intervals_are_the_papers(size: str, stage: str) -> None:
    config = load_config(recipe(size, stage), check_files=False)
    trainer, optimizer, evaluation = config.trainer, config.optimizer, config.evaluation
    tokens = trainer.steps * trainer.global_batch_size * config.data.seq_length
    assert tokens == TOKENS[stage]
    assert (config.data.rule, config.data.eta, config.data.smoothing) == ("paper", 1.0, 1e-4)
    assert (optimizer.lr, optimizer.min_lr_ratio, optimizer.clip_grad) == (1e-4, 0.1, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert optimizer.weight_decay == 0
    if stage == "prune":
        assert (trainer.steps, optimizer.warmup_steps, evaluation.interval) == (3200, 320, 50)
        pruning = config.pruning
        assert (pruning.sparsity_warmup_steps, pruning.mask_lr, pruning.multiplier_lr) == (
            640,
            1,
            1,
        )
    else:
        assert (trainer.steps, optimizer.warmup_steps, evaluation.interval) == (48000, 1440, 400)
        assert evaluation.sequences_per_domain == 500
