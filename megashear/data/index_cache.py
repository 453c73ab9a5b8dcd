"""Epochs of a token file, with Megatron's index of each epoch cached on disk.

Ranks, workers and later runs map the same files, so an index is built once and its memory shared.
A cache entry is named after all that its index is computed from (lengths of the documents,
`seq_length`, the shuffle's seed, Megatron-Core's release), not after the path of the tokens, so
that retokenized text never gets an old index. An entry is written under another name and renamed,
so it is complete or absent; a damaged one does not match the checksum at its beginning, and is
built again. An epoch takes 12 bytes per sample and 4 per document.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megashear.files import locked

CACHED_FROM = 100_000
"""Documents plus samples of an epoch; a smaller index takes milliseconds, and is not cached."""

Index = tuple[np.ndarray, np.ndarray, np.ndarray]
"""GPTDataset's three arrays: documents, samples and shuffle."""

_DIGEST = 32  # bytes of SHA-256 at the beginning of an entry

log = logging.getLogger("megashear")
# Megatron knows nothing of this cache, and warns that it keeps each index in memory.
logging.getLogger(gpt_dataset.__name__).addFilter(
    lambda record: "path_to_cache is None" not in record.getMessage()
)


class EpochDataset(GPTDataset):
    """One epoch of a token file: each of its whole samples once, shuffled by `seed` (32 bits).

    The index is cached in the directory `cache`; if that is None or cannot be written, the index
    stays in memory.
    """

    def __init__(
        self, tokens: IndexedDataset, seq_length: int, seed: int, cache: Path | None
    ) -> None:
        self._cache = cache
        # What GPTDataset needs of a tokenizer. No id is padding: every token of a file counts.
        tokenizer = SimpleNamespace(vocab_size=None, eod=None, pad=-1, unique_identifiers={})
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=([tokens.path_prefix], None),
            split="1",
            path_to_cache="",  # not Megatron's: it is not safe when many ranks build at once
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(tokens), dtype=np.int32)
        super().__init__(tokens, tokens.path_prefix, documents, None, Split.train, config)
        self.indices = documents[:0].copy()  # only building needs them

    def _build_document_sample_shuffle_indices(self) -> Index:
        build: Callable[[], Index] = super()._build_document_sample_shuffle_indices
        if self._cache is None:
            return build()
        settings = (version("megatron-core"), self.config.sequence_length, self.config.random_seed)
        key = hashlib.sha256(np.ascontiguousarray(self.dataset.sequence_lengths).data)
        key.update(repr(settings).encode())
        name = Path(self.dataset.path_prefix).name
        return _cached(self._cache / f"{name}-{key.hexdigest()[:24]}.index", build)


def _cached(entry: Path, build: Callable[[], Index]) -> Index:
    """Return the index of an entry; build and store it if it is missing."""
    if index := _read(entry):
        return index
    with _lock(entry):
        if index := _read(entry):  # another process has built it meanwhile
            return index
        if os.path.exists(entry):
            log.warning("%s is damaged: this index is built again", entry)
        index = build()
        try:
            _write(entry, index)
        except OSError as error:
            _warn_unwritable(entry.parent, error.strerror)
        return _read(entry) or index


def _read(entry: Path) -> Index | None:
    """Return the index of an entry, memory-mapped; None if it is missing or damaged."""
    try:
        with entry.open("rb") as file:
            if file.read(_DIGEST) != _digest(file):
                return None
            file.seek(_DIGEST)
            return _map(file), _map(file), _map(file)
    except OSError:
        return None


def _digest(file: BinaryIO) -> bytes:
    """Return the SHA-256 of the rest of a file."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.digest()


def _map(file: BinaryIO) -> np.ndarray:
    """Map the next array of a file, as a plain array: each access to a memmap creates another."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    array = np.memmap(file, dtype, "r", start, shape)
    file.seek(start + array.nbytes)
    return array.view(np.ndarray)


def _write(entry: Path, index: Index) -> None:
    """Store an index.

    Raises:
        OSError: the index cannot be written; no partial file remains.
    """
    partial = entry.with_name(f".{entry.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        with partial.open("w+b") as file:
            file.write(bytes(_DIGEST))
            for array in index:
                np.save(file, array, allow_pickle=False)
            file.seek(_DIGEST)
            digest = _digest(file)
            file.seek(0)
            file.write(digest)
        partial.replace(entry)
    finally:
        partial.unlink(missing_ok=True)


@functools.cache
def _warn_unwritable(directory: Path, reason: str) -> None:
    """Warn once per directory, not for each index."""
    log.warning(
        "%s cannot be written (%s): each process keeps indices that are missing there in its own "
        "memory. Name another directory by data.index_cache",
        directory,
        reason,
    )


@contextlib.contextmanager
def _lock(entry: Path) -> Iterator[None]:
    """Wait until no other process builds this entry.

    Where the directory cannot be written, or the file system has no locks, processes build
    concurrently, and each stores the same index.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(locked(entry.with_name(f".lock-{entry.name}")))
            for left in entry.parent.glob(f".{entry.name}.*"):  # by a process that was killed
                left.unlink()
        yield
