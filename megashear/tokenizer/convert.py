"""Write tokenizer.json for a tokenizer of a tokenizer.model and its settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megashear.errors import DataError
from megashear.tokenizer.files import (
    ADDED,
    CONFIG,
    HUGGING_FACE,
    SENTENCEPIECE,
    TokenizerFiles,
    find_tokenizer,
    load_sentencepiece,
)

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's sign for a space
_OF_LLAMA_CLASS = ("legacy", "sp_model_kwargs", "use_default_system_prompt", "auto_map")
"""Settings that only transformers' LlamaTokenizer reads, or that would run foreign code."""


def save_for_transformers(model: Path, folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` needs to give exactly the model's ids.

    Copies the sentencepiece model and writes `tokenizer.json` and `tokenizer_config.json`, because
    transformers' own conversion needs protobuf, and its LlamaTokenizer takes one space off a text
    that begins with one. Added tokens, special tokens, chat template and all other settings beside
    the model are kept.

    Raises:
        DataError: `model` is no sentencepiece model, or not one with LLaMA's settings (BPE, byte
            fallback, dummy prefix, no normalisation, bos and eos), or its added tokens have ids
            that leave a gap.
    """
    files = find_tokenizer(model if model.name != SENTENCEPIECE else model.parent)
    files = TokenizerFiles(model, None, files.config, files.added)
    whole = whole_tokenizer(files)
    processor = load_sentencepiece(model)
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    special = {f"{name}_token": processor.id_to_piece(number) for name, number in ids.items()}
    # Not LlamaTokenizer, which would replace parts of tokenizer.json by its own.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    stated = {key: value for key, value in files.config.items() if key not in _OF_LLAMA_CLASS}
    for name, value in stated.items():  # transformers 5 takes no mapping for a special token
        if name.endswith("_token") and isinstance(value, dict):
            stated[name] = value.get("content")
    folder.mkdir(parents=True, exist_ok=True)
    if model.resolve() != (folder / SENTENCEPIECE).resolve():
        shutil.copyfile(model, folder / SENTENCEPIECE)
    whole.save(str(folder / HUGGING_FACE))
    text = json.dumps(special | stated | config, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def whole_tokenizer(files: TokenizerFiles) -> Any:
    """Return the `tokenizers.Tokenizer` of a sentencepiece model and of what stands beside it.

    Raises:
        DataError: as `save_for_transformers`.
    """
    assert files.model is not None
    processor = load_sentencepiece(files.model)
    ids = {"unk": processor.unk_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    special = {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}
    whole = _twin(processor, special) if len(special) == len(ids) else None
    probe = " ".join(processor.id_to_piece(i) for i in range(processor.get_piece_size()) if i > 2)
    probe = "  " + probe.replace(_SPACE, " ") + "\n\N{LLAMA}"
    if whole is None or whole.encode(probe, add_special_tokens=False).ids != processor.encode(
        probe
    ):
        raise DataError(
            f"{files.model} was not trained with LLaMA's settings, so no {HUGGING_FACE} can be "
            "derived from it here. Put one beside it (transformers converts with protobuf "
            "installed)"
        )
    _add_tokens(whole, files)
    _set_template(whole, files, special)
    return whole


def _add_tokens(whole: Any, files: TokenizerFiles) -> None:
    """Add the tokens that stand beside the model, each under its own id."""
    from tokenizers import AddedToken

    for token in files.added:
        known = whole.id_to_token(token.id)
        if known is not None and known != token.content:
            text = f"{token.content!r} has the id {token.id}, which is {known!r} in the model"
            raise DataError(f"{files.model}: {CONFIG} or {ADDED}: {text}")
        flags = {"special": False, **token.flags}
        add = whole.add_special_tokens if flags["special"] else whole.add_tokens
        add([AddedToken(token.content, **flags)])
        if whole.token_to_id(token.content) != token.id:
            text = f"{token.content!r} has the id {token.id}, but the tokens before it end at "
            text += f"{whole.token_to_id(token.content)}: ids without a token cannot be kept"
            raise DataError(f"{files.model}: {CONFIG} or {ADDED}: {text}")


def _set_template(whole: Any, files: TokenizerFiles, special: dict[str, str]) -> None:
    """Put bos before and eos after a text where the settings say so."""
    from tokenizers import processors

    bos, eos = files.special("bos") or special["bos"], files.special("eos") or special["eos"]
    begin = f"{bos} " if files.states("add_bos_token", True) else ""
    end = f" {eos}" if files.states("add_eos_token", False) else ""
    ids = [(token, whole.token_to_id(token)) for token in dict.fromkeys((bos, eos))]
    if any(number is None for _, number in ids):
        raise DataError(f"{files.model}: {CONFIG} names {bos!r} and {eos!r}, not both are tokens")
    whole.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A{end}", pair=f"{begin}$A{end} {begin}$B{end}", special_tokens=ids
    )


def _twin(processor: Any, special: dict[str, str]) -> Any:
    """Return a `tokenizers.Tokenizer` that does what a LLaMA-like sentencepiece model does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import generate_merges

    vocabulary = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    scores = {piece: processor.get_score(i) for piece, i in vocabulary.items()}
    merges = generate_merges(vocabulary, scores)
    twin = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=special["unk"], fuse_unk=True, byte_fallback=True)
    )
    twin.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    byte_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    twin.decoder = decoders.Sequence([*byte_text, decoders.Strip(" ", 1, 0)])
    twin.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special.values()]
    )
    return twin
