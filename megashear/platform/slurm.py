"""What Slurm says to the processes of a job: the only reader of its variables (`SLURM_*`).

Imports neither torch nor Megatron-Core.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass

from megashear.errors import PlatformError

FIRST_PORT, PORTS = 20000, 10000
"""Ports of the rendezvous: below those that Linux gives away (32768), one for each job number."""


@dataclass(frozen=True)
class Task:
    """A process's place among those that one `srun` started.

    Attributes:
        rank: its number among all.
        tasks: how many there are.
        local_rank: its number among those of its node.
        node: number of its node among those of the step.
        nodes: how many there are.
    """

    rank: int
    tasks: int
    local_rank: int
    node: int
    nodes: int


def task() -> Task | None:
    """This process's place in its step; None where no `srun` started it with others.

    A batch script is no step: there SLURM_NTASKS is what `srun` will start.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks < 2 or "SLURM_PTY_PORT" in os.environ:  # alone, or a shell that somebody types into
        return None
    return Task(
        rank=_number("SLURM_PROCID"),
        tasks=tasks,
        local_rank=_number("SLURM_LOCALID"),
        node=_number("SLURM_NODEID"),
        nodes=_number("SLURM_STEP_NUM_NODES"),
    )


def job() -> str | None:
    """The job's number, the same after each requeue; None outside of Slurm."""
    return os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often the job was requeued."""
    return _number("SLURM_RESTART_COUNT")


def rendezvous() -> tuple[str, int]:
    """Address and port where the processes of a step meet: its first node, by the job's number.

    MASTER_ADDR and MASTER_PORT, where they are set, come first.

    Raises:
        PlatformError: the port is none, or nothing names the first node.
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
    """The first name of a list as Slurm writes it: of `a[03-05,9]-x,b7`, `a03-x`."""
    first = re.split(r",(?![^[]*\])", nodes)[0]
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first)


def _address(node: str) -> str:
    """What a node is reached by: its name, unless only Slurm knows where it is."""
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        if shutil.which("scontrol"):  # not in a container
            command = ("scontrol", "show", "node", node)
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if found := re.search(r"\bNodeAddr=(\S+)", said):
                return found[1]
    return node
