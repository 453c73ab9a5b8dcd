"""The records of a run: what it writes, and what watch, report and other views read.

Every line of metrics.jsonl is a JSON object with `kind`, one of those below, and `step`: the number
of optimizer steps completed. A resumed run drops the records of the steps that it repeats; start
and end records stay, so that the file holds the run's history in order. A loss is in nats per
token, a duration in seconds; a value that could not be measured is null.
This module imports nothing from megashear.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

METRICS, KEPT_UNITS_FILE = "metrics.jsonl", "masks.json"
SCHEMA = 3
"""Increases when a field changes its meaning or goes; a reader ignores fields it does not know."""


MAX_UNITS = 2**24
"""Units of one mask over all its rows; LLaMA-2-70B has 2.3 million intermediate units."""


class StartRecord(TypedDict):
    """The run starts or resumes training."""

    kind: Literal["start"]
    schema: int  # version of the records, as on this page
    step: int  # the step that training continues from, 0 in a new run
    time: str  # UTC, as 2026-11-23T05:40:00Z
    stage: str  # pretrain | prune | continue
    steps: int  # length of the whole run
    tokens_per_step: int  # over all processes
    source: dict[str, Any]  # ModelShape of the trained model
    target: dict[str, Any] | None  # ModelShape to prune to; stage prune only
    parameters: int  # parameters of the source
    target_parameters: int | None  # parameters of the target
    domain_weights: dict[str, float]  # weights that training starts with
    layout: dict[str, int]  # parallel sizes: tensor, pipeline, context, data
    hosts: list[str]  # machines, in the order of the ranks
    device: str  # name of the device, such as NVIDIA H100 80GB HBM3, or cpu
    peak_flops: float | None  # peak of one device in the run's precision (FLOP/s)
    flops_per_token: float  # model FLOPs, forward and backward
    precision: str  # bf16 | fp32
    layers: str  # torch | transformer_engine
    kernels: str  # torch | apex
    versions: dict[str, str]  # python, megashear, torch, megatron-core, and optional packages
    job: str | None  # the scheduler's job id


class StepRecord(TypedDict, total=False):
    """An optimizer step."""

    kind: Literal["step"]
    step: int  # number of the step, from 1
    time: float  # when it ended (seconds since 1970)
    tokens: int  # tokens seen since the run began
    loss: float  # mean over the step's tokens
    domain_losses: dict[str, float]  # mean over a domain's tokens, where the step had any
    domain_weights: dict[str, float]  # weights that the step's samples were drawn by
    lr: float  # learning rate of the weights
    grad_norm: float  # gradient norm of the weights, before clipping
    mask_grad_norm: float  # stage prune only, like all fields down to target_sparsity
    multiplier_grad_norm: float  # both norms are before clipping
    penalty: float  # Lagrangian penalty that the step minimised
    # lambda1 and lambda2 of each constraint after the step, [2, 1 or rows]
    multipliers: dict[str, list[list[float]]]
    sparsity: dict[str, float]  # expected sparsity of each constraint after the step, mean of rows
    target_sparsity: dict[str, float]  # target of the step; it rises during the sparsity warm-up
    seconds: float  # duration of the step, including the wait for data
    data_seconds: float  # wait for data
    forward_backward_seconds: float  # micro-batches, masking of weights, gradient reduction
    tokens_per_second: float  # over all processes
    mfu: float | None  # model FLOP/s as a fraction of the devices' peak
    memory_gib: float  # peak of rank 0 so far: allocated on a GPU, resident on a CPU


class EvaluationRecord(TypedDict, total=False):
    """All domains were evaluated on their validation tokens."""

    kind: Literal["evaluation"]
    step: int  # steps completed; 0 before the first
    time: float  # when it ended (seconds since 1970)
    seconds: float  # duration of the evaluation
    losses: dict[str, float]  # loss of each domain
    references: dict[str, float]  # reference loss of each domain that has one
    gaps: dict[str, float]  # loss - reference
    domain_weights: dict[str, float]  # weights from this step on
    kept: dict[str, list[int]]  # stage prune only: units kept in each row of each mask


class SaveRecord(TypedDict):
    """A checkpoint is complete."""

    kind: Literal["save"]
    step: int  # step of the checkpoint
    time: float  # when it was complete (seconds since 1970)
    seconds: float  # how long training waited; with async_save less than writing took


class EndRecord(TypedDict):
    """Training ended gracefully; a run that was killed or failed has no such record."""

    kind: Literal["end"]
    step: int  # steps completed
    time: str  # UTC, as in a start record
    reason: str  # complete, or the name of a signal such as SIGUSR1
    verdict: str  # warning about masks that are off their targets; empty if there are none


Record = StartRecord | StepRecord | EvaluationRecord | SaveRecord | EndRecord


def upgrade(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of any older schema as one of this schema.

    Schema 3 renamed `weights`, the weights of the domains, to `domain_weights`.
    """
    if "weights" in record:
        record = {("domain_weights" if k == "weights" else k): v for k, v in record.items()}
    return record


def utc() -> str:
    """Return the current time as in a record, such as 2026-11-23T05:40:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def pack(rows: list[list[int]]) -> dict[str, Any]:
    """Encode rows of 0 and 1 for masks.json: {"units": n, "rows": [hexadecimal, ...]}."""
    digits = [f"{int(''.join(map(str, row)) or '0', 2):x}" for row in rows]
    return {"units": len(rows[0]), "rows": digits}


def unpack(mask: Mapping[str, Any]) -> list[list[int]]:
    """Decode the rows of 0 and 1 that `pack` encoded.

    Raises:
        ValueError, TypeError, KeyError: `pack` did not write this mask.
    """
    units, digits = mask["units"], mask["rows"]
    if not isinstance(units, int) or not 0 <= units * len(digits) <= MAX_UNITS:
        raise ValueError(f"{len(digits)} rows of {units} units are no mask")
    rows = [f"{int(row, 16):0{units}b}" for row in digits]
    if any(len(row) != units for row in rows):
        raise ValueError(f"a row has more than {units} units")
    return [[int(digit) for digit in row] for row in rows]
