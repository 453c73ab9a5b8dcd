"""What the scripts for Slurm refuse, and read, without a cluster: tests/slurm has the rest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
SITE = """\
[[ -d /nowhere ]] && source /nowhere/settings
module load cuda
echo "not set: '$NO_SUCH_SITE'"
{}
"""


def bash(folder: Path, command: str, **environment: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a job script would run it, submitted from a folder that has a chain.yaml."""
    (folder / "chain.yaml").touch()
    names = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(folder)}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**names, "S": str(SCRIPTS), **{k: str(v) for k, v in environment.items()}},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("$S/submit.sh missing.yaml", "missing.yaml is no file"),
        ("$S/submit.sh chain.yaml extrct", "extrct is neither a file nor a stage"),
        ("$S/submit.sh chain.yaml extract evaluat", "evaluat is no stage"),
        ("$S/submit.sh chain.yaml $S/cluster.env 'prune extract'", "prune extract is no stage"),
        ("bash $S/prune.sbatch chain.yaml", "MEGASHEAR_SLURM has to be the path of"),
        ("MEGASHEAR_SLURM=$S bash $S/prune.sbatch", "sbatch [OPTIONS] prune.sbatch CHAIN.yaml"),
        ("MEGASHEAR_SLURM=$S bash $S/prune.sbatch x.yaml", "'x.yaml' is no file"),
        ("MEGASHEAR_CLUSTER=x source $S/common.sh", "x cannot be read"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_submitted(
    tmp_path: Path, command: str, message: str
) -> None:
    done = bash(tmp_path, command)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert done.stdout == ""


@pytest.mark.parametrize("behind", ["", " || exit 9"])  # where errors count, and where they do not
def test_a_line_of_a_site_may_fail_or_name_what_is_not_set(tmp_path: Path, behind: str) -> None:
    (tmp_path / "cluster.env").write_text(SITE.format("TRAIN=(--nodes=2)\nfalse"))
    done = bash(tmp_path, f'source $S/common.sh{behind}; echo "$TRAIN $-"; false; echo $UNSET on')
    assert done.stdout == "not set: ''\n--nodes=2 ehuBc\n"
    assert "cuda" in done.stderr or "module" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("ends", ["exit 0", "if true; then"])
def test_settings_that_end_the_script_are_named(tmp_path: Path, ends: str) -> None:
    (tmp_path / "cluster.env").write_text(SITE.format(ends))
    done = bash(tmp_path, "source $S/common.sh; echo not here")
    assert f"error: {tmp_path}/cluster.env " in done.stderr.splitlines()[-1]
    assert done.returncode == 2
    assert "not here" not in done.stdout


@pytest.mark.parametrize(
    ("steps", "preempted", "requeued"),
    [((), False, 3), ((7, 7, 7, 7, 7), False, 4), ((1, 2, 3, 4, 5), False, 5), ((), True, 5)],
)
def test_requeues_without_a_step_are_bounded(
    tmp_path: Path, steps: tuple[int, ...], preempted: bool, requeued: int
) -> None:
    """The job's log says at which step each start was stopped."""
    said = "JobState=RUNNING" + " PreemptTime=2026-01-01" * preempted
    (tmp_path / "scontrol").write_text(f'[[ $1 == show ]] && echo "{said}" || echo $* >>called\n')
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "run").write_text(
        "source $S/common.sh; sleep() { exit; }\n"
        "[[ -z $STEP ]] || echo stopped by SIGUSR1 at step $STEP; finish 138"
    )
    environment = {**os.environ, "S": str(SCRIPTS), "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    environment |= {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    with (tmp_path / "log").open("a") as log:
        for start in range(5):
            environment["STEP"] = str(steps[start]) if steps else ""
            subprocess.run(["bash", "run"], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    assert (tmp_path / "called").read_text().splitlines() == ["requeue 12_3"] * requeued
    assert ("in a row: no start makes a step" in (tmp_path / "log").read_text()) == (requeued < 5)


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ("--time=2 --signal=USR1@300", True),
        ("-t 3", True),
        ("-t0:03:30", True),
        ("--time=08:00", False),
        ("--time=1-0", False),
        ("--time=UNLIMITED", False),
        ("--time=5 --signal=B:USR1@300", True),
        ("", False),
    ],
)
def test_a_time_limit_without_time_for_a_step_is_warned_of(
    tmp_path: Path, options: str, warns: bool
) -> None:
    (tmp_path / "cluster.env").write_text(f"TRAIN=({options})\n")
    (tmp_path / "sbatch").write_text("echo 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    done = bash(tmp_path, "$S/submit.sh chain.yaml cluster.env prune", PATH=path)
    assert (done.returncode, done.stdout) == (0, "prune 1\n"), done.stderr
    assert ("warning: prune ends after" in done.stderr) == warns
