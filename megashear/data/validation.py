"""The validation sequences of a domain, as a data-parallel rank's micro-batches.

Imports nothing of model or training.
"""

from __future__ import annotations

import torch
from torch.utils.data import default_collate

from megashear.data.dataset import DomainDataset
from megashear.data.loader import MicroBatch, microbatch_samples


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
    filling = {**dataset[0], "loss_mask": torch.zeros_like(dataset[0]["loss_mask"])}
    return [
        default_collate([dataset[sample] if sample < count else filling for sample in samples])
        for samples in microbatch_samples(0, filled, micro_batch_size, dp_rank, dp_size)
    ]
