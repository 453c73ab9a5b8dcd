"""Work on all processes: a failure on one is an error on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from megashear.errors import CheckpointError

T = TypeVar("T")


def on_each_process(work: Callable[[], T]) -> list[T]:
    """Return what `work` returns on each process; raise on all if one fails. A collective."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must not wait for ever
        failure = error
    results: list[Any] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(
            results, (result, failure and f"{type(failure).__name__}: {failure}")
        )
    except RuntimeError as error:
        raise CheckpointError(f"another process has died or does not answer: {error}") from failure
    if isinstance(failure, OSError | SafetensorError):  # what a user can fix: a full disk
        raise CheckpointError(f"{type(failure).__name__}: {failure}") from failure
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(results):
        if text is not None:
            raise CheckpointError(f"process {rank} of {len(results)} failed: {text}")
    return [result for result, _ in results]


def on_first_process(work: Callable[[], T]) -> T:
    """Run `work` on the first process; return its result, or raise, on all. A collective."""
    return on_each_process(lambda: work() if dist.get_rank() == 0 else None)[0]  # type: ignore
