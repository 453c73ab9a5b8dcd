"""What happens to a job on a cluster, one after the other to one run: it goes on where it was."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from megashear.config.loader import load_config
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPTS
from tests.support.distributed import run_distributed
from tests.support.runs import records

pytestmark = pytest.mark.slurm
SIZES = {
    "steps: 6": "steps: 100000",  # more than there is time for
    "global_batch_size: 4": "global_batch_size: 8",
    "log_interval: 2, save_interval: 3": "log_interval: 50, save_interval: 100000",
    "interval: 3,": "interval: 50,",
}


def undisturbed(folder: Path, steps: int) -> None:
    """The same run in one go, as far as that."""
    os.chdir(folder)
    config = load_config(Path("long.yaml"), ["run_dir=runs/undisturbed"], world_size=2)
    trainer = Trainer(config, parallel.start(config.platform, config.parallel, config.trainer.seed))
    step = trainer.train_step

    def step_with_signal() -> None:
        if trainer.step == steps - 1:
            trainer.signals.received = signal.SIGINT
        step()

    trainer.train_step = step_with_signal  # type: ignore[method-assign]
    with contextlib.suppress(SystemExit):
        trainer.run()


class Life:
    """A run of many steps as a job: what was done to it, and what it said."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        config = (folder / "prune.yaml").read_text().replace("runs/prune", "runs/long")
        for before, after in SIZES.items():
            assert before in config
            config = config.replace(before, after)
        (folder / "long.yaml").write_text(config)
        go_on = (folder / "continue.yaml").read_text().replace("runs/prune", "runs/long")
        (folder / "after.yaml").write_text(go_on)
        chain = (folder / "chain.yaml").read_text().replace("prune.yaml", "long.yaml")
        (folder / "long_chain.yaml").write_text(chain.replace("continue.yaml", "after.yaml"))
        self.metrics = folder / "runs" / "long" / "metrics.jsonl"
        self.job = self.submit("--nodes=2", "--ntasks-per-node=1")

    def submit(self, *options: str) -> str:
        """Another job for the same run."""
        more = (f"--export=ALL,MEGASHEAR_SLURM={SCRIPTS}", "--time=60", "--parsable")
        options = (*options, *more, "--output=logs/%x-%j.log")
        script = str(SCRIPTS / "prune.sbatch")
        return self.cluster.run("sbatch", *options, script, "long_chain.yaml", cwd=self.folder)

    def log(self, job: str | None = None) -> str:
        """What a job has said so far."""
        file = self.folder / "logs" / f"prune-{job or self.job}.log"
        return file.read_text() if file.exists() else ""

    def train(self) -> None:
        """Wait until the job, started or requeued just now, trains."""
        before, begun = len(self.log()), "evaluation at step 0"
        if self.restarts() > 0:
            begun = "resumed from"
            # Started in the second in which it was requeued, a node would take it for killed.
            time.sleep(3)
            self.cluster.run("scontrol", "update", f"jobid={self.job}", "StartTime=now")
        self.cluster.wait(lambda: begun in self.log()[before:], 120)
        size = self.metrics.stat().st_size
        self.cluster.wait(lambda: self.metrics.stat().st_size > size + 5000, 60)  # a few steps

    def restarts(self) -> int:
        """How often Slurm has started the job again."""
        return int(self.cluster.job(self.job)["Restarts"])

    def wait_requeued(self, times: int) -> None:
        """Wait until the job has been requeued so often."""
        self.cluster.wait(lambda: self.restarts() == times, 90)
        self.cluster.wait(lambda: self.cluster.state(self.job) == "PENDING", 60)


@pytest.fixture(scope="module")
def life(cluster: Cluster, folder: Path, jobs: dict[str, str]) -> Life:
    return Life(cluster, folder)


