"""Encode lines of text as tokens in several processes, in the order of the input.

Every worker process imports this module: it imports neither torch nor Megatron.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from megashear.data.tokenize.jsonl import Chunk, Position, read_chunks, text_of
from megashear.data.tokenize.token_files import Documents, token_type
from megashear.errors import PlatformError
from megashear.tokenizer.load import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Encoding:
    """What a worker needs to know; `identity` changes if another tokenizer is at the same path."""

    tokenizer: str
    identity: str
    field: str
    valid_fraction: float


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk, one item for each output."""

    parts: list[Documents]
    empty: int
    problems: list[str]
    end: Position


def encode_all(
    files: Sequence[Path], start: Position, job: Encoding, workers: int
) -> Generator[Encoded, None, None]:
    """Yield encoded chunks in order; at most two per worker are in progress or waiting."""
    chunks = read_chunks(files, start)
    if workers == 1:
        yield from (_encode(job, chunk) for chunk in chunks)
        return
    # Spawned, not forked, since the caller may have threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    waiting: deque[Future[Encoded]] = deque()
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
            "a tokenizing process was killed, perhaps because memory ran out. Use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(job: Encoding, chunk: Chunk) -> Encoded:
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
    lengths = np.array([len(document) for document in ids], dtype=np.int32)
    parts = [Documents(tokens, lengths)]
    if job.valid_fraction:
        valid = np.array([_is_valid(text, job.valid_fraction) for text in kept], dtype=bool)
        sides = (~valid, valid)
        parts = [Documents(tokens[np.repeat(side, lengths)], lengths[side]) for side in sides]
    return Encoded(parts, len(texts) - len(kept), problems, chunk.end)


@lru_cache(maxsize=1)
def _tokenizer(job: Encoding) -> Tokenizer:
    return load_tokenizer(job.tokenizer)


def _is_valid(text: str, fraction: float) -> bool:
    """Whether a document is validation text; every copy of it has the same answer, everywhere."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@contextmanager
def _signals_held() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM inside the block; a process that is started in it has them blocked.

    The parent stops its workers. Otherwise a worker that is interrupted while it starts or imports
    would end with a traceback of its own.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # only it has handlers
    stops = (signal.SIGINT, signal.SIGTERM) if main else ()
    # The mask is for the child. Here another thread may receive the signal, so handlers defer it.
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
    """Use one thread; end when the parent sends SIGTERM, or when the parent is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    def leave_on_sigterm_of_parent() -> None:
        # SIGTERM is blocked here (`_signals_held`): a scheduler sends it to the whole job.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(1)

    for wait in (leave_with_parent, leave_on_sigterm_of_parent):
        threading.Thread(target=wait, daemon=True).start()
