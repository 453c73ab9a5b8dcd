"""Accelerators by the names that drivers give them."""

from __future__ import annotations

import pytest

from megashear.hardware import GPUS, gpu_of_device


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_device_is_found_by_its_drivers_name(device: str, name: str | None) -> None:
    found = gpu_of_device(device)
    assert (found.name if found else None) == name


def test_names_are_told_apart() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
