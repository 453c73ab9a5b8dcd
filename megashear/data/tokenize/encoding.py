"""Lines of text to tokens, by several processes, in order.

Imports `errors` and its siblings in `data`; never torch or Megatron: every process imports this.
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

from megashear.data.tokenize.jsonl import Chunk, Place, read_chunks, text_of
from megashear.data.tokenize.token_files import Documents, token_type
from megashear.errors import PlatformError
from megashear.tokenizer.load import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Encoding:
    """What a worker must know; `identity` tells another tokenizer at the same path."""

    tokenizer: str
    identity: str
    field: str
    valid_fraction: float


@dataclass(frozen=True)
class Encoded:
    """A chunk's documents, for each output."""

    parts: list[Documents]
    empty: int
    problems: list[str]
    end: Place


def encode_all(
    files: Sequence[Path], start: Place, job: Encoding, workers: int
) -> Generator[Encoded, None, None]:
    """Encoded chunks in order; at most two per worker are under way or waiting."""
    chunks = read_chunks(files, start)
    if workers == 1:
        yield from (_encode(job, chunk) for chunk in chunks)
        return
    # Spawned, not forked: the caller may have threads.
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
            "a tokenizing process was killed, perhaps for want of memory. Use fewer --workers"
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
    """Whether a document is validation text: the same for every copy of it, everywhere."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait, and a process that is started within has them blocked.

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
    """Use one thread, end when the parent says so, and do not outlive one that is killed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    def leave_when_parent_says() -> None:
        # SIGTERM is blocked here (`_signals_held`): a scheduler sends it to the whole job.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(1)

    for wait in (leave_with_parent, leave_when_parent_says):
        threading.Thread(target=wait, daemon=True).start()
