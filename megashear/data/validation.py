"""The validation sequences of a domain, as a data-parallel rank's micro-batches.

Imports nothing of model or training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megashear.data.dataset import DomainDataset
from megashear.data.loader import MicroBatch, microbatch, microbatch_samples


class ValidBatches(Sequence[MicroBatch]):
    """This rank's micro-batches of the first `sequences` samples of one epoch, or of all it has.

    Read when they are asked for. Over the ranks each sequence counts once. All ranks get equally
    many micro-batches of the same shape, in multiples of `rounds`, which Megatron's schedules need:
    what is lacking is filled with loss_mask 0.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        sequences: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        rounds: int = 1,
    ) -> None:
        self._dataset = dataset
        self._count = min(sequences, dataset.samples_per_epoch)
        across = micro_batch_size * dp_size * rounds
        filled = -(-self._count // across) * across
        self._samples = microbatch_samples(0, filled, micro_batch_size, dp_rank, dp_size)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> MicroBatch:  # type: ignore[override]
        counted = [sample < self._count for sample in self._samples[index]]
        read = zip(self._samples[index], counted, strict=True)
        text = np.stack([self._dataset[sample if counts else 0] for sample, counts in read])
        dataset_id = np.full(len(text), self._dataset.dataset_id)
        batch = microbatch(text, dataset_id, self._dataset.eod)
        batch["loss_mask"] *= torch.tensor(counted)[:, None]
        return batch
