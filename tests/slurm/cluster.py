"""A real Slurm on this machine: one slurmctld, two slurmd. As root; no munge, no cgroups."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONF = """
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=30
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=4
PartitionName=low  Nodes=n1,n2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=n1,n2 Default=NO State=UP PriorityTier=10 PreemptMode=OFF
"""
MISSING = [name for name in ("slurmctld", "slurmd", "srun") if shutil.which(name) is None]
"""What a test of Slurm would need and is not installed."""


class Cluster:
    """A cluster in a folder, from `start` until `stop`.

    Args:
        folder: for its state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in list(self.environment):  # of a job that the tests themselves run in
            if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        """Start the daemons and wait until both nodes take jobs."""
        for name in ("state", "spool-n1", "spool-n2", "log"):
            (self.folder / name).mkdir(parents=True)
        ports = [_free_port() for _ in range(3)]
        host = socket.gethostname().split(".")[0]
        names = {"folder": self.folder, "host": host, "port": ports[0]}
        text = CONF.format(**names, port_1=ports[1], port_2=ports[2])
        (self.folder / "slurm.conf").write_text(text)
        self.run("slurmctld", "-c", "-f", self.environment["SLURM_CONF"])
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait(lambda: self.run("sinfo", "-hNplow", "-o%T").split() == ["idle"] * 2, 30)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self.run("slurmd", "-c", "-f", self.environment["SLURM_CONF"], "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: slurmd, the steps' daemons and all that they run are gone."""
        file = self.folder / f"slurmd-{node}.pid"
        slurmd = [int(file.read_text())] if file.exists() else []
        tasks = self.processes(node)
        steps = {_parent(task) for task in tasks} - set(tasks)
        # From above: what is left of a daemon must not tell of the death of what it runs.
        for pid in (*slurmd, *(step for step in steps if _is_step(step)), *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, node: str, word: str = "") -> list[int]:
        """Of jobs, those that run on a node of this cluster; with a word of their command line."""
        names = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.environment['SLURM_CONF']}"}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command, environment = (
                    (folder / name).read_text(errors="replace").split("\0")
                    for name in ("cmdline", "environ")
                )
                if names <= set(environment) and (not word or word in command):
                    found.append(int(folder.name))
        return found

    def stop(self) -> None:
        """End all daemons, and what they run."""
        for node in ("n1", "n2"):
            self.kill_node(node)
        with contextlib.suppress(OSError, ValueError):  # it did not start, or has ended
            os.kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGTERM)

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Standard output of a command on this cluster, which must succeed."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "show", "job", number)
        return dict(pair.partition("=")[::2] for pair in text.split())

    def state(self, number: str) -> str:
        """A job's state."""
        return self.job(number)["JobState"]

    def wait(self, condition: Callable[[], Any], seconds: float) -> None:
        """Wait until something is so; thrice as long, since the machine may be busy."""
        until = time.monotonic() + 3 * seconds
        while not condition():
            assert time.monotonic() < until, f"not so after {seconds:.0f} s"
            time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parent(pid: int) -> int:
    """The process that started one; 0 where it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _is_step(pid: int) -> bool:
    """Whether a process is the daemon of a job step."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().startswith("slurmstepd")
    return False
