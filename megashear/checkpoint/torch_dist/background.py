"""Write sharded state dicts as torch_dist checkpoints in a background process.

Megatron-Core plans on all ranks which of them writes what; replicated tensors are spread over their
holders. A fork of each rank then writes its files and checksums from the memory as it was at the
fork, while the rank continues.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import queue
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megashear.checkpoint.checksums import Checksum, checksum
from megashear.errors import CheckpointError
from megashear.platform.checkpoints import BUILT_IN_WRITER, errors_put_off
from megashear.platform.collectives import on_each_process, on_first_process
from megashear.platform.parallel import data_and_context_group

_FORK = multiprocessing.get_context("fork")
_FILES = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def save(state: Mapping[str, Any], directory: Path) -> None:
    """Write a sharded state dict and wait for it; a collective.

    Raises:
        CheckpointError: it cannot be written, on this rank or another (a full disk).
    """
    Writing({directory: state}).finish()


class Writing:
    """Checkpoints that are being written. The constructor and `finish` are collectives.

    Args:
        parts: directories, made here, and the sharded state dict for each.

    Raises:
        CheckpointError: a rank cannot begin.
    """

    def __init__(self, parts: Mapping[Path, Mapping[str, Any]]) -> None:
        self._process: Any = None
        self._receiver, self._sender = _FORK.Pipe(duplex=False)
        # The writer must not wait for a reader that has gone, nor this process for the writer.
        self._hang_up = Finalize(self, self._receiver.close, exitpriority=0)
        self._written: list[Any] = []
        self._directory = next(iter(parts))
        on_first_process(lambda: _make(parts))
        _results()
        with errors_put_off() as errors:
            self._requests = [_request(state, directory) for directory, state in parts.items()]
        try:
            on_each_process(lambda: self._start(errors))
        except Exception:
            self.wait()
            raise

    def _start(self, errors: list[Exception]) -> None:
        self._raise(errors)
        jobs = []
        for request in self._requests:
            arguments = list(request.async_fn_args)
            if request.preload_fn is not None:
                arguments[1] = request.preload_fn()  # from a GPU to this machine's memory
            if request.async_fn is not None:
                jobs.append((request.async_fn, arguments))
        process = _FORK.Process(target=_write, args=(jobs, self._sender, self._receiver))
        process.start()
        self._process = process
        self._sender.close()  # else the end of the process would not end the connection

    def done(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return bool(self._receiver.poll())

    def wait(self) -> None:
        """Wait until this rank has stopped writing, successfully or not."""
        self._hang_up()
        if self._process is not None:
            self._process.join()

    def finish(self) -> dict[Path, Checksum]:
        """Wait for all ranks, then complete the checkpoints.

        Returns:
            Checksums of all files with tensors.

        Raises:
            CheckpointError: a rank could not write.
        """
        by_rank = on_each_process(self._receive)
        requests = [request for request in self._requests if request.async_fn is not None]
        for result in self._written:
            _results().put(result)
        assert len(requests) == len(self._written)
        with errors_put_off() as errors:
            for request in self._requests:
                for finalize in request.finalize_fns:
                    finalize()
        on_each_process(lambda: self._raise(errors))
        return {file: value for sums in by_rank for file, value in sums.items()}

    def _receive(self) -> dict[Path, Checksum]:
        try:
            self._written, sums, failure = self._receiver.recv()
        except EOFError:
            self.wait()
            failure = f"the process that wrote it ended with status {self._process.exitcode}"
        self.wait()
        if failure:
            # Of a full disk torch may say no more than "unexpected pos".
            free = shutil.disk_usage(self._directory).free
            text = f"cannot be written ({free:,} bytes free there): {failure}"
            raise CheckpointError(f"{self._directory}: {text}")
        return sums

    def _raise(self, errors: list[Exception]) -> None:
        """Raise the first error of Megatron-Core's own writing."""
        for error in errors:
            raise CheckpointError(f"{self._directory}: cannot be written: {error}") from error


def _make(directories: Iterable[Path]) -> None:
    for directory in directories:
        directory.mkdir(parents=True)


def _request(state: Mapping[str, Any], directory: Path) -> Any:
    """Return Megatron-Core's plan of what this rank writes, and how it is completed."""
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1)
    if (group := data_and_context_group()) is not None:
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    options: Any = BUILT_IN_WRITER
    return dist_checkpointing.save(
        dict(state), str(directory), strategy, async_sharded_save=True, **options
    )


def _write(jobs: list[Any], sender: Connection, receiver: Connection) -> None:
    """Write in the background process, and send what was written or why it failed."""
    receiver.close()  # else this process would not notice that the other has gone
    first_error = _FirstError()
    log = logging.getLogger(_FILES)
    log.addHandler(first_error)
    log.propagate = False
    written, failure = [], ""
    files: dict[Path, Checksum] = {}
    try:
        for function, arguments in jobs:
            function(*arguments)
            written.append(_results().get_nowait())
            if isinstance(written[-1], Exception):
                raise written[-1]
            files |= {Path(file): checksum(Path(file)) for file, *_ in arguments[1]}
    except Exception as error:
        # The error of megatron-core 0.19 has lost its text; its log has it.
        failure = first_error.text or f"{type(error).__name__}: {error}"
    with suppress(BrokenPipeError):  # the run has ended
        sender.send((written if not failure else [], files, failure))


class _FirstError(logging.Handler):
    """Keep the text of the first error that Megatron-Core's writer logs."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.text = self.text or record.getMessage()


def _results() -> Any:
    """Return Megatron's queue of results, replaced by a plain one without a server process.

    The server would import the main script again (6.3 s instead of 0.3 s, and a hang where that
    script lacks a __main__ guard), and outlive a run that is killed.
    """
    files: Any = importlib.import_module(_FILES)
    if files._results_queue is None:
        files._results_queue = queue.Queue()
    return files._results_queue
