"""What goes with a Hugging Face model besides its weights: a tokenizer, and settings of generation.

A checkpoint may be anybody's and names any path as its tokenizer, to be published with the model:
a file is copied only once it was read as what its name says. Imports neither Megatron nor
transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megashear.checkpoint.foreign import read_json, refuse
from megashear.errors import CheckpointError
from megashear.files import read_small

CONFIG, GENERATION = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
"""Written where nobody knows better: transformers would take LLaMA's."""
LONGEST = 2**16
"""Characters of all settings of generation."""
TEMPLATES = "additional_chat_templates"
"""A directory of them, beside the tokenizer."""

Generation = dict[str, Any]
"""Of CONFIG the special tokens' ids that are known, of GENERATION the content, if there is one."""


def _sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=file.read_bytes() or b"none")


def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(read_small(file))


def _vocabulary(file: Path) -> Any:
    vocabulary = read_json(file)
    if not vocabulary or not all(type(number) is int for number in vocabulary.values()):
        raise ValueError("not a mapping of tokens to their numbers")
    return vocabulary


def _tekken(file: Path) -> Any:
    content = read_json(file)
    if not {"config", "vocab"} <= content.keys():
        raise ValueError("without `config` and `vocab`")
    return content


VOCABULARIES: dict[str, Callable[[Path], Any]] = {
    "tokenizer.model": _sentencepiece,
    "tokenizer.json": _tokenizer,
    "vocab.json": _vocabulary,
    "tekken.json": _tekken,
}
"""Files any of which is a tokenizer (or its larger half), and what reads them."""
READERS: dict[str, Callable[[Path], Any]] = {
    **VOCABULARIES,
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json"), read_json),
    **dict.fromkeys(("added_tokens.json", "chat_template.json"), read_json),
    **dict.fromkeys(("merges.txt", "chat_template.jinja"), read_small),
}
"""The same of all files of tokenizers, by name."""


def has_tokenizer(directory: Path) -> bool:
    """Whether there is one in a directory."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(tokenizer: Path, directory: Path, vocab_size: int) -> Generation:
    """Copy the files of a tokenizer; returns what is told beside them of generation.

    Args:
        tokenizer: directory of its files, or one of them.
        directory: where they are to lie.
        vocab_size: of the model, which has all special tokens.

    Raises:
        CheckpointError: there is none, or a file is no part of one, or only points elsewhere.
    """
    source = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = {name: source / name for name in READERS if (source / name).is_file()}
    if tokenizer.is_file() and tokenizer.name not in files:
        files = {f"tokenizer{tokenizer.suffix}": tokenizer}
    else:
        templates = sorted((source / TEMPLATES).glob("*.jinja"))
        files |= {f"{TEMPLATES}/{file.name}": file for file in templates}
    if not tokenizer.exists() or not VOCABULARIES.keys() & files.keys():
        raise CheckpointError(f"{tokenizer}: no tokenizer (none of {', '.join(VOCABULARIES)})")
    _check_links(source, [file for file in files.values() if file != tokenizer])
    read = {name: _read(file, READERS.get(name, read_small)) for name, file in files.items()}
    for name, file in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, directory / name)
    told = read_generation(source, vocab_size) if (source / CONFIG).is_file() else {}
    if not told.get(CONFIG):
        told[CONFIG] = _special_ids(read)
        check_generation(told, vocab_size, tokenizer)
    return told


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    """What a reader makes of a file; the libraries raise whatever they like."""
    try:
        return read(file)
    except CheckpointError:
        raise
    except Exception as error:
        kind = "a sentencepiece model" if read is _sentencepiece else "a tokenizer's file"
        raise CheckpointError(f"{file}: not {kind}, so not published: {error!r:.200}") from None


def _special_ids(read: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens, out of the tokenizer itself."""
    config, tokenizer = read.get("tokenizer_config.json", {}), read.get("tokenizer.json")
    texts = {key: config.get(key.removesuffix("_id")) for key in IDS}
    texts = {
        k: text.get("content") if isinstance(text, dict) else text for k, text in texts.items()
    }
    if tokenizer is not None and any(isinstance(text, str) for text in texts.values()):
        ids = {k: tokenizer.token_to_id(text) for k, text in texts.items() if isinstance(text, str)}
    elif processor := read.get("tokenizer.model"):
        numbers = (processor.bos_id(), processor.eos_id(), processor.pad_id())
        ids = {key: number for key, number in zip(IDS, numbers, strict=True) if number >= 0}
    else:
        ids = {}
    return {key: number for key, number in ids.items() if number is not None}


