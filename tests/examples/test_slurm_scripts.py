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
