"""Read this process's rank, and the number of processes, from torchrun's or srun's variables.

The only reader of torchrun's variables. Imports neither torch nor Megatron-Core, so that a command
can refuse its arguments, once for all ranks, before it imports them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megashear.console import USAGE
from megashear.errors import ShearError
from megashear.platform import slurm


def world_size() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return _ranks()[1]


def launched_rank() -> int:
    """Return this process's rank as the launcher gave it; 0 without a launcher."""
    return _ranks()[0]


def local_rank() -> int:
    """Return this process's rank on its machine, whose first process reports for the others."""
    return _ranks()[2]


def _ranks() -> tuple[int, int, int]:
    """Return rank, number of processes, and rank on this machine; torchrun's, or else srun's."""
    environment, task = os.environ, slurm.task()
    if "RANK" in environment or task is None:
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        rank, size, local = (int(environment.get(name, unset)) for name, unset in names.items())
        return rank, size, local
    return task.rank, task.tasks, task.local_rank


@contextmanager
def report_once() -> Iterator[None]:
    """Let the first process on each machine report an error that all of them find."""
    try:
        yield
    except ShearError:
        if local_rank() == 0:
            raise
        time.sleep(2)  # a launcher ends all as soon as one has ended
        raise SystemExit(USAGE) from None
