"""JSONL text to Megatron token files: what `megashear tokenize` does.

Documents keep their order, whatever the number of processes. Imports `errors` and its siblings in
`data`; never torch or Megatron at the top, because every worker process imports this module.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megashear.data.jsonl import Chunk, find_inputs, read_chunks, text_of
from megashear.data.token_files import SUFFIXES, TokenFile, publish
from megashear.data.tokenizer import Tokenizer, load_tokenizer
from megashear.errors import DataError, PlatformError

BYTES_PER_WORKER = 4_000_000  # below this a further process costs more than it saves
MAX_PROBLEMS = 20
LINE_SECONDS = 5.0  # between lines of progress, where there is no terminal for a bar


@dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize_files` did."""

    outputs: tuple[TokenFile, ...]
    empty: int  # documents skipped because they hold no text
    seconds: float  # of reading, encoding and writing, start-up apart


@dataclass(frozen=True)
class _Job:
    """What a worker must know; the hash makes a new job of another tokenizer at the same path."""

    tokenizer: str
    sha256: str
    field: str
    valid_fraction: float


@dataclass(frozen=True)
class _Encoded:
    """A chunk's documents, their tokens one after the other."""

    tokens: np.ndarray  # int32
    lengths: list[int]
    valid: list[bool]  # whether the document belongs to the validation text
    empty: int
    problems: list[str]
    read: int  # bytes of input


def tokenize_files(
    inputs: Sequence[str],
    tokenizer: Path | str,
    output: Path | str,
    *,
    valid_fraction: float | None = None,
    field: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> TokenizeReport:
    """Tokenize JSONL files into PREFIX.bin, PREFIX.idx and PREFIX.json; each document bos ... eos.

    Args:
        inputs: files or glob patterns, `.jsonl` or `.jsonl.gz`.
        tokenizer: see `load_tokenizer`.
        output: PREFIX.
        valid_fraction: share of documents for PREFIX_valid, the rest is PREFIX_train; which, a hash
            of the text decides, so copies of a document are never on both sides. None: only PREFIX.
        field: name of the text in each record.
        workers: processes; None takes as many as the CPUs and the size of the input warrant.
        overwrite: whether existing files are replaced.
        progress: whether it is shown on stderr.

    Raises:
        DataError: a problem of the input, the tokenizer or the output; nothing is written then.
    """
    files = find_inputs(inputs)
    prefixes = _check_output(str(output), valid_fraction, overwrite)
    vocabulary = load_tokenizer(tokenizer)
    size = sum(file.stat().st_size for file in files)
    workers = _default_workers(size) if workers is None else workers
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be 1 or more")
    job = _Job(str(tokenizer), vocabulary.sha256, field, valid_fraction or 0.0)
    chunks = read_chunks(files)
    folder = Path(prefixes[0]).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=".tokenize-", dir=folder))
            encoded = stack.enter_context(closing(_encode_all(chunks, job, workers)))
            partial = [TokenFile(prefix, Path(name), vocabulary) for prefix in prefixes]
            writers = [stack.enter_context(closing(file)) for file in partial]
            shown = stack.enter_context(_progress(size, progress))
            started = time.monotonic()
            empty = _fill(writers, encoded, shown)
            publish(writers)
            seconds = time.monotonic() - started
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}") from error
    return TokenizeReport(tuple(writers), empty, seconds)


def _check_output(output: str, valid_fraction: float | None, overwrite: bool) -> list[str]:
    """The prefixes to write: one, or those of training and validation text."""
    if valid_fraction is not None and not 0.0 < valid_fraction < 1.0:
        raise DataError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1")
    if output.endswith(("/", ".bin", ".idx", ".json")) or Path(output).is_dir():
        raise DataError(f"output {output}: give the files' path without suffix, as in data/prose")
    parts = [""] if valid_fraction is None else ["_train", "_valid"]
    prefixes = [output + part for part in parts]
    paths = [Path(prefix + suffix) for prefix in prefixes for suffix in SUFFIXES]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(f"already there: {', '.join(existing)}. Use --overwrite to replace them")
    return prefixes


