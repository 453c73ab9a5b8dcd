"""Small random LLaMA models made, saved and loaded by transformers itself, and changed on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "wide_heads": {"num_key_value_heads": 2, "head_dim": 12},
    "rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


def random_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A model whose every weight, the norms' too, is drawn so that a mix-up changes the logits."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if noise.ndim == 1 else noise / noise.shape[1] ** 0.5)
    return model


def save_llama(directory: Path, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """The same, saved: `directory` is then a Hugging Face directory."""
    model = random_llama(seed, **changes)
    model.save_pretrained(directory)
    return model


def tokens_of(model: LlamaForCausalLM, batch: int = 2, length: int = 17) -> torch.Tensor:
    """int64 [batch, length]: random tokens of its vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def load_llama(directory: Path) -> LlamaForCausalLM:
    """The model in transformers, which must find every weight and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def assert_same_tensors(model: LlamaForCausalLM, other: LlamaForCausalLM) -> None:
    """Both have the same tensors, bit for bit, in the same order."""
    expected, found = model.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite model.safetensors after a change of its tensors."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def change_config(directory: Path, **changes: Any) -> None:
    """Rewrite config.json with other settings."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
