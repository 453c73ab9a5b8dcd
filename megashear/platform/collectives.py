"""Work that all processes do together: what fails on one is an error on all, at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from megashear.errors import CheckpointError

T = TypeVar("T")


def on_each_process(work: Callable[[], T]) -> list[T]:
    """What `work` returns on each process; a failure on one is an error on all. A collective."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must not wait for ever
        failure = error
    told: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(told, (result, failure and f"{type(failure).__name__}: {failure}"))
    except RuntimeError as error:
        raise CheckpointError(f"another process has died or does not answer: {error}") from failure
    if isinstance(failure, OSError | SafetensorError):  # what a user can mend: a full disk
        raise CheckpointError(f"{type(failure).__name__}: {failure}") from failure
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise CheckpointError(f"process {rank} of {len(told)} failed: {text}")
    return [result for result, _ in told]


def on_first_process(work: Callable[[], T]) -> T:
    """What `work` returns on the first process, to all; its failure is an error on all."""
    return on_each_process(lambda: work() if dist.get_rank() == 0 else None)[0]  # type: ignore
