"""Identity of token files: PREFIX.json (which tokenizer made them), and hashes of their content.

Imports neither torch nor Megatron: tokenizing processes import it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megashear.config.schema import Domain
from megashear.errors import DataError

_WHOLE = 1 << 26  # bytes of a file that is hashed as a whole; a larger one is sampled
_BLOCKS, _BLOCK = 256, 1 << 14  # number and bytes of the samples

Hashes = dict[str, dict[str, str]]
"""content_hash of the `train` and `valid` files by domain."""


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


def content_hash(prefix: str) -> str:
    """Return a hash of the content of PREFIX.bin and PREFIX.idx, wherever they are.

    Of a file above 64 MiB it takes the size and 256 evenly spaced blocks of 16 KiB: that shows text
    which was added, removed or tokenized again, but can miss an edit of a few tokens in place.
    """
    digest = hashlib.sha256()
    for file in (f"{prefix}.bin", f"{prefix}.idx"):
        size = os.path.getsize(file)
        digest.update(f"{size};".encode())
        with open(file, "rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for block in range(_BLOCKS):
                stream.seek((size - _BLOCK) * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:32]


def content_hashes(domains: Sequence[Domain]) -> Hashes:
    """Return the content hashes of the token files of all domains."""
    return {
        part: {domain.name: content_hash(getattr(domain, part)) for domain in domains}
        for part in ("train", "valid")
    }


def refuse_changed_content(domains: Sequence[Domain], before: Hashes, now: Hashes) -> None:
    """Refuse to resume a run whose token files have another content than at its start.

    Raises:
        DataError: lists all files that differ.
    """
    changed = [
        f"  domain {domain.name}: {getattr(domain, part)} ({part})"
        for domain in domains
        for part in before
        if before[part].get(domain.name) != now[part][domain.name]
    ]
    if changed:
        raise DataError(
            "token files have changed since the run began, so it cannot continue with the same "
            "samples:\n"
            + "\n".join(changed)
            + "\nPut the old files back (at any path), or start a new run_dir"
        )
