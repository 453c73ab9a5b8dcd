"""Lock files: one holder at a time, whoever it is, and nothing left behind."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from megashear.files import locked


def hold_in_child(file: Path, seconds: float) -> int:
    """Return the process that holds the lock, once it does."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with locked(file):
            os.write(writer, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return child


def test_a_lock_refuses_or_waits_while_another_process_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lock"
    child = hold_in_child(file, 0.5)
    with pytest.raises(ValueError, match="in use"), locked(file, ValueError("in use")):
        pass
    with locked(file):
        assert os.waitpid(child, os.WNOHANG)[0] in (0, child)
        assert file.exists()
    assert not list(file.parent.iterdir())


def test_many_waiters_are_never_in_the_block_together(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(20):
            with locked(tmp_path / "lock"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_killed_holder_and_a_file_system_without_locks_stand_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = hold_in_child(tmp_path / "lock", 60)
    os.kill(child, 9)
    os.waitpid(child, 0)
    with locked(tmp_path / "lock", ValueError()):
        pass

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "lock", ValueError()), locked(tmp_path / "lock", ValueError()):
        pass
