"""Validation losses are those of plain PyTorch over the same tokens, under either set of masks."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megashear.config.schema import (
    Domain,
    EvaluationConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from megashear.errors import TrainingError
from megashear.platform import parallel
from megashear.training.evaluation import cost_of_evaluations
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.make_data import write_tokens
from tests.support.reference_llama import forward, random_weights
from tests.support.runs import GQA, TARGETS, records, run_config, write_domains, write_source

SHAPE = replace(GQA, num_layers=4, tied_embeddings=True)
LENGTH = 16
SEQUENCES = {"first": 5, "second": 3}
"""Whole validation sequences of each domain: no multiple of the 2 or 4 that go through at once."""


def valid_tokens(name: str) -> np.ndarray:
    """Tokens of a domain's validation file, one document: its sequences, one label, a rest."""
    rng = np.random.default_rng(len(name))
    return rng.integers(1, SHAPE.vocab_size, SEQUENCES[name] * LENGTH + 1 + 7)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("evaluation")
    run_distributed(write_source, 1, directory, SHAPE)
    domains = tuple(
        replace(d, valid=write_tokens(directory / f"{d.name}_one", [valid_tokens(d.name)], 64))
        for d in write_domains(directory)
    )
    config = run_config(
        directory,
        domains,
        stage="prune",
        init_from=str(directory / "source"),
        target=TARGETS[GQA],
        evaluation=EvaluationConfig(interval=3, sequences_per_domain=8),
    )
    return replace(config, trainer=replace(config.trainer, micro_batch_size=2))


def evaluate(config: RunConfig) -> dict[str, Any]:
    """Losses of the source under masks that are far from saturated; and the masks."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    found: dict[str, Any] = {}
    if config.stage == "prune":
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for log_alpha in trainer.objective.masks.log_alpha.values():
                log_alpha.copy_(2 * torch.randn(log_alpha.shape, generator=generator))
        found["z"] = trainer.objective.masks.deterministic(config.evaluation.masks)
    weight = next(trainer.optimizer.chunks[0].parameters())
    before = weight.detach().clone()
    trainer._evaluate()
    found["losses"] = trainer.losses
    found["as_before"] = torch.equal(weight, before) and trainer.optimizer.models[0].training
    parallel.stop()
    return found


def expected_loss(name: str, z: dict[str, Tensor] | None = None) -> float:
    """Mean loss over all labels of a domain, in float64."""
    tokens = torch.from_numpy(valid_tokens(name))[: SEQUENCES[name] * LENGTH + 1]
    inputs, labels = tokens[:-1].view(-1, LENGTH), tokens[1:].view(-1, LENGTH)
    weights = {n: w.double() for n, w in random_weights(SHAPE, seed=0).items()}
    logits = forward(SHAPE, weights, inputs, z)
    return float(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


LAYOUTS = {
    "one": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2-sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "pp2-interleaved": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "cp2": (2, ParallelConfig(context=2)),
}


@pytest.fixture(scope="module")
def masked(config: RunConfig) -> Any:
    """What the ranks of a layout find under masks of the current or of the target model."""

    @functools.cache
    def found(layout: str, which: str) -> list[dict[str, Any]]:
        ranks, parallel_config = LAYOUTS[layout]
        changed = replace(
            config,
            run_dir=f"{config.run_dir}-{layout}-{which}",
            parallel=parallel_config,
            evaluation=replace(config.evaluation, masks=which),
        )
        return run_distributed(evaluate, ranks, changed)

    return found


@pytest.mark.parametrize(
    ("layout", "which"), [*((layout, "current") for layout in LAYOUTS), ("dp2", "target")]
)
def test_losses_are_those_of_masked_activations(layout: str, which: str, masked: Any) -> None:
    """Also where sequences do not divide evenly over ranks and micro-batches."""
    (one,) = masked("one", "current")
    for found in masked(layout, which):
        assert found["as_before"]
        assert list(found["losses"]) == list(SEQUENCES)
        for name, loss in found["losses"].items():
            assert loss == pytest.approx(expected_loss(name, found["z"]), rel=1e-6), name
        if which == "current":
            assert found["losses"] == pytest.approx(one["losses"], rel=1e-6)


def test_without_masks_losses_are_those_of_plain_pytorch(config: RunConfig) -> None:
    changed = replace(config, stage="continue", target=None)
    (found,) = run_distributed(evaluate, 1, changed)
    for name, loss in found["losses"].items():
        assert loss == pytest.approx(expected_loss(name), rel=1e-6), name


def test_current_and_target_masks_are_different_models(masked: Any) -> None:
    current, target = masked("dp2", "current")[0], masked("dp2", "target")[0]
    assert [int((z > 0).sum(1)[0]) for z in target["z"].values()] == [2, 24, 2, 32]
    assert any(not torch.equal(current["z"][kind], target["z"][kind]) for kind in target["z"])
    for name, loss in current["losses"].items():
        assert math.isfinite(loss) and math.isfinite(target["losses"][name])
        assert abs(loss - target["losses"][name]) > 1e-3


def test_the_record_holds_what_was_measured(config: RunConfig, masked: Any) -> None:
    losses = masked("dp2", "target")[0]["losses"]
    record = records(f"{config.run_dir}-dp2-target")[-1]
    assert (record["kind"], record["step"]) == ("evaluation", 0)
    assert record["losses"] == losses
    assert record["gaps"] == {name: loss - 4.0 for name, loss in losses.items()}


def test_no_more_than_the_wanted_sequences_are_used(config: RunConfig) -> None:
    """Four of the 5 sequences: the same ones whatever the number of ranks."""
    few = replace(
        config,
        stage="continue",
        target=None,
        evaluation=replace(config.evaluation, sequences_per_domain=4),
    )
    losses = [run_distributed(evaluate, ranks, few)[0]["losses"] for ranks in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert abs(losses[0]["first"] - expected_loss("first")) > 1e-3
    assert losses[0]["second"] == pytest.approx(expected_loss("second"), rel=1e-6)


def break_embedding(config: RunConfig) -> str:
    """What an evaluation says where one half of the vocabulary has come to NaN."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    with torch.no_grad():
        trainer.optimizer.chunks[0].embedding.word_embeddings.weight[32:] = math.nan
    with pytest.raises(TrainingError) as failed:
        trainer._evaluate()
    parallel.stop()
    return str(failed.value)


