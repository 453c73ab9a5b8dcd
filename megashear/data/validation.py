"""The validation sequences of a domain, as a data-parallel rank's micro-batches.

Imports nothing of model or training.
"""

from __future__ import annotations

import numpy as np
import torch

from megashear.data.dataset import DomainDataset
from megashear.data.loader import MicroBatch, microbatch, microbatch_samples


def valid_microbatches(
    dataset: DomainDataset,
    sequences: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    rounds: int = 1,
) -> list[MicroBatch]:
    """This rank's micro-batches of the first `sequences` samples of one epoch, or of all it has.

    Over the ranks each sequence counts once. All ranks get equally many micro-batches of the same
    shape, in multiples of `rounds`, which Megatron's schedules need: what is lacking is filled with
    loss_mask 0.
    """
    count = min(sequences, dataset.samples_per_epoch)
    across = micro_batch_size * dp_size * rounds
    filled = -(-count // across) * across
    return [
        _microbatch(dataset, samples, count)
        for samples in microbatch_samples(0, filled, micro_batch_size, dp_rank, dp_size)
    ]


def _microbatch(dataset: DomainDataset, samples: list[int], count: int) -> MicroBatch:
    text = np.stack([dataset[sample if sample < count else 0] for sample in samples])
    batch = microbatch(text, np.full(len(samples), dataset.dataset_id))
    batch["loss_mask"] *= torch.tensor([sample < count for sample in samples])[:, None]
    return batch
