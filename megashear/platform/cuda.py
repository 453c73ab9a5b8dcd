"""CUDA: the only module that calls `torch.cuda` (besides the patches of `cpu`)."""

from __future__ import annotations

import torch

from megashear.errors import PlatformError


def is_available() -> bool:
    """Whether a GPU can be used."""
    return torch.cuda.is_available()


def device_count() -> int:
    """GPUs that this process sees."""
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
    """What a GPU's driver calls it; of a CPU `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """What a GPU's work is queued in; None for a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory allocated on a GPU so far; on a CPU the process's peak resident set (GiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
