"""Let Megatron-Core run on CPU processes with gloo, by patches of Megatron and torch.

Megatron-Core can compute on any device, but names CUDA in literal places. `redirect_cuda` points
those at the CPU; docs/platform.md lists them with the reasons. Checked with megatron-core 0.16.1
and 0.19.2.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

# Modules whose own name `torch` becomes a proxy, because they write device="cuda".
_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.utils",
)
_FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like", "zeros_like", "full", "arange")


class _TorchOnCpu(ModuleType):
    """The torch module, except that its tensor factories read device="cuda" as the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Any) -> Any:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _NullStream(contextlib.nullcontext[None]):
    """A CUDA stream with nothing to wait for."""

    def wait_stream(self, other: object) -> None:
        """Return at once."""

    synchronize = wait_event = record_event = wait_stream


def _cuda_name_of_type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return `Tensor.type`; without arguments the CUDA type, with which Megatron compares."""
    name = _tensor_type(tensor, *args, **kwargs)
    # Under a TorchFunctionMode torch calls this function once more for the same tensor.
    if args or kwargs or name.startswith("torch.cuda."):
        return name
    return name.replace("torch.", "torch.cuda.", 1)


class _OneThreadGloo(dist.ProcessGroupGloo):
    """A gloo process group that runs its collectives one after another, on one thread.

    torch 2.13 uses two threads, which assign the name of the last collective to one string without
    a lock (`pgStatus_->lastCompletedWorkName` in ProcessGroupGloo::runLoop). A name of more than 15
    letters (ALLGATHER_COALESCED, of `overlap_param_gather`) is on the heap and may be freed twice,
    which kills a run on a busy machine now and then.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta) -> None:
        gloo: Any = dist.ProcessGroupGloo
        options: Any = gloo._Options()
        options._threads, options._timeout = 1, timeout
        interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
        options._devices = (
            [gloo.create_device(interface=name) for name in interfaces.split(",")]
            if interfaces
            else [gloo.create_default_device()]
        )
        super().__init__(store, rank, size, options)


def use_one_thread_per_group() -> None:
    """Give the gloo process groups that this process makes from now on one thread each."""
    vars(dist.distributed_c10d)["ProcessGroupGloo"] = _OneThreadGloo


_tensor_type = torch.Tensor.type


@functools.cache
def redirect_cuda() -> None:
    """Point Megatron-Core's literal CUDA calls at the CPU, for the rest of this process."""
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NullStream()
    cuda.manual_seed = cuda.random.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.type = _cuda_name_of_type

    proxy = _TorchOnCpu()
    for name in _MODULES_WITH_CUDA_LITERALS:
        with contextlib.suppress(ModuleNotFoundError):  # a module that only one release has
            vars(importlib.import_module(name))["torch"] = proxy
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
