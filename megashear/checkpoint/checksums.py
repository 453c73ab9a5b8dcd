"""Checksums of all files of a checkpoint: what was cut, lost or changed is named before it is used.

SHA-256: of what hashlib has, it is among the fastest where the processor helps (docs/log.md), and
`sha256sum` checks it without megashear.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megashear.checkpoint.agreement import on_each_process, on_first_process
from megashear.console import progress
from megashear.errors import CheckpointError

FILE = "checksums.json"
Checksum = dict[str, Any]
"""bytes, sha256"""


def checksum(file: Path) -> Checksum:
    """Size and hash of a file."""
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
        directory: all that belongs in it is there.
        known: checksums that are known already, by name.
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
    """What is wrong with a checkpoint, a line for each file; a collective where there are ranks.

    Args:
        directory: of the checkpoint.
        parts: names that are looked at, with what is in them; all of them if none is given.
    """
    if not dist.is_initialized():
        return _damage(directory, parts, 0, 1)
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = on_each_process(lambda: _damage(directory, parts, rank, size))
    return sorted({line for share in shares for line in share})


def _damage(directory: Path, parts: tuple[str, ...], rank: int, size: int) -> list[str]:
    """The same, of one rank's share of the files."""
    try:
        sums: dict[str, Checksum] = json.loads((directory / FILE).read_text())
        names = [name for name in sums if not parts or name.split("/")[0] in parts]
        names.sort(key=lambda name: int(sums[name]["bytes"]))
        if not names:
            raise ValueError("it names no file")
    except FileNotFoundError:
        return [f"{FILE}: missing"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        return [f"{FILE}: damaged: {error!r}"]
    mine = names[rank::size]
    shown = progress(mine, "checking", len(mine), "files", speaks=rank == 0)
    found = {name: _difference(directory / name, sums[name]) for name in shown}
    return [f"{name}: {difference}" for name, difference in found.items() if difference]


def _difference(file: Path, expected: Checksum) -> str:
    try:
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{size:,} bytes instead of {int(expected['bytes']):,}"
        return "" if checksum(file) == expected else "its content has changed since it was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error}"


def verify(directory: Path, *parts: str) -> None:
    """Refuse a checkpoint that is not as it was written; a collective where there are ranks.

    Args:
        directory: of the checkpoint.
        parts: as of `damage`.

    Raises:
        CheckpointError: files are missing or damaged; all are named.
    """
    if lines := damage(directory, *parts):
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory}: not there any more: a run that goes on has replaced it. "
                "Start again, or raise trainer.keep_checkpoints"
            )
        raise CheckpointError(f"{directory}: damaged:\n  " + "\n  ".join(lines))
