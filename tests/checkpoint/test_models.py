"""A model at a path is one object: what `latest` meant when it was opened, on all ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megashear.checkpoint import info as infos
from megashear.checkpoint import models
from megashear.checkpoint.dense import write_model
from megashear.checkpoint.info import CheckpointInfo
from megashear.config.schema import RunConfig
from megashear.errors import CheckpointError
from megashear.files import write_whole
from megashear.model.build import bound_rules
from megashear.platform import parallel
from megashear.pruning.table import param_rules
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, run_config, write_domains, write_source


def write_run(directory: Path) -> None:
    """A run with checkpoints that differ in all they hold; `latest` names the first."""
    for step in range(1, 7):
        ids = {"config.json": {"eos_token_id": step}}
        made = CheckpointInfo(GQA, "pretrain", step=step, tokens=step, generation=ids)
        weights = ((rule.name, torch.full(rule.shape(), float(step))) for rule in param_rules(GQA))
        write_model(directory / "checkpoints" / f"step-{step:08d}", made, weights)
    name_latest(directory, 1)


def name_latest(run: Path, step: int) -> None:
    write_whole(run / "checkpoints" / "latest", f"step-{step:08d}\n")


def start_while_latest_moves(config: RunConfig) -> list[float]:
    """Steps that a rank's history, generation settings and weights come from.

    The run saves another step whenever the first process has read `latest`, for the first time
    before any other process may read it.
    """
    assert config.init_from is not None
    run, find = Path(config.init_from), infos.find
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)

    def find_and_move(path: str | Path) -> Path:
        while platform.rank > 0 and not (run / "moved").exists():
            time.sleep(0.01)
        found = find(path)
        if platform.rank == 0:
            name_latest(run, int(found.name.removeprefix("step-")) + 1)
            (run / "moved").touch()
        return found

    infos.find = find_and_move
    trainer = Trainer(config, platform)
    weights = {b.parameter.unique().item() for b in bound_rules(trainer.optimizer.chunks)}
    eos = trainer.generation["config.json"]["eos_token_id"]
    parallel.stop()
    return [trainer.history[-1].steps, eos, *weights]


def test_ranks_start_from_one_step_while_latest_moves(tmp_path: Path) -> None:
    run_distributed(write_run, 1, tmp_path / "source")
    config = run_config(
        tmp_path, write_domains(tmp_path), stage="continue", init_from=str(tmp_path / "source")
    )
    assert run_distributed(start_while_latest_moves, 2, config) == [[1, 1, 1], [1, 1, 1]]


def test_an_opened_model_stays_what_it_was(tmp_path: Path) -> None:
    run_distributed(write_run, 1, tmp_path)
    model = models.open(tmp_path)
    name_latest(tmp_path, 2)
    assert model.history[-1].steps == 1
    assert model.read("decoder.final_layernorm.weight").unique().item() == 1
    assert models.open(tmp_path).info.step == 2


def prune_one_step(config: RunConfig) -> None:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    Trainer(config, platform).run()
    parallel.stop()


def try_to_start(config: RunConfig) -> str:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    try:
        Trainer(config, platform)
    except CheckpointError as error:
        return str(error)
    return "started"


def test_no_run_starts_from_the_source_under_a_pruning_runs_masks(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path)
    prune = run_config(
        tmp_path,
        write_domains(tmp_path),
        stage="prune",
        init_from=str(tmp_path / "source"),
        target=TARGETS[GQA],
    )
    prune = replace(prune, trainer=replace(prune.trainer, steps=1))
    run_distributed(prune_one_step, 1, prune)
    run = tmp_path / "run"
    again = replace(prune, run_dir=str(tmp_path / "again"))
    for path, stage in ((run, "continue"), (run / "checkpoints/step-00000001", "prune")):
        config = replace(again, init_from=str(path), stage=stage)
        config = replace(config, target=None) if stage == "continue" else config
        (message,) = run_distributed(try_to_start, 1, config)
        assert f"megashear extract --run {path}" in message
    assert not (tmp_path / "again").exists()
    model = models.open(run)
    assert model.masks.masks.target.num_layers == TARGETS[GQA].num_layers
    with pytest.raises(CheckpointError, match="Extract the pruned model first"):
        model.without_masks()


OPENED = "import sys\nfrom megashear.checkpoint import models\nmodel = models.open(sys.argv[1])\n"
OPENED += "print(model.stage, *({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"


def test_a_description_is_read_without_torch(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path)
    words = [sys.executable, "-c", OPENED, str(tmp_path / "source")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["imported"]
