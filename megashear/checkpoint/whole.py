"""Output directories that are there whole or not at all.

Imports nothing of megashear but `errors` and `files`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megashear.errors import CheckpointError
from megashear.files import flush


@contextmanager
def whole_directory(
    directory: str | Path, *, marker: str, overwrite: bool, parts: Sequence[str] = ()
) -> Iterator[Path]:
    """Give a directory to write into; when the block ends well, it takes the name `directory`.

    It lies beside its final place under a hidden name. Whatever ends the block early (Ctrl-C too)
    removes it and leaves what was there before. An empty directory may be there; with `overwrite`,
    a former result, which is known by a file `marker` and holds no directories but `parts`.

    Raises:
        CheckpointError: something is there that may not be replaced, or writing failed.
    """
    try:
        final = Path(directory).resolve()
        _check_replaceable(final, marker, overwrite, parts)
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}") from error
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        flush_tree(partial)
        _swap(partial, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(final: Path, marker: str, overwrite: bool, parts: Sequence[str]) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{final} exists. Remove it, or allow it with --overwrite")
    if not (final / marker).is_file():
        raise CheckpointError(f"{final} is not overwritten: it holds no {marker}. Remove it first")
    inside = sorted(p.name for p in final.iterdir() if p.is_dir() and p.name not in parts)
    if inside:
        raise CheckpointError(
            f"{final} is not overwritten: it holds directories ({', '.join(inside)}), which would "
            "be lost. Move them away first"
        )


def _swap(partial: Path, final: Path) -> None:
    former = final.with_name(f".{final.name}.former")
    if final.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.replace(final, former)
    os.replace(partial, final)
    flush(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def flush_tree(directory: Path) -> None:
    """Make all files below a directory, and their names, survive a crash of the machine."""
    for path in (*directory.rglob("*"), directory):
        flush(path)
