"""Micro-batches of a data-parallel rank, for training and for validation, prefetched by workers.

Only the main process knows the blend: it tells workers which sample of which domain to read, so
workers have no state of the order of samples. It imports nothing from model or training.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megashear.data.dataset import DomainDataset, DynamicBlendedDataset
from megashear.errors import DataError

Samples = tuple[np.ndarray, np.ndarray]
"""Tokens [b, s + 1] int32 and dataset_id [b] int64: what the rest of a micro-batch is derived from.

Arrays, since torch would give each tensor of a worker a piece of shared memory and a socket, which
takes longer than reading the tokens does.
"""

MicroBatch = dict[str, Tensor]
"""tokens, labels, loss_mask, position_ids [b, s] and dataset_id [b]; also document_ids [b, s] if
attention stays within documents."""


def micro_batch(
    tokens: np.ndarray | Tensor, dataset_id: np.ndarray | Tensor, eos: int | None = None
) -> MicroBatch:
    """Derive a model's inputs from tokens [b, s + 1], as Megatron's GPTDataset does by sample.

    With `eos`, the id that ends a document, positions restart at 0 in each document, and
    `document_ids` number the documents of a sample.
    """
    ids = torch.as_tensor(tokens).long()
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    batch = {
        "tokens": inputs,
        "labels": labels,
        "loss_mask": torch.ones_like(inputs, dtype=torch.float32),
        "position_ids": torch.arange(inputs.shape[1], device=ids.device).repeat(len(ids), 1),
        "dataset_id": torch.as_tensor(dataset_id),
    }
    if eos is not None:
        begins = torch.zeros_like(inputs, dtype=torch.bool)
        begins[:, 1:] = inputs[:, :-1] == eos
        batch["document_ids"] = begins.cumsum(1)
        batch["position_ids"] -= (batch["position_ids"] * begins).cummax(1).values
    return batch


class Order:
    """The sampler of a loader: a rank's micro-batches over `steps`, located as they are drawn."""

    def __init__(self, dataset: DynamicBlendedDataset, sizes: tuple[int, int, int, int]) -> None:
        self._dataset, self._sizes = dataset, sizes
        self.steps = range(0)  # first global sample of each step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first_sample in self.steps:
            for samples in micro_batch_samples(first_sample, *self._sizes):
                yield [self._dataset.locate(sample) for sample in samples]


class Reader(Dataset[Any]):
    """The dataset that workers read: an index is one micro-batch, as (domain, sample) pairs."""

    def __init__(self, members: Sequence[DomainDataset]) -> None:
        self._members = members

    def __getitem__(self, located: list[tuple[int, int]]) -> Samples | DataError:
        try:
            tokens = np.stack([self._members[domain][k] for domain, k in located])
        except DataError as error:  # returned: torch would wrap a raised one in a traceback
            return error
        return tokens, np.array([domain for domain, _ in located])


def as_read(samples: Any) -> Any:
    """Return samples as they are: torch's default would turn arrays into tensors."""
    return samples


def leave_signals_to_parent(worker: int) -> None:
    """Ignore Ctrl-C and a scheduler's signals in a worker: the parent saves, then ends its workers.

    Such signals reach all processes of a job. If a worker died first, the parent would fail with an
    error and save nothing.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def torch_fetcher(reader: Reader, order: Order, num_workers: int) -> Iterable[Any]:
    """Return torch's DataLoader; each `iter` of it fetches the steps that `order` has then."""
    return DataLoader(
        reader,
        batch_size=None,  # an index is already a whole micro-batch
        collate_fn=as_read,
        sampler=order,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),  # else it draws from the run's random state
    )


Fetcher = Callable[[Reader, Order, int], Iterable[Any]]
"""(reader, order, workers) -> Samples in the given order, or the DataError of a failed read."""


