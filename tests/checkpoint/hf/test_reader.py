"""Hugging Face directories, read and written again, with transformers as the judge of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megashear.checkpoint import models
from megashear.checkpoint.hf.writer import write_huggingface
from tests.support.hf_models import (
    VARIANTS,
    assert_same_tensors,
    load_llama,
    random_llama,
    save_llama,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small grouped-query model in one safetensors file."""
    save_llama(tmp_path / "model", num_key_value_heads=2)
    return tmp_path / "model"


@pytest.mark.parametrize("variant", ["tied", "biases", "qwen3"])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 5000])
def test_import_and_export_give_identical_tensors(
    tmp_path: Path, variant: str, max_shard_bytes: int
) -> None:
    model = save_llama(tmp_path / "model", **VARIANTS[variant])
    reader = models.open_huggingface(tmp_path / "model").weights
    out = tmp_path / "out"
    write_huggingface(out, reader.shape, reader.items(), max_shard_bytes=max_shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes == 5000)
    assert_same_tensors(model, load_llama(out))
    assert models.open_huggingface(out).shape == reader.shape


def test_sharded_by_transformers(tmp_path: Path) -> None:
    model = random_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    reader = models.open_huggingface(tmp_path / "model").weights
    write_huggingface(tmp_path / "out", reader.shape, reader.items())
    assert_same_tensors(model, load_llama(tmp_path / "out"))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(model: Path, sharded: bool) -> None:
    expected = load_llama(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (model / "model.safetensors").unlink()
    if sharded:
        parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
        weight_map = {name: f"pytorch_model-{i}.bin" for i in range(2) for name in parts[i]}
        for i, part in enumerate(parts):
            torch.save(part, model / f"pytorch_model-{i}.bin")
        index = model / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(tensors, model / "pytorch_model.bin")
    reader = models.open_huggingface(model).weights
    write_huggingface(model / "out", reader.shape, reader.items())
    assert_same_tensors(expected, load_llama(model / "out"))


def test_half_precision_is_kept_or_cast(tmp_path: Path) -> None:
    random_llama().bfloat16().save_pretrained(tmp_path / "model")
    reader = models.open_huggingface(tmp_path / "model").weights
    assert {tensor.dtype for _, tensor in reader.items()} == {torch.bfloat16}
    write_huggingface(tmp_path / "kept", reader.shape, reader.items())
    write_huggingface(tmp_path / "cast", reader.shape, reader.items(), dtype="float32")
    assert load_llama(tmp_path / "kept").dtype == torch.bfloat16
    assert load_llama(tmp_path / "cast").dtype == torch.float32
