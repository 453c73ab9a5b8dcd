"""Losses of a model of another size: L(N) = E + A / N^b, through the losses of a family of models.

A fit belongs to one domain; N counts all parameters, embeddings too (Sheared LLaMA, section 2.2).
Imports numpy and `errors` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megashear.errors import DataError

PARAMETERS = 3
"""Of a fit: E, A and b, so that it needs as many sizes."""

EXPONENTS = (1e-3, 10.0)
"""Where b is looked for. At the lower end the loss is linear in log N, at the upper one it has
reached E at all but the smallest size: a fit that ends there has not found b."""

MISFIT = 0.02
"""Of a residual, in nats: a fit with a larger one is flagged."""


@dataclass(frozen=True)
class Fit:
    """L(N) = E + A / N^b of one domain.

    Losses, and so E and A, are in nats per token; `sizes` and `losses` are those of the models.
    """

    E: float
    A: float
    b: float
    sizes: tuple[float, ...]
    losses: tuple[float, ...]

    def loss(self, parameters: float) -> float:
        """Loss (nats per token) of a model with so many parameters."""
        return self.E + self.A * parameters**-self.b

    @property
    def residuals(self) -> list[float]:
        """The models' losses minus the fit's."""
        return [loss - self.loss(N) for N, loss in zip(self.sizes, self.losses, strict=True)]

    @property
    def misfit(self) -> float:
        """The largest residual's size."""
        return max(map(abs, self.residuals))

    @property
    def flag(self) -> str:
        """What must be said of the fit before its losses are believed; empty if nothing."""
        (lowest, highest), found = EXPONENTS, []
        by_size = sorted(zip(self.sizes, self.losses, strict=True))
        for (N, loss), (larger, other) in pairwise(by_size):
            if larger > N and other > loss:
                found.append(f"does not fit: the loss rises from {N:,} to {larger:,} parameters")
        if self.misfit > MISFIT:
            found.append(f"does not fit: residuals of up to {self.misfit:.3f}")
        if self.b > 0.99 * highest:
            found.append("b is not identifiable: only the smallest model's loss differs")
        elif self.b < 1.01 * lowest:
            found.append("unphysical: the loss falls by log N or faster, E and b are not known")
        elif self.E < 0:
            found.append(f"unphysical: E = {self.E:.3g} is negative")
        return "; ".join(found)


def fit_domains(sizes: Sequence[float], losses: Mapping[str, Sequence[float]]) -> dict[str, Fit]:
    """A fit for each domain, through the losses of the models with so many parameters.

    Raises:
        DataError: there are fewer sizes than parameters of a fit, or losses do not fall with size;
            every such domain is named.
    """
    if (count := len(set(sizes))) < PARAMETERS:
        raise DataError(
            f"{count} sizes of models are fewer than the {PARAMETERS} parameters of E + A / N^b. "
            "Measure a model of another size, or take a model's own losses as references "
            "(megashear reference-loss source)"
        )
    fits = {name: fit(sizes, values) for name, values in losses.items()}
    growing = [f"  {name}: {losses[name]}" for name, found in fits.items() if not found.A > 0]
    if growing:
        raise DataError(
            f"losses that do not fall with size ({', '.join(f'{N:,}' for N in sizes)} parameters) "
            "give no reference:\n" + "\n".join(growing)
        )
    return fits


def fit(sizes: Sequence[float], losses: Sequence[float]) -> Fit:
    """The least-squares fit, which goes through three points exactly where that is possible.

    For a given b the best E and A are linear regression, so b alone is searched (variable
    projection): on a grid, then on finer ones, each between the neighbours of the best point.
    """
    log_N, y = np.log(np.asarray(sizes, dtype=float)), np.asarray(losses, dtype=float)
    low, high = EXPONENTS
    while high - low > 1e-13 * high:
        grid = np.geomspace(low, high, 200)
        best = int(np.argmin([_regression(b, log_N, y)[2] for b in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    b = (low + high) / 2
    E, A_at_mean, _ = _regression(b, log_N, y)
    return Fit(E, A_at_mean * float(np.exp(b * log_N.mean())), b, tuple(sizes), tuple(losses))


def _regression(b: float, log_N: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """Best E and A / N^b at the mean of log N for an exponent, and the sum of squared residuals.

    The power stands as (x^-b - 1) / b, which stays apart from a constant where b is small.
    """
    curve = np.expm1(-b * (log_N - log_N.mean())) / b
    centred, y = curve - curve.mean(), losses - losses.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - slope * centred
    E = float(losses.mean() - slope * curve.mean() - slope / b)
    return E, slope / b, float(residuals @ residuals)
