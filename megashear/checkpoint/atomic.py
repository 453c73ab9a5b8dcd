"""Write an output directory completely or not at all.

Imports nothing of megashear but `console`, `errors` and `files`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from megashear.console import signals_interrupt
from megashear.errors import CheckpointError
from megashear.files import flush, locked


@contextmanager
def whole_directory(
    directory: str | Path, *, overwrite: bool, content: Sequence[str]
) -> Iterator[Path]:
    """Yield a directory to write into; it is renamed to `directory` when the block succeeds.

    It is a hidden sibling of the final directory. Whatever ends the block early (Ctrl-C,
    SIGTERM and SIGHUP too) removes it and leaves what was there before. An empty directory may be
    there; with `overwrite`, a former result.

    Args:
        directory: of the result.
        overwrite: whether a former result is replaced.
        content: patterns of the names in a result, those of directories ending in `/`. The first
            is of a file that every result has.

    Raises:
        CheckpointError: something is there that may not be replaced, another process is writing
            there, or writing failed.
    """
    try:
        final = Path(directory).resolve()
        _check_replaceable(final, overwrite, content)
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}") from error
    partial = final.with_name(f".{final.name}.partial")
    try:
        # Not the directory that is written: of one, NFS gives no lock.
        lock = final.with_name(f".{final.name}.lock")
        text = f"{final}: another process is writing it (it holds {lock}). Wait for it to end, or "
        with signals_interrupt(), locked(lock, CheckpointError(text + "give another directory")):
            try:
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()
                yield partial
                flush_tree(partial)
                _check_replaceable(final, overwrite, content)  # what came there meanwhile
                _swap(partial, final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{final}: cannot be written: {error}") from error


def _check_replaceable(final: Path, overwrite: bool, content: Sequence[str]) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{final} exists. Remove it, or allow it with --overwrite")
    if not (final / content[0]).is_file():
        text = f"{final} is not overwritten: it holds no {content[0]}. Remove it first"
        raise CheckpointError(text)
    inside = sorted(path.name + "/" * path.is_dir() for path in final.iterdir())
    unknown = [name for name in inside if not any(fnmatch(name, ours) for ours in content)]
    if unknown:
        raise CheckpointError(
            f"{final} is not overwritten: it holds {', '.join(unknown)}, which no result "
            "holds and which would be lost. Move what you need away first"
        )


def _swap(partial: Path, final: Path) -> None:
    former = final.with_name(f".{final.name}.former")
    try:
        if final.exists():
            shutil.rmtree(former, ignore_errors=True)
            os.replace(final, former)
        os.replace(partial, final)
    except BaseException:
        if former.exists() and not final.exists():
            os.replace(former, final)
        raise
    flush(final.parent)
    shutil.rmtree(former, ignore_errors=True)


def flush_tree(directory: Path) -> None:
    """Make all files below a directory, and their names, survive a crash of the machine."""
    for path in (*directory.rglob("*"), directory):
        flush(path)
