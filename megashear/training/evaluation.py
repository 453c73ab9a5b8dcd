"""Per-domain validation loss: an exact token-weighted mean over all ranks; and what it costs."""

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

MUCH = 0.1
"""Computation of evaluations, as a share of training's, above which a run says how to have less."""


class DomainLoss(NamedTuple):
    """Mean loss over a domain's validation tokens (nats per token), and their number."""

    loss: float
    tokens: int


class Evaluator:
    """Measures a model on the first `sequences` of every domain's validation text.

    Micro-batches of a rank come in multiples of `rounds` (interleaved pipeline stages).

    Attributes:
        batches: this rank's micro-batches by domain, read when their turn comes.
        sequences: of one evaluation, over all domains and ranks, with what fills micro-batches.
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
        place = (platform.data_rank, platform.data_size, rounds)
        self.batches = {
            name: ValidBatches(dataset, sequences, micro_batch_size, *place)
            for name, dataset in datasets.items()
        }
        batches_of_all = platform.data_size * sum(map(len, self.batches.values()))
        self.sequences = micro_batch_size * batches_of_all

    def measure(self, models: Sequence[Any]) -> dict[str, DomainLoss]:
        """Loss of each domain, the same on every rank; a collective.

        Raises:
            DataError: the validation text of a domain cannot be read.
            TrainingError: losses are not finite; names their domains.
        """
        for model in models:
            model.eval()
        totals = torch.zeros(2, len(self.batches), dtype=torch.float64, device=self.platform.device)
        for name, batches in self.batches.items():
            self.platform.heartbeat.mark(f"evaluation of {name}")
            with torch.no_grad():  # Megatron's schedules would keep all that a backward pass needs
                totals += run_micro_batches(
                    models, batches, self.platform, len(self.batches), forward_only=True
                )
        for model in models:
            model.train()
        result = DomainLosses(self.platform.sum_over_all(totals).cpu())
        found = zip(self.batches, result.of_domains(), result.tokens.tolist(), strict=True)
        measured = {name: DomainLoss(loss, int(tokens)) for name, loss, tokens in found}
        if wrong := [f"{n} {m.loss}" for n, m in measured.items() if not math.isfinite(m.loss)]:
            raise TrainingError(
                f"the validation loss is not finite: {', '.join(wrong)}. Check the domain's "
                "validation text; a model that is broken has such a loss on all of them"
            )
        return measured


def cost_of_evaluations(config: RunConfig, sequences: int) -> tuple[str, bool]:
    """What the evaluations of a run add to the computation of training; and whether that is much.

    A forward pass is a third of training on the same tokens, and a quarter where layers are
    recomputed.

    Args:
        config: of the run.
        sequences: of one evaluation, over all domains and ranks.
    """
    trainer, evaluation = config.trainer, config.evaluation
    evaluations = 1 + math.ceil(trainer.steps / evaluation.interval)
    passes = 4 if config.parallel.recompute == "full" else 3
    share = evaluations * sequences / (passes * trainer.steps * trainer.global_batch_size)
    text = (
        f"evaluations of {sequences:,} sequences, every {evaluation.interval} steps, add "
        f"{share:.1%} to the computation of training"
    )
    if share <= MUCH:
        return text, False
    fewer = max(1, int(MUCH / share * sequences / len(config.data.domains)))
    return (
        f"{text}. Lower evaluation.sequences_per_domain ({fewer} would add {MUCH:.0%}) or raise "
        "evaluation.interval",
        True,
    )
