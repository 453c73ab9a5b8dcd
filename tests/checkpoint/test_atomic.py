"""Outputs that are there whole or not at all, however many processes want to write them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megashear.checkpoint.atomic import whole_directory
from megashear.errors import CheckpointError

FORK = multiprocessing.get_context("fork")
CONTENT = ("config.json", "*.safetensors", "model/")


def write(out: Path, text: str, ready: Any = None, go: Any = None, overwrite: bool = False) -> None:
    with whole_directory(out, overwrite=overwrite, content=CONTENT) as partial:
        (partial / "config.json").write_text(text)
        if ready is not None:
            ready.set()
            assert go.wait(60)


def started(*arguments: Any) -> Any:
    """A process that is in the midst of writing, and the event that lets it end."""
    ready, go = FORK.Event(), FORK.Event()
    process = FORK.Process(target=write, args=(*arguments, ready, go))
    process.start()
    assert ready.wait(60)
    return process, go


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_writer_is_refused_and_the_first_ends_well(
    overwrite: bool, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    process, go = started(tmp_path / "out", "first")
    with pytest.raises(CheckpointError, match=r"out: another process is writing it .*\. Wait"):
        write(tmp_path / "link" / "out", "second", overwrite=overwrite)
    go.set()
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "out" / "config.json").read_text() == "first"
    assert names(tmp_path) == ["link", "out"]
    write(tmp_path / "out", "third", overwrite=True)
    assert names(tmp_path) == ["link", "out"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    process, _ = started(tmp_path / "out", "first")
    process.kill()
    process.join(60)
    assert names(tmp_path) == [".out.lock", ".out.partial"]
    write(tmp_path / "out", "second")
    assert names(tmp_path) == ["out"]


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = whole_directory(out, overwrite=False, content=CONTENT)
    whole.__enter__()
    out.mkdir()
    (out / "config.json").touch()
    with pytest.raises(CheckpointError, match="out exists"):
        whole.__exit__(None, None, None)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["config.json"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_what_was_there(sent: signal.Signals, tmp_path: Path) -> None:
    class Sent:
        def set(self) -> None:
            os.kill(os.getpid(), sent)

    write(tmp_path / "out", "former")
    with pytest.raises(KeyboardInterrupt) as stopped:
        write(tmp_path / "out", "new", Sent(), overwrite=True)
    assert stopped.value.args == (sent,)
    assert signal.getsignal(sent) == signal.SIG_DFL
    assert (tmp_path / "out" / "config.json").read_text() == "former"
    assert names(tmp_path) == ["out"]


def test_only_what_a_result_holds_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "former")
    for name in ("model", "figures", "config.json.bak"):
        (out / name).mkdir()
    for name in ("model.safetensors", "thesis.tex"):
        (out / name).touch()
    strangers = r"it holds config\.json\.bak/, figures/, thesis\.tex, which"
    with pytest.raises(CheckpointError, match=strangers):
        write(out, "new", overwrite=True)
    assert (out / "config.json").read_text() == "former"
    (out / "thesis.tex").unlink()
    for name in ("figures", "config.json.bak"):
        (out / name).rmdir()
    write(out, "new", overwrite=True)
    assert names(out) == ["config.json"]
