"""How a command ends: exit statuses and messages seen from outside, and the plain text table."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time

import pytest

from megashear.console import progress, table


class Terminal(io.StringIO):
    """Where somebody watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "speaks", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_a_bar_is_for_who_watches_the_process_that_speaks(
    stderr: type[io.StringIO], speaks: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr())
    assert list(progress(range(3), "counting", 3, "numbers", speaks=speaks)) == [0, 1, 2]
    assert ("counting" in sys.stderr.getvalue()) == shown  # type: ignore[attr-defined]


def command(body: str) -> subprocess.Popen[str]:
    """A command whose main function has this body."""
    source = (
        "from megashear.console import run\n"
        "from megashear.errors import CheckpointError\n"
        f"def main():\n    {body}\n"
        "run(main)\n"
    )
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", source], stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("pass", 0, ""),
        ("return 1", 1, ""),
        ("raise CheckpointError('no weights in /x')", 2, "error: no weights in /x\n"),
    ],
)
def test_status_and_message(body: str, status: int, message: str) -> None:
    process = command(body)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (status, message)


def test_a_bug_keeps_its_traceback() -> None:
    process = command("return 1 / 0")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" in error and "ZeroDivisionError" in error


def test_interrupt_is_130_without_traceback() -> None:
    process = command("import time; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")


def test_reader_that_leaves_is_no_traceback() -> None:
    process = command("[print('line' * 1000) for _ in range(1000)]")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert error == ""


def test_table_aligns_words_left_and_numbers_right() -> None:
    text = table([("layers", "32"), ("hidden size", "4,096")], ("what", "size"))
    assert text == "what          size\nlayers          32\nhidden size  4,096"


def test_table_without_rows_is_its_header() -> None:
    assert table([], ("name", "shape")) == "name  shape"
