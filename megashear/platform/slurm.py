"""The only reader of Slurm's variables (`SLURM_*`). Imports neither torch nor Megatron-Core."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass

from megashear.errors import PlatformError

FIRST_PORT, PORTS = 20000, 10000
"""Ports of the rendezvous, one for each job number; below those that Linux assigns (32768 up)."""


@dataclass(frozen=True)
class Task:
    """One of the processes that one `srun` started.

    Attributes:
        rank: its rank.
        tasks: number of processes.
        local_rank: its rank on its node.
        node: index of its node in the step.
        nodes: number of nodes.
    """

    rank: int
    tasks: int
    local_rank: int
    node: int
    nodes: int


def task() -> Task | None:
    """Return this process's task; None if no `srun` started it together with others.

    A batch script is no step: its SLURM_NTASKS is the number that `srun` will start.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks < 2 or "SLURM_PTY_PORT" in os.environ:  # alone, or an interactive shell
        return None
    return Task(
        rank=_number("SLURM_PROCID"),
        tasks=tasks,
        local_rank=_number("SLURM_LOCALID"),
        node=_number("SLURM_NODEID"),
        nodes=_number("SLURM_STEP_NUM_NODES"),
    )


def job() -> str | None:
    """Return the job's id, the same after each requeue; None outside of Slurm.

    An array's last task has the array's own id; its id is `ARRAY_TASK` here.
    """
    job = os.environ.get("SLURM_JOB_ID")
    is_array = job is not None and job == os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if is_array else job


def restarts() -> int:
    """Return how often the job was requeued."""
    return _number("SLURM_RESTART_COUNT")


def rendezvous() -> tuple[str, int]:
    """Return where the processes of a step meet: its first node, and a port by the job's number.

    MASTER_ADDR and MASTER_PORT override them.

    Raises:
        PlatformError: the port is invalid, or nothing names the first node.
    """
    port = os.environ.get("MASTER_PORT") or str(FIRST_PORT + _number("SLURM_JOB_ID") % PORTS)
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise PlatformError(f"MASTER_PORT is {port!r}: a port is a number from 1 to 65535")
    address, nodes = os.environ.get("MASTER_ADDR"), os.environ.get("SLURM_STEP_NODELIST")
    if not address and not nodes:
        raise PlatformError(
            "SLURM_STEP_NODELIST is not set in this step of several tasks: set MASTER_ADDR to its "
            "first node, or start it by srun, with all its SLURM_ variables"
        )
    return address or _address(_first(nodes or "")), int(port)


def _number(name: str) -> int:
    return int(os.environ.get(name, "0"))


def _first(nodes: str) -> str:
    """Return the first name of a list in Slurm's notation: `a03-x` for `a[03-05,9]-x,b7`."""
    first = re.split(r",(?![^[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first)


def _address(node: str) -> str:
    """Return a node's address: its name, unless only Slurm knows where it is."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        if shutil.which("scontrol"):  # not in a container
            command = ("scontrol", "show", "node", node)
            shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if found := re.search(r"\bNodeAddr=(\S+)", shown):
                return found[1]
    return node
