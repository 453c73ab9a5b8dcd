"""Domain weights: the rule that updates them, and the list of segments that is their whole state.

This is the mathematics of dynamic batch loading (Sheared LLaMA, section 2.2 and algorithm 1) with
numpy only; it imports neither torch nor Megatron.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megashear.config.schema import DataConfig
from megashear.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Segment:
    """Domain weights from global sample `first_sample` to the beginning of the next segment."""

    first_sample: int
    weights: tuple[float, ...]


def updated_weights(
    weights: Sequence[float],
    losses: Mapping[str, float],
    references: Mapping[str, float],
    names: Sequence[str],
    rule: str,
    eta: float,
    smoothing: float,
) -> tuple[float, ...]:
    """Return domain weights after an evaluation: w * exp(eta * gap), normalised, then smoothed.

    The gap is `max(loss - reference, 0)` under rule `paper` (algorithm 1), and `loss - reference`
    under `reference_code`; losses and references are in nats per token. Smoothing distributes the
    fraction `smoothing` of all weight evenly over the domains.

    Raises:
        DataError: losses or references are missing or not finite; every such domain is named.
    """
    problems = [
        f"  {name}: {what} is {values.get(name, 'missing')}"
        for what, values in (("validation loss", losses), ("reference loss", references))
        for name in names
        if not math.isfinite(values.get(name, math.nan))
    ]
    if problems:
        raise DataError(
            "domain weights cannot be updated and remain unchanged:\n"
            + "\n".join(problems)
            + "\nCheck the domains' validation files, and reference_loss in data.domains"
        )
    gap = np.array([losses[name] - references[name] for name in names])
    exponent = eta * (np.maximum(gap, 0.0) if rule == "paper" else gap)
    old = np.asarray(weights, dtype=np.float64)
    # Relative to the largest exponent of a domain with weight, no exponent overflows, and not all
    # vanish. A domain without weight stays at 0, whatever its exponent.
    new = np.where(old > 0, old * np.exp(np.minimum(exponent - exponent[old > 0].max(), 0.0)), 0.0)
    new = (1.0 - smoothing) * new / new.sum() + smoothing / len(old)
    return tuple(new.tolist())


def within_bounds(
    weights: Sequence[float], lower: Sequence[float], upper: Sequence[float]
) -> tuple[float, ...]:
    """Return weights in proportion to the given ones, as far as the bounds allow.

    They are clip(lambda * w_i, lower_i, upper_i) with the lambda that makes them sum to 1: of all
    weights within the bounds, these are the nearest in relative entropy. A weight of 0 gets more
    than its lower bound only if the upper bounds of all others leave a remainder. The lower bounds
    must sum to 1 at most, and the upper ones to 1 at least.
    """
    given, low, high = (np.asarray(values, np.float64) for values in (weights, lower, upper))
    if ((low <= given) & (given <= high)).all():
        return tuple(weights)
    given = np.maximum(given, np.finfo(np.float64).tiny)
    # The sum is piecewise linear in lambda, with a corner wherever a weight meets a bound.
    corners = np.unique(np.concatenate([low / given, high / given]))
    sums = np.clip(corners[:, None] * given, low, high).sum(1)
    scale = np.interp(1.0, sums, corners)
    return tuple(np.clip(scale * given, low, high).tolist())


class DomainWeights:
    """The domain weights of a run: a rule, and the segments that it has produced so far.

    Every rank has its own copy and must get the same losses, bit for bit. A domain's `dataset_id`
    is its position in `names`. `segments` ascend, and are replaced as a whole. An update keeps each
    weight within its `bounds` (lower, upper), which default to (0, 1).
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float],
        references: Mapping[str, float],
        rule: str = "paper",
        eta: float = 1.0,
        smoothing: float = 1e-4,
        bounds: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        self.names = tuple(names)
        self.references = dict(references)
        self.rule, self.eta, self.smoothing = rule, eta, smoothing
        self.lower, self.upper = zip(*(bounds or [(0.0, 1.0)] * len(self.names)), strict=True)
        self.segments: tuple[Segment, ...] = (Segment(0, tuple(weights)),)

    @classmethod
    def from_config(cls, config: DataConfig) -> DomainWeights:
        """Return the weights at the start of a run."""
        domains = config.domains
        references = {d.name: d.reference_loss for d in domains if d.reference_loss is not None}
        names, weights = [d.name for d in domains], [d.weight for d in domains]
        bounds = [(domain.min_weight, domain.max_weight) for domain in domains]
        return cls(names, weights, references, config.rule, config.eta, config.smoothing, bounds)

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weights of the newest segment, one per domain."""
        return self.segments[-1].weights

    def by_name(self) -> dict[str, float]:
        """Return the weights of the newest segment by domain."""
        return dict(zip(self.names, self.weights, strict=True))

    def update(self, first_sample: int, losses: Mapping[str, float]) -> None:
        """Apply the rule: new weights hold from global sample `first_sample` on.

        Raises:
            DataError: see `updated_weights`; no segment is added.
        """
        if self.rule == "constant":
            return  # it needs neither losses nor references
        last = self.segments[-1]
        assert first_sample >= last.first_sample, "samples that are drawn keep their weights"
        weights = updated_weights(
            last.weights, losses, self.references, self.names, self.rule, self.eta, self.smoothing
        )
        weights = within_bounds(weights, self.lower, self.upper)
        self.segments = (*self.segments, Segment(first_sample, weights))

    def state_dict(self) -> dict[str, Any]:
        """Return names and segments as plain lists, for a checkpoint."""
        return {
            "names": list(self.names),
            "segments": [[s.first_sample, list(s.weights)] for s in self.segments],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the segments of a saved state of the same domains; rule and references stay.

        Raises:
            CheckpointError: the saved state has other domains, or the same in another order.
        """
        if list(state["names"]) != list(self.names):
            raise CheckpointError(
                f"the checkpoint blends the domains {', '.join(state['names'])}, but data.domains "
                f"lists {', '.join(self.names)}: a resumed run needs the same ones in the same "
                "order. Put them back, or start a new run_dir"
            )
        self.segments = tuple(
            Segment(int(first), tuple(float(weight) for weight in weights))
            for first, weights in state["segments"]
        )
