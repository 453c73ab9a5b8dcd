"""Names and layouts of Hugging Face tensors in Megatron's terms, and back.

`WEIGHTS` has a line for each parameter, by its name in `pruning.table`; parameters are whole, not
split by tensor parallelism. Rotary embeddings rotate halves in both: no row moves. Imports neither
Megatron nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.config.schema import ModelShape
from megashear.pruning.table import param_rules

_LAYER_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Weights:
    """One parameter and the Hugging Face tensors it consists of; `*` stands for the layer.

    Here it is the same tensor on both sides.
    """

    name: str
    hf_names: tuple[str, ...]

    def join(self, shape: ModelShape, parts: Sequence[Tensor]) -> Tensor:
        """The parameter made of its tensors."""
        return parts[0]

    def split(self, shape: ModelShape, whole: Tensor) -> Sequence[Tensor]:
        """The tensors that the parameter is made of."""
        return (whole,)


class QKV(Weights):
    """Query, key and value interleaved: for each query group its queries, its key, its value."""

    def join(self, shape: ModelShape, parts: Sequence[Tensor]) -> Tensor:
        """[heads * kv, d], [groups * kv, d] twice -> [groups * (heads / groups + 2) * kv, d]."""
        groups = [
            part.unflatten(0, (shape.num_query_groups, -1, shape.kv_channels)) for part in parts
        ]
        return torch.cat(groups, dim=1).flatten(0, 2)

    def split(self, shape: ModelShape, whole: Tensor) -> Sequence[Tensor]:
        """The inverse of `join`."""
        groups = whole.unflatten(0, (shape.num_query_groups, -1, shape.kv_channels))
        parts = groups.split((shape.heads_per_group, 1, 1), dim=1)
        return [part.flatten(0, 2) for part in parts]


class GatedMLP(Weights):
    """Gate above up."""

    def join(self, shape: ModelShape, parts: Sequence[Tensor]) -> Tensor:
        """[ffn, d] twice -> [2 * ffn, d]."""
        return torch.cat(list(parts))

    def split(self, shape: ModelShape, whole: Tensor) -> Sequence[Tensor]:
        """The inverse of `join`."""
        return whole.chunk(2)


def _layer(weights: type[Weights], name: str, *hf_names: str) -> Weights:
    hf = tuple(f"model.layers.*.{hf_name}" for hf_name in hf_names)
    return weights(f"decoder.layers.*.{name}", hf)


def _linear(weights: type[Weights], name: str, *hf_names: str) -> Iterator[Weights]:
    """The weight of a linear layer, and its bias, whose rows lie alike."""
    for kind in ("weight", "bias"):
        yield _layer(weights, f"{name}.{kind}", *(f"{hf_name}.{kind}" for hf_name in hf_names))


WEIGHTS: tuple[Weights, ...] = (
    Weights("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    _layer(Weights, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    *_linear(QKV, "self_attention.linear_qkv", *(f"self_attn.{n}_proj" for n in "qkv")),
    _layer(Weights, "self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
    _layer(Weights, "self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
    *_linear(Weights, "self_attention.linear_proj", "self_attn.o_proj"),
    _layer(Weights, "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
    *_linear(GatedMLP, "mlp.linear_fc1", "mlp.gate_proj", "mlp.up_proj"),
    *_linear(Weights, "mlp.linear_fc2", "mlp.down_proj"),
    Weights("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Weights("output_layer.weight", ("lm_head.weight",)),
)
"""Every parameter that a model may have; where families share a part they share its names."""


def _find(name: str) -> tuple[Weights, list[str]]:
    """The mapping of a parameter, and its Hugging Face names with the layer written out."""
    layer = "".join(_LAYER_NUMBER.findall(name))
    pattern = _LAYER_NUMBER.sub("*", name)
    weights = next(weights for weights in WEIGHTS if weights.name == pattern)
    return weights, [hf_name.replace("*", layer) for hf_name in weights.hf_names]


def to_megatron(shape: ModelShape, name: str, hf_read: Callable[[str], Tensor]) -> Tensor:
    """The parameter `name`, made of Hugging Face tensors."""
    weights, hf_names = _find(name)
    return weights.join(shape, [hf_read(hf_name) for hf_name in hf_names])


def to_hf(shape: ModelShape, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors, by name, that the parameter `name` consists of."""
    weights, hf_names = _find(name)
    yield from zip(hf_names, weights.split(shape, whole), strict=True)


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in param_rules(shape):
        whole = torch.empty(rule.shape(), device="meta")
        shapes |= {name: tuple(part.shape) for name, part in to_hf(shape, rule.name, whole)}
    return shapes
