"""Write a dense model as a torch_dist checkpoint tensor by tensor, from one process or many.

Megatron-Core's own writer needs all tensors of a process at once. Here it writes a checkpoint
without tensors; tensors are then appended one at a time to files of bounded size, and entered into
the table of contents at the end.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from math import ceil, prod
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megashear.checkpoint.atomic import whole_directory
from megashear.checkpoint.checksums import Checksum, checksum
from megashear.checkpoint.torch_dist import background
from megashear.checkpoint.torch_dist.metadata import check_metadata, place_on_disk
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.files import flush
from megashear.platform.collectives import on_each_process, on_first_process
from megashear.platform.parallel import single_process
from megashear.pruning.table import param_rules

FILE_NUMEL = 2**27
"""Elements in a file (512 MiB in fp32); a tensor that has more gets a file of its own."""

T = TypeVar("T")


class _Entry(NamedTuple):
    """A tensor of the table as it was written."""

    name: str
    properties: TensorProperties
    place: _StorageInfo


def processes() -> AbstractContextManager[Any]:
    """Use the present process group, or make one of the launched processes (or of this one)."""
    return nullcontext() if dist.is_initialized() else single_process()


@contextmanager
def shared_directory(directory: Path, **options: Any) -> Iterator[Path]:
    """Yield a `whole_directory` of the first process to all; a collective at both ends."""
    with ExitStack() as stack:
        whole = whole_directory(directory, **options)
        yield on_first_process(lambda: stack.enter_context(whole))
        on_first_process(stack.close)


def files(shape: ModelShape) -> dict[str, str]:
    """Return the file of each tensor, in the table's order, for any number of processes."""
    rules = list(param_rules(shape))
    sizes = [prod(rule.shape()) for rule in rules]
    number, held = 1, 0  # Megatron-Core may have written a file 0
    names = {}
    for rule, size in zip(rules, sizes, strict=True):
        if held and held + size > FILE_NUMEL:
            number, held = number + 1, 0
        held += size
        names[rule.name] = f"__0_{number}.distcp"
    return names


def tensors_of_rank(shape: ModelShape) -> list[str]:
    """Return the names of the tensors that this process writes: whole files, in turn."""
    home = files(shape)
    mine = set(list(dict.fromkeys(home.values()))[dist.get_rank() :: dist.get_world_size()])
    return [name for name, file in home.items() if file in mine]


def write_weights(
    directory: Path, shape: ModelShape, weights: Iterable[tuple[str, Tensor]]
) -> dict[Path, Checksum]:
    """Write a model's weights as a torch_dist checkpoint; a collective.

    Args:
        directory: made here; must not exist.
        shape: of the model.
        weights: the tensors of `tensors_of_rank(shape)`, in this order; one is held at a time.

    Returns:
        Checksums of the files with tensors.

    Raises:
        CheckpointError: tensors are missing, unexpected, of the wrong shape or of another type
            than in other layers (all are named), or cannot be written, here or elsewhere.
    """
    background.save({}, directory)
    home, mine = files(shape), tensors_of_rank(shape)
    parts = []
    with _Files(directory, home, shape, mine) as files_of_mine:
        for batch in _batches(home, mine, weights):  # so that a failure is soon known to all
            parts += on_each_process(partial(files_of_mine.append, batch))
        by_rank = on_each_process(files_of_mine.checksums)
    written = {entry.name: entry for entries, _ in parts for entry in entries}
    problems = [problem for _, found in parts for problem in found]
    problems += [
        f"{rule.name} is missing" for rule in param_rules(shape) if rule.name not in written
    ]
    entries = [written[rule.name] for rule in param_rules(shape) if rule.name in written]
    problems += _mixed_types(entries)
    if problems:
        raise CheckpointError(f"{directory}: not written:\n  " + "\n  ".join(problems))
    on_first_process(lambda: _enter(directory, shape, entries))
    return {file: value for sums in by_rank for file, value in sums.items()}


def _batches(home: dict[str, str], mine: list[str], weights: Iterable[T]) -> list[Iterable[T]]:
    """Split weights into the same number of batches on all ranks: a file each, then the rest."""
    rounds = ceil(len(set(home.values())) / dist.get_world_size())
    counts = list(Counter(home[name] for name in mine).values())[: rounds - 1]
    stream = iter(weights)
    return [islice(stream, count) for count in (*counts, None)]


