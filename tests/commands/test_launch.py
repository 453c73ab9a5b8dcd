"""`megashear launch` on one machine: how a run's processes end is how it ends."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from megashear.cli import execute
from tests.support.forks import Forked

# Two processes; of the second one the argument says how it ends.
SCRIPT = """
import os, signal, sys, time
assert os.environ["WORLD_SIZE"] == "2"
def say(text):  # at once: both write into one pipe
    os.write(1, (text + "\\n").encode())
say(f"rank {os.environ['RANK']} {sys.argv[1:]}")
if os.environ["RANK"] == "1":
    if sys.argv[1] == "--status":
        sys.exit(int(sys.argv[2]))
    if sys.argv[1] == "--kill":
        os.kill(os.getpid(), signal.SIGKILL)
def save(number, frame):
    time.sleep(1)
    say("saved")
    sys.exit(128 + number)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, save)
say("ready")
time.sleep({"--go": 0, "--nohup": 3}.get(sys.argv[1], 60))
"""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Started:
    """A launch in an interpreter of its own, with what a Forked has."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        self.send_signal, self._lines = self._process.send_signal, ""

    def said(self) -> tuple[str, str]:
        """What is in stdout and stderr by now, with one line more."""
        self._lines += self._process.stdout.readline()  # type: ignore[union-attr]
        return self._lines, ""

    def end(self, timeout: float) -> tuple[int, str, str]:
        """Wait for the end: status, stdout, stderr."""
        try:
            out, err = self._process.communicate(timeout=timeout)
        finally:
            self._process.kill()
        return self._process.returncode, self._lines + out, err


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Status, output and messages, by how it was ended; all started at once."""
    script = tmp_path_factory.mktemp("launch") / "a script.py"
    script.write_text(SCRIPT)
    ways = ("--go", "--status 2", "--kill", "--nohup SIGHUP")
    ways += tuple(f"--wait {stop.name}" for stop in SIGNALS)
    launch = ["launch", "--nproc-per-node", "2", str(script)]
    real = {"--go": [], "--nohup SIGHUP": ["nohup"]}
    importlib.import_module("torch.distributed.run")  # once, for the forks
    started: dict[str, Forked | Started] = {
        way: Started([*real[way], sys.executable, "-m", "megashear", *launch, *way.split()])
        if way in real
        else Forked(partial(execute, [*launch, *way.split()]), script.parent)
        for way in ways
    }
    found = {}
    for way, process in started.items():
        if way.startswith(("--wait", "--nohup")):
            while process.said()[0].count("ready") < 2:
                time.sleep(0.02)
            process.send_signal(signal.Signals[way.split()[1]])
        found[way] = process.end(timeout=100)
    return found


def test_all_is_well(ends: dict[str, tuple[int, str, str]]) -> None:
    status, out, err = ends["--go"]
    assert (status, err) == (0, "")
    ranks = [f"rank {rank} ['--go']" for rank in range(2)]
    assert sorted(out.splitlines()) == sorted([*ranks, "ready", "ready"])


def test_the_status_is_that_of_the_process_that_failed(
    ends: dict[str, tuple[int, str, str]],
) -> None:
    status, _, err = ends["--status 2"]
    assert (status, err) == (2, "")  # it has said itself what was wrong


def test_a_process_that_was_killed_is_named(ends: dict[str, tuple[int, str, str]]) -> None:
    status, _, err = ends["--kill"]
    assert status == 128 + signal.SIGKILL
    (line,) = err.splitlines()
    assert line.startswith("error: rank 1 (pid ")
    assert line.endswith(" died of SIGKILL")


@pytest.mark.parametrize("stop", SIGNALS, ids=lambda stop: stop.name)
def test_a_signal_reaches_the_processes_which_save(
    ends: dict[str, tuple[int, str, str]], stop: signal.Signals
) -> None:
    status, out, err = ends[f"--wait {stop.name}"]
    assert (status, err) == (128 + stop, "")
    assert out.count("saved") == 2


def test_under_nohup_a_lost_terminal_is_no_end(ends: dict[str, tuple[int, str, str]]) -> None:
    status, out, _ = ends["--nohup SIGHUP"]
    assert (status, out.count("ready"), out.count("saved")) == (0, 2, 0)


@pytest.mark.parametrize("number", ["0", "-3", "two"])
def test_a_wrong_number_is_refused_by_its_option(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        execute(["launch", "--nproc-per-node", number, "script.py"])
    assert "--nproc-per-node: invalid" in capsys.readouterr().err
