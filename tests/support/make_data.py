"""Token files for tests: small Megatron `.bin/.idx` pairs, written by Megatron's own builder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder


def write_tokens(prefix: str | Path, documents: Iterable[Sequence[int]], vocab: int) -> str:
    """Write one document per sequence to `prefix`.bin/.idx, in the type that `vocab` needs."""
    path = Path(prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=DType.optimal_dtype(vocab))
    for document in documents:
        builder.add_document(np.asarray(document, dtype=np.int64), [len(document)])
    builder.finalize(f"{path}.idx")
    return str(path)


def random_documents(tokens: int, vocab: int, seed: int = 0, mean: int = 40) -> list[list[int]]:
    """Documents of uneven length, `tokens` in all: ids in [1, vocab) at random, ended by eos 0."""
    rng = np.random.default_rng(seed)
    documents: list[list[int]] = []
    left = tokens
    while left > 0:
        length = min(left, 1 + int(rng.integers(1, 2 * mean)))
        documents.append([*rng.integers(1, vocab, length - 1).tolist(), 0])
        left -= length
    return documents


def counting_documents(tokens: int, length: int = 7) -> list[list[int]]:
    """Documents in which every token id from 0 to `tokens` - 1 stands exactly once."""
    return [list(range(at, min(at + length, tokens))) for at in range(0, tokens, length)]
