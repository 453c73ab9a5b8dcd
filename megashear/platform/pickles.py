"""Keeps torch.load from running what a foreign pickle names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
