"""What a run will take: memory, time, disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from megashear.config.chain import EXTRACTED
from megashear.config.schema import ModelShape, RunConfig
from megashear.config.shapes import shape_problems
from megashear.config.values import Problem
from megashear.planning.layouts import Layout, allowed, layout_of, ranked, usable_bytes
from megashear.planning.memory import ERROR_TEXT, RESERVE
from megashear.planning.setup import TORCH, TRANSFORMER_ENGINE
from megashear.planning.throughput import Cluster
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import resolve_target

GIB = 2**30


@dataclass(frozen=True)
class PlannedRun:
    """A run, and what is known of it before it runs.

    Attributes:
        config: the configuration in its file.
        shape: shape of the model that it trains.
        gpus: number of GPUs.
        domains: number of domains; 0 if it is unknown.
    """

    config: RunConfig
    shape: ModelShape
    gpus: int
    domains: int

    @property
    def target(self) -> ModelShape | None:
        """The shape that the run prunes to; None without a target shape."""
        wanted = self.config.target
        if self.config.stage != "prune" or wanted is None:
            return None
        return resolve_target(self.shape, wanted, self.config.pruning.head_unit)

    @property
    def target_parameters(self) -> int | None:
        """Parameters of the model that pruning leaves; None in other stages."""
        if self.config.target_sparsity is not None:
            return round((1 - self.config.target_sparsity) * parameter_count(self.shape))
        return parameter_count(self.target) if self.target else None

    @property
    def tokens(self) -> int:
        """Tokens that the run trains on."""
        trainer = self.config.trainer
        return trainer.steps * trainer.global_batch_size * self.config.data.seq_length

    @property
    def backend(self) -> str:
        """The layers on GPUs: `auto` stands for Transformer Engine."""
        return TORCH if self.config.platform.layers == "torch" else TRANSFORMER_ENGINE

    def evaluation_cost(self) -> float:
        """Return the compute of all evaluations as a fraction of that of training."""
        sequences = self.config.evaluation.sequences_per_domain * self.domains
        return self.config.evaluation_cost(sequences)

    def hours(self, layout: Layout) -> float:
        """Return the hours of training and evaluations."""
        seconds = self.config.trainer.steps * layout.time.total
        return seconds * (1 + self.evaluation_cost()) / 3600

    def disk_bytes(self) -> dict[str, int]:
        """Return the most bytes that the run's files take, by kind."""
        bf16 = self.config.platform.precision_on(cuda=True) == "bf16"
        element, moments = (2, 12) if bf16 else (4, 8)  # with bf16, fp32 weights as well
        number = parameter_count(self.shape)
        checkpoint = number * (element + moments)
        result = (self.target_parameters or number) * element
        what = EXTRACTED if self.config.stage == "prune" else "export"
        kept = checkpoint * self.config.trainer.keep_checkpoints
        return {"checkpoints": kept, "one more while it is written": checkpoint, what: result}


