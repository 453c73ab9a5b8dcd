"""Megatron-Core's checkpoints: nothing in them is run, and its releases are told apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron.core import package_info

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_RELEASE = (package_info.MAJOR, package_info.MINOR)

BUILT_IN_WRITER = {"async_strategy": "mcore"} if _RELEASE >= (0, 19) else {}
"""Option of `save`: 0.19 would else write by another package; 0.16 has its own writer only."""


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
    if _RELEASE >= (0, 19) or "common_state/shard_0_1" not in stored:
        return ""
    if (directory / "common.pt").exists():
        return ""
    return (
        f"written by a newer Megatron-Core than {package_info.__version__}, which is installed "
        "here. Load it with 0.19 or newer, or carry its weights over: megashear export reads them"
    )


@contextmanager
def errors_put_off() -> Iterator[list[Exception]]:
    """Within the context what rank 0 alone writes for Megatron-Core fails without an exception.

    The table of contents, metadata.json and, of 0.16, common.pt: where that raised (a full disk),
    the other ranks would wait in the next collective until it times out.

    Yields:
        The errors, for the caller to raise on all ranks.
    """
    core = "megatron.core.dist_checkpointing"
    places = [
        (import_module(f"{core}.strategies.filesystem_async").FileSystemWriterAsync, "finish"),
        (import_module(f"{core}.serialization"), "save_config"),
    ]
    if _RELEASE < (0, 19):
        common = import_module(f"{core}.strategies.common")
        places.append((common.TorchCommonSaveStrategy, "save_common"))
    errors: list[Exception] = []
    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, original in originals:
        setattr(place, name, _without_errors(original, errors))
    try:
        yield errors
    finally:
        for place, name, original in originals:
            setattr(place, name, original)


def _without_errors(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    return call
