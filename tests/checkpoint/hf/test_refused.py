"""Hugging Face directories that are refused: incomplete, damaged, hostile, or not what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megashear.checkpoint import models
from megashear.errors import CheckpointError
from tests.support.hf_models import (
    change_config,
    change_tensors,
    random_llama,
    save_llama,
)

FOURTH = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small grouped-query model in one safetensors file."""
    save_llama(tmp_path / "model", num_key_value_heads=2)
    return tmp_path / "model"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        models.open_huggingface(directory).verify()
    return str(caught.value)


def test_every_misfit_is_named_at_once(model: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"], tensors[FOURTH]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["lm_head.weight"] = torch.zeros(96, 32, dtype=torch.int8)

    change_tensors(model, change)
    message = refusal(model)
    assert message.startswith(f"{model}: 6 problems\n")
    assert "model.norm.weight is missing" in message
    assert f"{FOURTH} is missing" in message
    assert (
        "up_proj.weight is [47, 32] in model.safetensors, but config.json says [48, 32]" in message
    )
    assert "model.layers.3.input_layernorm.weight in model.safetensors is unexpected" in message
    assert "q_proj.bias in model.safetensors is unexpected" in message
    assert "lm_head.weight in model.safetensors has type I8" in message


def test_a_config_that_lies_is_told_by_the_tensors(model: Path) -> None:
    change_config(model, num_hidden_layers=2)
    assert "model.layers.2.input_layernorm.weight in model.safetensors is unexpected" in refusal(
        model
    )
    change_config(model, num_hidden_layers=4)
    assert "model.layers.3.input_layernorm.weight is missing" in refusal(model)
    change_config(model, num_hidden_layers=1_000_000)
    assert "num_hidden_layers = 1000000 in config.json" in refusal(model)
    change_config(model, num_hidden_layers=3, num_key_value_heads=4)
    assert "k_proj.weight is [16, 32]" in refusal(model)


def test_reading_checks_first(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop(FOURTH))
    with pytest.raises(CheckpointError, match=f"{FOURTH} is missing"):
        models.open_huggingface(model).weights.read("decoder.final_layernorm.weight")


def test_tied_head_may_be_there_but_not_differ(tmp_path: Path) -> None:
    model = save_llama(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    models.open_huggingface(tmp_path).verify()
    change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1e-3))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path)
    save_llama(tmp_path, tie_word_embeddings=True)
    change_config(tmp_path, tie_word_embeddings=False)
    assert "lm_head.weight is missing" in refusal(tmp_path)
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", None, "cannot be read: No such file"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[1]", "must be a mapping"),
        ("config.json", "[" * 100_000, "not JSON"),
        ("config.json", "\udcff", "not JSON"),
        ("model.safetensors", None, "no weights"),
    ],
)
def test_missing_or_damaged_files(model: Path, file: str, text: str | None, reason: str) -> None:
    (model / file).unlink()
    if text is not None:
        (model / file).write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(model)
    assert reason in message
    assert str(model) in message


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files, with their index."""
    random_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def change_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        3,
        "x.bin",
    ],
)
def test_index_may_name_only_files_beside_it(sharded: Path, name: Any) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    change_index(sharded, lambda weight_map: weight_map.update({FOURTH: name}))
    message = refusal(sharded)
    assert f"{FOURTH} is said to be in {name!r}" in message


def test_index_against_its_files(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    lost = sorted(load_file(sharded / files[-1]))

    def change(weight_map: dict[str, str]) -> None:
        weight_map["model.layers.9.ghost.weight"] = files[0]
        del weight_map[sorted(load_file(sharded / files[0]))[0]]

    change_index(sharded, change)
    (sharded / files[-1]).unlink()
    message = refusal(sharded)
    assert f"{files[-1]} cannot be read: missing" in message
    assert f"model.layers.9.ghost.weight is not in {files[0]}, where the index has it" in message
    assert f"is in {files[0]}, but the index does not say so" in message
    assert all(f"{name} is missing" in message for name in lost)


def test_links_into_a_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blob = (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(blob)
    models.open_huggingface(model).verify()
