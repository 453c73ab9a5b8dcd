"""Hugging Face directories as they are written: whole or not at all, and ordinary."""

from __future__ import annotations

import json
import resource
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor

from megashear.checkpoint.hf.writer import write_huggingface
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.pruning.table import param_rules
from tests.support.hf_models import (
    change_config,
    load_llama,
    save_llama,
)
from tests.support.make_tokenizer import make_tokenizer
from tests.support.reference_llama import random_weights

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=40,
    max_position_embeddings=64,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small grouped-query model in one safetensors file."""
    save_llama(tmp_path / "model", num_key_value_heads=2)
    return tmp_path / "model"


def weights(**changes: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in random_weights(SHAPE, 0).items():
        changed = changes.get(name.replace(".", "_"), tensor)
        if changed is not None:
            yield name, changed


def test_result_is_an_ordinary_directory(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    write_huggingface(out, SHAPE, weights(), card="# mine\n")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    assert (out / "README.md").read_text() == "# mine\n"
    config = load_llama(out).config
    assert config.bos_token_id is config.eos_token_id is None  # and not LLaMA's
    (tmp_path / "ordinary").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (*out.iterdir(), tmp_path / "ordinary")}
    assert len(modes) == 1  # others may read it where they may read what this user writes
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(tmp_path.joinpath("a").stat().st_mode)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "out", SHAPE, weights(), max_shard_bytes=6000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        held |= dict.fromkeys(tensors, file.name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 6000
    assert index["weight_map"] == held
    total = 4 * sum(tensor.numel() for _, tensor in weights())
    assert index["metadata"]["total_size"] == total
    load_llama(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_final_layernorm_weight": None}, "missing: decoder.final_layernorm.weight"),
        (
            {"decoder_final_layernorm_weight": torch.ones(17)},
            "final_layernorm.weight.*another shape",
        ),
        ({"output_layer_weight": torch.full((40, 16), float("nan"))}, "output_layer.*not finite"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_huggingface(tmp_path / "out", SHAPE, weights(**changes))
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    changes = {"output_layer_weight": torch.full((40, 16), 1e5)}
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        write_huggingface(tmp_path / "out", SHAPE, weights(**changes), dtype="float16")


def test_unexpected_weight_and_weight_given_twice(tmp_path: Path) -> None:
    names = [rule.name for rule in param_rules(SHAPE)]
    for name in ("decoder.layers.2.mlp.linear_fc2.weight", names[0]):
        stream = [*weights(), (name, torch.ones(40, 16))]
        with pytest.raises(CheckpointError, match="is unexpected"):
            write_huggingface(tmp_path / "out", SHAPE, stream)
        assert not list(tmp_path.iterdir())


def test_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_huggingface(out, SHAPE, weights())
    before = (out / "model.safetensors").read_bytes()

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield next(weights())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_huggingface(out, SHAPE, interrupted(), overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_output_is_replaced_only_when_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_huggingface(out, SHAPE, weights())  # an empty directory is no output
    with pytest.raises(CheckpointError, match="exists"):
        write_huggingface(out, SHAPE, weights())
    write_huggingface(out, SHAPE, weights(), dtype="bfloat16", overwrite=True)
    assert load_llama(out).dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_model_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        write_huggingface(tmp_path, SHAPE, weights(), overwrite=True)
    (tmp_path / "config.json").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"it holds checkpoints/, thesis\.tex, which"):
        write_huggingface(tmp_path, SHAPE, weights(), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        write_huggingface(tmp_path / "file", SHAPE, weights(), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_huggingface(tmp_path / "file" / "out", SHAPE, weights())


def test_disk_that_takes_no_more(tmp_path: Path) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, former[1]))  # a write beyond it fails
    try:
        with pytest.raises(CheckpointError, match="out: cannot be written"):
            write_huggingface(tmp_path / "out", SHAPE, weights())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert not list(tmp_path.iterdir())


# Tokenizers


def sentencepiece_model(directory: Path) -> Path:
    directory.mkdir()
    text = [f"line {i} of the text, and {i * i} more words to learn from" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


def test_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer" / "unrelated.txt").touch()
    for given in (model, model.parent):
        write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=given, overwrite=True)
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
        assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
        assert not (tmp_path / "out" / "unrelated.txt").exists()
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    renamed = model.rename(tmp_path / "mine.model")
    write_huggingface(tmp_path / "other", SHAPE, weights(), tokenizer=renamed)
    assert (tmp_path / "other" / "tokenizer.model").read_bytes() == renamed.read_bytes()


WORDS = {"<s>": 3, "</s>": 4, "a": 5}


def tokenizer_json(file: Path) -> str:
    """Writes a tokenizer of WORDS; the text of it."""
    tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, "a")).save(str(file))
    return file.read_text()


def written(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Special tokens of config.json, and generation_config.json."""
    config = json.loads((directory / "config.json").read_text())
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    return ids, json.loads((directory / "generation_config.json").read_text())


def test_special_tokens_of_the_source_model_are_kept(model: Path, tmp_path: Path) -> None:
    tokenizer_json(model / "tokenizer.json")
    (model / "generation_config.json").unlink()
    change_config(model, bos_token_id=5, eos_token_id=[6, 7])
    write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=model)
    loaded = load_llama(tmp_path / "out")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (5, [6, 7])
    assert loaded.generation_config.eos_token_id == [6, 7]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (5, [6, 7])


