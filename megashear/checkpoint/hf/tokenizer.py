"""The tokenizer files and generation settings of a Hugging Face model.

A foreign checkpoint can name any path as its tokenizer, and the files are published with the model:
a file is copied only if it can be read as what its name says. Imports neither Megatron nor
transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megashear.checkpoint.foreign import read_json, refuse
from megashear.console import say
from megashear.errors import CheckpointError
from megashear.files import read_small

CONFIG, GENERATION = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
"""Written where the ids are not known: transformers would assume LLaMA's."""
MAX_CHARACTERS = 2**16
"""Largest accepted size of all generation settings, in characters."""
TEMPLATES = "additional_chat_templates"
"""A directory of chat templates next to the tokenizer."""

Generation = dict[str, Any]
"""CONFIG -> the known ids of special tokens; GENERATION -> the content of that file, if any."""


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
"""Files each of which is a tokenizer or most of one, and their readers."""
READERS: dict[str, Callable[[Path], Any]] = {
    **VOCABULARIES,
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json"), read_json),
    **dict.fromkeys(("added_tokens.json", "chat_template.json"), read_json),
    **dict.fromkeys(("merges.txt", "chat_template.jinja"), read_small),
}
"""All files of tokenizers by name, and their readers."""


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def copy_tokenizer(tokenizer: Path, directory: Path, vocab_size: int) -> Generation:
    """Copy the files of a tokenizer; return the generation settings found with them.

    Args:
        tokenizer: directory of its files, or one of them.
        directory: to copy into.
        vocab_size: of the model; all special tokens must be below it.

    Raises:
        CheckpointError: there is none, or a file is damaged or a link to elsewhere.
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
    if "tokenizer.json" in files and (model := files.get("tokenizer.model")):
        try:
            _read(model, _sentencepiece)
        except CheckpointError:
            say(f"{model}: no sentencepiece model (Llama 3's is a tiktoken file): left out")
            del files["tokenizer.model"]
    _check_links(source, [file for file in files.values() if file != tokenizer])
    read = {name: _read(file, READERS.get(name, read_small)) for name, file in files.items()}
    for name, file in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, directory / name)
    settings = read_generation(source, vocab_size) if (source / CONFIG).is_file() else {}
    if not settings.get(CONFIG):
        settings[CONFIG] = _special_ids(read)
        check_generation(settings, vocab_size, tokenizer)
    return settings


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return what a reader returns; the libraries can raise anything."""
    try:
        return read(file)
    except CheckpointError:
        raise
    except Exception as error:
        kind = "a sentencepiece model" if read is _sentencepiece else "a tokenizer's file"
        raise CheckpointError(f"{file}: not {kind}, so not published: {error!r:.200}") from None


def _special_ids(read: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens that the tokenizer itself states."""
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
    """Refuse links that lead out of a foreign directory: they could publish a private file."""
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
    """Return the generation settings of a Hugging Face directory; a padding token of -1 is none.

    Raises:
        CheckpointError: a file is damaged, or a special token is not in the vocabulary.
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
    """Refuse damaged generation settings.

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
        if len(json.dumps(generation, allow_nan=False)) > MAX_CHARACTERS:
            problems.append(f"{GENERATION} is longer than {MAX_CHARACTERS:,} characters")
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
    source: Generation, tokenizer: Generation, tokenizer_wins: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the special tokens for an exported config.json, and its generation_config.json.

    Args:
        source: settings that the checkpoint kept from its source.
        tokenizer: settings that the tokenizer states.
        tokenizer_wins: whether the tokenizer's ids win where both have some.
    """
    first, second = (tokenizer, source) if tokenizer_wins else (source, tokenizer)
    chosen = first if any(first.values()) else second
    ids = {**NO_IDS, **chosen.get(CONFIG, {})}
    stated = chosen.get(GENERATION, ids)
    others = source.get(GENERATION) or tokenizer.get(GENERATION) or {"_from_model_config": True}
    settings = {key: value for key, value in others.items() if key not in IDS}
    return ids, settings | {key: stated[key] for key in IDS if key in stated}
