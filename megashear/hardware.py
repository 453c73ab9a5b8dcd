"""Accelerators by name: what a plan needs of them, and what a run's MFU is measured against.

Figures are the makers' data sheets', dense (without sparsity). This module imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
"""Weights that are worked on at once, by kind of device: what a core's cache holds, and what keeps
a GPU busy."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: as `--gpu` takes it.
        device: what its driver's name for it has in it, in lower case; GH200 is no H200.
        memory_gib: of the device.
        bf16_flops: peak of dense matrix products (FLOP/s).
        memory_bandwidth: of its own memory (bytes/s).
        link_bandwidth: to the others of its node, one way (bytes/s).
    """

    name: str
    device: tuple[str, ...]
    memory_gib: float
    bf16_flops: float
    memory_bandwidth: float
    link_bandwidth: float


GPUS = (
    Gpu("a100-40gb", ("a100", "40gb"), 40, 312e12, 1.555e12, 300e9),
    Gpu("a100-80gb", ("a100", "80gb"), 80, 312e12, 2.039e12, 300e9),
    Gpu("h100-80gb", ("h100", "hbm3"), 80, 989e12, 3.35e12, 450e9),
    Gpu("h100-pcie-80gb", ("h100", "pcie"), 80, 756e12, 2.0e12, 64e9),
    Gpu("h200-141gb", (" h200",), 141, 989e12, 4.8e12, 450e9),
    Gpu("b200-180gb", (" b200",), 180, 2250e12, 8.0e12, 900e9),
    Gpu("l40s-48gb", ("l40s",), 48, 362e12, 0.864e12, 32e9),
    Gpu("v100-32gb", ("v100", "32gb"), 32, 125e12, 0.9e12, 150e9),
)


def gpu_of_device(device: str) -> Gpu | None:
    """The one that a driver calls by this name; None for one that is not listed."""
    words = device.lower()
    return next((gpu for gpu in GPUS if all(part in words for part in gpu.device)), None)
