"""Safe loading and saving by Megatron-Core, and the differences between its releases."""

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
"""Option of `save`: 0.19 would otherwise use another package; 0.16 has only its own writer."""


@contextmanager
def weights_only() -> Iterator[None]:
    """Make torch.load accept tensors and plain data only, whatever its caller asks for.

    Megatron-Core 0.19 stores non-tensors (`common_state`) among the tensors, and torch's planner
    reads them with weights_only=False; 0.16 reads a file of its own safely. torch has no other
    switch than this environment variable.
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
    """Return why this Megatron-Core cannot load a checkpoint of 0.19; empty if it can.

    0.19 loads checkpoints of 0.16, but writes no common.pt, which 0.16 needs.
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
    """Collect the errors of what only rank 0 writes for Megatron-Core.

    These are the table of contents, metadata.json and, with 0.16, common.pt: if one raised (a full
    disk), the other ranks would wait in the next collective until it times out.

    Yields:
        The errors, for the caller to raise on all ranks.
    """
    core = "megatron.core.dist_checkpointing"
    functions = [
        (import_module(f"{core}.strategies.filesystem_async").FileSystemWriterAsync, "finish"),
        (import_module(f"{core}.serialization"), "save_config"),
    ]
    if _RELEASE < (0, 19):
        common = import_module(f"{core}.strategies.common")
        functions.append((common.TorchCommonSaveStrategy, "save_common"))
    errors: list[Exception] = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in functions]
    for owner, name, original in originals:
        setattr(owner, name, _without_errors(original, errors))
    try:
        yield errors
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _without_errors(function: Callable[..., Any], errors: list[Exception]) -> Callable[..., None]:
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    return call
