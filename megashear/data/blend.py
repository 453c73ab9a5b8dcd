"""The order in which a blend of fixed weights draws from its domains, by Megatron's own rule."""

from __future__ import annotations

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.utils import normalize

_BLOCK = 1024  # positions from one stored count to the next
_MIN_LENGTH = 4096  # positions computed at once


class Blend:
    """Megatron's greedy blend of domains, computed only as far as needed.

    The rule draws from the domain that is furthest behind its weight, so a longer order begins with
    the shorter one, and doubling the length keeps the cost per sample constant. A position takes
    one byte, and ten more while the order grows.

    The order is that of BlendedDataset, without its end. BlendedDataset refuses a weight of 0; here
    such a domain is left out, since the rule would draw from it when all others are exactly even.
    """

    def __init__(self, weights: tuple[float, ...]) -> None:
        self.weights = weights
        self._domains = np.zeros(0, dtype=np.uint8)
        self._before = np.zeros((1, len(weights)), dtype=np.int64)  # samples before each block

    def locate(self, position: int) -> tuple[int, int]:
        """Return (domain, number of samples that it gave before) at a position of the order."""
        self._grow(position + 1)
        domain = int(self._domains[position])
        block = position // _BLOCK
        inside = np.count_nonzero(self._domains[block * _BLOCK : position] == domain)
        return domain, int(self._before[block, domain] + inside)

    def counts(self, length: int) -> np.ndarray:
        """Return the number of samples of every domain among the first `length`, int64."""
        self._grow(length)
        block = length // _BLOCK
        rest = np.bincount(self._domains[block * _BLOCK : length], minlength=len(self.weights))
        return self._before[block] + rest

    def _grow(self, length: int) -> None:
        if length <= len(self._domains):
            return
        length = max(length, 2 * len(self._domains), _MIN_LENGTH)
        length += -length % _BLOCK
        domains, samples = np.zeros(length, dtype=np.int16), np.zeros(length, dtype=np.int64)
        active = np.flatnonzero(self.weights)
        weights = normalize([self.weights[domain] for domain in active])
        helpers.build_blending_indices(domains, samples, weights, len(active), length, False)
        del samples
        self._domains = active.astype(np.min_scalar_type(len(self.weights)))[domains]
        blocks = self._domains.reshape(-1, _BLOCK)
        inside = [np.count_nonzero(blocks == d, axis=1) for d in range(len(self.weights))]
        self._before = np.zeros((len(blocks) + 1, len(inside)), dtype=np.int64)
        np.cumsum(np.transpose(inside), axis=0, out=self._before[1:])
