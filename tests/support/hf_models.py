"""Small random models made, saved and loaded by transformers itself, and changed on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GROUPS = {"num_key_value_heads": 2}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_IN_FULL = {
    **YARN,
    **{"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.4, "truncate": False},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
NO_WINDOW = {"sliding_window": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": GROUPS,
    "multi_query": {"num_key_value_heads": 1},
    "tied": {**GROUPS, "tie_word_embeddings": True},
    "wide_heads": {**GROUPS, "head_dim": 12},
    "eps": {"rms_norm_eps": 0.1},
    "rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "linear": {"rope_parameters": LINEAR},
    "dynamic": {"rope_parameters": DYNAMIC},
    "llama3": {**GROUPS, "rope_parameters": LLAMA3, "max_position_embeddings": 131072},
    "yarn": {**GROUPS, "rope_parameters": YARN},
    "yarn_in_full": {**GROUPS, "rope_parameters": YARN_IN_FULL},
    "attention_bias": {**GROUPS, "attention_bias": True},
    "mlp_bias": {**GROUPS, "mlp_bias": True, "tie_word_embeddings": True},
    "biases": {**GROUPS, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GROUPS, "model_type": "mistral", "sliding_window": 5},
    "mistral_v3": {**GROUPS, "model_type": "mistral", **NO_WINDOW, "hidden_size": 30},
    "qwen2": {**GROUPS, "model_type": "qwen2", **NO_WINDOW, "tie_word_embeddings": True},
    "qwen2_window": {**GROUPS, "model_type": "qwen2", **WINDOW, "rope_parameters": YARN},
    "qwen3": {**GROUPS, "model_type": "qwen3", **NO_WINDOW, "head_dim": 12},
    "qwen3_bias": {**GROUPS, "model_type": "qwen3", "attention_bias": True, **WINDOW},
}
"""Of every family and everything that a config.json of it may say; LLaMA unless said otherwise."""


def config_of(**changes: Any) -> PreTrainedConfig:
    """A configuration as transformers makes it: SIZES with changes, `model_type` among them."""
    return AutoConfig.for_model(**{"model_type": "llama", **SIZES, **changes})


def random_llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose every weight, the norms' too, is drawn so that a mix-up changes the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(
                    1 + 0.2 * noise if noise.ndim == 1 else noise / noise.shape[1] ** 0.5
                )
    return model


def save_llama(directory: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The same, saved: `directory` is then a Hugging Face directory."""
    model = random_llama(seed, **changes)
    model.save_pretrained(directory)
    return model


def tokens_of(model: PreTrainedModel, batch: int = 2, length: int = 17) -> torch.Tensor:
    """int64 [batch, length]: random tokens of its vocabulary."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def load_llama(directory: Path) -> PreTrainedModel:
    """The model in transformers, which must find every weight and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_same_tensors(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Both have the same tensors, bit for bit, in the same order."""
    assert type(model) is type(other)
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
