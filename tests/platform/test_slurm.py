"""What is made of Slurm's variables; how they come to be is tested in tests/slurm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megashear.errors import PlatformError
from megashear.platform import launched, slurm

BATCH = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def seen() -> tuple[int, int, bool]:
    return launched.launched_rank(), launched.world_size(), launched.local_rank() == 0


def test_a_task_of_several_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, STEP)
    assert slurm.task() == slurm.Task(rank=3, tasks=4, local_rank=1, node=1, nodes=2)
    assert seen() == (3, 4, False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BATCH,  # what srun will start is not there yet
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "SLURM_PTY_PORT": "40123"},  # srun --pty bash: one shell, whatever --ntasks says
    ],
)
def test_what_runs_alone_is_one_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    set_all(monkeypatch, variables)
    assert slurm.task() is None
    assert seen() == (0, 1, True)


def test_torchrun_in_a_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**STEP, "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "0"})
    assert seen() == (9, 16, True)


def test_jobs_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**STEP, "SLURM_STEP_NODELIST": "localhost,other"})
    ports = []
    for job in range(9995, 10005):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        address, port = slurm.rendezvous()
        ports.append(port)
        assert address == "localhost"
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 20000
    assert max(ports) < 30000  # Linux gives away those from 32768 on
    set_all(monkeypatch, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert slurm.rendezvous() == ("10.0.0.7", 1234)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
    ],
)
def test_a_meeting_place_that_is_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    set_all(monkeypatch, {**STEP, **variables})
    with pytest.raises(PlatformError, match=message):
        slurm.rendezvous()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[07-09,11],cpu3", "gpu07"),
        ("a[12,14]-ib,b1", "a12-ib"),
        ("rack[2-3]node[04-05]", "rack2node04"),
    ],
)
def test_first_node_of_a_list(nodes: str, first: str) -> None:
    assert slurm._first(nodes) == first


def test_a_node_whose_name_leads_nowhere_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "no-such-node.invalid"
    assert slurm._address(name) == name  # nothing better is known
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\n[ "$*" = "show node {name}" ] && echo "A=1 NodeAddr=10.1.2.3 B=2"'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert slurm._address(name) == "10.1.2.3"
    assert slurm._address("localhost") == "localhost"


def test_job_and_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (slurm.job(), slurm.restarts()) == (None, 0)
    set_all(monkeypatch, {**BATCH, "SLURM_RESTART_COUNT": "2"})
    assert (slurm.job(), slurm.restarts()) == ("123456", 2)
    set_all(monkeypatch, {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "2"})
    assert slurm.job() == "123456_2"
    set_all(monkeypatch, {"SLURM_JOB_ID": "123457"})  # another task, or a job that one submitted
    assert slurm.job() == "123457"
