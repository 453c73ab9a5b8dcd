"""`megashear launch` on one machine: how a run's processes end is how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megashear.cli import execute

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


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, str, str]]]:
    """Status, output and messages, by how it was ended; all started at once."""
    script = tmp_path_factory.mktemp("launch") / "a script.py"
    script.write_text(SCRIPT)
    ways = ("--go", "--status 2", "--kill", "--nohup SIGHUP")
    ways += tuple(f"--wait {stop.name}" for stop in SIGNALS)
    launch = [sys.executable, "-m", "megashear", "launch", "--nproc-per-node", "2", str(script)]
    started = {
        way: subprocess.Popen(
            [*(["nohup"] if "nohup" in way else []), *launch, *way.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for way in ways
    }
    found = {}
    for way, process in started.items():
        lines = ""
        if way.startswith(("--wait", "--nohup")):
            while lines.count("ready") < 2:
                lines += process.stdout.readline()  # type: ignore[union-attr]
            process.send_signal(signal.Signals[way.split()[1]])
        out, err = process.communicate(timeout=100)
        found[way] = (process.returncode, lines + out, err)
    yield found
    for process in started.values():
        process.kill()


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
