"""What evaluations cost a run: their share of its time, beside the share that the run itself says.

Real runs of the trainer on the CPU say at their start what evaluations will add to the computation
of training; their records tell the seconds. The prediction takes a forward pass for a third of
training on the same tokens; the last column is that third as measured.

Example (two minutes on two idle cores):
  OMP_NUM_THREADS=1 python benchmarks/evaluation.py
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from harness import Report, interleaved, parser, ratio
from runs import of_kind, run_config, train, write_domains

from megashear.config.schema import (
    DataConfig,
    Domain,
    EvaluationConfig,
    ModelShape,
    PruningConfig,
    RunConfig,
    TargetShape,
    TrainerConfig,
)
from megashear.console import run
from megashear.training.evaluation import cost_of_evaluations
from tests.support.distributed import run_distributed
from tests.support.runs import write_source

STEPS, BATCH, MICRO_BATCH = 12, 8, 4
SHAPE = ModelShape(
    num_layers=4, hidden_size=128, num_attention_heads=4, ffn_hidden_size=344, vocab_size=2000
)
PRUNE = {
    "target": TargetShape(num_layers=3, hidden_size=96, num_attention_heads=3, ffn_hidden_size=256),
    "pruning": PruningConfig(sparsity_warmup_steps=STEPS),
}
SETTINGS = ((4, 6), (8, 3))
"""Sequences of each domain, and steps between evaluations."""


def main() -> None:
    """Measure, print and keep the table."""
    arguments = parser(__doc__, rounds=3).parse_args()
    report = Report("evaluation", __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="evaluation-") as name:
        folder = Path(name)
        run_distributed(write_source, 1, folder, SHAPE)
        domains = write_domains(folder / "text", 2_000_000, 1000, SHAPE.vocab_size)
        cases = {config.run_dir: Case(config) for config in configurations(folder, domains)}
        interleaved({name: case.measure for name, case in cases.items()}, arguments.rounds, 0)
    header = ["stage", "sequences of a domain", "every steps", "says: adds %", "adds %"]
    header += ["of all time %", "a sequence, evaluated over trained"]
    report.table("In real runs on the CPU", header, [case.row() for case in cases.values()])
    report.write(arguments.out)


def configurations(folder: Path, domains: tuple[Domain, ...]) -> Iterator[RunConfig]:
    """Runs of both stages under each setting."""
    source = {"init_from": str(folder / "source")}
    for stage, options in (("pretrain", {"model": SHAPE}), ("prune", {**source, **PRUNE})):
        for sequences, interval in SETTINGS:
            yield run_config(
                folder / f"{stage}-{sequences}",
                DataConfig(seq_length=256, domains=domains),
                stage=stage,
                evaluation=EvaluationConfig(interval=interval, sequences_per_domain=sequences),
                trainer=TrainerConfig(
                    steps=STEPS, global_batch_size=BATCH, micro_batch_size=MICRO_BATCH
                ),
                **options,
            )


class Case:
    """Runs of one configuration: seconds of their evaluations, and of their steps."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.evaluations: list[float] = []
        self.steps: list[float] = []
        each = config.evaluation.sequences_per_domain
        self.sequences = len(config.data.domains) * -(-each // MICRO_BATCH) * MICRO_BATCH
        self.count = 1 + STEPS // config.evaluation.interval

    def measure(self) -> None:
        """One run, which is removed again."""
        records = train(self.config)
        shutil.rmtree(self.config.run_dir)
        for kind, kept in (("evaluation", self.evaluations), ("step", self.steps)):
            kept.append(sum(record["seconds"] for record in of_kind(records, kind)))

    def row(self) -> tuple[Any, ...]:
        """Of the table."""
        said, _ = cost_of_evaluations(self.config, self.sequences)
        (share,) = re.findall(r"add ([\d.]+)%", said)[:1]
        pairs = list(zip(self.evaluations, self.steps, strict=True))
        evaluation = self.config.evaluation
        return (
            self.config.stage,
            evaluation.sequences_per_domain,
            evaluation.interval,
            float(share),
            round(100 * median(e / s for e, s in pairs), 1),
            round(100 * median(e / (e + s) for e, s in pairs), 1),
            ratio(
                [e / (self.count * self.sequences) for e in self.evaluations],
                [s / (STEPS * BATCH) for s in self.steps],
            ),
        )


if __name__ == "__main__":
    run(main)
