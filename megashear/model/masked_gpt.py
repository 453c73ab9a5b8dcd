"""A GPT model that states which of its parameters the masks act on, and how.

Forward passes are inherited, never copied: masks act on the weights (`masked_weights`), and outside
of that these are plain Megatron-Core models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megashear.config.schema import QUERY_GROUP, ModelShape
from megashear.model.masked_attention import MaskedSelfAttention
from megashear.model.masked_mlp import MaskedMLP
from megashear.pruning.table import ParamRule, layer_rules, outer_rules


@dataclass(frozen=True)
class BoundRule:
    """A rule of the table with the parameter that holds it on this rank.

    Attributes:
        rule: how masks act on the parameter.
        parameter: this tensor-parallel rank's shard.
        module: holds the parameter; for a norm it also holds `eps`.
        copy: whether another stage holds the same parameter as its own (a tied embedding).
    """

    rule: ParamRule
    parameter: nn.Parameter
    module: nn.Module
    copy: bool = False


class MaskedTransformerLayer(TransformerLayer):
    """Megatron-Core's transformer layer; a layer mask of 0 makes it add nothing."""

    self_attention: MaskedSelfAttention
    mlp: MaskedMLP

    def masked_modules(self) -> dict[str, nn.Module]:
        """Return the modules by the names of their parameters in the table, within a layer."""
        modules = {**self.self_attention.masked_modules(), **self.mlp.masked_modules()}
        modules.setdefault("self_attention.linear_qkv.layer_norm_weight", self.input_layernorm)
        modules.setdefault("mlp.linear_fc1.layer_norm_weight", self.pre_mlp_layernorm)
        return modules

    def bound_rules(self, shape: ModelShape, head_unit: str) -> Iterator[BoundRule]:
        """Yield the layer's rules, each with its parameter."""
        number = self.layer_number - 1  # Megatron counts layers from 1
        modules = self.masked_modules()
        prefix = f"decoder.layers.{number}."
        for rule in layer_rules(shape, number, head_unit):
            yield _bind(rule, modules[rule.name.removeprefix(prefix)])


class MaskedGPTModel(GPTModel):
    """Megatron-Core's GPT model, or one pipeline stage of it, over masked layers."""

    shape: ModelShape

    @property
    def tokens(self) -> int:
        """Return how many tokens' embeddings this rank holds; padding after them stays 0."""
        vocabulary = outer_rules(self.shape)[0].axes[0]
        return len(vocabulary.shard_blocks(self.tp_group.rank(), self.tp_group.size()))

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Set padding to 0: no gradient will change it."""
        for bound in self.bound_rules():
            if bound.rule.axes[0].vocabulary:
                bound.parameter[self.tokens :] = 0

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return Megatron-Core's loss [b, s], with probability 0 and no gradient for padding.

        Logits [s, b, V/tp] that are asked for without a loss are 0 there.
        """
        # Cross entropy writes into them as well; outside of autograd this costs no copy.
        logits.detach()[..., self.tokens :] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)

    def bound_rules(self, head_unit: str = QUERY_GROUP) -> Iterator[BoundRule]:
        """Yield every rule whose parameter this rank holds, each once."""
        outer = {rule.name: rule for rule in outer_rules(self.shape)}
        if self.pre_process:
            name = "embedding.word_embeddings.weight"
            yield _bind(outer[name], self.embedding.word_embeddings)
        for layer in self.decoder.layers:
            yield from layer.bound_rules(self.shape, head_unit)
        if self.post_process:
            yield _bind(outer["decoder.final_layernorm.weight"], self.decoder.final_layernorm)
            if not self.shape.tied_embeddings:
                yield _bind(outer["output_layer.weight"], self.output_layer)
            elif not self.pre_process:  # the last stage's copy of the tied embedding
                name = "embedding.word_embeddings.weight"
                yield _bind(outer[name], self.output_layer, copy=True)


def _bind(rule: ParamRule, module: nn.Module, copy: bool = False) -> BoundRule:
    attribute = rule.name.rpartition(".")[2]
    if not hasattr(module, attribute):  # a norm of its own, where the rule is named as if fused
        attribute = "weight"
    parameter = getattr(module, attribute)
    assert isinstance(parameter, nn.Parameter)
    return BoundRule(rule, parameter, module, copy)
