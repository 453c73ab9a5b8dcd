"""Write Megatron token files: PREFIX.bin, PREFIX.idx and the fingerprint PREFIX.json.

It imports neither torch nor Megatron, so that tokenizing processes start quickly.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megashear.data.fingerprint import Fingerprint
from megashear.files import flush, write_whole

SUFFIXES = (".bin", ".idx", ".json")
_LENGTH = np.dtype(np.int32)


def token_type(vocab_size: int) -> np.dtype:
    """Return the dtype of a token file, by Megatron's own rule (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Documents:
    """Some documents: their concatenated tokens [total] and their lengths [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Counts:
    """Numbers of documents and tokens in a token file, and its highest token id."""

    documents: int = 0
    tokens: int = 0
    highest_id: int = -1

    def plus(self, new: Documents) -> Counts:
        """Return the counts after appending documents."""
        highest = max(self.highest_id, int(new.tokens.max(initial=0)))
        return Counts(self.documents + len(new.lengths), self.tokens + len(new.tokens), highest)

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Return the sizes of the unfinished files in bytes, by suffix."""
        return {".bin": self.tokens * dtype.itemsize, ".lengths": self.documents * _LENGTH.itemsize}


class TokenFile:
    """One set of unfinished token files, in a folder next to their destination until `publish`.

    Until `finish` the lengths of documents are in a file of their own, so memory does not grow.
    Unfinished files in `folder` are truncated to `counts`.
    """

    def __init__(self, prefix: str, folder: Path, dtype: np.dtype, counts: Counts) -> None:
        self.prefix = prefix
        self._partial, self._dtype = str(folder / Path(prefix).name), dtype
        sizes = counts.sizes(dtype).items()
        self._tokens, self._lengths = (_open_at(self._partial + kind, size) for kind, size in sizes)

    def add(self, documents: Documents) -> None:
        """Append documents."""
        self._tokens.write(documents.tokens.astype(self._dtype, copy=False).data)
        self._lengths.write(documents.lengths.astype(_LENGTH, copy=False).data)

    def flush(self) -> None:
        """Flush added documents to disk, so that they survive a crash of the machine."""
        _flush(self._tokens)
        _flush(self._lengths)

    def close(self) -> None:
        """Close the files; may be called again."""
        self._tokens.close()
        self._lengths.close()

    def finish(self, fingerprint: Fingerprint) -> None:
        """Write the index and the fingerprint next to the tokens."""
        self.flush()
        lengths = np.fromfile(f"{self._partial}.lengths", dtype=_LENGTH)
        with open(f"{self._partial}.idx", "wb") as index:
            _write_index(index, lengths, self._dtype)
            _flush(index)
        text = json.dumps(asdict(fingerprint), indent=2) + "\n"
        write_whole(Path(f"{self._partial}.json"), text)


def holds(folder: Path, prefix: str, counts: Counts, dtype: np.dtype) -> bool:
    """Whether unfinished files hold at least what `counts` says."""
    for suffix, size in counts.sizes(dtype).items():
        file = folder / (Path(prefix).name + suffix)
        if not file.is_file() or file.stat().st_size < size:
            return False
    return True


def publish(prefixes: Sequence[str], folder: Path) -> None:
    """Move finished files from a folder to their destination; a repeated call completes the moves.

    If it is killed at any point, there is no .bin without .idx, no .idx next to another run's .bin,
    and PREFIX.json only if all of PREFIX is in place.
    """

    def waiting(*suffixes: str) -> list[tuple[Path, Path]]:
        """Return (file, destination) of all files that no earlier call has moved."""
        files = [Path(prefix + suffix) for prefix in prefixes for suffix in suffixes]
        return [(folder / file.name, file) for file in files if (folder / file.name).exists()]

    for _, destination in waiting(".json", ".bin"):
        destination.unlink(missing_ok=True)
    for finished, destination in waiting(".idx", ".bin", ".json"):
        finished.replace(destination)
    flush(folder.parent)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open_at(path: str, size: int) -> BinaryIO:
    """Open a file for appending after its first `size` bytes."""
    file = open(path, "ab")  # noqa: SIM115, the caller closes it
    file.truncate(size)
    return file


def _write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write Megatron's index of documents of one sequence each.

    Megatron's IndexedDatasetBuilder would hold a Python object for every document in memory.
    """
    number = len(lengths)
    code = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}[dtype]
    file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, number, number + 1))
    file.write(lengths.data)
    ends = np.cumsum(lengths, dtype=np.int64)
    file.write(((ends - lengths) * dtype.itemsize).data)
    file.write(np.arange(number + 1, dtype=np.int64).data)
