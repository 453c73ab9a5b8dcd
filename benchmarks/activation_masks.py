"""Masks on activations, as published: what a pruning step costs without masks in weight space.

For comparison only. Hooks multiply head outputs, intermediate activations, the outputs of both
blocks, and the hidden dimensions after each read and write of the residual stream, where the public
code of Sheared-LLaMA does (composer_llama.py), its norm over the kept dimensions included. The
masks are float32 and drawn once a step, so that loss and gradients are those of `MaskedWeights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megashear.config.schema import QUERY_GROUP
from megashear.model.build import unwrap
from megashear.platform.layers import RMSNorm
from megashear.platform.parallel import Platform
from megashear.pruning.table import HEAD, HIDDEN, INTERMEDIATE, LAYER, layer_rules

REPEATED = (HIDDEN, LAYER)
"""Masks of what every tensor-parallel rank has, and has the same gradients of."""


class ActivationMasks:
    """Stands where a PruningObjective has its MaskedWeights.

    Args:
        chunks: this rank's part of the model: one stage, of torch layers.
        platform: its place among tensor-parallel ranks, without sequence parallelism.
        tokens: of a step, by which Megatron divides the gradients of the weights.
    """

    def __init__(self, chunks: Sequence[nn.Module], platform: Platform, tokens: int) -> None:
        self.model, self.platform, self.tokens = unwrap(chunks[0]), platform, tokens
        assert platform.layers == "torch", "fused layers have no activation to multiply"
        self._masks: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        of_layer = {rule.name: rule for rule in layer_rules(self.model.shape, 0, QUERY_GROUP)}
        place = (platform.tensor_rank, platform.tensor_size)
        second = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
        self._units = [
            of_layer[f"decoder.layers.0.{name}"]
            .axes[1]
            .unit_of_position(*place)
            .to(platform.device)
            for name in second
        ]

    @contextmanager
    def masked(self, z: Mapping[str, Tensor], kept: int | None = None) -> Iterator[None]:
        """Within the context the model's activations carry the masks [rows, units] by kind."""
        self._masks = {kind: mask.to(self.platform.device) for kind, mask in z.items()}
        self._leaves = {
            kind: mask.detach().requires_grad_(mask.requires_grad)
            for kind, mask in self._masks.items()
        }
        hooks = list(self._hooks())
        norms = [module for module in self.model.modules() if isinstance(module, RMSNorm)]
        for norm in norms:
            norm.forward = partial(_masked_norm, norm, self._leaves[HIDDEN][0])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for norm in norms:
                del norm.forward

    def _hooks(self) -> Iterator[Any]:
        z = self._leaves
        hidden = z[HIDDEN][0]
        embedding = self.model.embedding.word_embeddings
        yield embedding.register_forward_hook(_multiply_output(hidden))
        for layer in self.model.decoder.layers:
            number = layer.layer_number - 1
            second = (layer.self_attention.linear_proj, layer.mlp.linear_fc2)
            for module, kind, units in zip(second, (HEAD, INTERMEDIATE), self._units, strict=True):
                yield module.register_forward_pre_hook(_multiply_input(z[kind][number], units))
                yield module.register_forward_hook(_multiply_output(z[LAYER][0, number], hidden))

    def backward(self) -> None:
        """Gradients of the masks, this rank's part of them, on through the graph of z."""
        graph, gradients = [], []
        for kind, leaf in self._leaves.items():
            if leaf.grad is None:
                continue
            counts = kind not in REPEATED or self.platform.tensor_rank == 0
            graph.append(self._masks[kind])
            gradients.append(leaf.grad * (counts / self.tokens))
        self._masks, self._leaves = {}, {}
        torch.autograd.backward(graph, gradients)


def _masked_norm(norm: RMSNorm, hidden: Tensor, x: Tensor) -> Tensor:
    """The published norm: over the kept dimensions, which are looked up anew each time."""
    kept = torch.where(~hidden.eq(0))[0]
    variance = torch.index_select(x, -1, kept).to(torch.float32).pow(2).mean(-1, keepdim=True)
    normed = (x * torch.rsqrt(variance + norm.eps)).to(norm.weight.dtype)
    return (norm.weight * normed).mul(hidden).to(x.dtype)


def _multiply_input(mask: Tensor, units: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]  # the graph of what is selected is of one micro-batch
        return ((x * mask.index_select(0, units)).to(x.dtype), *args[1:])

    return hook


def _multiply_output(*masks: Tensor) -> Callable[..., Any]:
    """One after the other, as published; a parallel linear layer gives (output, bias)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        for mask in masks:
            x = (x * mask).to(x.dtype)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook
