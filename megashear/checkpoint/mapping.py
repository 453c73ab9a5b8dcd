"""Names and layouts of Hugging Face tensors in Megatron's terms, and back.

A family of models is one entry of `FAMILIES`. Parameters go by their names in `pruning.table` and
are whole, not split by tensor parallelism. Rotary embeddings rotate halves in both: no row moves.
What config.json says is the matter of `hf_config`. Imports neither Megatron nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megashear.config.schema import ModelShape
from megashear.pruning.table import table

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
    hf = tuple(f"model.layers.*.{hf_name}.weight" for hf_name in hf_names)
    return weights(f"decoder.layers.*.{name}", hf)


LLAMA_WEIGHTS: tuple[Weights, ...] = (
    Weights("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    _layer(Weights, "self_attention.linear_qkv.layer_norm_weight", "input_layernorm"),
    _layer(QKV, "self_attention.linear_qkv.weight", *(f"self_attn.{n}_proj" for n in "qkv")),
    _layer(Weights, "self_attention.linear_proj.weight", "self_attn.o_proj"),
    _layer(Weights, "mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"),
    _layer(GatedMLP, "mlp.linear_fc1.weight", "mlp.gate_proj", "mlp.up_proj"),
    _layer(Weights, "mlp.linear_fc2.weight", "mlp.down_proj"),
    Weights("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Weights("output_layer.weight", ("lm_head.weight",)),
)


@dataclass(frozen=True)
class Family:
    """Models that share an architecture's code in transformers."""

    architecture: str  # the class in transformers
    model_type: str
    defaults: Mapping[str, Any]  # what transformers takes for a key that config.json leaves out
    weights: tuple[Weights, ...]  # of every parameter


LLAMA = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    weights=LLAMA_WEIGHTS,
)
FAMILIES = {family.architecture: family for family in (LLAMA,)}


def _find(name: str, family: Family) -> tuple[Weights, list[str]]:
    """The mapping of a parameter, and its Hugging Face names with the layer written out."""
    layer = "".join(_LAYER_NUMBER.findall(name))
    pattern = _LAYER_NUMBER.sub("*", name)
    weights = next(weights for weights in family.weights if weights.name == pattern)
    return weights, [hf_name.replace("*", layer) for hf_name in weights.hf_names]


def to_megatron(
    shape: ModelShape, name: str, hf_read: Callable[[str], Tensor], family: Family = LLAMA
) -> Tensor:
    """The parameter `name`, made of Hugging Face tensors."""
    weights, hf_names = _find(name, family)
    return weights.join(shape, [hf_read(hf_name) for hf_name in hf_names])


def to_hf(
    shape: ModelShape, name: str, whole: Tensor, family: Family = LLAMA
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors, by name, that the parameter `name` consists of."""
    weights, hf_names = _find(name, family)
    yield from zip(hf_names, weights.split(shape, whole), strict=True)


def hf_tensors(shape: ModelShape, family: Family = LLAMA) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in table(shape):
        whole = torch.empty(row.shape(), device="meta")
        shapes |= {name: tuple(p.shape) for name, p in to_hf(shape, row.name, whole, family)}
    return shapes
