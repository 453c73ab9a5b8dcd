"""NVIDIA DALI behind torch's loader: the same micro-batches, bit for bit.

Torch's workers read ahead; DALI keeps the next micro-batches ready and, on a GPU, copies them there
while another one is computed on. Only this module imports DALI, and only if a run asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megashear.data.loader import Order, Reader, Samples, torch_fetcher
from megashear.errors import DataError
from megashear.platform import cuda

READY = 2
"""Micro-batches that DALI keeps ready; with only one it would not see the end of an epoch."""


class DaliFetcher:
    """Each `iter` fetches the steps that `order` has then; the caller must take all of them.

    Without workers this process reads when it is asked for a batch. Batches are on `device`.
    """

    def __init__(
        self, reader: Reader, order: Order, num_workers: int, device: torch.device
    ) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._loader = torch_fetcher(reader, order, num_workers)
        self._source, self._device = _Source(), device
        on_gpu = device.type == "cuda"
        self._pipeline = Pipeline(
            batch_size=1,  # of micro-batches
            num_threads=1,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=READY,
            exec_dynamic=True,  # so that outputs can be bound to a stream
            seed=0,  # nothing is random here
        )
        with self._pipeline:
            samples = fn.external_source(
                self._source, 2, dtype=[types.INT32, types.INT64], ndim=[2, 1], batch=False
            )
            self._pipeline.set_outputs(*(part.gpu() if on_gpu else part for part in samples))
        self._pipeline.build()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | DataError]:
        self._pipeline.reset()  # reading ahead, it has met the end of the previous steps
        self._source.samples = iter(self._loader)
        try:
            with suppress(StopIteration):
                while True:
                    read: Any = self._pipeline.run(cuda.current_stream(self._device))
                    tokens, dataset_id = (from_dlpack(part.as_tensor())[0].clone() for part in read)
                    yield tokens, dataset_id
            if self._source.error is not None:
                yield from repeat(self._source.error)
        finally:
            del self._source.samples  # DALI's graph of operators, a cycle, would keep the workers


class _Source:
    """DALI calls it for each micro-batch; an epoch of DALI ends with the steps or with an error."""

    samples: Iterator[Samples | DataError]
    error: DataError | None = None

    def __call__(self) -> Samples:
        samples = next(self.samples)
        if isinstance(
            samples, DataError
        ):  # raised after the batches that are ready, by their consumer
            self.error = samples
            raise StopIteration
        return samples