class TrainLoader:
    """The micro-batches of each step on one data-parallel rank, in the order of the blend.

    It prefetches whole steps, only as far as `fetch_until` allows. Its whole state is
    `consumed_samples`: a loader created with that number, on any number of ranks and workers,
    continues with the same samples.

    Args:
        dataset: the blend.
        global_batch_size: sequences of a step over all ranks.
        micro_batch_size: sequences of one forward pass on one rank.
        data_rank: this rank, among `data_size` data-parallel ranks.
        num_workers: processes that prefetch; with 0 this process reads on demand.
        fetcher: `torch_fetcher`, or another `Fetcher`.
        consumed_samples: global samples that the run has consumed before.
    """

    def __init__(
        self,
        dataset: DynamicBlendedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        num_workers: int = 0,
        consumed_samples: int = 0,
        fetcher: Fetcher = torch_fetcher,
    ) -> None:
        self._domain_weights, self._eos = dataset.domain_weights, dataset.eos
        self._step_samples = global_batch_size
        self._step_batches = global_batch_size // (micro_batch_size * data_size)
        self.consumed_samples = self._limit = consumed_samples
        self._segments = dataset.domain_weights.segments
        self._order = Order(dataset, (global_batch_size, micro_batch_size, data_rank, data_size))
        self._order.steps = range(consumed_samples, consumed_samples, global_batch_size)
        self._loader: Iterable[Any] | None = fetcher(
            Reader(dataset.members), self._order, num_workers
        )
        self._samples: Iterator[Any] = iter(())

    def fetch_until(self, sample: int) -> None:
        """Allow prefetching of steps that end at or before `sample`: the next evaluation.

        Domain weights may change there, so prefetching must not pass it. Without this call nothing
        is prefetched.
        """
        self._limit = sample

    def next_step(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            DataError: a token file does not fit the vocabulary.
        """
        assert self._loader is not None, "the loader is closed"
        if self.consumed_samples == self._order.steps.stop:
            self._samples = self._fetch(self._loader)
        assert self._domain_weights.segments is self._segments, (
            f"weights changed at sample {self.consumed_samples} of the steps {self._order.steps} "
            "that fetch_until allowed"
        )
        read = [next(self._samples) for _ in range(self._step_batches)]
        for samples in read:
            if isinstance(samples, DataError):
                raise samples
        self.consumed_samples += self._step_samples
        return [micro_batch(tokens, ids, self._eos) for tokens, ids in read]

    def close(self) -> None:
        """End the workers; may be called again."""
        self._samples, self._loader = iter(()), None  # with the last reference torch ends them

    def _fetch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Start fetching all steps up to the limit, and at least one; they cannot be taken back."""
        steps = max(1, (self._limit - self.consumed_samples) // self._step_samples)
        stop = self.consumed_samples + steps * self._step_samples
        self._order.steps = range(self.consumed_samples, stop, self._step_samples)
        self._segments = self._domain_weights.segments
        return iter(loader)


def micro_batch_samples(
    first_sample: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> list[list[int]]:
    """Return the sample numbers of a rank's micro-batches in the step from `first_sample` on.

    Micro-batch i of rank r takes `micro_batch_size` consecutive samples from
    `first_sample + (i * data_size + r) * micro_batch_size` on, so the ranks together take exactly
    the global batch, whatever their number.
    """
    across = micro_batch_size * data_size
    assert global_batch_size % across == 0, "global batch is not a whole number of micro-batches"
    mine = first_sample + data_rank * micro_batch_size
    starts = range(mine, first_sample + global_batch_size, across)
    return [list(range(start, start + micro_batch_size)) for start in starts]


class ValidBatches(Sequence[MicroBatch]):
    """This rank's micro-batches of the first `sequences` samples of one epoch, or of all it has.

    They are read on demand. Over all ranks each sequence counts once. Megatron's schedules need the
    same number of micro-batches on all ranks, of the same shape, and a multiple of `rounds`; they
    are padded with sequences of loss_mask 0.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        sequences: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        rounds: int = 1,
    ) -> None:
        self._dataset = dataset
        self._count = min(sequences, dataset.samples_per_epoch)
        across = micro_batch_size * data_size * rounds
        filled = -(-self._count // across) * across
        self._samples = micro_batch_samples(0, filled, micro_batch_size, data_rank, data_size)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> MicroBatch:  # type: ignore[override]
        counted = [sample < self._count for sample in self._samples[index]]
        read = zip(self._samples[index], counted, strict=True)
        tokens = np.stack([self._dataset[sample if counts else 0] for sample, counts in read])
        dataset_id = np.full(len(tokens), self._dataset.dataset_id)
        batch = micro_batch(tokens, dataset_id, self._dataset.eos)
        batch["loss_mask"] *= torch.tensor(counted)[:, None]
        return batch
