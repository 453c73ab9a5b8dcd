"""The records of a run: what it writes, and what watch, report and other views read.

Every line of metrics.jsonl is a JSON object with `kind`, one of those below, and `step`: the
optimizer steps done by then. A resume drops the records of the steps that are done again; those of
starts and ends stay, and tell the run's history in the order of the file. A loss is in nats per
token, a duration in seconds; what could not be measured is null.
This module imports nothing of megashear.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

METRICS, MASKS = "metrics.jsonl", "masks.json"
SCHEMA = 2
"""Changes when a field's meaning does or one goes; a reader passes over fields it does not know."""


_MOST_UNITS = 2**24
"""Of a mask, of all its rows: LLaMA-2-70B has 2.3 million of the feed-forward networks."""


class StartRecord(TypedDict):
    """A process group began to train: at first, and after each resume."""

    kind: Literal["start"]
    schema: int  # of this page's fields
    step: int  # that it goes on from
    time: str  # UTC, as 2026-11-23T05:40:00Z
    stage: str  # pretrain | prune | continue
    steps: int  # of the whole run
    tokens_per_step: int  # of all processes
    source: dict[str, Any]  # shape that is trained: ModelShape
    target: dict[str, Any] | None  # shape to reach, in stage prune where it has one
    parameters: int  # of the source
    target_parameters: int | None  # of the target
    weights: dict[str, float]  # of the domains, to begin with
    layout: dict[str, int]  # processes by kind: tensor, pipeline, context, data
    hosts: list[str]  # machines, in the order of the processes
    device: str  # its name, such as NVIDIA H100 80GB HBM3, or cpu
    peak_flops: float | None  # of a device, in the run's precision (FLOP/s)
    flops_per_token: float  # of the model's arithmetic, forward and backward
    precision: str  # bf16 | fp32
    layers: str  # torch | transformer_engine
    kernels: str  # torch | apex
    versions: dict[str, str]  # python, megashear, torch, megatron-core, and optional packages
    job: str | None  # a scheduler's number of it


class StepRecord(TypedDict, total=False):
    """An optimizer step."""

    kind: Literal["step"]
    step: int  # its number, from 1 on
    time: float  # when it ended (seconds since 1970)
    tokens: int  # seen since the run began
    loss: float  # mean over the step's tokens
    domain_losses: dict[str, float]  # of the domains that the step had tokens of
    weights: dict[str, float]  # of the domains, that the step's samples were drawn by
    lr: float  # of the weights
    grad_norm: float  # of the weights, before clipping
    mask_grad_norm: float  # stage prune only, as all down to target_sparsity; before clipping
    multiplier_grad_norm: float  # before clipping
    penalty: float  # of being off the targets, as the step minimised it
    # of each constraint after the step: lambda1 and lambda2, [2, 1 or rows]
    multipliers: dict[str, list[list[float]]]
    sparsity: dict[str, float]  # expected, of each constraint after the step, mean over rows
    target_sparsity: dict[str, float]  # that the step aimed at, which rises while it warms up
    seconds: float  # of the step, waiting for data included
    data_seconds: float  # waiting for data
    forward_backward_seconds: float  # micro-batches, masks on weights, reduction of gradients
    tokens_per_second: float  # of all processes
    mfu: float | None  # model FLOP/s used, of the devices' peak
    memory_gib: float  # peak so far, of this process: of a GPU allocated, of a CPU resident


class EvaluationRecord(TypedDict, total=False):
    """Validation of every domain."""

    kind: Literal["evaluation"]
    step: int  # steps done; 0 before the first
    time: float  # when it ended (seconds since 1970)
    seconds: float  # that it took
    losses: dict[str, float]  # of the domains
    references: dict[str, float]  # of the domains that have one
    gaps: dict[str, float]  # loss - reference
    weights: dict[str, float]  # from here on
    kept: dict[str, list[int]]  # stage prune: units of each mask that are kept by now, of each row


class SaveRecord(TypedDict):
    """A checkpoint is there, whole."""

    kind: Literal["save"]
    step: int  # of the checkpoint
    time: float  # when it got its name (seconds since 1970)
    seconds: float  # that training waited; with async_save less than the writing took


class EndRecord(TypedDict):
    """Training ended in order; a run that was killed, or that failed, has none."""

    kind: Literal["end"]
    step: int  # steps done
    time: str  # UTC, as in a start
    reason: str  # complete, or the name of the signal, such as SIGUSR1
    verdict: str  # masks that are off their targets, as the run says it; empty where all is well


def utc() -> str:
    """The time of now as records have it: 2026-11-23T05:40:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def pack(rows: list[list[int]]) -> dict[str, Any]:
    """Rows of 0 and 1 as masks.json has them: {"units": n, "rows": [hexadecimal, ...]}."""
    digits = [f"{int(''.join(map(str, row)) or '0', 2):x}" for row in rows]
    return {"units": len(rows[0]), "rows": digits}


def unpack(mask: Mapping[str, Any]) -> list[list[int]]:
    """The rows of 0 and 1 that `pack` was given.

    Raises:
        ValueError, TypeError, KeyError: it is none of `pack`.
    """
    units, digits = mask["units"], mask["rows"]
    if not isinstance(units, int) or not 0 <= units * len(digits) <= _MOST_UNITS:
        raise ValueError(f"{len(digits)} rows of {units} units are no mask")
    rows = [f"{int(row, 16):0{units}b}" for row in digits]
    if any(len(row) != units for row in rows):
        raise ValueError(f"a row has more than {units} units")
    return [[int(digit) for digit in row] for row in rows]
