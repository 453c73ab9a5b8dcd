"""The hard concrete distribution: masks that are exactly 0 or positive, and can be learned.

Louizos, Welling and Kingma 2018 (arXiv 1712.01312), with the constants of Sheared LLaMA (arXiv
2310.06694, section 2.1). Pure functions of tensors. Imports torch only; never Megatron.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

TEMPERATURE = 2 / 3
STRETCH = (-0.1, 1.1)
LOG_ALPHA_LIMIT = math.log(100)
INITIAL_LOG_ALPHA = 5.0
NOISE_EPS = 1e-6
DETERMINISTIC_SLOPE = 0.8


def generator(seed: int, step: int) -> torch.Generator:
    """Return a CPU generator for a step's noise, the same on every rank and after a resume."""
    # Hashed, because torch's CPU generator uses only the low 32 bits of its seed.
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "big"))


def noise(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw uniform noise in [1e-6, 1 - 1e-6], float32 on the CPU."""
    uniform = torch.rand(size, generator=generator, dtype=torch.float32)
    return (NOISE_EPS + (1 - 2 * NOISE_EPS) * uniform).clamp(NOISE_EPS, 1 - NOISE_EPS)


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return the training sample z in [0, 1]; log_alpha has no gradient where z is clamped."""
    logit = uniform.log() - torch.log1p(-uniform)
    low, high = STRETCH
    s = torch.sigmoid((logit + log_alpha) / TEMPERATURE)
    return (s * (high - low) + low).clamp(0, 1)


def probability_kept(log_alpha: Tensor) -> Tensor:
    """Return P(z > 0), clipped to [1e-6, 1 - 1e-6]; its mean is the expected fraction kept."""
    low, high = STRETCH
    removed = torch.sigmoid(TEMPERATURE * math.log(-low / high) - log_alpha)
    return 1 - removed.clamp(NOISE_EPS, 1 - NOISE_EPS)


def deterministic(log_alpha: Tensor, removed: int | Tensor) -> Tensor:
    """Return evaluation masks [rows, units]: sigmoid(0.8 log_alpha / beta), the smallest set to 0.

    Of equal log_alpha the lower index is kept, on any device: an untrained model loses its last
    layers, not its first.

    Args:
        log_alpha: [rows, units].
        removed: number of units to set to 0, one for all rows or int [rows].
    """
    rows, units = log_alpha.shape
    removed_R = torch.as_tensor(removed, device=log_alpha.device).expand(rows)
    order = log_alpha.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(units, device=order.device).expand(rows, units)
    )
    value = torch.sigmoid(DETERMINISTIC_SLOPE / TEMPERATURE * log_alpha)
    return torch.where(rank < units - removed_R[:, None], value, 0.0)
