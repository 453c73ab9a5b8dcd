"""The record of a run: metrics.jsonl, and its views. Only rank 0 writes.

`megashear.records` says what every line holds.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megashear.checkpoint.models import versions
from megashear.config.schema import ModelShape, RunConfig
from megashear.errors import PlatformError
from megashear.files import flush, write_durably
from megashear.hardware import gpu_of_device
from megashear.platform import cuda, slurm
from megashear.platform.collectives import on_each_process
from megashear.platform.parallel import Platform
from megashear.pruning.counting import flops_per_token, parameter_count
from megashear.records import (
    METRICS,
    SCHEMA,
    EndRecord,
    EvaluationRecord,
    SaveRecord,
    StartRecord,
    StepRecord,
    utc,
)
from megashear.training.terminal import Terminal
from megashear.training.views import View, views

_OPTIONAL = (
    *("numpy", "transformer-engine", "apex", "nvidia-dali-cuda120", "nvidia-dali-cuda130"),
    *("tensorboard", "wandb"),
)


class RunLog:
    """Appends records to metrics.jsonl and shows them: on the console, and where `log` says.

    Args:
        config: of the run.
        writes: whether this process writes (rank 0); the others are silent.
        resumed_step: records of later steps are dropped, since these steps are done again; None
            where the run begins, which drops those of all steps.
    """

    def __init__(self, config: RunConfig, writes: bool, resumed_step: int | None) -> None:
        self.config, self.writes, self.resumed_step = config, writes, resumed_step
        self.file = Path(config.run_dir) / METRICS  # in a directory that the run's lock has made
        self._terminal = Terminal(config.trainer)
        self._views: list[View] = [self._terminal]
        if writes:
            self._drop_after(resumed_step)

    def _drop_after(self, step: int | None) -> None:
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                done_again = step is None or record["step"] > step
                keep = not done_again or record["kind"] in ("start", "end")
            except (ValueError, TypeError, KeyError):
                continue  # a line cut by a crash belongs to a step that is done again
            if keep:
                kept.append(line + "\n")
        write_durably(self.file, "".join(kept), PlatformError)

    def flush(self) -> None:
        """Make the records survive a crash of the machine, before a checkpoint does.

        A run that is resumed from it makes those of later steps alone.
        """
        if self.writes and self.file.exists():  # not before the first record
            flush(self.file)
            flush(self.file.parent)

    def say(self, text: str) -> None:
        """Print a message once."""
        if self.writes:
            self._terminal.say(text)

    def warn(self, text: str) -> None:
        """Print a message once, on stderr."""
        if self.writes:
            self._terminal.say(text, sys.stderr)

    def start(self, record: StartRecord) -> None:
        """Record that training begins, and open the views."""
        if self.writes:
            self._views += views(self.config, self.resumed_step, self.warn)
        self._record(record)

    def step(self, record: StepRecord) -> None:
        """Record a training step."""
        self._record(record)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Record an evaluation."""
        self._record(record)

    def save(self, record: SaveRecord) -> None:
        """Record a checkpoint."""
        self._record(record)

    def end(self, record: EndRecord) -> None:
        """Record that training ended in order."""
        self._record(record)

    def _record(self, record: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        try:
            with self.file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PlatformError(f"{self.file} cannot be written: {error}") from error
        for view in self._views:
            view.take(record)

    def close(self) -> None:
        """Close the views; messages are printed still."""
        for view in self._views:
            view.close()


def start_record(
    config: RunConfig,
    platform: Platform,
    source: ModelShape,
    target: ModelShape | None,
    step: int,
    weights: Mapping[str, float],
) -> StartRecord:
    """What stands at the head of a run that goes on from a step; a collective.

    Args:
        config: of the run.
        platform: that it stands on.
        source: shape that is trained.
        target: shape to reach, where there is one.
        step: completed.
        weights: of the domains.
    """
    return {
        "kind": "start",
        "schema": SCHEMA,
        "step": step,
        "time": utc(),
        "stage": config.stage,
        "steps": config.trainer.steps,
        "tokens_per_step": config.trainer.global_batch_size * config.data.seq_length,
        "source": asdict(source),
        "target": asdict(target) if target else None,
        "parameters": parameter_count(source),
        "target_parameters": parameter_count(target) if target else None,
        "domain_weights": dict(weights),
        "layout": {
            "tensor": platform.tensor_size,
            "pipeline": platform.pipeline_size,
            "context": platform.context_size,
            "data": platform.data_size,
        },
        "hosts": list(dict.fromkeys(on_each_process(socket.gethostname))),
        "device": cuda.device_name(platform.device),
        "peak_flops": peak_flops(platform),
        "flops_per_token": flops_per_token(source, config.data.seq_length),
        "precision": platform.precision,
        "layers": platform.layers,
        "kernels": platform.kernels,
        "versions": {**versions(), **_optional_versions()},
        "job": slurm.job(),
    }


def peak_flops(platform: Platform) -> float | None:
    """Of a device in bf16 (FLOP/s); None in fp32, and of a device that is not known."""
    gpu = gpu_of_device(cuda.device_name(platform.device))
    return gpu.bf16_flops if gpu and platform.precision == "bf16" else None


def _optional_versions() -> dict[str, str]:
    found = {}
    for package in _OPTIONAL:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
