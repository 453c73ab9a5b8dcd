"""Measure the validation loss of each domain: an exact mean over its tokens on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megashear.config.schema import RunConfig
from megashear.data.dataset import DomainDataset
from megashear.data.loader import ValidBatches
from megashear.errors import TrainingError
from megashear.platform.parallel import Platform
from megashear.training.step import DomainLosses, run_micro_batches

WARN_FRACTION = 0.1
"""A run warns if its evaluations cost more than this fraction of the compute of training."""


class DomainLoss(NamedTuple):
    """Mean loss over a domain's validation tokens (nats per token), and the number of tokens."""

    loss: float
    tokens: int


class Evaluator:
    """Measures a model on the first `sequences` of every domain's validation tokens.

    The micro-batches of a rank are a multiple of `rounds` (for interleaved pipeline stages).

    Attributes:
        batches: this rank's micro-batches by domain, read one by one when they are used.
        sequences: sequences of one evaluation over all domains and ranks, including padding.
    """

    def __init__(
        self,
        datasets: Mapping[str, DomainDataset],
        sequences: int,
        micro_batch_size: int,
        platform: Platform,
        rounds: int = 1,
    ) -> None:
        self.platform = platform
        shard = (platform.data_rank, platform.data_size, rounds)
        self.batches = {
            name: ValidBatches(dataset, sequences, micro_batch_size, *shard)
            for name, dataset in datasets.items()
        }
        batches_of_all_ranks = platform.data_size * sum(map(len, self.batches.values()))
        self.sequences = micro_batch_size * batches_of_all_ranks

    def measure(self, models: Sequence[Any]) -> dict[str, DomainLoss]:
        """Return the loss of each domain, the same on every rank; a collective.

        Raises:
            DataError: the validation tokens of a domain cannot be read.
            TrainingError: a loss is not finite; names the domains.
        """
        for model in models:
            model.eval()
        totals = torch.zeros(2, len(self.batches), dtype=torch.float64, device=self.platform.device)
        for name, batches in self.batches.items():
            self.platform.heartbeat.mark(f"evaluation of {name}")
            with torch.no_grad():  # else Megatron's schedules keep activations
                totals += run_micro_batches(
                    models, batches, self.platform, len(self.batches), forward_only=True
                )
        for model in models:
            model.train()
        result = DomainLosses(self.platform.sum_over_all(totals).cpu())
        domains = zip(self.batches, result.of_domains(), result.tokens.tolist(), strict=True)
        measured = {name: DomainLoss(loss, int(tokens)) for name, loss, tokens in domains}
        if wrong := [f"{n} {m.loss}" for n, m in measured.items() if not math.isfinite(m.loss)]:
            raise TrainingError(
                f"the validation loss is not finite: {', '.join(wrong)}. Check the domain's "
                "validation text; if all domains are listed, the model itself is broken"
            )
        return measured


def cost_of_evaluations(config: RunConfig, sequences: int) -> tuple[str, bool]:
    """Describe what the evaluations of a run cost, and return whether that deserves a warning.

    Args:
        config: configuration of the run.
        sequences: sequences of one evaluation, over all domains and ranks.
    """
    cost = config.evaluation_cost(sequences)
    text = (
        f"evaluations of {sequences:,} sequences, every {config.evaluation.interval} steps, add "
        f"{cost:.1%} to the computation of training"
    )
    if cost <= WARN_FRACTION:
        return text, False
    fewer = max(1, int(WARN_FRACTION / cost * sequences / len(config.data.domains)))
    return (
        f"{text}. Lower evaluation.sequences_per_domain ({fewer} would add {WARN_FRACTION:.0%}) or "
        "raise evaluation.interval",
        True,
    )