class _Files:
    """The files of one process; complete ones are flushed and hashed in the background."""

    def __init__(
        self, directory: Path, home: dict[str, str], shape: ModelShape, mine: Container[str]
    ) -> None:
        self.directory, self.home = directory, home
        self.expected = {
            rule.name: rule.shape() for rule in param_rules(shape) if rule.name in mine
        }
        self.sums: dict[Path, Checksum] = {}
        self._background = ThreadPoolExecutor(2)
        self._sealing: dict[Path, tuple[Future[None], Future[Checksum]]] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._background.shutdown()  # before the directory may be removed

    def append(self, weights: Iterable[tuple[str, Tensor]]) -> tuple[list[_Entry], list[str]]:
        """Append tensors; return what was written, and problems."""
        entries, problems = [], []
        for name, tensor in weights:
            if self.expected.pop(name, None) != tuple(tensor.shape):
                problems.append(f"{name} {tuple(tensor.shape)} is unexpected or of the wrong shape")
            else:
                entries.append(_append(self.directory / self.home[name], name, tensor.detach()))
            del tensor  # before the next one is made
        unfinished = {self.home[name] for name in self.expected}
        self.checksums()
        for name in {entry.place.relative_path for entry in entries} - unfinished:
            file = self.directory / name
            tasks = self._background.submit(flush, file), self._background.submit(checksum, file)
            self._sealing[file] = tasks
        return entries, problems

    def checksums(self) -> dict[Path, Checksum]:
        """Wait until all complete files are on the disk; return their checksums."""
        for file, (flushed, hashed) in self._sealing.items():
            flushed.result()
            self.sums[file] = hashed.result()
        self._sealing.clear()
        return self.sums


def _append(file: Path, name: str, tensor: Tensor) -> _Entry:
    _, layer = place_on_disk(name)
    try:
        with file.open("ab") as stream:
            start = stream.tell()
            _save(_compact(tensor.view(*(1 for _ in layer), *tensor.shape)), stream)
            length = stream.tell() - start
    except (OSError, RuntimeError) as error:
        reason = _reason(error)
        if not isinstance(reason, Exception):
            raise reason from None
        raise CheckpointError(f"{file}: cannot be written: {reason}") from error
    properties = TensorProperties.create_from_tensor(tensor)
    return _Entry(name, properties, _StorageInfo(file.name, start, length))


def _reason(error: BaseException) -> BaseException:
    """Return the cause (a full disk, Ctrl-C) of the error that torch raised closing its file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            return cause
        cause = cause.__context__
    return error


def _save(tensor: Tensor, stream: IO[bytes]) -> None:
    """Save without CRC-32, which torch never checks; checksums.json replaces it."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, stream)
    finally:
        torch.serialization.set_crc32_options(before)


def _compact(tensor: Tensor) -> Tensor:
    """Return the tensor with a storage of its own size, since torch.save writes whole storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _mixed_types(entries: Iterable[_Entry]) -> Iterator[str]:
    """Yield tensors of another dtype than in the first layer: a checkpoint stacks all layers."""
    first: dict[str, torch.dtype] = {}
    for entry in entries:
        key, _ = place_on_disk(entry.name)
        dtype = first.setdefault(key, entry.properties.dtype)
        if entry.properties.dtype != dtype:
            yield f"{entry.name} is {entry.properties.dtype}, layers before it are {dtype}"


def _enter(directory: Path, shape: ModelShape, entries: Iterable[_Entry]) -> None:
    """Put tensors into the table of contents."""
    metadata = check_metadata(directory)
    vars(metadata).pop("all_local_plans", None)  # Megatron-Core's note on how it wrote nothing
    sizes = {rule.name: rule.shape() for rule in param_rules(shape)}
    for name, properties, place in entries:
        key, layer = place_on_disk(name)
        stacked, size = tuple(shape.num_layers for _ in layer), sizes[name]
        whole = TensorStorageMetadata(properties, torch.Size((*stacked, *size)), [])
        held = metadata.state_dict_metadata.setdefault(key, whole)
        assert isinstance(held, TensorStorageMetadata)
        offsets = torch.Size((*layer, *(0 for _ in size)))
        index = MetadataIndex(key, offsets, len(held.chunks))
        held.chunks.append(ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in layer), *size))))
        metadata.storage_data[index] = place
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
