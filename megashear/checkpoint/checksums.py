"""Checksums of all files of a checkpoint, so that damaged files are named before they are used.

They are SHA-256: among the fastest in hashlib where the processor has instructions for it
(docs/log.md), and `sha256sum` checks them without megashear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.files import read_small
from megashear.platform.collectives import on_each_process, on_first_process

FILE = "checksums.json"
Checksum = dict[str, Any]
"""bytes, sha256"""


def checksum(file: Path) -> Checksum:
    """Return the size and hash of a file."""
    digest, size = hashlib.sha256(), 0
    block = memoryview(bytearray(2**18))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            size += count
    return {"bytes": size, "sha256": digest.hexdigest()}


def seal(directory: Path, known: Mapping[str, Checksum]) -> None:
    """Write the checksums of all files in a directory; a collective.

    Args:
        directory: complete except for the checksums.
        known: checksums that are computed already, by name.
    """
    found = on_first_process(
        lambda: sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    )
    mine = [name for name in found if name not in known][dist.get_rank() :: dist.get_world_size()]
    shown = progress(mine, "checksums", len(mine), "files", speaks=dist.get_rank() == 0)
    parts = on_each_process(lambda: {name: checksum(directory / name) for name in shown})
    sums = dict(known)
    for part in parts:
        sums |= part
    text = json.dumps({name: sums[name] for name in found}, indent=1)
    on_first_process(lambda: (directory / FILE).write_text(text))


def damage(directory: Path, *parts: str) -> list[str]:
    """Return a line for each damaged file of a checkpoint; a collective where there are ranks.

    Args:
        directory: of the checkpoint.
        parts: names of the files and directories to check; all if none is given.
    """
    if not dist.is_initialized():
        return _damage(directory, parts, 0, 1)
    rank, size = dist.get_rank(), dist.get_world_size()
    by_rank = on_each_process(lambda: _damage(directory, parts, rank, size))
    return sorted({line for lines in by_rank for line in lines})


def _damage(directory: Path, parts: tuple[str, ...], rank: int, size: int) -> list[str]:
    """Check one rank's shard of the files."""
    sums, problems = _listed(directory, parts)
    mine = sorted(sums, key=lambda name: sums[name]["bytes"])[rank::size]
    shown = progress(mine, "checking", len(mine), "files", speaks=rank == 0)
    return problems + [line for name in shown for line in _difference(directory, name, sums[name])]


def _listed(directory: Path, parts: tuple[str, ...]) -> tuple[dict[str, Checksum], list[str]]:
    """Return checksums by name, in the order of writing, and the problems of the list itself."""
    try:
        sums: dict[str, Checksum] = json.loads(read_small(directory / FILE))
        names = [name for name in sums if not parts or name.split("/")[0] in parts]
        if not names or not all(_is_checksum(sums[name]) for name in names):
            raise ValueError("it names no file, or not its size and hash")
        outside = [name for name in names if not _is_inside(name)]
        if outside:
            raise ValueError(f"it names {outside[0]!r:.200}, which is no file of a checkpoint")
        return {name: sums[name] for name in sorted(names, key=lambda n: (len(n), n))}, []
    except FileNotFoundError:
        return {}, [f"{FILE}: missing"]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return {}, [f"{FILE}: damaged: {error!r}"]


def _is_checksum(value: Any) -> bool:
    types = {name: type(each) for name, each in value.items()}
    return types == {"bytes": int, "sha256": str}


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.isprintable() and name == "/".join(parts) and not {"..", "/"} & {*parts}


def _difference(directory: Path, name: str, expected: Checksum) -> list[str]:
    """Return what is wrong with a file: one line or none."""
    try:
        size = (directory / name).stat().st_size
        if not (directory / name).is_file():
            return [f"{name}: not an ordinary file"]
        if size != expected["bytes"]:
            return [f"{name}: {size:,} bytes instead of {expected['bytes']:,}"]
        if checksum(directory / name) != expected:
            return [f"{name}: its content has changed since it was written"]
        return []
    except FileNotFoundError:
        return [f"{name}: missing"]
    except OSError as error:
        return [f"{name}: cannot be read: {error}"]


def verify(directory: Path, *parts: str) -> None:
    """Refuse a damaged checkpoint; a collective where there are ranks.

    Args:
        directory: of the checkpoint.
        parts: as of `damage`.

    Raises:
        CheckpointError: files are missing or damaged; all are named.
    """
    _refuse(directory, damage(directory, *parts))


@contextmanager
def verifying(directory: Path, *parts: str) -> Iterator[None]:
    """Verify in a background thread while the block reads the checkpoint; not a collective.

    Damage is raised at the end of the block, in place of an error that the block itself raised.
    """
    sums, lines = _listed(directory, parts)
    with ThreadPoolExecutor(1) as background:
        tasks = [background.submit(_difference, directory, name, sums[name]) for name in sums]
        try:
            yield
        except CheckpointError:
            _refuse(directory, [*lines, *(line for task in tasks for line in task.result())])
            raise
        except BaseException:
            background.shutdown(cancel_futures=True)
            raise
        _refuse(directory, [*lines, *(line for task in tasks for line in task.result())])


def _refuse(directory: Path, damaged: list[str]) -> None:
    if damaged and not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no longer there: its run has saved newer checkpoints and removed it. "
            "Start again, or raise trainer.keep_checkpoints"
        )
    if damaged:
        raise CheckpointError(f"{directory}: damaged:\n  " + "\n  ".join(damaged))
