"""Megatron token files in the making: PREFIX.bin, PREFIX.idx and the fingerprint PREFIX.json.

Imports `errors`, `data.tokenizer` and, only once files are written, Megatron.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megashear.data.tokenizer import Tokenizer
from megashear.errors import DataError

SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class Fingerprint:
    """What stands beside a token file in PREFIX.json, for a run to check its domains with."""

    tokenizer_sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    documents: int
    tokens: int

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


class TokenFile:
    """One set of token files, written in a folder beside their place until `publish` moves them.

    What was not published is the caller's to delete, after `close`.

    Attributes:
        prefix: of their place.
        documents: written so far.
        tokens: in these.
    """

    def __init__(self, prefix: str, partial: Path, tokenizer: Tokenizer) -> None:
        from megatron.core.datasets import indexed_dataset  # brings torch and takes seconds

        self.prefix = prefix
        self.documents = self.tokens = 0
        self._partial = str(partial / Path(prefix).name)
        self._tokenizer = tokenizer
        dtype = indexed_dataset.DType.optimal_dtype(tokenizer.vocab_size)
        self._builder = indexed_dataset.IndexedDatasetBuilder(f"{self._partial}.bin", dtype=dtype)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document."""
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def close(self) -> None:
        """Close what is open; harmless when repeated."""
        self._builder.data_file.close()

    def finish(self) -> None:
        """Write the index and the fingerprint."""
        self._builder.finalize(f"{self._partial}.idx")
        known = self._tokenizer
        fingerprint = Fingerprint(
            known.sha256, known.vocab_size, known.bos_id, known.eos_id, self.documents, self.tokens
        )
        Path(f"{self._partial}.json").write_text(json.dumps(asdict(fingerprint), indent=2) + "\n")

    def move(self, suffix: str) -> None:
        """Put one finished file in its place."""
        os.replace(self._partial + suffix, self.prefix + suffix)


def publish(files: Sequence[TokenFile]) -> None:
    """Finish all files, then move them to their places.

    Killed at any point, this leaves no .bin without .idx, no .idx beside another run's .bin, and
    PREFIX.json only where all of PREFIX is in place.
    """
    for file in files:
        file.finish()
    for file in files:
        for suffix in (".json", ".bin"):
            Path(file.prefix + suffix).unlink(missing_ok=True)
    for file in files:
        for suffix in (".idx", ".bin", ".json"):
            file.move(suffix)
