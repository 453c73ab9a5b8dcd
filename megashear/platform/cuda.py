"""The only module that calls `torch.cuda` (except the patches of `cpu`)."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from megashear.errors import PlatformError


def is_available() -> bool:
    """Return whether a GPU can be used."""
    return torch.cuda.is_available()


def device_count() -> int:
    """Return the number of GPUs that this process sees."""
    return torch.cuda.device_count() if is_available() else 0


def device_of_rank(local_rank: int) -> torch.device:
    """Make the GPU of this rank the current one and return it.

    Raises:
        PlatformError: there are fewer GPUs on this machine than processes.
    """
    count = device_count()
    if local_rank >= count:
        raise PlatformError(
            f"process {local_rank} of this machine finds {count} GPU(s). Start fewer processes "
            "per machine, or use platform.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Return the driver's name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the current stream of a GPU; None for a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, from pinned memory so that the host does not wait for a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Moment:
    """The time at which the device finishes the work queued so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: Moment) -> float:
        """Return the seconds between two moments that have both passed."""
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        return earlier._event.elapsed_time(self._event) / 1000


class ToHost:
    """Copies named tensors from the device to the host in the background.

    Args:
        tensors: tensors of any shapes, on one device.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        self._event: torch.cuda.Event | None = None
        if flat.is_cuda:
            self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._flat.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._flat = flat

    def read(self) -> dict[str, Tensor]:
        """Return the tensors by name, float64 on the CPU; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        parts = self._flat.split([shape.numel() for shape in self._shapes.values()])
        shapes = self._shapes.items()
        return {name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of allocated GPU memory, or the process's peak resident set (GiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
