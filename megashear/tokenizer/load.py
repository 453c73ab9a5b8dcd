"""Tokenizers behind one small interface: sentencepiece's `.model`, Hugging Face's `tokenizer.json`.

One rule for every form of a tokenizer. Where tokenizer.json and tokenizer.model agree on the size
of the vocabulary, bos and eos, sentencepiece does the work, which is faster on long documents;
where they differ, tokenizer.json counts, as for transformers and our exports. Whether bos begins a
document is what the template of tokenizer.json does (transformers 5 obeys it; 4 obeyed
`add_bos_token`); of a tokenizer.model alone `add_bos_token` says it, and its default is yes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megashear.errors import DataError
from megashear.tokenizer.files import (
    CONFIG,
    TokenizerFiles,
    find_tokenizer,
    load_sentencepiece,
    read_bytes,
)


class Tokenizer(Protocol):
    """Text to token ids, without special tokens; a special token's text is text like any other."""

    vocab_size: int  # ids are below this
    # Begins a document, as transformers puts it before a text; None where the family puts nothing
    # there (GPT-2, Qwen).
    bos_id: int | None
    eos_id: int  # ends a document
    sha256: str  # of what decides the ids, to compare token files and checkpoints
    note: str  # what a user should know of contradictions in the files; empty where there are none

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from a directory that holds one, or from one of its files.

    Raises:
        DataError: there is none, it cannot be read, or it lacks an end-of-document token.
    """
    files = find_tokenizer(path)
    if files.json_file is not None:
        whole = HuggingFaceTokenizer(files, _from_json(files.json_file))
        return _agreeing(files, whole) or whole
    plain = SentencePieceTokenizer(files)
    adds = any(token.id >= plain.vocab_size for token in files.added)
    if not adds and files.special("eos") in (None, plain.processor.id_to_piece(plain.eos_id)):
        return plain
    from megashear.tokenizer.convert import whole_tokenizer

    return HuggingFaceTokenizer(files, whole_tokenizer(files))


def _agreeing(files: TokenizerFiles, whole: HuggingFaceTokenizer) -> SentencePieceTokenizer | None:
    """Return the sentencepiece tokenizer where it knows all that tokenizer.json knows."""
    try:
        plain = SentencePieceTokenizer(files) if files.model is not None else None
    except DataError:  # Llama 3's tokenizer.model is a tiktoken file
        return None
    if plain is None or whole.bos_id not in (None, plain.processor.bos_id()):
        return None
    plain.bos_id, plain.note = whole.bos_id, whole.note
    same = (plain.vocab_size, plain.eos_id) == (whole.vocab_size, whole.eos_id)
    return plain if same else None


class SentencePieceTokenizer:
    """A sentencepiece model, with the settings beside it.

    Raises:
        DataError: the file is no such model, or has no end-of-sentence piece.
    """

    note = ""

    def __init__(self, files: TokenizerFiles) -> None:
        assert files.model is not None
        self.processor = load_sentencepiece(files.model)
        self.vocab_size: int = self.processor.get_piece_size()
        bos, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        self.bos_id = bos if bos >= 0 and files.states("add_bos_token", True) else None
        if self.eos_id < 0:
            raise DataError(
                f"{files.model} has no end-of-sentence piece (eos_id); train it with one"
            )
        self.sha256 = hashlib.sha256(read_bytes(files.model)).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        # One thread: processes do the work concurrently.
        ids: list[list[int]] = self.processor.encode(list(texts), num_threads=1)
        return ids


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer`, with the settings of tokenizer_config.json.

    Raises:
        DataError: no token ends a document.
    """

    def __init__(self, files: TokenizerFiles, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # Without this a document that says "</s>" would be cut in two.
        tokenizer.encode_special_tokens = True
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = files.sha256()
        bos_id, eos_id = (self._id(files.special(name)) for name in ("bos", "eos"))
        # A token of that name that is not put before a text is none (GPT-2's is the eos).
        begins = bos_id is not None and tokenizer.encode("a").ids[:1] == [bos_id]
        self.bos_id = bos_id if begins else None
        if eos_id is None:
            raise DataError(
                f"no eos_token for {files.json_file or files.model}: the {CONFIG} in its directory "
                "must name a token of the vocabulary as eos_token"
            )
        self.eos_id = eos_id
        contradicts = files.json_file and bos_id is not None
        self.note = ""
        if contradicts and files.states("add_bos_token", begins) != begins:
            puts = "begins every text with bos" if begins else "puts no bos before a text"
            self.note = (
                f"{files.json_file} {puts}, against add_bos_token = {str(not begins).lower()} in "
                f"{CONFIG}: documents are made as the former says, as by transformers 5"
            )

    def _id(self, text: str | None) -> int | None:
        number: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return number

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _from_json(file: Path) -> Any:
    import tokenizers

    content = read_bytes(file)
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more precise
        raise DataError(f"{file} is not a Hugging Face tokenizer.json: {error}") from error
