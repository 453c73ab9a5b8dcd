"""NVIDIA DALI in place of torch's loader: the same micro-batches, bit for bit.

DALI's workers read; its pipeline keeps the next micro-batches finished and, where there is a GPU,
copies them there while another is computed on. The only module that imports DALI, when asked for.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from megashear.data.loader import Order, Reader, Texts, leave_signals_to_parent
from megashear.errors import DataError
from megashear.platform.watchdog import end_with_parent

READY = 2
"""Micro-batches that the pipeline keeps finished; each worker has as many more to read."""

Located = list[tuple[int, int]]
"""(domain, number of its sample) of each sequence of a micro-batch."""


class DaliFetcher:
    """Each `iter` fetches the steps that `order` then has, all of which have to be taken.

    A worker that is killed from outside leaves DALI waiting for it: the watchdog ends the run.

    Args:
        reader: reads a micro-batch.
        order: known to this process alone.
        num_workers: processes that read; with 0 this one does, between two batches.
        device: where micro-batches are to be.
        start_method: of workers, fork or spawn; by default spawn with a GPU, where DALI refuses
            to fork.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        num_workers: int,
        device: torch.device,
        start_method: str | None = None,
    ) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._reader, self._order = reader, order
        self._epoch = 0  # as DALI calls what one `iter` fetches
        self._plan = _Plan(READY * (1 + num_workers) + 1, order.micro_batch_size)
        on_gpu = device.type == "cuda"
        self._pipeline = Pipeline(
            batch_size=order.micro_batch_size,
            num_threads=1,
            device_id=device.index if on_gpu else None,
            prefetch_queue_depth=READY,
            seed=0,  # it draws nothing
            py_num_workers=max(1, num_workers),
            py_start_method=start_method or ("spawn" if on_gpu else "fork"),
        )
        with self._pipeline:
            texts = fn.external_source(
                _Source(reader, self._plan),
                num_outputs=2,
                dtype=[types.INT32, types.INT64],
                ndim=[1, 0],
                batch_info=True,
                parallel=num_workers > 0,
                prefetch_queue_depth=READY * num_workers or None,
            )
            self._pipeline.set_outputs(*(part.gpu() if on_gpu else part for part in texts))
        with _signals_held():
            self._pipeline.start_py_workers()
        self._pipeline.build()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | DataError]:
        planned = self._planned()
        coming = deque(next(planned) for _ in range(self._plan.slots))
        while (located := coming.popleft()) is not None:
            parts = [from_dlpack(part.as_tensor()) for part in self._pipeline.run()]
            text, dataset_id = (part.clone() for part in parts)  # before DALI uses them again
            coming.append(next(planned))
            if coming[0] is None:  # whoever takes the last one does not come back
                self._end_epoch()
            yield (text, dataset_id) if text.shape[1] else self._error(located)

    def _planned(self) -> Iterator[Located | None]:
        """Put the micro-batches of the order into the plan, and behind them that there are none."""
        for number, located in enumerate(chain(self._order, repeat(None))):
            self._plan.write(self._epoch, number, located)
            yield located

    def _end_epoch(self) -> None:
        with suppress(StopIteration):
            self._pipeline.run()
        self._pipeline.reset()
        self._epoch += 1

    def _error(self, located: Located) -> Any:
        """What reading a micro-batch met, without frames that would keep the pipeline alive."""
        error = self._reader[located]
        return error.with_traceback(None) if isinstance(error, DataError) else error


class _Source:
    """What DALI calls for each micro-batch, in one of its workers or in this process."""

    def __init__(self, reader: Reader, plan: _Plan) -> None:
        self._reader, self._plan, self._process = reader, plan, os.getpid()

    def __call__(self, asked: Any) -> Texts:
        """Text [b, s + 1] and dataset_id [b]; text [b, 0] where reading met a DataError.

        DALI would raise the error ahead of its turn, wrapped in a traceback.
        """
        if os.getpid() != self._process:  # the first call in a worker
            self._process = os.getpid()
            end_with_parent()
            leave_signals_to_parent(0)
        located = self._plan.read(asked.epoch_idx, asked.iteration)
        if located is None:
            raise StopIteration
        texts = self._reader[located]
        if isinstance(texts, DataError):
            return np.zeros((len(located), 0), np.int32), np.zeros(len(located), np.int64)
        return texts


class _Plan:
    """Which samples are read next, in memory that workers share: DALI gives them only a number.

    A ring of `slots` micro-batches, each with its epoch, its number, and whether it is one. There
    are two: workers may still be asked for what lies behind the end of the epoch before.
    """

    def __init__(self, slots: int, micro_batch_size: int) -> None:
        self.slots = slots
        self._shape = (2, slots, 3 + 2 * micro_batch_size)
        self._file = os.fdopen(os.memfd_create("megashear-plan"), "r+b")
        self._file.truncate(8 * int(np.prod(self._shape)))
        self._open(f"/proc/{os.getpid()}/fd/{self._file.fileno()}")

    def _open(self, path: str) -> None:
        self._path, self._table = path, np.memmap(path, np.int64, "r+", shape=self._shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"slots": self.slots, "_shape": self._shape, "_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(self._path)

    def write(self, epoch: int, number: int, located: Located | None) -> None:
        """Put in a micro-batch, or that there is none, where one was that has been taken."""
        row = self._table[epoch % 2, number % self.slots]
        row[:3] = epoch, number, located is not None
        if located is not None:
            row[3:] = np.ravel(located)

    def read(self, epoch: int, number: int) -> Located | None:
        """A micro-batch; None behind the last."""
        row = self._table[epoch % 2, number % self.slots].tolist()
        assert row[:2] == [epoch, number], "DALI asked for more than is planned"
        return list(zip(row[3::2], row[4::2], strict=True)) if row[2] else None


@contextmanager
def _signals_held() -> Iterator[None]:
    """A process that is started here gets none of a job's signals: its parent saves and ends it."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
