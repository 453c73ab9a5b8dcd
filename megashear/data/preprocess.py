"""JSONL text to Megatron token files: what `megashear tokenize` does.

Documents keep their order, whatever the number of processes, and however often the work was
interrupted. Imports `errors` and its siblings in `data`; never torch or Megatron, because every
worker process imports this module.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megashear.data.jsonl import Chunk, Place, find_inputs, read_chunks, text_of
from megashear.data.token_files import SUFFIXES, Documents, Fingerprint, token_type
from megashear.data.tokenizer import Tokenizer, load_tokenizer
from megashear.data.unfinished import Unfinished, is_kept, workplace
from megashear.errors import DataError, PlatformError

BYTES_PER_WORKER = 4_000_000  # below this a further process costs more than it saves
MAX_PROBLEMS = 20
LINE_SECONDS = 5.0  # between lines of progress, where there is no terminal for a bar


@dataclass(frozen=True)
class Output:
    """Token files that are in their place."""

    prefix: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize_files` did."""

    outputs: tuple[Output, ...]
    empty: int = 0  # documents skipped because they hold no text
    seconds: float = 0.0  # of reading, encoding and writing; 0 where all was there already


@dataclass(frozen=True)
class _Encoding:
    """What a worker must know; the hash makes a new one of another tokenizer at the same path."""

    tokenizer: str
    sha256: str
    field: str
    valid_fraction: float


@dataclass(frozen=True)
class _Encoded:
    """A chunk's documents, for each output."""

    parts: list[Documents]
    empty: int
    problems: list[str]
    end: Place


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
    """Tokenize JSONL files into PREFIX.bin, .idx and .json; each document [bos] ... eos.

    Called again with the same arguments (but for workers, overwrite and progress) it goes on where
    it was interrupted, and leaves alone what it had made.

    Args:
        inputs: files or glob patterns: JSONL, plain, gzip or zstd.
        tokenizer: see `load_tokenizer`.
        output: PREFIX.
        valid_fraction: share of documents for PREFIX_valid, the rest is PREFIX_train; which, a hash
            of the text decides, so copies of a document are never on both sides. None: only PREFIX.
        field: name of the text in each record.
        workers: processes; None takes as many as the CPUs and the size of the input warrant.
        overwrite: whether files that came of other input, tokenizer or arguments are replaced.
        progress: whether it is shown on stderr.

    Raises:
        DataError: a problem of the input, the tokenizer or the output; nothing is in place then.
        PlatformError: a worker was killed.
    """
    files = find_inputs(inputs)
    prefixes = _prefixes(str(output), valid_fraction)
    known = load_tokenizer(tokenizer)
    size = sum(file.stat().st_size for file in files)
    workers = _default_workers(size) if workers is None else workers
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be 1 or more")
    job = _job(files, known, field, valid_fraction)
    encoding = _Encoding(str(tokenizer), known.sha256, field, valid_fraction or 0.0)
    keep = all(file.is_file() for file in files)  # not of a pipe
    try:
        with workplace(str(output)) as folder, _way_on(folder, progress):
            work = Unfinished(folder, prefixes, job, token_type(known.vocab_size), keep=keep)
            if not work.progress.finished:
                if made := _made_before(prefixes, work.job_id):
                    return TokenizeReport(made)
                _refuse_existing(prefixes, overwrite)
                if work.note and progress:
                    print(f"{output}: {work.note}", file=sys.stderr)
                start = work.progress.end
                with work, _progress(size, start.read, progress) as bar:
                    _fill(work, _encode_all(files, start, encoding, workers), bar)
                    work.finish(known)
            work.publish()
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}") from error
    done = work.progress
    outputs = (Output(p, c.documents, c.tokens) for p, c in zip(prefixes, done.counts, strict=True))
    return TokenizeReport(tuple(outputs), done.empty, done.seconds)


def _prefixes(output: str, valid_fraction: float | None) -> list[str]:
    """The prefixes to write: one, or those of training and validation text."""
    if valid_fraction is not None and not 0.0 < valid_fraction < 1.0:
        raise DataError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1")
    if output.endswith(("/", *SUFFIXES)) or Path(output).is_dir():
        raise DataError(f"output {output}: give the files' path without suffix, as in data/prose")
    parts = [""] if valid_fraction is None else ["_train", "_valid"]
    return [output + part for part in parts]


def _job(
    files: Sequence[Path], tokenizer: Tokenizer, field: str, valid_fraction: float | None
) -> dict[str, Any]:
    """All that the result depends on. A pipe's content is never the same again."""
    stats = [(str(file), file.stat(), file.is_file()) for file in files]
    return {
        "input": [
            [name, stat.st_size, stat.st_mtime_ns if regular else time.time_ns()]
            for name, stat, regular in stats
        ],
        "tokenizer": [tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id],
        "field": field,
        "valid fraction": valid_fraction,
    }


