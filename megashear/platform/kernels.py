"""Fused kernels: Apex's, which Megatron-Core finds by itself, and compiled ones.

Apex is NVIDIA's, built from its sources; the package of that name on the Python package index is
something else and is never installed by this project.
"""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from megashear.errors import PlatformError


def choose_kernels(asked: str) -> str:
    """Return the optimizer kernels in use: `apex` if NVIDIA's Apex is installed, else `torch`.

    Megatron-Core uses Apex whenever it is installed, so `torch` cannot be forced then.

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


def can_compile(device: torch.device) -> bool:
    """Return whether Megatron-Core's torch.compile functions (SwiGLU, cross entropy) run fused.

    They need a GPU, Triton and the C compiler that it calls. On a CPU, compiling takes longer than
    it saves in a short run.
    """
    compilers = (os.environ.get("CC", "cc"), "gcc", "clang")
    has_compiler = any(shutil.which(name) for name in compilers)
    return device.type == "cuda" and has_compiler and importlib.util.find_spec("triton") is not None