def _default_workers(size: int) -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Slurm's share of the node; not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cpus, 1 + size // BYTES_PER_WORKER)


def _encode(job: _Job, chunk: Chunk) -> _Encoded:
    texts, problems = [], []
    for number, line in enumerate(chunk.lines, chunk.first_line):
        try:
            if line.strip():  # an empty line is no record
                texts.append(text_of(line, job.field))
        except ValueError as error:
            problems.append(f"{chunk.file}:{number}: {error}")
    kept = [text for text in texts if text.strip()]
    tokenizer = _tokenizer(job)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    documents = [[*bos, *ids, tokenizer.eos_id] for ids in tokenizer.encode(kept)]
    return _Encoded(
        tokens=np.fromiter(chain.from_iterable(documents), dtype=np.int32),
        lengths=[len(document) for document in documents],
        valid=[_is_valid(text, job.valid_fraction) for text in kept],
        empty=len(texts) - len(kept),
        problems=problems,
        read=chunk.end.read,
    )


@lru_cache(maxsize=1)
def _tokenizer(job: _Job) -> Tokenizer:
    return load_tokenizer(job.tokenizer)


def _is_valid(text: str, fraction: float) -> bool:
    """Whether a document is validation text: the same for every copy of it, everywhere."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _encode_all(
    chunks: Iterable[Chunk], job: _Job, workers: int
) -> Generator[_Encoded, None, None]:
    """Encoded chunks in order; at most two per worker are under way or waiting."""
    if workers == 1:
        yield from (_encode(job, chunk) for chunk in chunks)
        return
    # Spawned, not forked: the caller may have threads, and torch need not be in the workers.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode, job, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise PlatformError(
            "a tokenizing process was killed, perhaps for want of memory. Use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave signals to the parent, use one thread, and do not outlive a parent that is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _fill(writers: list[TokenFile], encoded: Iterable[_Encoded], shown: tqdm) -> int:
    """Write all documents; the number of empty ones. Problems are gathered and raised together."""
    problems: list[str] = []
    empty = 0
    for chunk in encoded:
        problems += chunk.problems
        if len(problems) >= MAX_PROBLEMS:
            break
        empty += chunk.empty
        ends = np.cumsum(chunk.lengths, dtype=np.int64)
        for end, length, valid in zip(ends, chunk.lengths, chunk.valid, strict=True):
            # Without a split the only output is both the first and the last.
            writers[-1 if valid else 0].add(chunk.tokens[end - length : end])
        tokens = sum(writer.tokens for writer in writers)
        shown.set_postfix_str(f"{tokens:,} tokens", refresh=False)
        shown.update(chunk.read - shown.n)
    if problems:
        found = problems[:MAX_PROBLEMS]
        lines = "line" if len(found) == 1 else "lines"
        more = "; there may be more" if len(found) == MAX_PROBLEMS else ""
        head = f"{len(found)} malformed {lines}; their domain was not written{more}:"
        raise DataError("\n  ".join([head, *found]))
    documents = sum(writer.documents for writer in writers)
    for writer in writers:
        if writer.documents == 0:
            raise DataError(
                f"none of {documents:,} documents ({empty:,} empty ones besides) is for "
                f"{writer.prefix}. Give more text"
                + (", or another valid fraction" * bool(documents))
            )
    return empty


def _progress(size: int, shown: bool) -> tqdm:
    """Bytes read and tokens made: a bar on a terminal, else a line every few seconds."""
    plain = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "bar_format": "{l_bar}{r_bar}\n"}
    style = {} if sys.stderr.isatty() else plain
    return tqdm(
        total=size, unit="B", unit_scale=True, leave=False, miniters=1, disable=not shown, **style
    )
