"""The oracle itself, held against the LLaMA of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megashear.config.schema import ModelShape
from tests.support.reference_llama import forward, random_weights


def hf_weights(shape: ModelShape, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names, in its layouts; biases where the shape has them."""
    embedding = weights["embedding.word_embeddings.weight"]
    named = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": embedding if shape.tied_embeddings else weights["output_layer.weight"],
    }
    for layer in range(shape.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = _parts(shape, weights, ours, kind)
            named |= {f"{theirs}{name}.{kind}": value for name, value in parts.items()}
    return named


def _parts(
    shape: ModelShape, weights: dict[str, Tensor], prefix: str, kind: str
) -> dict[str, Tensor]:
    """The weights or biases of a layer, by its modules in transformers."""
    found = {}
    qkv = weights.get(f"{prefix}self_attention.linear_qkv.{kind}")
    if qkv is not None:
        groups = qkv.unflatten(0, (shape.num_query_groups, -1, shape.kv_channels))
        for name, rows in (("q", groups[:, :-2]), ("k", groups[:, -2:-1]), ("v", groups[:, -1:])):
            found[f"self_attn.{name}_proj"] = rows.flatten(0, 2)
    fc1 = weights.get(f"{prefix}mlp.linear_fc1.{kind}")
    if fc1 is not None:
        found["mlp.gate_proj"], found["mlp.up_proj"] = fc1.chunk(2)
    for name, module in (
        ("self_attention.linear_proj", "self_attn.o_proj"),
        ("self_attention.q_layernorm", "self_attn.q_norm"),
        ("self_attention.k_layernorm", "self_attn.k_norm"),
        ("mlp.linear_fc2", "mlp.down_proj"),
        ("self_attention.linear_qkv.layer_norm", "input_layernorm"),
        ("mlp.linear_fc1.layer_norm", "post_attention_layernorm"),
    ):
        separator = "_" if name.endswith("layer_norm") else "."
        value = weights.get(f"{prefix}{name}{separator}{kind}")
        if value is not None:
            found[module] = value
    return found


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("groups", "tied"), [(4, False), (2, True)])
def test_dense_logits_are_those_of_transformers(groups: int, tied: bool, architecture: str) -> None:
    """Untied, with the biases that the architecture may have; Qwen3 with its q/k norms."""
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
        qkv_bias=not tied,
        proj_bias=not tied,
        mlp_bias=not tied and not qwen,
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
        attention_bias=shape.qkv_bias,
        mlp_bias=shape.mlp_bias,
    )
    weights = random_weights(shape, seed=0)
    theirs = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    theirs.load_state_dict(hf_weights(shape, weights))
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        forward(shape, weights, tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5
    )
