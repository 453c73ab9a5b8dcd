"""The oracle itself, held against the LLaMA of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megashear.config.schema import ModelShape
from tests.reference_llama import forward, random_weights


def _hf_weights(shape: ModelShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    embedding = weights["embedding.word_embeddings.weight"]
    named = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": embedding if shape.tied_embeddings else weights["output_layer.weight"],
    }
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"].view(
            shape.num_query_groups, -1, shape.kv_channels, shape.hidden_size
        )
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        parts = {
            "self_attn.q_proj": qkv[:, :-2].reshape(-1, shape.hidden_size),
            "self_attn.k_proj": qkv[:, -2].reshape(-1, shape.hidden_size),
            "self_attn.v_proj": qkv[:, -1].reshape(-1, shape.hidden_size),
            "self_attn.o_proj": weights[ours + "self_attention.linear_proj.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": weights[ours + "mlp.linear_fc2.weight"],
            "input_layernorm": weights[ours + "self_attention.linear_qkv.layer_norm_weight"],
            "post_attention_layernorm": weights[ours + "mlp.linear_fc1.layer_norm_weight"],
        }
        if shape.qk_norm:
            parts["self_attn.q_norm"] = weights[ours + "self_attention.q_layernorm.weight"]
            parts["self_attn.k_norm"] = weights[ours + "self_attention.k_layernorm.weight"]
        named |= {f"{theirs}{name}.weight": value for name, value in parts.items()}
        if shape.qkv_bias:
            bias = weights[ours + "self_attention.linear_qkv.bias"].view(
                shape.num_query_groups, -1, shape.kv_channels
            )
            parts = {
                "q": bias[:, :-2].flatten(),
                "k": bias[:, -2].flatten(),
                "v": bias[:, -1].flatten(),
                "o": torch.zeros(shape.hidden_size),
            }
            named |= {f"{theirs}self_attn.{n}_proj.bias": value for n, value in parts.items()}
    return named


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("groups", "tied"), [(4, False), (2, True)])
def test_dense_logits_are_those_of_transformers(groups: int, tied: bool, architecture: str) -> None:
    """Qwen3 has the q/k norms, and here also the attention bias, of which that of o_proj is 0."""
    import transformers

    qwen = architecture == "Qwen3"
    shape = ModelShape(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=4,
        ffn_hidden_size=40,
        vocab_size=50,
        num_query_groups=groups,
        kv_channels=8,
        rotary_base=5000.0,
        layernorm_epsilon=1e-2,
        tied_embeddings=tied,
        qkv_bias=qwen,
        qk_norm=qwen,
    )
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=8,
        rms_norm_eps=1e-2,
        rope_theta=5000.0,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        attention_bias=qwen,
    )
    weights = random_weights(shape, seed=0)
    theirs = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    theirs.load_state_dict(_hf_weights(shape, weights))
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        forward(shape, weights, tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5
    )
