"""Validation losses are those of plain PyTorch over the same tokens, under either set of masks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megashear.checkpoint.manager import CheckpointInfo, write_model
from megashear.config.schema import EvaluationConfig, ModelShape, ParallelConfig, RunConfig
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.distributed import run_distributed
from tests.make_data import write_tokens
from tests.reference_llama import forward, random_weights
from tests.runs import GQA, TARGETS, run_config, write_domains

SHAPE = replace(GQA, tied_embeddings=True)
LENGTH = 16
SEQUENCES = {"first": 5, "second": 3}
"""Whole validation sequences of each domain: no multiple of the 2 or 4 that go through at once."""


def write_source(directory: Path, shape: ModelShape) -> None:
    info = CheckpointInfo(shape=shape, stage="imported")
    write_model(directory, info, random_weights(shape, seed=0).items())


def valid_tokens(name: str) -> np.ndarray:
    """Tokens of a domain's validation file, one document: its sequences, one label, a rest."""
    rng = np.random.default_rng(len(name))
    return rng.integers(1, SHAPE.vocab_size, SEQUENCES[name] * LENGTH + 1 + 7)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("evaluation")
    run_distributed(write_source, 1, directory / "source", SHAPE)
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
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_plain_pytorch(layout: str, config: RunConfig) -> None:
    """Also where sequences do not divide evenly over ranks and micro-batches."""
    ranks, layout_config = LAYOUTS[layout]
    changed = replace(config, stage="continue", target=None, parallel=layout_config)
    for found in run_distributed(evaluate, ranks, changed):
        assert found["as_before"]
        assert list(found["losses"]) == list(SEQUENCES)
        for name, loss in found["losses"].items():
            assert loss == pytest.approx(expected_loss(name), rel=1e-6), name


@pytest.fixture(scope="module")
def masked(config: RunConfig) -> dict[str, list[dict[str, Any]]]:
    """What both ranks find under the masks of the current and of the target model."""
    found = {}
    for which in ("current", "target"):
        evaluation = replace(config.evaluation, masks=which)
        changed = replace(config, run_dir=f"{config.run_dir}-{which}", evaluation=evaluation)
        found[which] = run_distributed(evaluate, 2, changed)
    return found


@pytest.mark.parametrize("which", ["current", "target"])
def test_losses_under_masks_are_those_of_masked_activations(which: str, masked: Any) -> None:
    for found in masked[which]:
        assert found["as_before"]
        for name, loss in found["losses"].items():
            assert loss == pytest.approx(expected_loss(name, found["z"]), rel=1e-6), name


def test_current_and_target_masks_are_different_models(masked: Any) -> None:
    current, target = masked["current"][0], masked["target"][0]
    assert [int((z > 0).sum(1)[0]) for z in target["z"].values()] == [2, 24, 2, 32]
    assert any(not torch.equal(current["z"][kind], target["z"][kind]) for kind in target["z"])
    for name, loss in current["losses"].items():
        assert math.isfinite(loss) and math.isfinite(target["losses"][name])
        assert abs(loss - target["losses"][name]) > 1e-3


def test_the_record_holds_what_was_measured(config: RunConfig, masked: Any) -> None:
    lines = Path(f"{config.run_dir}-target", "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert (record["kind"], record["step"]) == ("evaluation", 0)
    assert record["losses"] == masked["target"][0]["losses"]


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