def _check_links(source: Path, files: Iterable[Path]) -> None:
    """Refuse to copy what a foreign directory only points at: a key, say, to be published."""
    home = source.resolve()
    places = (home, home.parent.parent / "blobs")  # the hub's cache is links to there
    problems = [
        f"{file.name} is a link to {file.resolve()}, outside of it; put a copy in its place"
        for file in files
        if not any(place in file.resolve().parents for place in places)
    ]
    if problems:
        refuse(source, problems)


def read_generation(directory: Path, vocab_size: int) -> Generation:
    """What a Hugging Face directory says of generation; a padding token of -1 is none.

    Raises:
        CheckpointError: a file is damaged, or a special token is none of the vocabulary's.
    """
    config = read_json(directory / CONFIG)
    if config.get("pad_token_id") == -1:  # the first LLaMA's
        del config["pad_token_id"]
    found: Generation = {CONFIG: {key: config[key] for key in IDS if config.get(key) is not None}}
    file = directory / GENERATION
    if file.exists():
        _check_links(directory, [file])
        found[GENERATION] = read_json(file)
    check_generation(found, vocab_size, directory)
    return found


def check_generation(generation: Mapping[str, Any], vocab_size: int, source: object) -> None:
    """Refuse settings of generation that are none.

    Raises:
        CheckpointError: listing the problems.
    """
    problems = [f"{name} is unknown here" for name in generation.keys() - {CONFIG, GENERATION}]
    for file in (CONFIG, GENERATION):
        settings = generation.get(file, {})
        if not isinstance(settings, dict):
            problems.append(f"{file} must be a mapping")
            continue
        if file == CONFIG:
            problems += [f"{file}: {key} is no special token" for key in settings.keys() - {*IDS}]
        text = f"must be the number of a token (below {vocab_size}), or a list of such"
        problems += [
            f"{file}: {key} = {settings[key]!r:.80} {text}"
            for key in IDS
            if not _are_ids(settings.get(key), vocab_size)
        ]
    try:
        if len(json.dumps(generation, allow_nan=False)) > LONGEST:
            problems.append(f"{GENERATION} is longer than {LONGEST:,} characters")
    except (ValueError, RecursionError):
        problems.append(f"{GENERATION} holds numbers that JSON does not have, or is too deep")
    if problems:
        refuse(source, sorted(problems))


def _are_ids(value: Any, vocab_size: int) -> bool:
    if value is None:
        return True
    ids = value if isinstance(value, list) else [value]
    return all(type(number) is int and 0 <= number < vocab_size for number in ids)


def settings_of(
    kept: Generation, told: Generation, told_wins: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an exported config.json says of special tokens, and its generation_config.json.

    Args:
        kept: what the checkpoint has of its source.
        told: what the tokenizer says.
        told_wins: whether the ids are the tokenizer's where both know some.
    """
    first, second = (told, kept) if told_wins else (kept, told)
    source = first if any(first.values()) else second
    ids = {**NO_IDS, **source.get(CONFIG, {})}
    stated = source.get(GENERATION, ids)
    others = kept.get(GENERATION) or told.get(GENERATION) or {"_from_model_config": True}
    settings = {key: value for key, value in others.items() if key not in IDS}
    return ids, settings | {key: stated[key] for key in IDS if key in stated}
