"""Read the files of a tokenizer, in either of the two forms that models are published with.

`tokenizer.json` is whole: vocabulary, added tokens and template. `tokenizer.model` (sentencepiece)
is the vocabulary of a base model; what a finetune added is in tokenizer_config.json
(`added_tokens_decoder`) or added_tokens.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megashear.errors import DataError

SENTENCEPIECE, HUGGING_FACE = "tokenizer.model", "tokenizer.json"
CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
"""How an added token is matched in a text, as `tokenizers.AddedToken` names it."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is not in the sentencepiece model, or whose flags other files state."""

    id: int
    content: str
    flags: dict[str, bool]


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of one tokenizer.

    Attributes:
        model: the sentencepiece file; None where there is none.
        json_file: the tokenizer.json; None where there is none.
        config: the content of tokenizer_config.json; empty where there is none.
        added: tokens that are not in the sentencepiece model, by id.
    """

    model: Path | None
    json_file: Path | None
    config: dict[str, Any]
    added: tuple[AddedToken, ...]

    def special(self, name: str) -> str | None:
        """Return the text of a special token (`bos`, `eos`, `pad`); None if none is named."""
        token = self.config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else None

    def states(self, name: str, default: bool) -> bool:
        """Return a yes-or-no setting of tokenizer_config.json, such as `add_bos_token`."""
        value = self.config.get(name)
        return value if isinstance(value, bool) else default

    def sha256(self) -> str:
        """Return a hash of what decides the ids: the vocabulary's file and its added tokens."""
        file = self.json_file or self.model
        assert file is not None
        digest = hashlib.sha256(file.read_bytes())
        if self.json_file is None and self.added:
            added = [[token.id, token.content, token.flags] for token in self.added]
            digest.update(json.dumps([added, self.special("eos")], sort_keys=True).encode())
        return digest.hexdigest()


def find_tokenizer(path: Path | str) -> TokenizerFiles:
    """Find the files of the tokenizer at a path: a directory, or one file of a tokenizer.

    A file under its usual name stands for its directory, so that every form of one tokenizer gives
    the same ids. A file under another name is read with the settings beside it, if any.

    Raises:
        DataError: there is no tokenizer, or its settings cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"cannot read the tokenizer {path}: No such file or directory")
    directory = path if path.is_dir() else path.parent
    config = _read_json(directory / CONFIG)
    if path.is_dir() or path.name in (SENTENCEPIECE, HUGGING_FACE):
        model, json_file = (
            file if (file := directory / name).is_file() else None
            for name in (SENTENCEPIECE, HUGGING_FACE)
        )
        if model is None and json_file is None:
            raise DataError(f"{path} has neither {SENTENCEPIECE} nor {HUGGING_FACE}")
    else:
        model, json_file = (None, path) if path.suffix == ".json" else (path, None)
    added = () if model is None else _added_tokens(directory, config)
    return TokenizerFiles(model, json_file, config, added)


def load_sentencepiece(file: Path) -> Any:
    """Return the SentencePieceProcessor of a model file.

    Raises:
        DataError: it cannot be read, or is not a sentencepiece model.
    """
    import sentencepiece

    content = read_bytes(file)
    try:
        # The library takes "" for a model; and the path is not given to it, for then it logs.
        return sentencepiece.SentencePieceProcessor(model_proto=content or b"none")
    except RuntimeError as error:
        raise DataError(
            f"{file} is not a sentencepiece model ({len(content):,} bytes). Name a file that "
            f"sentencepiece trained, or a {HUGGING_FACE} (Llama 3's tokenizer.model is a tiktoken "
            "file: take the tokenizer.json beside it)"
        ) from error


def read_bytes(file: Path) -> bytes:
    """Return the content of a tokenizer's file, or raise a DataError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error.strerror}") from error


def _added_tokens(directory: Path, config: dict[str, Any]) -> tuple[AddedToken, ...]:
    """Return the added tokens by id; added_tokens_decoder, which has flags, wins."""
    special = {
        token.get("content") if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token")
    }
    extra = config.get("additional_special_tokens")
    special |= {token for token in extra or () if isinstance(token, str)}
    found = {}
    try:
        for content, number in _read_json(directory / ADDED).items():
            flags = {"special": content in special, "normalized": False}
            found[int(number)] = AddedToken(int(number), content, flags)
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            flags = {flag: entry[flag] for flag in FLAGS if isinstance(entry.get(flag), bool)}
            found[int(number)] = AddedToken(int(number), str(entry["content"]), flags)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{directory}: {CONFIG} or {ADDED}: no list of tokens: {error!r}") from None
    return tuple(found[number] for number in sorted(found))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes()) if file.is_file() else {}
    except (ValueError, OSError) as error:
        raise DataError(f"{file} cannot be read as a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is not a JSON object")
    return content
