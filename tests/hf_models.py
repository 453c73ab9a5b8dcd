"""Small random LLaMA models made and saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
