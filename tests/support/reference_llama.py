"""The oracle: a LLaMA in plain PyTorch, with the masks where the paper puts them, on activations.

Written without `megashear.pruning` (of which it takes only the names of the parameters) and without
Megatron, so that the weight-space masks, the extraction and the exports can be held against it.
Weights go by Megatron-Core's names and layouts; any float dtype; plain autograd throughout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megashear.config.schema import ModelShape
from megashear.pruning.table import mask_sizes, param_rules

Weights = Mapping[str, Tensor]
Masks = Mapping[str, Tensor]


def forward(shape: ModelShape, weights: Weights, tokens: Tensor, z: Masks | None = None) -> Tensor:
    """Logits [b, s, vocab] of int64 tokens [b, s]; z holds all four masks as [rows, units]."""
    embedding = weights["embedding.word_embeddings.weight"]
    z = z or {}
    hidden_d = _mask(z, "hidden", 0, shape.hidden_size, embedding)
    layer_L = _mask(z, "layer", 0, shape.num_layers, embedding)
    x = embedding[tokens] * hidden_d
    for layer in range(shape.num_layers):
        prefix = f"decoder.layers.{layer}."
        head_GQ = _head_mask(shape, z, layer, embedding)
        intermediate_M = _mask(z, "intermediate", layer, shape.ffn_hidden_size, embedding)
        scale = layer_L[layer] * hidden_d
        normed = norm(
            shape, x, weights[prefix + "self_attention.linear_qkv.layer_norm_weight"], hidden_d
        )
        x = x + scale * attention(shape, weights, prefix + "self_attention.", normed, head_GQ)
        normed = norm(shape, x, weights[prefix + "mlp.linear_fc1.layer_norm_weight"], hidden_d)
        x = x + scale * mlp(weights, prefix + "mlp.", normed, intermediate_M)
    x = norm(shape, x, weights["decoder.final_layernorm.weight"], hidden_d)
    if shape.tied_embeddings:
        return (x * hidden_d) @ embedding.T  # the one weight is scaled once, and used twice
    return x @ weights["output_layer.weight"].T


def _mask(z: Masks, kind: str, row: int, units: int, like: Tensor) -> Tensor:
    return z[kind][row].to(like) if kind in z else like.new_ones(units)


def _head_mask(shape: ModelShape, z: Masks, layer: int, like: Tensor) -> Tensor:
    """One number for each query head [groups, heads of a group], or for each group [groups, 1]."""
    if "head" not in z:
        return like.new_ones(shape.num_query_groups, 1)
    return z["head"].view(shape.num_layers, shape.num_query_groups, -1)[layer].to(like)


def norm(shape: ModelShape, x: Tensor, weight: Tensor, hidden_d: Tensor) -> Tensor:
    """RMSNorm over the kept hidden dimensions, its output masked."""
    kept = hidden_d > 0
    mean_square = (x * kept).square().sum(-1, keepdim=True) / max(int(kept.sum()), 1)
    return x * torch.rsqrt(mean_square + shape.layernorm_epsilon) * weight * hidden_d


def attention(
    shape: ModelShape, weights: Weights, prefix: str, x: Tensor, head_GQ: Tensor
) -> Tensor:
    """Causal grouped-query attention [b, s, d]; the mask multiplies the outputs of query heads."""
    b, s, _ = x.shape
    groups, per_group, channels = (
        shape.num_query_groups,
        shape.num_attention_heads // shape.num_query_groups,
        shape.kv_channels,
    )
    qkv = linear(weights, prefix + "linear_qkv", x)
    qkv = qkv.view(b, s, groups, per_group + 2, channels).permute(0, 2, 3, 1, 4)  # [b,G,q+2,s,c]
    q, k, v = qkv[:, :, :per_group], qkv[:, :, per_group, None], qkv[:, :, per_group + 1, None]
    if shape.qk_norm:
        q = head_norm(shape, q, weights[prefix + "q_layernorm.weight"])
        k = head_norm(shape, k, weights[prefix + "k_layernorm.weight"])
    q, k = rotate(shape, q), rotate(shape, k)
    scores = q @ k.transpose(-1, -2) / channels**0.5
    future = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
    out = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
    out = out * head_GQ.view(1, groups, -1, 1, 1)
    out = out.permute(0, 3, 1, 2, 4).reshape(b, s, groups * per_group * channels)
    return linear(weights, prefix + "linear_proj", out)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """The matrix of that name, and its bias where there is one."""
    out = x @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if name + ".bias" in weights else out


def head_norm(shape: ModelShape, x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of [..., channels], of each head by itself."""
    mean_square = x.square().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square + shape.layernorm_epsilon) * weight


def rotate(shape: ModelShape, x: Tensor) -> Tensor:
    """Rotary position embedding of [..., s, channels], halves rotated (not interleaved)."""
    s, channels = x.shape[-2:]
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=x.device) / channels
    angle = torch.outer(torch.arange(s, device=x.device), shape.rotary_base**-exponent)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def mlp(weights: Weights, prefix: str, x: Tensor, intermediate_M: Tensor) -> Tensor:
    """SwiGLU [b, s, d]; the mask multiplies the activations between the two projections."""
    gate, up = linear(weights, prefix + "linear_fc1", x).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up * intermediate_M
    return linear(weights, prefix + "linear_fc2", hidden)


def random_weights(
    shape: ModelShape, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Every weight of a model by name, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, *size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64)
        if name.endswith(".bias"):
            return (0.5 * values).to(dtype)
        return (1 + 0.2 * values if len(size) == 1 else values / size[-1] ** 0.5).to(dtype)

    return {rule.name: draw(rule.name, *rule.shape()) for rule in param_rules(shape)}


def random_masks(
    source: ModelShape, target: ModelShape, seed: int, head_unit: str = "query_group"
) -> dict[str, Tensor]:
    """All four masks with the target's number of units kept in each row, values in [0.1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for kind, (rows, units) in mask_sizes(source, head_unit).items():
        kept = mask_sizes(target, head_unit)[kind][1]
        order = torch.rand(rows, units, generator=generator).argsort(dim=1)
        values = 0.1 + 0.9 * torch.rand(rows, units, generator=generator)
        masks[kind] = torch.where(order < kept, values, 0.0)
    return masks
