"""How a command ends: exit statuses and messages seen from outside, and the plain text table."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from megashear.console import progress, signals_interrupt, table


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


def source(body: str) -> str:
    """Of a command whose main function has this body."""
    return (
        "from megashear.console import run, signals_interrupt\n"
        "from megashear.errors import CheckpointError\n"
        f"def main():\n    {body}\n"
        "run(main)\n"
    )


def command(body: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    line = [sys.executable, "-c", source(body)]
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True)


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


def test_a_message_takes_the_place_of_a_bar_on_a_terminal() -> None:
    """Of whichever process: one that is killed takes no bar away."""
    leader, follower = pty.openpty()
    body = "print('step 3 |###  |', end='', flush=True); raise CheckpointError('lost')"
    done = subprocess.run([sys.executable, "-c", source(body)], stdout=follower, stderr=follower)
    os.close(follower)
    shown = os.read(leader, 1000).decode()
    os.close(leader)
    assert (done.returncode, shown) == (2, "step 3 |###  |\r\x1b[Kerror: lost\r\n")


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


STOPPED = """
    import time
    with signals_interrupt():
        try:
            print('ready', flush=True); time.sleep(60)
        finally:
            print('cleans up', flush=True); time.sleep(0.5); print('has', flush=True)
"""


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGHUP, 129, "hung up\n")],
)
def test_signals_clean_up_as_ctrl_c_does_however_often_they_come(
    sent: signal.Signals, status: int, message: str
) -> None:
    process = command(STOPPED)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(sent)
    assert process.stdout.readline() == "cleans up\n"
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output, error) == (status, "has\n", message)


def test_what_is_ignored_or_handled_stays_so() -> None:
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGTERM, handler := lambda *_: None)
    try:
        with signals_interrupt():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == handler
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def test_table_aligns_words_left_and_numbers_right() -> None:
    text = table([("layers", "32"), ("hidden size", "4,096")], ("what", "size"))
    assert text == "what          size\nlayers          32\nhidden size  4,096"


def test_table_without_rows_is_its_header() -> None:
    assert table([], ("name", "shape")) == "name  shape"
