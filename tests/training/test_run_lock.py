"""One run at a time in a run directory."""

from __future__ import annotations

import errno
import io
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.errors import CheckpointError, PlatformError
from megashear.platform import parallel
from megashear.training import run_lock, trainer
from megashear.training.run_lock import RunLock
from tests.support.distributed import run_distributed

assert trainer  # imported before the forks, with all of Megatron-Core that they use


def hold(run_dir: Path, pipe: Any, job: str, leaves: bool) -> None:
    """A run of one process, with a fork as readers of data are; until it is killed, or told."""
    os.environ["SLURM_JOB_ID"] = job
    parallel.start(PlatformConfig(device="cpu"), ParallelConfig(), seed=0)
    lock = RunLock(run_dir)
    if leaves and os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    pipe.send("held")
    pipe.recv()
    lock.close()


@contextmanager
def held(run_dir: Path, job: str = "7", leaves: bool = False) -> Iterator[Any]:
    """A block in which another process has the lock; gives it, and the pipe to it."""
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=hold, args=(run_dir, there, job, leaves))
    process.start()
    try:
        assert here.poll(60)
        here.recv()
        yield process, here
    finally:
        process.kill()
        process.join()


def take(run_dir: Path, variables: dict[str, str], wait: float = 60.0) -> tuple[str, float]:
    """What a rank that wants the lock is told, and after how many seconds; "" where it has it."""
    os.environ.update(variables)
    run_lock.FORMER_SELF_S = wait
    parallel.start(PlatformConfig(device="cpu"), ParallelConfig(), seed=0)
    if run_dir.is_dir():
        (run_dir / "waits").touch()
    began, said = time.monotonic(), ""
    try:
        RunLock(run_dir)
    except (CheckpointError, PlatformError) as error:
        said = str(error)
    except SystemExit as end:
        said = f"status {end.code}"
    seconds = time.monotonic() - began
    parallel.stop()
    return said, seconds


def test_a_second_run_is_refused_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("not touched")
    with held(tmp_path) as (process, _):
        (first, _), (second, _) = run_distributed(take, 2, tmp_path, {})
        owner = json.loads((tmp_path / "lock").read_text())
    assert owner["pid"] == process.pid
    assert f"{tmp_path} is in use by another run: Slurm job 7, process {process.pid} of" in first
    assert f"on {owner['host']}, since {owner['since']}. Wait for it to end" in first
    assert second == "status 2"  # one rank on a machine speaks
    assert (tmp_path / "metrics.jsonl").read_text() == "not touched"


def test_a_run_that_ended_or_was_killed_is_no_obstacle(tmp_path: Path) -> None:
    with held(tmp_path) as (process, pipe):
        pipe.send("go")
        process.join()
        assert (tmp_path / "lock").read_text() == ""
        assert run_distributed(take, 1, tmp_path, {})[0][0] == ""
    with held(tmp_path, leaves=True) as (process, _):
        os.kill(process.pid, signal.SIGKILL)  # what it forked lives on
        process.join()
        assert "host" in (tmp_path / "lock").read_text()
        assert run_distributed(take, 2, tmp_path, {})[0][0] == ""


@pytest.mark.parametrize(("job", "restarts"), [("8", "1"), ("7", "0")])
def test_who_is_not_its_former_self_does_not_wait(tmp_path: Path, job: str, restarts: str) -> None:
    variables = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts}
    with held(tmp_path):
        ((said, seconds),) = run_distributed(take, 1, tmp_path, variables)
    assert "Slurm job 7" in said
    assert seconds < 1


def test_a_requeued_job_waits_for_its_former_self(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    with held(tmp_path) as (_, pipe):
        ((said, seconds),) = run_distributed(take, 1, tmp_path, variables, 1.5)
        assert "Slurm job 7" in said  # not for ever
        assert 1.5 < seconds < 4
        release = multiprocessing.get_context("fork").Process(
            target=send_later, args=(pipe, tmp_path / "waits")
        )
        (tmp_path / "waits").unlink()
        release.start()
        ((said, seconds),) = run_distributed(take, 1, tmp_path, variables)
        release.join()
    assert said == ""
    assert 0.5 < seconds < 20


def send_later(pipe: Any, waits: Path) -> None:
    while not waits.exists():
        time.sleep(0.05)
    time.sleep(1)
    pipe.send("go")


def without_locks(run_dir: Path) -> str:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    run_lock.fcntl.lockf = refuse  # type: ignore[assignment]
    said = io.StringIO()
    logging.getLogger(run_lock.__name__).addHandler(logging.StreamHandler(said))
    refused, _ = take(run_dir, {})
    return said.getvalue() + refused


def test_where_there_are_no_locks_that_is_said(tmp_path: Path) -> None:
    (said,) = run_distributed(without_locks, 1, tmp_path)
    assert said.startswith(f"{tmp_path}/lock cannot be locked (No locks available): nothing prev")
    assert "in use" not in said


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (first, _), (second, _) = run_distributed(take, 2, tmp_path / "file" / "run", {})
    assert f"run_dir {tmp_path}/file/run cannot be created" in first
    assert "cannot be created" in second
