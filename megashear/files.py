"""Small files that are written whole and survive a crash of the machine, and lock files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path

MAX_BYTES = 2**26
"""Bytes; the index of a model with half a million tensors has fewer."""


def hub_hint(path: str | Path) -> str:
    """Return how to fetch what is no path here but may be a model's name on a hub, else nothing."""
    hub = re.fullmatch(r"([\w.-]+)/([\w.-]+)", str(path))
    if hub is None or Path(hub[1]).exists():
        return ""
    command = f"hf download {path} --local-dir models/{hub[2]}"
    return f"If it is the name of a model on the Hugging Face hub, download it: {command}"


def flush(path: Path) -> None:
    """Make a file, or the names in a directory, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_small(file: Path) -> str:
    """Return the text of a small file.

    Raises:
        OSError: it is missing, or no ordinary file (of a pipe or a device there would be no end),
            or larger than such files are.
    """
    size = file.stat().st_size
    if not file.is_file():
        raise OSError(None, "not an ordinary file")
    if size > MAX_BYTES:
        raise OSError(None, f"has {size:,} bytes; {MAX_BYTES:,} are the most for such a file")
    return file.read_text(encoding="utf-8")


def write_whole(file: Path, text: str) -> None:
    """Write a small file under a temporary name and rename it.

    Raises:
        OSError: it cannot be written; the temporary file is removed.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        flush(file.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(file: Path, refusal: Exception | None = None) -> Iterator[None]:
    """Hold a lock file while the block runs, and remove it afterwards.

    It is a flock: it excludes other threads too, nothing that this process opens or closes releases
    it by accident, and it ends with the process and what that has forked. (The lock of a run is a
    POSIX lock instead, since what a run forks must not keep it: see `training.run_lock`.) On a file
    system without locks the block runs without one.

    Args:
        file: the lock file; its directory is made if it is missing.
        refusal: raised if another process holds the lock; None waits for it.

    Raises:
        OSError: the file cannot be opened.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
            except BlockingIOError:
                assert refusal is not None
                raise refusal from None
            except OSError:
                pass  # a file system without locks
            if not _is_at(stream.fileno(), file):
                continue  # its holder has just removed it
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    file.unlink()
            return


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def write_durably(file: Path, text: str, error: type[Exception]) -> None:
    """Write a small file as `write_whole` does, and raise `error` where that fails.

    Raises:
        error: the file cannot be written (a full disk).
    """
    try:
        write_whole(file, text)
    except OSError as reason:
        raise error(f"{file}: cannot be written: {reason}") from reason
