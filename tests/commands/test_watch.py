"""`megashear watch`: what a frame tells of runs in any state, and the command in a terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from megashear import cli
from megashear.errors import DataError
from megashear.report.frame import frame
from megashear.report.runs import RecordedRun

BEGAN = 1_795_412_800.0


def start(step: int, **changes: Any) -> dict[str, Any]:
    iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(BEGAN + 10 * step))
    return {
        **{"kind": "start", "schema": 3, "step": step, "time": iso, "stage": "prune", "steps": 20},
        **{"tokens_per_step": 4096, "parameters": 6738415616, "target_parameters": 1345423360},
        **{"layout": {"tensor": 2, "pipeline": 1, "context": 1, "data": 4}, "job": "4711"},
        **{"device": "NVIDIA H100 80GB HBM3", "domain_weights": {"cc": 0.6, "github": 0.4}},
        **changes,
    }


def step(number: int) -> dict[str, Any]:
    """Steps take 8 s each; with what is between them, 10 s."""
    return {
        **{"kind": "step", "step": number, "time": BEGAN + 10 * number, "tokens": 4096 * number},
        **{"loss": 2.5, "domain_losses": {"cc": 2.61}, "lr": 1e-4, "grad_norm": 0.8},
        **{"sparsity": {"head": 0.181}, "target_sparsity": {"head": 0.25}, "seconds": 8.0},
        **{"data_seconds": 0.4, "tokens_per_second": 14730.0, "mfu": 0.243, "memory_gib": 61.2},
    }


def evaluation(number: int) -> dict[str, Any]:
    return {
        **{"kind": "evaluation", "step": number, "time": BEGAN + 10 * number + 1, "seconds": 1.0},
        **{"losses": {"cc": 2.1, "github": 0.8}, "references": {"cc": 1.9643}},
        **{"gaps": {"cc": 0.1357}, "domain_weights": {"cc": 0.7, "github": 0.3}},
        **{"kept": {"head": [16, 14, 15]}},
    }


SAVE = {"kind": "save", "step": 4, "time": BEGAN + 42, "seconds": 12.3}
END = {"kind": "end", "step": 5, "time": start(5)["time"], "verdict": ""}
FIVE = [start(0), evaluation(0), *map(step, range(1, 5)), evaluation(4), SAVE, step(5)]


def write(directory: Path, records: list[Any]) -> Path:
    """A run directory with these records, or lines that are none; replaced as a resume does."""
    directory.mkdir(exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    partial = directory / "partial"
    partial.write_text("".join(line + "\n" for line in lines))
    partial.rename(directory / "metrics.jsonl")
    return directory


def text(*directories: Path, after: float = 52.0, width: int = 120) -> str:
    """A frame, so many seconds after the begin."""
    console = Console(file=io.StringIO(), width=width)
    console.print(frame([RecordedRun.read(each) for each in directories], BEGAN + after, width))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in shown.splitlines())
    return str(shown)


def words(shown: str) -> list[str]:
    """Its lines with single spaces."""
    return [" ".join(line.split()) for line in shown.splitlines()]


def test_a_frame_tells_how_far_and_how_well(tmp_path: Path) -> None:
    shown = words(text(write(tmp_path / "run", FIVE)))
    assert shown[0].endswith("/run running")
    assert shown[1].startswith("prune ")
    assert shown[1].endswith("step 5 of 20 (25%), 0:02:30 h left")  # 15 x 10 s
    assert "6,738,415,616 -> 1,345,423,360 parameters" in shown[2]
    assert "8 x NVIDIA H100 80GB HBM3 · tensor 2 · data 4 · job 4711" in shown[2]
    assert "loss 2.5000 · lr 1.00e-04 · grad norm 0.80" in shown[3]
    assert "14,730 tok/s · MFU 24.3% · data wait 5.0%" in shown[3]
    assert shown[4] == "20,480 of 81,920 tokens · 61.2 GiB · saved at step 4, in 12.3 s"
    assert "domain training at step 4 reference gap weight moved" in shown
    assert "cc 2.6100 2.1000 1.9643 +0.1357 0.7000 +0.0000" in shown
    assert "github - 0.8000 - - 0.3000 +0.0000" in shown
    absent = {**step(6), "domain_losses": {"github": 0.95}}  # of a domain that it drew nothing of
    shown = words(text(write(tmp_path / "run", [*FIVE, absent])))
    assert "cc 2.6100 2.1000 1.9643 +0.1357 0.7000 +0.0000" in shown
    assert "github 0.9500 0.8000 - - 0.3000 +0.0000" in shown
    assert any(re.fullmatch(r"head \S+ 0.1810 0.2500 -0.0690 14 to 16", line) for line in shown)


STATES: dict[str, tuple[list[Any], float, str]] = {
    "running": (FIVE, 100, "running"),
    "silent": (FIVE, 50 + 185, "running, silent for 0:03:05 h"),
    "dead": (FIVE, 50 + 720, "silent for 0:12:00 h: perhaps dead"),
    "stopped": ([*FIVE, {**END, "reason": "SIGUSR1"}], 9e5, "stopped by SIGUSR1"),
    "complete": ([*FIVE, {**END, "reason": "complete"}], 9e5, "complete"),
    "started again": ([*FIVE, {**END, "reason": "SIGUSR1"}, start(5)], 60, "running"),
    "begins": ([start(0)], 5, "running"),
    "nothing": ([], 5, "not begun"),
    "no times": ([{"kind": "step", "step": 3}], 5, "no sign of when"),
}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_run(name: str, tmp_path: Path) -> None:
    records, after, expected = STATES[name]
    first = words(text(write(tmp_path / "run", records), after=after))[0]
    assert first.endswith(f"/run {expected}")


def test_patience_is_that_of_the_run(tmp_path: Path) -> None:
    """What it would end itself after, and the longest thing that it does between records."""
    run = write(tmp_path / "run", [*FIVE[:-1], step(5) | {"seconds": 600.0}])
    (run / "config.yaml").write_text(yaml.safe_dump({"platform": {"timeout_minutes": 30.0}}))
    assert "perhaps dead" not in text(run, after=50 + 2399)
    assert "perhaps dead" in text(run, after=50 + 2401)


def test_odd_fields_are_left_out_and_a_line_that_is_no_record_ends_the_reading(
    tmp_path: Path,
) -> None:
    broken = {"kind": "step", "step": 6, "time": "x", "loss": [], "sparsity": {"head": "y"}}
    odd = {
        "kind": "evaluation",
        "step": 6,
        "losses": 3,
        "domain_weights": {"cc": None},
        "kept": {"head": 1},
    }
    run = write(tmp_path / "run", [*FIVE, broken, odd])
    assert "step 6 of 20" in text(run)
    for line in ('{"kind": "st', "\x00\x00", "[]", '{"kind": "step"}', '{"step": 5.5}'):
        shown = text(write(run, [*FIVE, line, broken, odd]))
        assert "step 5 of 20" in shown
        assert "metrics.jsonl, line 10: not a record. Nothing after it is shown" in shown
    write(run, [start(0, steps="many", layout=[1], job=3, weights=None), step(1)])
    assert "step 1" in text(run)


def test_a_run_is_followed_through_a_resume(tmp_path: Path) -> None:
    """Whether the file has become shorter or longer meanwhile."""
    run = RecordedRun.read(write(tmp_path / "run", FIVE))
    more = [step(number) for number in range(3, 15)]
    for dropped in ([start(0), step(1), start(1)], [start(0), step(1), step(2), start(2), *more]):
        write(tmp_path / "run", dropped)
        assert run.follow()
        assert run.step == dropped[-1]["step"]
        assert [r["step"] for r in run.records["step"]] == [
            r["step"] for r in dropped if r["kind"] == "step"
        ]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(step(15)) + "\n" + json.dumps(step(16))[:20])
    assert run.follow()
    assert run.step == 15  # the last line is not whole yet


Steps = list[int | str]
"""Of step records; "4" is a start that goes on from step 4."""


@pytest.mark.parametrize(
    ("written", "kept", "problem"),
    [
        ([1, 2, 3, "1", 2, 3, 4], [1, 2, 3, 4], None),  # what a resume has not dropped
        ([1, 2, 3, 3, 4], [1, 2, 3, 4], None),
        ([1, 2, 3, 4, 2, 5], [1, 2, 3, 4], "line 6: step 2 after 4, and no start between"),
        ([1, 2, 3, 4, "3", 1, 5], [1, 2, 3], "line 7: step 1 after 3"),
    ],
)
def test_steps_go_back_to_a_start_only(
    written: Steps, kept: list[int], problem: str | None, tmp_path: Path
) -> None:
    """A step that cannot be true ends the reading."""
    lines = [start(0), *(start(int(n)) if isinstance(n, str) else step(n) for n in written)]
    run = RecordedRun.read(write(tmp_path / "run", lines))
    assert [record["step"] for record in run.records["step"]] == kept
    assert len(run.problems) == (problem is not None)
    assert not problem or run.problems[0].startswith(f"metrics.jsonl, {problem}")
    assert run.step == kept[-1]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_nothing_is_cut_off_on_a_narrow_terminal(width: int, tmp_path: Path) -> None:
    long = "a-domain-of-a-name"
    renamed = json.loads(json.dumps(FIVE).replace('"cc"', f'"{long}"'))
    runs = [write(tmp_path / name, renamed) for name in ("run", "other")]
    shown = text(runs[0], width=width)
    for told in (long, "+0.1357", "0.7000", "0.1810", "0.2500", "14 to 16"):
        assert told in shown.replace("\n", ""), told
    if width >= 60:
        assert "…" not in shown
        assert "running" in text(*runs, width=width)


def test_several_runs_have_a_line_each(tmp_path: Path) -> None:
    complete = write(tmp_path / "b", [*FIVE, {**END, "reason": "complete"}])
    shown = words(text(write(tmp_path / "a", FIVE), complete, width=200))
    assert any(
        line.startswith("a prune 5/20 0:02:30 h 2.5000 +0.1357 14,730 running") for line in shown
    )
    assert any(line.startswith("b prune 5/20 - 2.5000 +0.1357 14,730 complete") for line in shown)


def test_once_prints_a_frame_without_torch(tmp_path: Path) -> None:
    run = write(tmp_path / "run", FIVE)
    code = "import sys; from megashear import cli; cli.execute(sys.argv[1:])"
    code += "; print([name for name in ('torch', 'megatron') if name in sys.modules])"
    command = [sys.executable, "-c", code, "watch", "--once", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "perhaps dead" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    with pytest.raises(DataError, match=r"no directory of a run: .*absent"):
        cli.execute(["watch", "--once", str(run), str(tmp_path / "absent")])
    for options in ([], ["--once"]):
        with pytest.raises(DataError, match=f"{tmp_path} is no directory of a run: it has none of"):
            cli.execute(["watch", *options, str(tmp_path)])


class Watched:
    """The command in a pseudo-terminal."""

    def __init__(self, *arguments: Path) -> None:
        self.leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megashear", "watch", *map(str, arguments)],
            **dict.fromkeys(("stdin", "stdout", "stderr"), follower),
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )  # type: ignore[call-overload]
        os.close(follower)
        self.said = ""

    def until(self, told: str) -> None:
        """Read what it shows until it tells something."""
        limit = time.monotonic() + 30
        while told not in self.said:
            assert self.read() and time.monotonic() < limit, self.said

    def ended(self) -> int:
        """Read on until it has ended; its status."""
        while self.read():
            pass
        return self.process.wait(20)

    def read(self) -> bool:
        """Read what there is; whether there may be more."""
        try:
            if select.select([self.leader], [], [], 0.2)[0]:
                self.said += os.read(self.leader, 2**16).decode(errors="replace")
        except OSError:  # it has ended
            return False
        return True


def test_it_follows_and_ends(tmp_path: Path) -> None:
    """A run that does not exist yet, and goes on to its end; another, left by Ctrl-C."""
    follows = Watched(tmp_path / "run")
    left = Watched(write(tmp_path / "other", FIVE))
    try:
        follows.until("not begun")
        write(tmp_path / "run", FIVE)
        follows.until("step 5 of 20")
        write(tmp_path / "run", [*FIVE[:6], start(4)])
        follows.until("step 4 of 20")
        write(tmp_path / "run", [*FIVE, {**END, "reason": "complete"}])
        assert follows.ended() == 0
        left.until("perhaps dead")
        left.process.send_signal(signal.SIGINT)
        assert left.ended() == 130
        assert "interrupted" in left.said
    finally:
        for watched in (follows, left):
            watched.process.kill()
            watched.process.wait()
            os.close(watched.leader)
    after_screen = left.said.rpartition("\x1b[?1049l")[2]  # the last frame stays
    assert "perhaps dead" in after_screen and "Traceback" not in after_screen
