"""Reads text from JSONL files, plain or gzip: every line one object, the text in one of its fields.

Imports `errors` and the standard library only.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from megashear.errors import DataError

CHUNK_BYTES = 1 << 19  # of lines, to be handed on at a time
_GZIP = b"\x1f\x8b"
_UNREADABLE = {
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
}


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of a file."""

    file: str
    first_line: int
    lines: list[bytes]
    read: int  # bytes on disk (compressed ones, if so) since the chunk before


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and glob patterns (`**` too) name, each once, in order.

    Raises:
        DataError: patterns that match nothing, and folders: all of them at once.
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


def read_chunks(file: Path) -> Iterator[Chunk]:
    """The lines of a file, about CHUNK_BYTES at a time.

    Raises:
        DataError: it cannot be read or decompressed.
    """
    lines: list[bytes] = []
    number = first = 0
    try:
        with file.open("rb") as raw:
            place = raw.tell if raw.seekable() else (lambda: 0)  # a pipe has none
            before = size = 0
            for line in _decompressed(file, raw):
                number += 1
                lines.append(line)
                size += len(line)
                if size >= CHUNK_BYTES:
                    yield Chunk(str(file), first + 1, lines, place() - before)
                    before, size, first, lines = place(), 0, number, []
            yield Chunk(str(file), first + 1, lines, place() - before)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file}: damaged gzip data after line {number:,} ({error}). Fetch or compress it "
            "again; `gzip -t` tells whether it is whole"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _decompressed(file: Path, raw: BufferedReader) -> Iterable[bytes]:
    """The plain byte stream of an open file, by what it holds, not by its name."""
    head = raw.peek(6)
    for magic, name in _UNREADABLE.items():
        if head.startswith(magic):
            raise DataError(f"{file}: {name} data. Convert it to JSONL, plain or gzip")
    if head.startswith(_GZIP):
        return gzip.GzipFile(fileobj=raw)
    if head and file.suffix == ".gz":
        raise DataError(f"{file}: not gzip data, in spite of its name. Compress or rename it")
    return raw


def text_of(line: bytes, field: str) -> str:
    """The text of one line.

    Raises:
        ValueError: it is not a JSON object with text in `field`; says what it is instead.
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
        raise ValueError(f"a JSON {_KINDS[type(record)]}, not an object with a field {field!r}")
    if field not in record:
        others = ", ".join(map(repr, list(record)[:6])) or "none"
        raise ValueError(f"no field {field!r}; the record's fields: {others}")
    text = record[field]
    if not isinstance(text, str):
        raise ValueError(f"field {field!r} is {_KINDS[type(text)]}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {field!r} holds half a surrogate pair, not a character") from error
    return text


_KINDS = {
    dict: "object",
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