def _made_before(prefixes: Sequence[str], job_id: str) -> tuple[Output, ...]:
    """The files in place, if all are there whole and this very job made them."""
    made = []
    for prefix in prefixes:
        if not all(Path(prefix + suffix).exists() for suffix in SUFFIXES):
            return ()
        found = Fingerprint.read(prefix)
        size = found.tokens * token_type(found.vocab_size).itemsize
        if found.made_from != job_id or Path(f"{prefix}.bin").stat().st_size != size:
            return ()
        made.append(Output(prefix, found.documents, found.tokens))
    return tuple(made)


def _refuse_existing(prefixes: Sequence[str], overwrite: bool) -> None:
    paths = [Path(prefix + suffix) for prefix in prefixes for suffix in SUFFIXES]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(
            f"already there, of other input, tokenizer or options: {', '.join(existing)}. Use "
            "--overwrite to replace them"
        )


def _default_workers(size: int) -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Slurm's share of the node; not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cpus, 1 + size // BYTES_PER_WORKER)


def _encode(job: _Encoding, chunk: Chunk) -> _Encoded:
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
    ids = [[*bos, *ids, tokenizer.eos_id] for ids in tokenizer.encode(kept)]
    tokens = np.fromiter(chain.from_iterable(ids), token_type(tokenizer.vocab_size))
    parts = [Documents(tokens, np.array([len(document) for document in ids], dtype=np.int32))]
    if job.valid_fraction:
        parts = _split(parts[0], np.array([_is_valid(t, job.valid_fraction) for t in kept], bool))
    return _Encoded(parts, len(texts) - len(kept), problems, chunk.end)


def _split(documents: Documents, valid: np.ndarray) -> list[Documents]:
    """Those of training and of validation text."""
    tokens, lengths = documents.tokens, documents.lengths
    return [Documents(tokens[np.repeat(part, lengths)], lengths[part]) for part in (~valid, valid)]


@lru_cache(maxsize=1)
def _tokenizer(job: _Encoding) -> Tokenizer:
    return load_tokenizer(job.tokenizer)


def _is_valid(text: str, fraction: float) -> bool:
    """Whether a document is validation text: the same for every copy of it, everywhere."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _encode_all(
    files: Sequence[Path], start: Place, job: _Encoding, workers: int
) -> Generator[_Encoded, None, None]:
    """Encoded chunks in order; at most two per worker are under way or waiting."""
    chunks = read_chunks(files, start)
    if workers == 1:
        yield from (_encode(job, chunk) for chunk in chunks)
        return
    # Spawned, not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for chunk in chunks:
            with _signals_held():
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


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait, and a process that is started within never gets them.

    It is its parent's to stop. While it imports, or if the parent were interrupted while it starts
    one, it would die with a traceback of its own.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # only it has handlers
    stops = (signal.SIGINT, signal.SIGTERM) if main else ()
    # The mask is for the child: where another thread gets the signal, Python's handler runs yet.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    handlers = {stop: signal.signal(stop, lambda n, _: came.append(n)) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came:
            signal.raise_signal(number)


def _start_worker() -> None:
    """Use one thread, and do not outlive a parent that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _fill(work: Unfinished, encoded: Generator[_Encoded, None, None], bar: tqdm) -> None:
    """Write all documents. Problems are gathered and raised together."""
    problems: list[str] = []
    with closing(encoded):
        for chunk in encoded:
            problems += chunk.problems
            if len(problems) >= MAX_PROBLEMS:
                break
            if not problems:  # else nothing will come of it
                work.add(chunk.parts, chunk.end, chunk.empty)
            tokens = sum(count.tokens for count in work.progress.counts)
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(chunk.end.read - bar.n)
    if problems:
        found = problems[:MAX_PROBLEMS]
        lines = "line" if len(found) == 1 else "lines"
        more = "; there may be more" if len(found) == MAX_PROBLEMS else ""
        head = f"{len(found)} malformed {lines}; their domain was not written{more}:"
        raise DataError("\n  ".join([head, *found]))
    counts, empty = work.progress.counts, work.progress.empty
    documents = sum(count.documents for count in counts)
    for prefix, count in zip(work.prefixes, counts, strict=True):
        if count.documents == 0:
            raise DataError(
                f"none of {documents:,} documents ({empty:,} empty ones besides) is for {prefix}. "
                "Give more text" + (", or another valid fraction" * bool(documents))
            )


@contextmanager
def _way_on(folder: Path, shown: bool) -> Iterator[None]:
    """Say after an interrupt or a failure how to go on."""
    try:
        yield
    except (KeyboardInterrupt, PlatformError, OSError):
        if shown and is_kept(folder):
            print(
                f"what is done is kept in {folder}: the same command goes on there", file=sys.stderr
            )
        raise


def _progress(size: int, done: int, shown: bool) -> tqdm:
    """Bytes read and tokens made: a bar on a terminal, else a line every few seconds."""
    plain = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "bar_format": "{l_bar}{r_bar}\n"}
    style: dict[str, Any] = {} if sys.stderr.isatty() else plain
    style |= {"unit": "B", "unit_scale": True, "leave": False, "miniters": 1}
    return tqdm(total=size, initial=done, disable=not shown, **style)
