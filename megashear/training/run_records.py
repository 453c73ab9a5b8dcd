"""The records of a run, built from what training measured. `megashear.records` defines them."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from megashear.checkpoint.info import versions
from megashear.config.schema import ModelShape, RunConfig
from megashear.data.domain_weights import DomainWeights
from megashear.hardware import gpu_of_device
from megashear.platform import cuda, slurm
from megashear.platform.collectives import on_each_process
from megashear.platform.parallel import Platform
from megashear.pruning.counting import flops_per_token, parameter_count
from megashear.records import SCHEMA, EvaluationRecord, StartRecord, StepRecord, utc
from megashear.training.step import DomainLosses

_OPTIONAL = (
    *("numpy", "transformer-engine", "apex", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("tensorboard", "wandb"),
)


class StepTimes(NamedTuple):
    """Durations in a step, in seconds."""

    total: float
    data: float
    forward_backward: float


class RunRecords:
    """Builds the records of one run.

    Args:
        config: configuration of the run.
        platform: process group and device.
        shape: shape of the trained model.
        domain_weights: the run's weights; records have the newest ones.
    """

    def __init__(
        self,
        config: RunConfig,
        platform: Platform,
        shape: ModelShape,
        domain_weights: DomainWeights,
    ) -> None:
        self.config, self.platform, self.shape = config, platform, shape
        self.domain_weights = domain_weights
        self.tokens_per_step = config.trainer.global_batch_size * config.data.seq_length
        self.flops_per_token = flops_per_token(shape, config.data.seq_length)
        self.peak_flops = peak_flops(platform)

    def start(self, step: int, target: ModelShape | None) -> StartRecord:
        """Return the record of a run that starts or resumes at a step; a collective."""
        config, platform = self.config, self.platform
        return {
            "kind": "start",
            "schema": SCHEMA,
            "step": step,
            "time": utc(),
            "stage": config.stage,
            "steps": config.trainer.steps,
            "tokens_per_step": self.tokens_per_step,
            "source": asdict(self.shape),
            "target": asdict(target) if target else None,
            "parameters": parameter_count(self.shape),
            "target_parameters": parameter_count(target) if target else None,
            "domain_weights": self.domain_weights.by_name(),
            "layout": {
                "tensor": platform.tensor_size,
                "pipeline": platform.pipeline_size,
                "context": platform.context_size,
                "data": platform.data_size,
            },
            "hosts": list(dict.fromkeys(on_each_process(socket.gethostname))),
            "device": cuda.device_name(platform.device),
            "peak_flops": self.peak_flops,
            "flops_per_token": self.flops_per_token,
            "precision": platform.precision,
            "layers": platform.layers,
            "kernels": platform.kernels,
            "versions": {**versions(), **_optional_versions()},
            "job": slurm.job(),
        }

    def step(
        self,
        step: int,
        losses: DomainLosses,
        lr: float,
        grad_norm: float,
        objective: Mapping[str, Any],
        times: StepTimes,
    ) -> StepRecord:
        """Return the record of a completed step; `objective` has the fields of its objective."""
        of_domains = zip(self.domain_weights.names, losses.of_domains(), strict=True)
        speed = self.tokens_per_step / times.total
        peak = self.peak_flops and self.peak_flops * self.platform.world_size
        return {
            "kind": "step",
            "step": step,
            "time": time.time(),
            "tokens": step * self.tokens_per_step,
            "loss": losses.mean,
            "domain_losses": {name: loss for name, loss in of_domains if not math.isnan(loss)},
            "domain_weights": self.domain_weights.by_name(),
            "lr": lr,
            "grad_norm": grad_norm,
            **objective,  # type: ignore[typeddict-item]
            "seconds": times.total,
            "data_seconds": times.data,
            "forward_backward_seconds": times.forward_backward,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / peak if peak else None,
            "memory_gib": cuda.peak_memory_gib(self.platform.device),
        }

    def evaluation(
        self, step: int, losses: dict[str, float], seconds: float, kept: dict[str, list[int]]
    ) -> EvaluationRecord:
        """Return the record of an evaluation; `kept` is empty except in stage prune."""
        references = self.domain_weights.references
        record: EvaluationRecord = {
            "kind": "evaluation",
            "step": step,
            "time": time.time(),
            "seconds": seconds,
            "losses": losses,
            "references": references,
            "gaps": {n: loss - references[n] for n, loss in losses.items() if n in references},
            "domain_weights": self.domain_weights.by_name(),
        }
        if kept:
            record["kept"] = kept
        return record


def peak_flops(platform: Platform) -> float | None:
    """Return the peak of one device in bf16 (FLOP/s); None in fp32 or if the device is unknown."""
    gpu = gpu_of_device(cuda.device_name(platform.device))
    return gpu.bf16_flops if gpu and platform.precision == "bf16" else None


def _optional_versions() -> dict[str, str]:
    installed = {}
    for package in _OPTIONAL:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
