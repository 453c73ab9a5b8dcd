"""Which jobs are requeued, and how often; with a stub in place of megashear."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPTS

pytestmark = pytest.mark.slurm


class Stub:
    """Jobs of prune.sbatch whose training run is a few lines of bash.

    Args:
        cluster: runs them.
        folder: where they are submitted.
        run: the training run.
    """

    def __init__(self, cluster: Cluster, folder: Path, run: str) -> None:
        self.cluster, self.folder = cluster, folder
        stub = folder / "megashear"
        stub.write_text(f"#!/bin/bash\nif [[ $1 == shear ]]; then echo {stub}; exit; fi\n{run}\n")
        stub.chmod(0o755)
        (folder / "cluster.env").write_text(f"PATH={folder}:$PATH\n")
        (folder / "chain.yaml").touch()

    def submit(self, *options: str) -> str:
        options = (*options, "--parsable", f"--export=ALL,MEGASHEAR_SLURM={SCRIPTS}")
        script = str(SCRIPTS / "prune.sbatch")
        return self.cluster.run("sbatch", *options, script, "chain.yaml", cwd=self.folder)

    def restarts(self, job: str) -> int:
        return int(self.cluster.job(job)["Restarts"])


def test_a_task_of_an_array_requeues_itself_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The last task has the number of the whole array."""
    runs = ("exit 0", "sleep 100", "[[ $SLURM_RESTART_COUNT ]] || sleep 4; exit 138")
    cases = " ".join(f"{number}) {run} ;;" for number, run in enumerate(runs))
    stub = Stub(cluster, tmp_path, f"case $SLURM_ARRAY_TASK_ID in {cases} esac")
    array = stub.submit("--array=0-2", "--ntasks=1")
    tasks = [f"{array}_{number}" for number in range(3)]
    cluster.wait(lambda: stub.restarts(tasks[2]) == 1, 60)
    assert cluster.job(tasks[2])["JobId"] == array
    assert [stub.restarts(task) for task in tasks] == [0, 0, 1]
    assert [cluster.state(task) for task in tasks[:2]] == ["COMPLETED", "RUNNING"]
    assert [file.name for file in tmp_path.glob(".retries-*")] == [f".retries-{tasks[2]}"]
    cluster.run("scancel", array)


def test_a_job_that_never_makes_a_step_is_not_requeued_for_ever(
    cluster: Cluster, tmp_path: Path
) -> None:
    """As where the warning signal comes longer before the end than the job has time."""
    stub = Stub(cluster, tmp_path, "exit 138")
    job = stub.submit("--time=2", "--signal=USR1@300", "--ntasks=1")
    for requeues in (1, 2, 3):
        cluster.wait(lambda n=requeues: stub.restarts(job) == n, 60)  # type: ignore[misc]
        cluster.wait(lambda: cluster.state(job) == "PENDING", 60)
        time.sleep(3)  # started in the second in which it was requeued, a job is taken for killed
        cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")
    cluster.wait(lambda: cluster.state(job) == "FAILED", 60)
    assert cluster.job(job)["ExitCode"] == "138:0"
    (log,) = tmp_path.glob("prune-*.log")
    assert "requeued 3 times in a row: no start makes a step" in log.read_text()
