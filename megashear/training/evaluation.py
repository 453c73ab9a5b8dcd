"""Per-domain validation loss: an exact token-weighted mean over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megashear.data.dataset import DomainDataset
from megashear.data.validation import valid_microbatches
from megashear.errors import DataError
from megashear.platform.parallel import Platform
from megashear.training.step import run_microbatches


class Evaluator:
    """Measures a model on the first `sequences` of every domain's validation text.

    Micro-batches of a rank come in multiples of `rounds` (interleaved pipeline stages).
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
        self._batches = {
            name: valid_microbatches(dataset, sequences, micro_batch_size, *place)
            for name, dataset in datasets.items()
        }

    def losses(self, models: Sequence[Any]) -> dict[str, float]:
        """Loss of each domain (nats per token), the same on every rank; a collective.

        Raises:
            DataError: a domain has no validation tokens.
        """
        for model in models:
            model.eval()
        losses = {}
        for number, (name, batches) in enumerate(self._batches.items()):
            self.platform.progress.mark(f"evaluation of {name}")
            result = run_microbatches(
                models, batches, self.platform, len(self._batches), forward_only=True
            )
            if not result.tokens[number]:
                raise DataError(f"domain {name} has no validation tokens. Check its `valid` file")
            losses[name] = result.of_domains()[number]
        for model in models:
            model.train()
        return losses
