"""Families of models: an entry for each, with the defaults of transformers' config class.

Imports neither torch, Megatron nor transformers, whose AutoConfig takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PARTS = {
    "qkv_bias": "biases of queries, keys and values",
    "proj_bias": "a bias of the attention's output",
    "mlp_bias": "biases of the feed-forward",
    "qk_norm": "q/k norms",
}
"""Features that only some models have: flags of ModelShape, in words."""


@dataclass(frozen=True)
class Family:
    """An architecture of transformers: the settings of its config.json besides the sizes."""

    architecture: str  # the class
    model_type: str
    defaults: Mapping[str, Any]  # what transformers takes for a key that is left out
    always: frozenset[str] = frozenset()  # PARTS that every such model has
    switches: Mapping[str, frozenset[str]] = field(default_factory=dict)  # keys, and their PARTS
    window: tuple[str, ...] = ()  # keys that say which layers attend over a sliding window
    whole_heads: bool = False  # whether hidden_size must be a multiple of num_attention_heads


_ATTENTION_BIAS = frozenset(("qkv_bias", "proj_bias"))

_EVERYWHERE = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}

_QWEN = {
    **_EVERYWHERE,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

_QWEN_WINDOW = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            architecture="LlamaForCausalLM",
            model_type="llama",
            defaults={
                **_EVERYWHERE,
                "max_position_embeddings": 2048,
                "attention_bias": False,
                "mlp_bias": False,
            },
            switches={"attention_bias": _ATTENTION_BIAS, "mlp_bias": frozenset(("mlp_bias",))},
            whole_heads=True,
        ),
        Family(
            architecture="MistralForCausalLM",
            model_type="mistral",
            defaults={
                **_EVERYWHERE,
                "max_position_embeddings": 131072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            window=("sliding_window",),
        ),
        Family(
            architecture="Qwen2ForCausalLM",
            model_type="qwen2",
            defaults=_QWEN,
            always=frozenset(("qkv_bias",)),
            window=_QWEN_WINDOW,
        ),
        Family(
            architecture="Qwen3ForCausalLM",
            model_type="qwen3",
            defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
            always=frozenset(("qk_norm",)),
            switches={"attention_bias": _ATTENTION_BIAS},
            window=_QWEN_WINDOW,
        ),
    )
}
