"""The fingerprint PREFIX.json of a token file: which tokenizer made it, and what it holds.

Imports neither torch nor Megatron: tokenizing processes import it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megashear.errors import DataError


@dataclass(frozen=True)
class Fingerprint:
    """What PREFIX.json says about a token file, for a run to check its domains."""

    tokenizer_sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    documents: int
    tokens: int
    highest_id: int | None = None  # highest token id in the file; None if unknown
    made_from: str | None = None  # hash of input, tokenizer and options

    @classmethod
    def read(cls, prefix: Path | str) -> Fingerprint:
        """Read the fingerprint of the token files PREFIX.bin and PREFIX.idx.

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
    """Refuse token files of different tokenizers; a file without PREFIX.json is not checked.

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
            "the token files were made by different tokenizers (by sha256):\n"
            + "\n".join(lines)
            + "\nMake them again with one tokenizer, with `megashear tokenize`"
        )


def check_fingerprint(prefix: str, documents: int, tokens: int, vocab_size: int) -> None:
    """Refuse token files that PREFIX.json, if it exists, does not describe.

    Args:
        prefix: path of the token files without suffix.
        documents: number of documents in PREFIX.idx.
        tokens: number of tokens in PREFIX.idx.
        vocab_size: size of the model's vocabulary.

    Raises:
        DataError: the files are not from one run, or have ids outside of the vocabulary.
    """
    if not Path(f"{prefix}.json").exists():
        return
    known = Fingerprint.read(prefix)
    if (known.documents, known.tokens) != (documents, tokens):
        raise DataError(
            f"{prefix}.json is for {known.documents:,} documents with {known.tokens:,} tokens, but "
            f"{prefix}.idx has {documents:,} with {tokens:,}: the files are not from one run. "
            f"Tokenize again; or, if another program wrote them, delete {prefix}.json"
        )
    if known.highest_id is not None and known.highest_id >= vocab_size:
        raise DataError(
            f"{prefix}.bin holds token id {known.highest_id}, but the vocabulary ends at "
            f"{vocab_size - 1}: tokenize it with the model's tokenizer"
        )
