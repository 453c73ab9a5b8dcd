"""Dynamic batch loading in runs: weights move by the rule, the stream and the next run follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megashear.checkpoint import models
from megashear.checkpoint.dense import extract_checkpoint
from megashear.checkpoint.info import read_info
from megashear.config.loader import load_config
from megashear.config.schema import RunConfig
from megashear.errors import ConfigError
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, records, run_config, write_domains, write_source

ETA, SMOOTHING, INTERVAL, BATCH = 4.0, 1e-4, 4, 8
REFERENCES = {"first": 6.0, "second": 4.1}  # a random model's loss is above the second alone


def configuration(directory: Path, rule: str) -> RunConfig:
    """12 steps of 8 sequences on any number of ranks, evaluated every 4."""
    domains = tuple(
        replace(domain, reference_loss=REFERENCES[domain.name])
        for domain in write_domains(directory)
    )
    config = run_config(
        directory,
        domains,
        stage="prune",
        run_dir=str(directory / rule),
        init_from=str(directory / "source"),
        target=TARGETS[GQA],
    )
    return replace(
        config,
        data=replace(config.data, rule=rule, eta=ETA, smoothing=SMOOTHING),
        evaluation=replace(config.evaluation, interval=INTERVAL),
        trainer=replace(
            config.trainer, steps=12, global_batch_size=BATCH, micro_batch_size=2, save_interval=12
        ),
    )


def train(config: RunConfig) -> list[list[int]]:
    """Run to the end; this rank's sequences of each domain, by step."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    counts: list[list[int]] = []
    next_step = trainer.loader.next_step

    def counted() -> Any:
        batches = next_step()
        ids = torch.cat([batch["dataset_id"] for batch in batches])
        counts.append(torch.bincount(ids, minlength=2).tolist())
        return batches

    trainer.loader.next_step = counted  # type: ignore[method-assign]
    try:
        trainer.run()
    finally:
        parallel.stop()
    return counts


class Run:
    """A run on two data-parallel ranks, and what it says of itself."""

    def __init__(self, directory: Path, rule: str) -> None:
        self.config = configuration(directory, rule)
        self.directory = Path(self.config.run_dir)
        ranks = run_distributed(train, 2, self.config)
        self.counts = np.array(ranks).sum(0)  # [steps, domains]
        self.evaluations = records(self.directory, "evaluation")
        self.steps = records(self.directory, "step")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixing")
    run_distributed(write_source, 1, directory)
    return directory


@pytest.fixture(scope="module", params=["paper", "reference_code", "constant"])
def run(request: pytest.FixtureRequest, directory: Path) -> Run:
    return Run(directory, request.param)


def updated(rule: str, weights: dict[str, float], losses: dict[str, float]) -> dict[str, float]:
    """The rule in the words of the paper's algorithm 1, and its published code's difference."""
    if rule == "constant":
        return weights
    gaps = {name: losses[name] - REFERENCES[name] for name in losses}
    if rule == "paper":
        gaps = {name: max(gap, 0.0) for name, gap in gaps.items()}
    moved = {name: weights[name] * np.exp(ETA * gap) for name, gap in gaps.items()}
    total = sum(moved.values())
    return {n: (1 - SMOOTHING) * w / total + SMOOTHING / len(moved) for n, w in moved.items()}


def test_weights_move_by_the_rule_and_are_recorded(run: Run) -> None:
    assert [record["step"] for record in run.evaluations] == [0, 4, 8, 12]
    weights = {"first": 0.7, "second": 0.3}
    for record in run.evaluations:
        assert record["references"] == REFERENCES
        if record["step"] < 12:  # after the last step there is nothing to draw
            weights = updated(run.config.data.rule, weights, record["losses"])
        assert record["domain_weights"] == pytest.approx(weights, rel=1e-12)
    if run.config.data.rule != "constant":
        first, *_, last = run.evaluations
        assert 0.3 < first["domain_weights"]["second"] < last["domain_weights"]["second"]


def test_the_stream_follows_the_weights_from_the_evaluation_on(run: Run) -> None:
    """Between two evaluations each domain gives its share of the 32 sequences, to within one."""
    assert run.counts.sum(1).tolist() == [BATCH] * 12
    for record, begin in zip(run.evaluations, (0, 4, 8), strict=False):
        given = run.counts[begin : begin + INTERVAL].sum(0)
        share = INTERVAL * BATCH * np.array(list(record["domain_weights"].values()))
        assert (np.abs(given - share) <= 1).all(), (record["step"], given, share)


def test_the_losses_of_a_step_are_of_the_domains_in_its_batch(run: Run) -> None:
    for record, counts in zip(run.steps, run.counts, strict=True):
        present = [name for name, count in zip(REFERENCES, counts, strict=True) if count]
        assert list(record["domain_losses"]) == present
        parts = zip(record["domain_losses"].values(), counts[counts > 0], strict=True)
        assert record["loss"] == pytest.approx(sum(loss * n for loss, n in parts) / BATCH, rel=1e-6)


def extract(run: Path) -> None:
    extract_checkpoint(models.open(run), run / "extracted")


def test_a_run_takes_domains_references_and_final_weights_of_another(
    run: Run, tmp_path: Path
) -> None:
    domains = yaml.safe_load((run.directory / "domains.yaml").read_text())
    final = run.evaluations[-1]["domain_weights"]
    assert {d["name"]: d["weight"] for d in domains} == final
    assert {d["name"]: d["reference_loss"] for d in domains} == REFERENCES
    run_distributed(extract, 1, run.directory)
    file = tmp_path / "continue.yaml"
    settings = {
        "stage": "continue",
        "run_dir": str(tmp_path / "continue"),
        "init_from": str(run.directory / "extracted"),
        "data": {"seq_length": 16, "rule": "constant", "domains_from": str(run.directory)},
        "trainer": {"steps": 2, "global_batch_size": BATCH, "micro_batch_size": 2},
        "optimizer": {"warmup_steps": 1},
        "evaluation": {"sequences_per_domain": 8},
        "platform": {"device": "cpu"},
    }
    file.write_text(yaml.safe_dump(settings))
    config = load_config(file, source_shape=lambda path: models.open(path).shape, world_size=1)
    assert [(d.name, d.train, d.valid) for d in config.data.domains] == [
        (d.name, d.train, d.valid) for d in run.config.data.domains
    ]
    starts = {d.name: d.first_sample for d in config.data.domains}
    assert sum(starts.values()) == run.config.trainer.steps * BATCH
    again = load_config(
        file,
        ["data.reread_domains=true"],
        source_shape=lambda path: models.open(path).shape,
        world_size=1,
    )
    assert [domain.first_sample for domain in again.data.domains] == [0, 0]
    run_distributed(train, 1, config)
    *_, pruned, _, continued = read_info(tmp_path / "continue").records
    assert pruned.samples == {name: [0, start] for name, start in starts.items()}
    assert {name: first for name, (first, _) in continued.samples.items()} == starts
    assert sum(end - first for first, end in continued.samples.values()) == 2 * BATCH
    first = records(tmp_path / "continue", "evaluation")[0]
    assert first["domain_weights"] == final
    assert first["references"] == REFERENCES


def test_a_run_that_has_not_saved_cannot_be_taken_from(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "continue.yaml"
    settings = {
        "stage": "continue",
        "run_dir": "run",
        "init_from": str(directory / "source"),
        "data": {"seq_length": 16, "domains_from": str(tmp_path)},
    }
    file.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"data\.domains_from .*no file .*domains\.yaml"):
        load_config(file)
