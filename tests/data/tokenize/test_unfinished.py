"""Interrupted at any moment, `megashear tokenize` goes on, and its files are those of one run."""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import zstandard

from megashear.data.tokenize import jsonl, unfinished
from megashear.data.tokenize.preprocess import tokenize_files
from megashear.errors import DataError
from tests.support.make_tokenizer import REPOSITORY, make_tokenizer, real_texts, write_jsonl

OUTPUTS = [f"x_{part}.{kind}" for part in ("train", "valid") for kind in ("bin", "idx", "json")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.model"


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal after each of some chunks, and no waiting for the disk."""
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 6_000)
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_inputs(folder: Path, copies: int = 1) -> list[str]:
    """One file plain, one gzip, one zstd, with different text."""
    packers: dict[str, Callable[[bytes], bytes]] = {
        "a.jsonl": bytes,
        "b.jsonl.gz": gzip.compress,
        "c.jsonl.zst": zstandard.compress,
    }
    texts = [text[:300] for text in real_texts()]
    for number, (name, pack) in enumerate(packers.items()):
        records = [{"text": text, "id": text[:9]} for text in ["", *texts[number::3]]]
        path = write_jsonl(folder / name, records * copies)
        path.write_bytes(pack(path.read_bytes()))
    return [str(folder / name) for name in packers]


def contents(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, hidden files too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_fork(function: Callable[[], Any]) -> int:
    """Run a function in a forked process; its status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            function()
            os._exit(0)
        os._exit(1)
    status: int = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status


@pytest.mark.usefixtures("small_steps")
def test_killed_at_every_write_to_disk(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each flush, rename and deletion that a run makes; about 5 seconds."""
    inputs = write_inputs(tmp_path / "in")

    def run(name: str) -> Any:
        return tokenize_files(
            inputs, tokenizer, tmp_path / name / "x", valid_fraction=0.3, workers=1
        )

    whole = run("whole")
    expected = contents(tmp_path / "whole")
    assert sorted(expected) == sorted(OUTPUTS)

    def run_killed_at(fatal: int) -> None:
        calls = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counting

        for name in ("fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        run(str(fatal))

    for fatal in range(1, 1000):
        status = in_fork(partial(run_killed_at, fatal))
        out = tmp_path / str(fatal)
        made = {path.name for path in out.iterdir()}
        for part in ("train", "valid"):
            assert f"x_{part}.bin" not in made or f"x_{part}.idx" in made
            assert f"x_{part}.json" not in made or {f"x_{part}.bin", f"x_{part}.idx"} <= made
        if status == 0:
            break
        assert status == -signal.SIGKILL
        report = run(str(fatal))
        assert contents(out) == expected
        assert list(report.outputs.values()) == list(whole.outputs.values())
        if report.seconds:  # else all was there already
            assert report.empty == whole.empty
    assert fatal > 50


def start(tokenizer: Path, inputs: list[str], output: Path) -> subprocess.Popen[str]:
    """The command, with a journal after each of many chunks, as a session of its own."""
    code = (
        "from megashear import cli; from megashear.data.tokenize import jsonl, unfinished\n"
        "jsonl.CHUNK_BYTES, unfinished.SAVE_SECONDS = 5000, 0.0\n"
        "cli.main()"
    )
    arguments = ["tokenize", "--input", *inputs, "--tokenizer", tokenizer, "--output", output]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), "--workers", "2"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(file: Path, text: str) -> None:
    """Until a file is there and holds a text."""
    deadline = time.monotonic() + 60
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_interrupted_command_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    """Two workers; Ctrl-C in the first of three files, SIGTERM, SIGKILL in the last; 5 seconds."""
    inputs = write_inputs(tmp_path / "in", copies=30)
    out = tmp_path / "out"
    journal = out / ".x.tokenize" / "journal.json"
    tokenize_files(inputs, tokenizer, tmp_path / "whole" / "x", workers=1)
    for number, sent in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)):
        process = start(tokenizer, inputs, out / "x")
        wait_for(journal, f'"file": {number},')
        children = psutil.Process(process.pid).children()
        if sent == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, sent)  # a terminal and Slurm send it to every process
        output, error = process.communicate(timeout=60)
        assert "Traceback" not in error and output == ""
        assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130)
        assert os.listdir(out) == [".x.tokenize"]
        assert ("unfinished work is kept in" in error) == (sent != signal.SIGKILL)
        assert ("continuing after" in error) == (number > 0)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive and len(children) >= 2  # its processes go with it
    output, error = start(tokenizer, inputs, out / "x").communicate(timeout=60)
    assert "continuing after" in error and "x " in output
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_worker_ends_the_run_and_its_work_is_kept(tokenizer: Path, tmp_path: Path) -> None:
    """As the kernel does where memory runs out."""
    process = start(tokenizer, write_inputs(tmp_path / "in", copies=30), tmp_path / "out" / "x")
    journal = tmp_path / "out" / ".x.tokenize" / "journal.json"
    wait_for(journal, '"file": 0,')
    children = psutil.Process(process.pid).children()
    next(child for child in children if "spawn_main" in "".join(child.cmdline())).kill()
    output, error = process.communicate(timeout=60)
    assert (output, process.returncode, journal.exists()) == ("", 2, True)
    assert "Use fewer --workers" in error and "unfinished work is kept in" in error
    assert "Traceback" not in error and not psutil.wait_procs(children, timeout=20)[1]


def is_importing(process: psutil.Process) -> bool:
    """Whether a process has begun to load numpy."""
    with contextlib.suppress(psutil.Error):
        return any("numpy" in mapped.path for mapped in process.memory_maps())
    return False


def test_interrupt_while_processes_start(tokenizer: Path, tmp_path: Path) -> None:
    """A process that still imports does not print a traceback; of a pipe, nothing is kept."""
    fifo = tmp_path / "endless.jsonl"
    os.mkfifo(fifo)
    process = start(tokenizer, [str(fifo)], tmp_path / "out" / "x")
    with fifo.open("wb", buffering=0) as writer, contextlib.suppress(BrokenPipeError):
        while not any(map(is_importing, psutil.Process(process.pid).children())):
            writer.write(b'{"text": "a"}\n' * 100)
        os.killpg(process.pid, signal.SIGINT)
        for _ in range(100):
            writer.write(b'{"text": "a"}\n' * 100)
    output, error = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", 130)
    assert "Traceback" not in error and "kept" not in error
    assert os.listdir(tmp_path / "out") == []


@pytest.fixture
def stopped(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_steps: None
) -> list[str]:
    """The inputs of a run into out/x that was interrupted after three chunks."""
    inputs = write_inputs(tmp_path / "in")
    with monkeypatch.context() as patch:
        add = unfinished.Unfinished.add
        calls = iter([add, add, add])

        def interrupt(*args: Any) -> None:
            if (call := next(calls, None)) is None:
                raise KeyboardInterrupt
            call(*args)

        patch.setattr(unfinished.Unfinished, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokenize_files(inputs, tokenizer, tmp_path / "out" / "x", workers=1)
    assert os.listdir(tmp_path / "out") == [".x.tokenize"]
    return inputs


@pytest.mark.parametrize("change", ["input", "field", "tokenizer", "valid fraction", "damaged"])
def test_of_another_job_it_begins_anew(
    tokenizer: Path,
    tmp_path: Path,
    stopped: list[str],
    change: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments: dict[str, Any] = {"inputs": stopped, "tokenizer": tokenizer}
    if change == "input":
        write_jsonl(Path(stopped[0]), ["other text"])
    elif change == "field":
        arguments["field"] = "id"
    elif change == "tokenizer":
        arguments["tokenizer"] = make_tokenizer(tmp_path / "other", 400) / "tokenizer.model"
    elif change == "valid fraction":
        arguments["valid_fraction"] = 0.3
    else:
        os.truncate(tmp_path / "out" / ".x.tokenize" / "x.bin", 100)
    capsys.readouterr()
    tokenize_files(**arguments, output=tmp_path / "out" / "x", progress=True)
    told = capsys.readouterr().err
    assert "is damaged: starting again" in told or f"{change}: starting again" in told
    tokenize_files(**arguments, output=tmp_path / "whole" / "x")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_runs_at_once_are_refused(tokenizer: Path, tmp_path: Path, stopped: list[str]) -> None:
    with (
        unfinished.work_folder(str(tmp_path / "out" / "x")),
        pytest.raises(DataError, match=r"another `megashear tokenize` is writing .*out/x "),
    ):
        tokenize_files(stopped, tokenizer, tmp_path / "out" / "x")
    tokenize_files(stopped, tokenizer, tmp_path / "out" / "x")


def test_what_was_made_is_left_alone(tokenizer: Path, tmp_path: Path) -> None:
    """The same command once more does nothing, unless what it made is not there whole."""
    inputs = write_inputs(tmp_path / "in")
    first = tokenize_files(inputs, tokenizer, tmp_path / "out" / "x")
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for overwrite in (False, True):
        again = tokenize_files(inputs, tokenizer, tmp_path / "out" / "x", overwrite=overwrite)
        assert (again.outputs, again.seconds) == (first.outputs, 0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == made
    before = contents(tmp_path / "out")
    os.truncate(tmp_path / "out" / "x.bin", 100)
    with pytest.raises(DataError, match="existing files from"):
        tokenize_files(inputs, tokenizer, tmp_path / "out" / "x")
    tokenize_files(inputs, tokenizer, tmp_path / "out" / "x", overwrite=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("small_steps")
def test_full_disk_is_named_and_the_work_goes_on_after(tokenizer: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands for the disk's."""
    inputs = write_inputs(tmp_path / "in")
    tokenize_files(inputs, tokenizer, tmp_path / "whole" / "x", workers=1)
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out" / "x"

    def run_short_of_space() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limit = len(expected["x.bin"]) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(DataError, match=f"cannot write {out}: File too large"):
            tokenize_files(inputs, tokenizer, out, workers=1)

    assert in_fork(run_short_of_space) == 0
    assert os.listdir(tmp_path / "out") == [".x.tokenize"]
    tokenize_files(inputs, tokenizer, out, workers=1)
    assert contents(tmp_path / "out") == expected
