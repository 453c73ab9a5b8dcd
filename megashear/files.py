"""Files that survive a crash of the machine, and are there whole or as they were before."""

from __future__ import annotations

import os
from pathlib import Path

LARGEST = 2**26
"""Bytes; the index of a model with half a million tensors has fewer."""


def flush(path: Path) -> None:
    """Make a file, or the names in a directory, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_small(file: Path) -> str:
    """The text of a file that people read too.

    Raises:
        OSError: it is missing, or no ordinary file (of a pipe or a device there would be no end),
            or larger than such files are.
    """
    size = file.stat().st_size
    if not file.is_file():
        raise OSError(None, "not an ordinary file")
    if size > LARGEST:
        raise OSError(None, f"has {size:,} bytes; {LARGEST:,} are the most for such a file")
    return file.read_text(encoding="utf-8")


def write_whole(file: Path, text: str) -> None:
    """Write a small file beside its place and rename it.

    Raises:
        OSError: it cannot be written; nothing is left of it.
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