@dataclass(frozen=True)
class RunPlan:
    """A run in its own layout and in others.

    Attributes:
        run: the run.
        cluster: the machines.
        problems: why it cannot run as configured; then `configured` is None.
        configured: its own layout.
        layouts: layouts that fit, fastest first.
        least: the layout that needs least memory of all that may run; None if none may.
        reserve: fraction of a GPU's memory that is left free.
    """

    run: PlannedRun
    cluster: Cluster
    problems: list[Problem]
    configured: Layout | None
    layouts: list[Layout]
    least: Layout | None
    reserve: float

    @property
    def fits(self) -> bool:
        """Whether the configured layout fits."""
        own = self.configured
        return own is not None and own.memory.total <= usable_bytes(self.cluster, self.reserve)

    @property
    def chosen(self) -> Layout | None:
        """The layout for the totals: its own if it fits, else the fastest that does."""
        return self.configured if self.fits else next(iter(self.layouts), None)

    @property
    def why_none(self) -> str | None:
        """Why no layout fits; None if one does."""
        batch, least = self.run.config.trainer.global_batch_size, self.least
        if self.layouts:
            return None
        if least is None:
            text = f"trainer.global_batch_size = {batch} cannot be split evenly over"
            text += f" {self.run.gpus:,} GPUs, however the model is split"
            return f"{text}. Take fewer GPUs, or another batch"
        total, part = least.memory.total / GIB, max(asdict(least.memory).items(), key=itemgetter(1))
        text = f"the least takes {total:.1f} GiB, {part[1] / GIB:.1f} of it {part[0]}"
        return f"{text} ({least.options}). Take more GPUs, or larger ones"

    def facts(self) -> dict[str, Any]:
        """Return the plan as plain values: `--json` prints them, and the text is made from them."""
        run = self.run
        return {
            "stage": run.config.stage,
            "run_dir": run.config.run_dir,
            "gpus": run.gpus,
            "gpu": self.cluster.gpu.name,
            "source": {"parameters": parameter_count(run.shape), **asdict(run.shape)},
            "target_parameters": run.target_parameters,
            "target": asdict(run.target) if run.target else None,
            "steps": run.config.trainer.steps,
            "tokens": run.tokens,
            "evaluation_share": run.evaluation_cost() if run.domains else None,
            "usable_bytes": usable_bytes(self.cluster, self.reserve),
            "memory_model": ERROR_TEXT,
            "problems": self.problems,
            "fits": self.fits,
            "configured": self._facts(self.configured) if self.configured else None,
            "layouts": [self._facts(layout) for layout in self.layouts],
            "why_none": self.why_none,
            "mfu": self.cluster.mfu,
            "disk_bytes": run.disk_bytes(),
        }

    def _facts(self, layout: Layout) -> dict[str, Any]:
        hours, parallel = self.run.hours(layout), layout.setup.parallel
        return {
            "options": layout.options,
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual": parallel.virtual_pipeline,
            "context": parallel.context,
            "data": layout.setup.data_size,
            "micro-batch": layout.setup.micro_batch_size,
            "recompute": parallel.recompute,
            "bytes": {**asdict(layout.memory), "total": layout.memory.total},
            "seconds_per_step": {**asdict(layout.time), "total": layout.time.total},
            "sent_bytes_per_step": layout.sent,
            "mask_overhead": layout.mask_overhead,
            "tokens_per_second": layout.tokens_per_second,
            "hours": hours,
            "gpu_hours": hours * self.run.gpus,
        }


def plan(run: PlannedRun, cluster: Cluster, reserve: float = RESERVE) -> RunPlan:
    """Plan a run in its own layout and in all others."""
    arguments = (run.config, run.shape, run.gpus)
    problems = shape_problems(*arguments)
    own = None if problems else layout_of(*arguments, cluster, run.backend)
    every = list(allowed(*arguments, cluster, run.backend))
    least = min(every, key=lambda layout: layout.memory.total, default=None)
    layouts = ranked(every, usable_bytes(cluster, reserve))
    return RunPlan(run, cluster, problems, own, layouts, least, reserve)


def shape_after(runs: Sequence[PlannedRun], path: str) -> ModelShape | None:
    """Return the shape of the model that an earlier run will leave at a path; None if none does."""
    for run in runs:
        run_dir = Path(run.config.run_dir)
        if run.target is not None and Path(path) == run_dir / EXTRACTED:
            return run.target
        if Path(path) == run_dir:
            return run.shape
    return None


def count_domains(config: RunConfig, runs: Sequence[PlannedRun]) -> int:
    """Return the number of domains: its own, or those of the run it names; 0 if not known."""
    own = len(config.data.domains)
    source = config.data.domains_from
    of = [run.domains for run in runs if source and Path(run.config.run_dir) == Path(source)]
    return own or next(iter(of), 0)