def test_a_tokenizer_that_points_elsewhere_is_not_published(model: Path, tmp_path: Path) -> None:
    text = tokenizer_json(tmp_path / "secret")
    (model / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to .*secret, outside"):
        write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=model)
    assert not (tmp_path / "out").exists()
    cache = tmp_path / "models--mine"  # as the hub's cache has it
    (cache / "blobs").mkdir(parents=True)
    (tmp_path / "secret").rename(cache / "blobs" / "0123")
    (cache / "snapshots").mkdir()
    model = model.rename(cache / "snapshots" / "main")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to("../../blobs/0123")
    write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=model)
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == text


@pytest.mark.parametrize("value", ["<s>", -1, 1.5, [1, "2"], {"id": 1}, True, 10**6])
def test_special_tokens_that_are_none(model: Path, tmp_path: Path, value: Any) -> None:
    tokenizer_json(model / "tokenizer.json")
    change_config(model, eos_token_id=value)
    with pytest.raises(CheckpointError, match=r"eos_token_id = .* must be the number of a token"):
        write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=model)
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("no model")
    for tokenizer, message in (("nowhere", "no tokenizer"), ("tokenizer.model", "sentencepiece")):
        with pytest.raises(CheckpointError, match=message):
            write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=tmp_path / tokenizer)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tekken.json", "mine.json"])
def test_a_file_that_is_no_tokenizer_is_not_published(name: str, tmp_path: Path) -> None:
    """A checkpoint may name any file of whoever exports it."""
    (tmp_path / name).write_text('{"key": "secret"}')
    with pytest.raises(CheckpointError, match=f"{name}: not a tokenizer's file"):
        write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


EOS = {"__type": "AddedToken", "content": "</s>"}  # as transformers 4 saved it


def test_special_tokens_out_of_the_tokenizers_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    (folder / "additional_chat_templates").mkdir(parents=True)
    text = tokenizer_json(folder / "tokenizer.json")
    config = {"bos_token": "<s>", "eos_token": EOS, "pad_token": "no word"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text("{}")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    for _ in range(2):  # the directory within does not keep it from being replaced
        write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=folder, overwrite=True)
    assert written(tmp_path / "out")[0] == {"bos_token_id": 3, "eos_token_id": 4}
    for file in folder.rglob("*.j*"):
        copy = tmp_path / "out" / file.relative_to(folder)
        assert copy.read_text() == file.read_text()
    (folder / "tokenizer.json").rename(folder / "other.json")
    write_huggingface(tmp_path / "bare", SHAPE, weights(), tokenizer=folder / "other.json")
    assert (tmp_path / "bare" / "tokenizer.json").read_text() == text


KEPT = {
    "config.json": {"bos_token_id": 1, "eos_token_id": 8, "pad_token_id": 0},
    "generation_config.json": {"eos_token_id": [8, 9], "temperature": 0.6},
}


def test_the_sources_settings_of_generation_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer_json(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    for tokenizer in (None, folder):
        out = tmp_path / f"out{tokenizer is None}"
        write_huggingface(out, SHAPE, weights(), tokenizer=tokenizer, generation=KEPT)
        assert written(out) == (KEPT["config.json"], KEPT["generation_config.json"])
    other = {"tokenizer": folder, "generation": KEPT, "other_tokenizer": True}
    write_huggingface(tmp_path / "other", SHAPE, weights(), **other)
    ids = {"bos_token_id": 3, "eos_token_id": 4}
    assert written(tmp_path / "other") == (ids, {**ids, "temperature": 0.6})


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"config.json": {"eos_token_id": 40}}, "eos_token_id = 40 must be"),
        ({"config.json": {"auto_map": {}}}, "auto_map is no special token"),
        ({"generation_config.json": []}, "must be a mapping"),
        ({"generation_config.json": {"temperature": float("nan")}}, "numbers that JSON does not"),
        ({"generation_config.json": {"prefix": "x" * 10**5}}, "longer than"),
        ({"tokenizer.json": {}}, r"tokenizer\.json is unknown"),
    ],
)
def test_settings_of_generation_that_are_none(
    generation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_huggingface(tmp_path / "out", SHAPE, weights(), generation=generation)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_transformers_replaces_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    shape = replace(SHAPE, family="qwen2", qkv_bias=True, vocab_size=500)
    weights = random_weights(shape, seed=0)
    with pytest.raises(CheckpointError, match=r"Qwen2Tokenizer\) reads .*--tokenizer none"):
        write_huggingface(tmp_path / "out", shape, weights.items(), tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    write_huggingface(tmp_path / "out", shape, weights.items())


def test_a_tiktoken_file_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    (tokenizer / "tokenizer.model").write_text("IQ== 0\n")  # as Llama 3's directories have it
    shape = replace(SHAPE, vocab_size=500)
    out = tmp_path / "out"
    write_huggingface(out, shape, random_weights(shape, seed=0).items(), tokenizer=tokenizer)
    assert (out / "tokenizer.json").is_file()
    assert not (out / "tokenizer.model").exists()
    assert "tiktoken file): left out" in capsys.readouterr().err
