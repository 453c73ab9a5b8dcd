"""Read text from JSONL files, plain, gzip or zstd: each line is an object with a field of text."""

from __future__ import annotations

import glob
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megashear.errors import DataError

CHUNK_BYTES = 1 << 19  # size of a chunk of lines
_BLOCK_BYTES = 1 << 17  # compressed data read at a time
_GZIP = b"\x1f\x8b"
# A data frame, or a skippable frame, with which some writers begin.
_ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)))
_UNREADABLE = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"PAR1": "parquet"}


@dataclass(frozen=True)
class Position:
    """A position between two lines of the input."""

    file: int = 0  # number of the file
    line: int = 0  # lines before the position in that file
    read: int = 0  # bytes on disk before it in all files (compressed bytes of compressed files)


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file."""

    file: str
    first_line: int
    lines: list[bytes]
    end: Position


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and glob patterns (also `**`) name, each once, in order.

    Raises:
        DataError: lists all patterns that match nothing, and all folders.
    """
    found: dict[Path, Path] = {}  # by resolved path
    problems = []
    for pattern in patterns:
        # A path that exists may hold [ or *, so it is tried first.
        names = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        paths = [Path(name) for name in names]
        files = [path for path in paths if not path.is_dir()]
        if not paths:
            problems.append(f"{pattern}: no such file, and no file matches it")
        elif not files:
            problems.append(f"{pattern}: a folder. Name its files: '{pattern.rstrip('/')}/*.jsonl'")
        for path in files:
            found.setdefault(path.resolve(), path)
    if problems or not found:
        raise DataError("\n  ".join(["input not found:", *problems] if problems else ["no input"]))
    return list(found.values())


START = Position()


def read_chunks(files: Sequence[Path], start: Position = START) -> Iterator[Chunk]:
    """Yield the lines of all files from a position on, about CHUNK_BYTES at a time.

    Raises:
        DataError: a file cannot be read or decompressed.
    """
    for number in range(start.file, len(files)):
        here = start if number == start.file else Position(number)
        before = sum(file.stat().st_size for file in files[:number])
        yield from _read_file(files[number], here, before)


def _read_file(file: Path, start: Position, before: int) -> Iterator[Chunk]:
    """Yield the lines of one file; `before` is the size of the files before it in bytes."""
    number, kind, size = start.line, "", 0
    lines: list[bytes] = []

    def chunk() -> Chunk:
        read = before + (raw.tell() if raw.seekable() else 0)  # a pipe has no position
        return Chunk(str(file), number - len(lines) + 1, lines, Position(start.file, number, read))

    try:
        with file.open("rb") as raw:
            kind = _kind(file, raw.peek(6))
            for line in islice(_lines(_unpacked(raw, kind)) if kind else raw, start.line, None):
                number, size = number + 1, size + len(line)
                lines.append(line)
                if size >= CHUNK_BYTES:
                    yield chunk()
                    lines, size = [], 0
            yield chunk()
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{file}: damaged {kind} data after line {number:,} ({error}). Fetch or compress it "
            f"again; `{kind} -t` checks whether it is complete"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _kind(file: Path, head: bytes) -> str:
    """Return how a file is compressed, by its content: gzip, zstd or not at all ("")."""
    for magic, name in _UNREADABLE.items():
        if head.startswith(magic):
            raise DataError(f"{file}: {name} data. Convert it to JSONL, plain, gzip or zstd")
    kind = "gzip" if head.startswith(_GZIP) else "zstd" if head.startswith(_ZSTD) else ""
    named = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix, kind)
    if head and named != kind:
        raise DataError(f"{file}: not {named} data, despite its name. Compress or rename it")
    return kind


def _unpacked(raw: BinaryIO, kind: str) -> Iterator[bytes]:
    """Decompress gzip members or zstd frames; zstd's own reader overlooks a truncated file."""
    # Allow any window: frames of `zstd --long=31` need 2 GiB.
    zstd = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    packed, frame = b"", None
    while packed := packed or raw.read(_BLOCK_BYTES):
        frame = frame or (zlib.decompressobj(31) if kind == "gzip" else zstd.decompressobj())
        yield frame.decompress(packed)
        packed = frame.unused_data
        frame = None if frame.eof else frame
    if frame:
        raise EOFError("it ends within a frame")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of a line that continues in the next block
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            yield b"".join([*pieces, end, b"\n"])
            pieces = []
        pieces.append(rest)
    if rest := b"".join(pieces):
        yield rest


def text_of(line: bytes, field: str) -> str:
    """Return the text of one line.

    Raises:
        ValueError: the line is not a JSON object with text in `field`; says what it is instead.
    """
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{_short(record)} is not an object with a field {field!r}")
    if field not in record:
        others = ", ".join(map(repr, list(record)[:6])) or "none"
        raise ValueError(f"no field {field!r}; the record's fields: {others}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {_short(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {field!r} holds half a surrogate pair, not a character") from error
    return text


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    return json.dumps(value)[:40]
