"""Tokenizers behind one small interface: sentencepiece's `.model`, Hugging Face's `tokenizer.json`.

Imports `errors` and the two tokenizer libraries; never torch or Megatron, for worker processes of
`preprocess` start with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megashear.errors import DataError

SENTENCEPIECE, HUGGING_FACE = "tokenizer.model", "tokenizer.json"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's sign for a space


class Tokenizer(Protocol):
    """Text to token ids, without special tokens; a special token's text is text like any other."""

    vocab_size: int  # ids are below this
    # Begins a document, as transformers puts it before a text; None where the family puts nothing
    # there (GPT-2, Qwen).
    bos_id: int | None
    eos_id: int  # ends a document
    sha256: str  # of the file, to tell whether two token files belong together

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer from its file, or from a folder that holds one as Hugging Face names it.

    Raises:
        DataError: there is none, it cannot be read, or it lacks an end-of-document token.
    """
    file = Path(path)
    if file.is_dir():
        held = [name for name in (SENTENCEPIECE, HUGGING_FACE) if (file / name).is_file()]
        if not held:
            raise DataError(f"{path} has neither {SENTENCEPIECE} nor {HUGGING_FACE}")
        file /= held[0]
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error.strerror}") from error
    return _HuggingFace(file, content) if file.suffix == ".json" else _SentencePiece(file, content)


class _SentencePiece:
    def __init__(self, file: Path, content: bytes) -> None:
        self._processor = load_sentencepiece(file, content)
        self.vocab_size: int = self._processor.get_piece_size()
        bos, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        wanted = _config(file).get("add_bos_token", True)  # LLaMA's default
        self.bos_id = bos if bos >= 0 and wanted else None
        self.sha256 = hashlib.sha256(content).hexdigest()
        if self.eos_id < 0:
            raise DataError(f"{file} has no end-of-sentence piece (eos_id); train it with one")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: processes do the work side by side.
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids


def load_sentencepiece(file: Path, content: bytes) -> Any:
    """A SentencePieceProcessor of a model file's content.

    Raises:
        DataError: it is not a sentencepiece model.
    """
    import sentencepiece

    try:
        # The library takes "" for a model; and the path is not given to it, for then it logs.
        return sentencepiece.SentencePieceProcessor(model_proto=content or b"none")
    except RuntimeError as error:
        raise DataError(
            f"{file} is not a sentencepiece model ({len(content):,} bytes). Name a file that "
            f"sentencepiece trained, or a {HUGGING_FACE} (Llama 3's tokenizer.model is a tiktoken "
            "file: take the tokenizer.json beside it)"
        ) from error


class _HuggingFace:
    def __init__(self, file: Path, content: bytes) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more precise
            raise DataError(f"{file} is not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Without this a document that says "</s>" would be cut in two.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = hashlib.sha256(content).hexdigest()
        config = _config(file)
        bos_id, eos_id = (self._special_id(config.get(f"{name}_token")) for name in ("bos", "eos"))
        # A token of that name that is not put before a text is none (GPT-2's is the eos).
        begins = self._tokenizer.encode("a").ids[:1] == [bos_id]
        self.bos_id = bos_id if begins else None
        if eos_id is None:
            raise DataError(
                f"no eos_token for {file}: its tokenizer_config.json must stand beside it and name "
                "a token of the vocabulary as eos_token"
            )
        self.eos_id = eos_id

    def _special_id(self, token: Any) -> int | None:
        """The id of a special token, given as text or as a record."""
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _config(tokenizer: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer's file; empty where there is none."""
    config = tokenizer.with_name("tokenizer_config.json")
    try:
        found = json.loads(config.read_bytes()) if config.is_file() else {}
    except (ValueError, OSError) as error:
        raise DataError(f"{config} cannot be read as a JSON object: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{config} is not a JSON object")
    return found


def save_for_transformers(model: Path, folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` needs to give exactly the model's ids.

    Copies the sentencepiece model and adds `tokenizer.json` and `tokenizer_config.json`, because
    transformers' own conversion needs protobuf, and its LlamaTokenizer takes one space off a text
    that begins with one.

    Raises:
        DataError: `model` is no sentencepiece model, or not one with LLaMA's settings (BPE, byte
            fallback, dummy prefix, no normalisation, bos and eos).
    """
    processor = load_sentencepiece(model, model.read_bytes())
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    special = {f"{name}_token": processor.id_to_piece(i) for name, i in ids.items() if i >= 0}
    twin = _twin(processor, special) if len(special) == len(ids) else None
    probe = " ".join(processor.id_to_piece(i) for i in range(processor.get_piece_size()) if i > 2)
    probe = "  " + probe.replace(_SPACE, " ") + "\n\N{LLAMA}"
    if twin is None or twin.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
        raise DataError(
            f"{model} was not trained with LLaMA's settings, so no {HUGGING_FACE} can be derived "
            "from it here. Put one beside it (transformers converts with protobuf installed)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if model.resolve() != (folder / SENTENCEPIECE).resolve():
        shutil.copyfile(model, folder / SENTENCEPIECE)
    twin.save(str(folder / HUGGING_FACE))
    # Not LlamaTokenizer, which would replace parts of tokenizer.json by its own.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    text = json.dumps(config | special, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _twin(processor: Any, special: dict[str, str]) -> Any:
    """A `tokenizers.Tokenizer` that does what a LLaMA-like sentencepiece model does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    scores = {piece: processor.get_score(i) for piece, i in vocabulary.items()}
    merges = generate_merges(vocabulary, scores)
    unknown, bos = special["unk_token"], special["bos_token"]
    twin = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    twin.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    byte_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    twin.decoder = decoders.Sequence([*byte_text, decoders.Strip(" ", 1, 0)])
    twin.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special.values()]
    )
    twin.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return twin
