"""Gated MLP that states how intermediate and hidden masks act on its weights."""

from __future__ import annotations

from megatron.core.transformer.mlp import MLP
from torch import nn


class MaskedMLP(MLP):
    """Megatron-Core's gated MLP.

    linear_fc1 [2m/tp, d] holds this rank's gate rows, then its up rows; linear_fc2 is [d, m/tp].
    """

    def masked_modules(self) -> dict[str, nn.Module]:
        """Return the modules by the names of their parameters in the table, within a layer."""
        modules = {
            "mlp.linear_fc1.weight": self.linear_fc1,
            "mlp.linear_fc1.bias": self.linear_fc1,
            "mlp.linear_fc2.weight": self.linear_fc2,
            "mlp.linear_fc2.bias": self.linear_fc2,
        }
        if hasattr(self.linear_fc1, "layer_norm_weight"):  # Transformer Engine fuses the norm
            modules["mlp.linear_fc1.layer_norm_weight"] = self.linear_fc1
        return modules
