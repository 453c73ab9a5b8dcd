"""Megatron token files: PREFIX.bin, PREFIX.idx and the fingerprint PREFIX.json.

Needs neither torch nor Megatron, so that processes which write text as tokens start at once.
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

from megashear.errors import DataError
from megashear.files import flush, write_whole

SUFFIXES = (".bin", ".idx", ".json")
_LENGTH = np.dtype(np.int32)


@dataclass(frozen=True)
class Fingerprint:
    """What stands beside a token file in PREFIX.json, for a run to check its domains with."""

    tokenizer_sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    documents: int
    tokens: int
    highest_id: int | None = None  # in the file; None where it was not noted
    made_from: str | None = None  # hash of input, tokenizer and options

    @classmethod
    def read(cls, prefix: Path | str) -> Fingerprint:
        """The fingerprint of the token files PREFIX.bin and PREFIX.idx.

        Raises:
            DataError: it is missing or damaged.
        """
        path = Path(f"{prefix}.json")
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError as error:
            raise DataError(f"no {path}: make {prefix} with `megashear tokenize`") from error
        except (ValueError, TypeError, OSError) as error:
            raise DataError(f"{path} is damaged ({error}): make {prefix} again") from error


def check_one_tokenizer(prefixes: Sequence[str]) -> None:
    """Refuse token files that different tokenizers made; one without PREFIX.json is not asked.

    Raises:
        DataError: lists the files by tokenizer; or a fingerprint is damaged.
    """
    files: dict[str, list[str]] = {}
    for prefix in prefixes:
        if Path(f"{prefix}.json").exists():
            files.setdefault(Fingerprint.read(prefix).tokenizer_sha256, []).append(prefix)
    if len(files) > 1:
        lines = (f"  {sha256[:12]}: {', '.join(made)}" for sha256, made in files.items())
        raise DataError(
            "the domains were made by different tokenizers (by sha256):\n"
            + "\n".join(lines)
            + "\nMake them again by one, with `megashear tokenize`"
        )


def check_fingerprint(prefix: str, documents: int, tokens: int, vocab_size: int) -> None:
    """Refuse token files that PREFIX.json, where there is one, does not describe.

    `documents` and `tokens` are what PREFIX.idx describes, `vocab_size` is the model's.

    Raises:
        DataError: they are not of one run, or of another vocabulary.
    """
    if not Path(f"{prefix}.json").exists():
        return
    known = Fingerprint.read(prefix)
    if (known.documents, known.tokens) != (documents, tokens):
        raise DataError(
            f"{prefix}.json is of {known.documents:,} documents with {known.tokens:,} tokens, but "
            f"{prefix}.idx has {documents:,} with {tokens:,}: the files are not of one run. "
            f"Tokenize again; or, if another program wrote them, delete {prefix}.json."
        )
    if known.highest_id is not None and known.highest_id >= vocab_size:
        raise DataError(
            f"{prefix}.bin holds token id {known.highest_id}, but the vocabulary ends at "
            f"{vocab_size - 1}: tokenize it with the model's tokenizer."
        )


def token_type(vocab_size: int) -> np.dtype:
    """The type of a token file, by Megatron's own rule (`DType.optimal_dtype`)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Documents:
    """Some documents: their tokens one after the other [total], and their lengths [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Counts:
    """What a token file holds."""

    documents: int = 0
    tokens: int = 0
    highest_id: int = -1

    def plus(self, new: Documents) -> Counts:
        """The same after some documents more."""
        highest = max(self.highest_id, int(new.tokens.max(initial=0)))
        return Counts(self.documents + len(new.lengths), self.tokens + len(new.tokens), highest)

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Bytes of its unfinished files."""
        return {
            ".bin": self.tokens * dtype.itemsize,
            ".lengths": self.documents * _LENGTH.itemsize,
        }


class TokenFile:
    """One set of token files in the making, in a folder beside their place until `publish`.

    Until `finish` the lengths of documents are in a file of their own, so memory does not grow.

    What the files in `folder` hold beyond `counts` is cut off.
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
        """Make what was added survive a crash of the machine."""
        _flush(self._tokens)
        _flush(self._lengths)

    def close(self) -> None:
        """Close what is open; harmless when repeated."""
        self._tokens.close()
        self._lengths.close()

    def finish(self, fingerprint: Fingerprint) -> None:
        """Write the index and the fingerprint beside the tokens."""
        self.flush()
        lengths = np.fromfile(f"{self._partial}.lengths", dtype=_LENGTH)
        with open(f"{self._partial}.idx", "wb") as index:
            _write_index(index, lengths, self._dtype)
            _flush(index)
        text = json.dumps(asdict(fingerprint), indent=2) + "\n"
        write_whole(Path(f"{self._partial}.json"), text)


def holds(folder: Path, prefix: str, counts: Counts, dtype: np.dtype) -> bool:
    """Whether unfinished files hold at least as much as they should."""
    for suffix, size in counts.sizes(dtype).items():
        file = folder / (Path(prefix).name + suffix)
        if not file.is_file() or file.stat().st_size < size:
            return False
    return True


def publish(prefixes: Sequence[str], folder: Path) -> None:
    """Move finished files from a folder to their places; may be called again to end what it began.

    Killed at any point, this leaves no .bin without .idx, no .idx beside another run's .bin, and
    PREFIX.json only where all of PREFIX is in place.
    """

    def waiting(*suffixes: str) -> list[tuple[Path, Path]]:
        """(file, its place) of all that no earlier call has moved."""
        files = [Path(prefix + suffix) for prefix in prefixes for suffix in suffixes]
        return [(folder / file.name, file) for file in files if (folder / file.name).exists()]

    for _, place in waiting(".json", ".bin"):
        place.unlink(missing_ok=True)
    for partial, place in waiting(".idx", ".bin", ".json"):
        partial.replace(place)
    flush(folder.parent)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open_at(path: str, size: int) -> BinaryIO:
    """Open a file for appending after its first `size` bytes."""
    file = open(path, "ab")  # noqa: SIM115, the caller's to close
    file.truncate(size)
    return file


def _write_index(file: BinaryIO, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Megatron's index of documents of one sequence each.

    Its own IndexedDatasetBuilder makes a Python object of every document, in memory.
    """
    number = len(lengths)
    code = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}[dtype]
    file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, number, number + 1))
    file.write(lengths.data)
    ends = np.cumsum(lengths, dtype=np.int64)
    file.write(((ends - lengths) * dtype.itemsize).data)
    file.write(np.arange(number + 1, dtype=np.int64).data)
