"""Predict the loss at another size, L(N) = E + A / N^b, from the losses of a family of models.

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
"""Parameters of a fit: E, A and b. A fit needs at least as many sizes."""

EXPONENTS = (1e-3, 10.0)
"""Range of the search for b. At its lower end the loss is linear in log N; at its upper end it has
reached E at all sizes except the smallest: a fit that ends there has not found b."""

MISFIT = 0.02
"""Largest residual (nats per token) of a fit that is not flagged."""


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
        """Return the loss (nats per token) of a model with this many parameters."""
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
        """Why the losses of the fit must not be trusted; empty if nothing speaks against them."""
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
    """Fit each domain through the losses of the models with these numbers of parameters.

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
    """Return the least-squares fit; it goes through three points exactly if that is possible.

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
    """Return the best E and A / N^b at the mean of log N for b, and the sum of squared residuals.

    The power is written as (x^-b - 1) / b, which differs from a constant also for small b.
    """
    curve = np.expm1(-b * (log_N - log_N.mean())) / b
    centred, y = curve - curve.mean(), losses - losses.mean()
    slope = float(centred @ y / (centred @ centred))
    residuals = y - slope * centred
    E = float(losses.mean() - slope * curve.mean() - slope / b)
    return E, slope / b, float(residuals @ residuals)
