"""Short runs whose losses are kept in losses.json, and the command that writes them anew.

    python -m tests.golden.runs

A change of names or structure leaves every number as it is, bit for bit. A change that means to
alter numbers writes the file anew and says in its commit why they moved.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron.core
import torch

from megashear.checkpoint import models
from megashear.checkpoint.dense import extract_checkpoint
from megashear.config.schema import DataConfig, ParallelConfig, RunConfig
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, records, run_config, write_domains, write_source

FILE = Path(__file__).with_name("losses.json")
FIELDS = ("loss", "grad_norm", "mask_grad_norm", "penalty", "sparsity", "losses")
"""What is kept of a step or an evaluation, where it has it."""


def environment() -> str:
    """What the bits of a sum depend on: releases, and the instructions that the CPU has."""
    # Behind "+" is a build, or the commit of whatever repository Megatron-Core was imported in.
    versions = [module.__version__.split("+")[0] for module in (torch, megatron.core)]
    cpu = torch.backends.cpu.get_cpu_capability()
    return "torch {}, megatron-core {}, {}".format(*versions, cpu)


def compute() -> dict[str, list[dict[str, Any]]]:
    """Run every stage on one rank, and pruning on two; steps and evaluations of each."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        run_distributed(write_source, 1, directory)
        domains = write_domains(directory)
        source = str(directory / "source")

        def config(name: str, **changes: Any) -> RunConfig:
            return run_config(directory, domains, run_dir=str(directory / name), **changes)

        prune = config("prune", stage="prune", init_from=source, target=TARGETS[GQA])
        prune = replace(prune, data=DataConfig(seq_length=16, domains=domains, rule="paper"))
        dense = config("dense", model=GQA)
        extracted = config(
            "continue", stage="continue", init_from=str(directory / "prune" / "extracted")
        )
        tensor = replace(prune, run_dir=str(directory / "prune-tp2"))
        tensor = replace(tensor, parallel=ParallelConfig(tensor=2, sequence=True))
        runs = (("dense", dense, 1), ("prune", prune, 1), ("prune-tp2", tensor, 2))
        for _, run, ranks in runs:
            run_distributed(_train, ranks, run)
        run_distributed(_extract, 1, directory / "prune")
        run_distributed(_train, 1, extracted)
        return {name: _kept(directory / name) for name in (*[r[0] for r in runs], "continue")}


def _train(config: RunConfig) -> None:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    Trainer(config, platform).run()
    parallel.stop()


def _extract(run: Path) -> None:
    extract_checkpoint(models.open(run), run / "extracted")


def _kept(run: Path) -> list[dict[str, Any]]:
    return [
        {field: record[field] for field in ("kind", "step", *FIELDS) if field in record}
        for record in records(run)
    ]


if __name__ == "__main__":
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {}
    golden[environment()] = compute()
    FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    print(f"{FILE}: {environment()}")