def test_a_second_job_is_refused_while_the_first_runs(cluster: Cluster, life: Life) -> None:
    life.train()
    second = life.submit("--nodes=2", "--ntasks-per-node=1")
    cluster.wait(lambda: cluster.state(second) == "FAILED", 90)
    assert cluster.job(second)["ExitCode"] == "2:0"
    said = re.findall(r"error: runs/long is in use .*", life.log(second))
    assert len(said) == 2  # once on each node
    assert f"by another run: Slurm job {life.job}, process " in said[0]
    assert f"scancel --signal=INT {life.job}" in said[0]
    assert cluster.state(life.job) == "RUNNING"


def test_before_its_time_ends_it_saves_and_is_requeued(cluster: Cluster, life: Life) -> None:
    cluster.run("scontrol", "update", f"jobid={life.job}", "TimeLimit=3")
    life.wait_requeued(1)  # within half a minute: Slurm looks no oftener
    assert "stopped by SIGUSR1" in life.log()
    assert f"job {life.job} is requeued: saved before its time ends" in life.log()
    cluster.run("scontrol", "update", f"jobid={life.job}", "TimeLimit=60")
    life.train()


@pytest.mark.parametrize("sends", ["SIGUSR1", "SIGTERM"])
def test_preempted_it_saves_and_is_requeued(cluster: Cluster, life: Life, sends: str) -> None:
    if sends == "SIGTERM":  # as where Slurm was not told of preempt_send_user_signal
        config = Path(cluster.environment["SLURM_CONF"])
        config.write_text(re.sub("(?m)^SlurmctldParameters.*", "", config.read_text()))
        cluster.run("scontrol", "reconfigure")
    before = life.restarts()
    option = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    urgent = cluster.run("sbatch", "--parsable", *option, "--wrap=sleep 1")
    life.wait_requeued(before + 1)
    assert f"stopped by {sends}" in life.log()
    cluster.wait(lambda: cluster.state(urgent) == "COMPLETED", 60)
    life.train()


def test_a_process_that_was_killed_is_no_end(cluster: Cluster, life: Life) -> None:
    before = life.restarts()
    worker = min(cluster.processes("n2", "-u"))  # torchrun's; those behind it are forks of it
    os.kill(worker, signal.SIGKILL)
    life.wait_requeued(before + 1)
    assert f"error: rank 1 (pid {worker}) died of SIGKILL" in life.log()
    assert "is requeued: a process was lost" in life.log()
    life.train()


def test_a_node_that_dies_is_no_end(cluster: Cluster, life: Life) -> None:
    before = life.restarts()
    cluster.kill_node("n2")
    # Slurm would notice by itself after SlurmdTimeout, 300 s.
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=power")
    life.wait_requeued(before + 1)
    cluster.start_node("n2")
    cluster.wait(lambda: "down" not in cluster.run("sinfo", "-hNplow", "-nn2", "-o%T"), 60)
    life.train()


def test_cancelled_it_saves_and_does_not_come_back(cluster: Cluster, life: Life) -> None:
    before = life.log()
    cluster.run("scancel", life.job)
    cluster.wait(lambda: cluster.state(life.job) == "CANCELLED", 60)
    said = life.log().removeprefix(before)
    assert "stopped by SIGTERM" in said
    assert "saved runs/long" in said
    assert "ends with status 143" in said
    time.sleep(3)
    assert cluster.state(life.job) == "CANCELLED"


def test_it_went_on_exactly_where_it_was(cluster: Cluster, life: Life) -> None:
    """The last job has a task for each process, without torchrun; it is stopped without haste."""
    life.job = life.submit("--nodes=1", "--ntasks-per-node=2")
    cluster.wait(lambda: life.log().count("  loss ") > 1, 120)
    assert life.log().count("prune in runs/long") == 1  # of two processes, one speaks
    cluster.run("scancel", "--signal=INT", life.job)
    cluster.wait(lambda: cluster.state(life.job) == "FAILED", 60)
    assert cluster.job(life.job)["ExitCode"] == "130:0"
    steps = records(life.folder / "runs" / "long", "step")
    run_distributed(undisturbed, 2, life.folder, len(steps))
    whole, parts = (records(life.folder / "runs" / name) for name in ("undisturbed", "long"))
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert len(records(life.folder / "runs" / "long", "start")) == 7
    assert parts == whole
