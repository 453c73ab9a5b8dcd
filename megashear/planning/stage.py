"""What a stage of the chain will take: memory, time, disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from megashear.config.chain import EXTRACTED
from megashear.config.schema import ModelShape, RunConfig
from megashear.config.values import Problem
from megashear.planning.layouts import (
    Layout,
    allowed,
    layout_of,
    layout_problems,
    ranked,
    usable_bytes,
)
from megashear.planning.memory import ERROR_TEXT, RESERVE
from megashear.planning.setup import TORCH, TRANSFORMER_ENGINE
from megashear.planning.throughput import Cluster
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import resolve_target

GIB = 2**30


@dataclass(frozen=True)
class Stage:
    """A run of the chain, and what is known of it before it runs.

    Attributes:
        config: as it stands in its file.
        shape: of the model that it trains.
        gpus: of the run.
        domains: their number; 0 where it is not known.
    """

    config: RunConfig
    shape: ModelShape
    gpus: int
    domains: int

    @property
    def target(self) -> ModelShape | None:
        """The shape that masks lead to."""
        wanted = self.config.target
        if self.config.stage != "prune" or wanted is None:
            return None
        return resolve_target(self.shape, wanted, self.config.pruning.head_unit)

    @property
    def target_parameters(self) -> int | None:
        """Of what the stage leaves, where that is not the model that it trains."""
        if self.config.target_sparsity is not None:
            return round((1 - self.config.target_sparsity) * parameter_count(self.shape))
        return parameter_count(self.target) if self.target else None

    @property
    def tokens(self) -> int:
        """That it trains on."""
        trainer = self.config.trainer
        return trainer.steps * trainer.global_batch_size * self.config.data.seq_length

    @property
    def backend(self) -> str:
        """What computes on GPUs: `auto` stands for Transformer Engine."""
        return TORCH if self.config.platform.layers == "torch" else TRANSFORMER_ENGINE

    def evaluation_share(self) -> float:
        """Computation of evaluations, as a share of training's."""
        trainer, evaluation = self.config.trainer, self.config.evaluation
        count = 1 + math.ceil(trainer.steps / evaluation.interval)
        sequences = evaluation.sequences_per_domain * self.domains
        passes = 4 if self.config.parallel.recompute == "full" else 3
        return count * sequences / (passes * trainer.steps * trainer.global_batch_size)

    def hours(self, layout: Layout) -> float:
        """Of training and evaluations."""
        seconds = self.config.trainer.steps * layout.time.total
        return seconds * (1 + self.evaluation_share()) / 3600

    def disk_bytes(self) -> dict[str, int]:
        """Of what lies on disk, at most."""
        bf16 = self.config.platform.precision != "fp32"
        element, moments = (2, 12) if bf16 else (4, 8)  # with bf16, fp32 weights as well
        number = parameter_count(self.shape)
        checkpoint = number * (element + moments)
        result = (self.target_parameters or number) * element
        what = EXTRACTED if self.config.stage == "prune" else "export"
        kept = checkpoint * self.config.trainer.keep_checkpoints
        return {"checkpoints": kept, "one more while it is written": checkpoint, what: result}


@dataclass(frozen=True)
class StagePlan:
    """A stage in its own layout and in others.

    Attributes:
        stage: what is planned.
        cluster: where.
        problems: why its own layout cannot be; then there is no `configured`.
        configured: its own layout.
        layouts: others that fit, fastest first.
        least: of all that the rules allow, the one that takes least memory; None where none does.
        reserve: share of a GPU's memory that is left free.
    """

    stage: Stage
    cluster: Cluster
    problems: list[Problem]
    configured: Layout | None
    layouts: list[Layout]
    least: Layout | None
    reserve: float

    @property
    def fits(self) -> bool:
        """Whether the configured layout does."""
        own = self.configured
        return own is not None and own.memory.total <= usable_bytes(self.cluster, self.reserve)

    @property
    def chosen(self) -> Layout | None:
        """The layout that totals are of: its own if it fits, else the fastest that does."""
        return self.configured if self.fits else next(iter(self.layouts), None)

    @property
    def why_none(self) -> str | None:
        """What leaves no layout that fits; None where one does."""
        batch, least = self.stage.config.trainer.global_batch_size, self.least
        if self.layouts:
            return None
        if least is None:
            text = f"trainer.global_batch_size = {batch} cannot be shared evenly by"
            text += f" {self.stage.gpus:,} GPUs, however the model is split"
            return f"{text}. Take fewer GPUs, or another batch"
        total, part = least.memory.total / GIB, max(asdict(least.memory).items(), key=itemgetter(1))
        text = f"the least takes {total:.1f} GiB, {part[1] / GIB:.1f} of it {part[0]}"
        return f"{text} ({least.options}). Take more GPUs, or larger ones"

    def facts(self) -> dict[str, Any]:
        """All that is known, as plain values: what --json prints, and the text is made of."""
        stage = self.stage
        return {
            "stage": stage.config.stage,
            "run_dir": stage.config.run_dir,
            "gpus": stage.gpus,
            "gpu": self.cluster.gpu.name,
            "source": {"parameters": parameter_count(stage.shape), **asdict(stage.shape)},
            "target_parameters": stage.target_parameters,
            "target": asdict(stage.target) if stage.target else None,
            "steps": stage.config.trainer.steps,
            "tokens": stage.tokens,
            "evaluation_share": stage.evaluation_share() if stage.domains else None,
            "usable_bytes": usable_bytes(self.cluster, self.reserve),
            "memory_model": ERROR_TEXT,
            "problems": self.problems,
            "fits": self.fits,
            "configured": self._facts(self.configured) if self.configured else None,
            "layouts": [self._facts(layout) for layout in self.layouts],
            "why_none": self.why_none,
            "mfu": self.cluster.mfu,
            "disk_bytes": stage.disk_bytes(),
        }

    def _facts(self, layout: Layout) -> dict[str, Any]:
        hours, parallel = self.stage.hours(layout), layout.setup.parallel
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
            "gpu_hours": hours * self.stage.gpus,
        }


def plan(stage: Stage, cluster: Cluster, reserve: float = RESERVE) -> StagePlan:
    """Plan a stage in its own layout, and in all others."""
    arguments = (stage.config, stage.shape, stage.gpus)
    problems = layout_problems(*arguments)
    own = None if problems else layout_of(*arguments, cluster, stage.backend)
    every = list(allowed(*arguments, cluster, stage.backend))
    least = min(every, key=lambda layout: layout.memory.total, default=None)
    layouts = ranked(every, usable_bytes(cluster, reserve))
    return StagePlan(stage, cluster, problems, own, layouts, least, reserve)


def shape_after(stages: Sequence[Stage], path: str) -> ModelShape | None:
    """The shape of what an earlier stage of the chain will leave at a path; None if none does."""
    for stage in stages:
        run_dir = Path(stage.config.run_dir)
        if stage.target is not None and Path(path) == run_dir / EXTRACTED:
            return stage.target
        if Path(path) == run_dir:
            return stage.shape
    return None


def count_domains(config: RunConfig, stages: Sequence[Stage]) -> int:
    """Domains of a run: its own, or those of the stage that it takes them from; 0 if not known."""
    own = len(config.data.domains)
    source = config.data.domains_from
    of = [s.domains for s in stages if source and Path(s.config.run_dir) == Path(source)]
    return own or next(iter(of), 0)
