"""Apex: says whether its fused kernels are there; Megatron-Core itself picks them up.

Apex is NVIDIA's, built from its sources; the package of that name on the Python package index is
something else and is never installed by this project.
"""

from __future__ import annotations

from megashear.errors import PlatformError


def choose_kernels(asked: str) -> str:
    """The optimizer kernels in use: `apex` where NVIDIA's Apex is installed, else `torch`.

    Megatron-Core imports Apex by itself where it finds it, so `torch` cannot be forced there.

    Raises:
        PlatformError: Apex is asked for by name and its fused kernels are not installed.
    """
    try:
        import amp_C  # noqa: F401  (Apex's compiled kernels: the unrelated package has none)
        from apex.optimizers import FusedAdam  # noqa: F401

        found = "apex"
    except ImportError:
        found = "torch"
    if asked == "apex" and found != "apex":
        raise PlatformError(
            "platform.kernels = apex, but NVIDIA's Apex with its CUDA kernels is not installed. "
            "Build it from NVIDIA's sources (not from the package index), or use torch or auto"
        )
    return found
