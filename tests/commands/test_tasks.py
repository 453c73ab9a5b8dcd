"""What an example does again and what it does not: done, changed, failed and interrupted tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megashear import tasks
from megashear.errors import ShearError
from tests.support.make_tokenizer import REPOSITORY


def task(name: str, command: str = "", reads: tuple[Path, ...] = ()) -> tasks.Task:
    """Adds a line to NAME/made and counts how often it ran, then does what else is asked."""
    script = f"mkdir -p {name}; echo x >> {name}/made; echo x >> {name}.count; {command}"
    return tasks.Task(name, name, ("sh", "-c", script), reads)


def go(folder: Path, *todo: tasks.Task) -> tasks.TaskRunner:
    runner = tasks.TaskRunner(folder)
    runner.run_all(todo)
    return runner


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def counts(folder: Path) -> dict[str, int]:
    """How often each stage ran."""
    return {file.stem: lines(file) for file in sorted(folder.glob("*.count"))}


def test_a_done_task_is_not_run_again_and_keeps_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = go(tmp_path, task("a", "sleep 0.05; echo hello"), task("b"))
    assert first.seconds["a"] >= 0.05
    shown = capsys.readouterr().out
    assert "[1/2] a\n" in shown and "    hello\n" in shown
    assert (tmp_path / "logs" / "a.log").read_text() == "hello\n"
    again = go(tmp_path, task("a", "sleep 0.05; echo hello"), task("b"))
    assert counts(tmp_path) == {"a": 1, "b": 1}
    assert again.seconds == first.seconds
    assert "[1/2] a: done before" in capsys.readouterr().out


def test_a_changed_task_is_made_anew_with_all_that_follow(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 1")
    before = (task("a"), task("b", reads=(file,)), task("c"), task("d"))
    go(tmp_path, *before)
    file.write_text("steps: 2")
    go(tmp_path, *before)
    assert counts(tmp_path) == {"a": 1, "b": 2, "c": 2, "d": 2}
    go(tmp_path, *before[:3], task("d", "true"))
    assert counts(tmp_path) == {"a": 1, "b": 2, "c": 2, "d": 3}
    assert all(lines(tmp_path / name / "made") == 1 for name in "abcd")  # nothing old is left


def test_a_task_whose_result_is_gone_is_made_again(tmp_path: Path) -> None:
    go(tmp_path, task("a"), task("b"))
    (tmp_path / "a" / "made").unlink()
    (tmp_path / "a").rmdir()
    go(tmp_path, task("a"), task("b"))
    assert counts(tmp_path) == {"a": 2, "b": 1}


def test_a_failing_command_stops_with_its_log_named_and_goes_on_when_mended(
    tmp_path: Path,
) -> None:
    file = tmp_path / "mended"
    failing = task("b", f"echo broken >&2; test -e {file}")
    with pytest.raises(ShearError) as error:
        go(tmp_path, task("a"), failing, task("c"))
    log = tmp_path / "logs" / "b.log"
    assert str(error.value) == (f"task b failed with status 1. Its output is above and in {log}")
    assert log.read_text() == "broken\n"
    assert counts(tmp_path) == {"a": 1, "b": 1}
    file.touch()
    go(tmp_path, task("a"), failing, task("c"))
    assert counts(tmp_path) == {"a": 1, "b": 2, "c": 1}
    assert lines(tmp_path / "b" / "made") == 2  # it found what it had begun


def test_what_an_unfinished_task_began_from_other_input_is_removed(tmp_path: Path) -> None:
    """Else it would go on from a model that is no longer the one before it."""
    failing = task("b", "exit 3")
    with pytest.raises(ShearError, match="status 3"):
        go(tmp_path, task("a"), failing)
    with pytest.raises(ShearError, match="status 3"):
        go(tmp_path, task("a", "true"), failing)
    assert lines(tmp_path / "b" / "made") == 1


INTERRUPTED = """
import sys
from pathlib import Path
from megashear.console import run
from tests.commands.test_tasks import go, task
# By built-ins alone: a shell whose child dies of the signal would go on.
waits = task("b", "test -e b.asleep || { : > b.asleep; exec sleep 60; }")
run(lambda: go(Path(sys.argv[1]), task("a"), waits) and 0)
"""


def test_ctrl_c_ends_it_and_the_task_goes_on_next_time(tmp_path: Path) -> None:
    """A real one, to the whole group, as a terminal sends it."""
    command = (sys.executable, "-c", INTERRUPTED, str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    marker = tmp_path / "stages" / "b.json"
    while process.poll() is None and not (tmp_path / "b.asleep").is_file():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error.strip()) == (130, "interrupted")
    state = json.loads(marker.read_text())
    assert not state["done"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert counts(tmp_path) == {"a": 1, "b": 2}
    assert json.loads(marker.read_text())["seconds"] > state["seconds"] > 0
    assert lines(tmp_path / "b" / "made") == 2


def keeping(folder: Path, *todo: tasks.Task, adopts: bool = False) -> None:
    tasks.TaskRunner(folder / "work", folder, keeps=True).run_all(todo, adopts=adopts)


def test_what_is_to_be_kept_is_not_made_again_but_told_and_can_be_adopted(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2 * tasks.SMALL))
    keeping(tmp_path, task("a", reads=(tmp_path / "weights",)), task("b"))
    file.write_bytes(b"x" + bytes(2 * tasks.SMALL - 1))  # of the same size
    changed = (replace(task("a", reads=(file,)), settings={"lr": 2}), task("b"))
    with pytest.raises(ShearError) as error:
        keeping(tmp_path, *changed)
    told = str(error.value)
    assert "a (task a): command was sh -c" in told
    assert "lr was None, is 2" in told and f"{file} has changed" in told
    assert "b (task b): what it was made of has changed" in told
    keeping(tmp_path, *changed, adopts=True)
    keeping(tmp_path, *changed)
    assert counts(tmp_path) == {"a": 1, "b": 1}


def test_what_was_made_by_hand_is_told_and_can_be_adopted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "run").mkdir()
    todo = (task("a"), replace(task("run"), resumes=True))
    with pytest.raises(ShearError, match=r"a \(task a\): not made by this command"):
        keeping(tmp_path, *todo)
    keeping(tmp_path, *todo, adopts=True)
    assert counts(tmp_path) == {"run": 1}  # which may have been unfinished


def test_one_process_at_a_time_runs_the_tasks(tmp_path: Path) -> None:
    again = f"{sys.executable} -c 'from tests.commands.test_tasks import *; go(Path(sys.argv[1]))'"
    environment = f"PYTHONPATH={REPOSITORY}"
    with pytest.raises(ShearError, match="task a failed"):
        go(tmp_path, task("a", f"{environment} {again} {tmp_path}"))
    log = (tmp_path / "logs" / "a.log").read_text()
    assert f"ShearError: {tmp_path}: in use by another process" in log


def test_a_command_that_knows_what_is_done_always_runs(tmp_path: Path) -> None:
    for _ in range(2):
        keeping(tmp_path, replace(task("a"), repeats=True), task("b"))
    assert counts(tmp_path) == {"a": 2, "b": 1}