@pytest.mark.parametrize("rule", ["paper", "constant"])
def test_a_loss_that_is_not_finite_names_its_domain(rule: str, tmp_path: Path) -> None:
    lower, upper = (np.random.default_rng(0).integers(low, low + 32, 40) for low in (0, 32))
    domains = tuple(
        replace(domain, valid=write_tokens(tmp_path / f"{domain.name}_half", [tokens], 64))
        for domain, tokens in zip(write_domains(tmp_path), (lower, upper), strict=True)
    )
    config = run_config(tmp_path, domains, model=GQA)
    config = replace(config, data=replace(config.data, rule=rule))
    (message,) = run_distributed(break_embedding, 1, config)
    assert message.startswith("the validation loss is not finite: second nan. ")


def seven_domains(directory: Path, **changes: Any) -> RunConfig:
    domains = tuple(Domain(str(n), "train", "valid", 1 / 7, 2.0) for n in range(7))
    return run_config(directory, domains, trainer=TrainerConfig(**changes))


def test_a_run_says_what_its_evaluations_cost(tmp_path: Path) -> None:
    """The paper's two stages: forward passes are a third of training on as many sequences."""
    prune = seven_domains(tmp_path, steps=3200, global_batch_size=32)
    prune = replace(prune, evaluation=EvaluationConfig(interval=50))
    text, much = cost_of_evaluations(prune, 7 * 500)
    assert round(100 * 65 * 7 * 500 / (3 * 3200 * 32)) == 74
    assert much and "every 50 steps, add 74.1% to the computation of training" in text
    assert "evaluation.sequences_per_domain (67 would add 10%)" in text
    assert cost_of_evaluations(prune, 7 * 67)[1] is False
    assert cost_of_evaluations(prune, 7 * 68)[1] is True

    longer = seven_domains(tmp_path, steps=48000, global_batch_size=256)
    longer = replace(longer, evaluation=EvaluationConfig(interval=400))
    text, much = cost_of_evaluations(longer, 7 * 500)
    assert not much and text.endswith("every 400 steps, add 1.1% to the computation of training")


def test_the_cost_counts_what_fills_micro_batches(
    config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """5 and 3 sequences on two ranks in micro-batches of two are 8 and 4; at steps 0, 3 and 6."""
    changed = replace(config, stage="continue", target=None)
    run_distributed(evaluate, 2, changed)
    assert "evaluations of 12 sequences, every 3 steps, add 50.0%" in capfd.readouterr().err
