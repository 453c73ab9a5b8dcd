"""Real runs of the trainer on processes of this machine, for benchmarks: text, sizes, records."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT
from megatron.core.datasets.indexed_dataset import _IndexWriter

from megashear.config.schema import (
    DataConfig,
    Domain,
    OptimizerConfig,
    PlatformConfig,
    RunConfig,
)
from megashear.platform import parallel
from megashear.records import METRICS
from megashear.training.trainer import Trainer

sys.path.insert(0, str(ROOT))
from tests.support.distributed import run_distributed  # the processes are those of the tests

WEIGHTS = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
"""Of the seven domains: those of the paper."""


def write_domains(
    folder: Path, tokens: int, length: int, vocab: int, *, sparse: bool = False
) -> tuple[Domain, ...]:
    """Token files of seven domains, in documents of `length` tokens.

    Args:
        folder: made here.
        tokens: of all domains.
        length: of a document.
        vocab: ids are random, below it.
        sparse: files of that length with nothing in them, which take no room on the disk.
    """
    folder.mkdir()
    rng, domains = np.random.default_rng(0), []
    for number, weight in enumerate(WEIGHTS):
        prefix, documents = folder / f"d{number}", int(tokens * weight / length)
        with _IndexWriter(f"{prefix}.idx", np.uint16) as index:
            index.write(np.full(documents, length), None, np.arange(documents + 1))
        with open(f"{prefix}.bin", "wb") as file:
            if sparse:
                file.truncate(2 * documents * length)
            else:
                rng.integers(0, vocab, documents * length, dtype=np.uint16).tofile(file)
        domains.append(Domain(f"d{number}", str(prefix), str(prefix), weight, 1.0))
    return tuple(domains)


def run_config(run_dir: Path, data: DataConfig, **of: Any) -> RunConfig:
    """A run in fp32 on CPU processes; what is not named has its default."""
    settings: dict[str, Any] = {
        "stage": "pretrain",
        "run_dir": str(run_dir),
        "data": data,
        "optimizer": OptimizerConfig(warmup_steps=1),
        "platform": PlatformConfig(device="cpu", precision="fp32"),
    }
    return RunConfig(**{**settings, **of})


def train(config: RunConfig, ranks: int = 1) -> list[dict[str, Any]]:
    """Run a configuration to its end; the records of its metrics.jsonl."""
    run_distributed(_train, ranks, config)
    lines = (Path(config.run_dir) / METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The records of steps, evaluations or saves."""
    return [record for record in records if record["kind"] == kind]


def _train(config: RunConfig) -> None:
    trainer = begin(config)
    trainer.run()
    parallel.stop()


def silence() -> None:
    """What this process prints, a fork, goes nowhere; an error goes to the parent by itself."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def begin(config: RunConfig) -> Trainer:
    """The trainer of this process, a fork, whose output goes nowhere."""
    silence()
    return Trainer(config, parallel.start(config.platform, config.parallel, config.trainer.seed))
