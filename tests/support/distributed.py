"""Runs a function on gloo processes, forked after importing once (0.3 s instead of 10 s)."""

from __future__ import annotations

import gc
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks; returns what each returned, in rank order.

    Launcher variables (RANK, WORLD_SIZE, ...) are set as torchrun would; the function starts its
    platform itself. Results must be loadable by torch.load(weights_only=True).
    """
    with tempfile.TemporaryDirectory() as directory:
        mp.start_processes(
            _on_rank,
            args=(function, world_size, _free_port(), directory, args),
            nprocs=world_size,
            start_method="fork",
        )
        return [
            torch.load(Path(directory) / f"{rank}.pt", weights_only=True)
            for rank in range(world_size)
        ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _on_rank(
    rank: int, function: Callable[..., Any], size: int, port: int, directory: str, args: Any
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    gc.freeze()  # what the parent left (process groups among it) is not for this process to free
    torch.save(function(*args), Path(directory) / f"{rank}.pt")
