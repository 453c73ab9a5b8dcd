"""What is no tensor in a checkpoint: read without running anything, and from an older release."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.core import package_info

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only() -> Iterator[None]:
    """Within the context torch.load takes tensors and plain data only, whatever its caller asks.

    For megatron-core 0.19, which keeps what is no tensor of a checkpoint (`common_state`) among
    the tensors, where torch's planner reads it with weights_only=False; 0.16 has a file for it,
    which it reads safely. torch knows no other way than this variable of the environment.
    """
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def layout_of_newer_release(directory: Path, stored: Container[str]) -> str:
    """Why this Megatron-Core cannot load a checkpoint that 0.19 wrote; empty where it can.

    0.19 loads those of 0.16, but writes no common.pt, which 0.16 needs.
    """
    here = (package_info.MAJOR, package_info.MINOR)
    if here >= (0, 19) or "common_state/shard_0_1" not in stored:
        return ""
    if (directory / "common.pt").exists():
        return ""
    return (
        f"written by a newer Megatron-Core than {package_info.__version__}, which is installed "
        "here. Load it with 0.19 or newer, or carry its weights over: tools/checkpoint/ reads them"
    )
