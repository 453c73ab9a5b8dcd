"""Start and stop the processes of a run: device, process groups, layers, kernels and seeds.

torchrun's variables are read in `launched`, Slurm's in `slurm`, and nowhere else.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.errors import PlatformError, RankError
from megashear.platform import cuda, slurm
from megashear.platform.kernels import choose_kernels
from megashear.platform.launched import launched_rank, local_rank, world_size
from megashear.platform.random_states import seed_all
from megashear.platform.watchdog import GRACE_MINUTES, Heartbeat, is_lost_connection, watching


@dataclass(frozen=True)
class Platform:
    """The device, dtype, layers and kernels of this process, and its ranks in the layout.

    Attributes:
        device: where this process computes.
        dtype: of weights and activations.
        layers: `torch` or `transformer_engine`.
        kernels: of the optimizer, `torch` or `apex`.
        heartbeat: what this process is doing.
    """

    device: torch.device
    dtype: torch.dtype
    layers: str
    kernels: str
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    def __str__(self) -> str:
        """Return the line that a run logs about its platform."""
        chosen = (
            f"{self.device.type} {self.precision}, {self.layers} layers, {self.kernels} kernels"
        )
        sizes = {
            "tensor": self.tensor_size,
            "pipeline": self.pipeline_size,
            "context": self.context_size,
        }
        layout = [f"{name} {size}" for name, size in sizes.items() if size > 1]
        return f"{chosen}, {' x '.join([*layout, f'data {self.data_size}'])} processes"

    @property
    def precision(self) -> str:
        """Return the precision that was chosen: fp32 or bf16."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    @property
    def layout_rank(self) -> str:
        """Return this process's rank and the layout of all, to compare with another run's."""
        sizes = (self.tensor_size, self.pipeline_size, self.context_size, self.data_size)
        return f"{self.rank} of {' x '.join(map(str, sizes))}"

    @property
    def rank(self) -> int:
        """Return the global rank of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return dist.get_world_size()

    @property
    def tensor_rank(self) -> int:
        """Return this process's tensor-parallel rank."""
        return _state().get_tensor_model_parallel_rank()

    @property
    def tensor_size(self) -> int:
        """Return the number of tensor-parallel ranks."""
        return _state().get_tensor_model_parallel_world_size()

    @property
    def pipeline_size(self) -> int:
        """Return the number of pipeline stages."""
        return _state().get_pipeline_model_parallel_world_size()

    @property
    def context_size(self) -> int:
        """Return the number of ranks that share a sequence."""
        return _state().get_context_parallel_world_size()

    @property
    def data_rank(self) -> int:
        """Return this process's data-parallel rank; ranks that share a sequence have the same."""
        return _state().get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        """Return the number of data-parallel ranks."""
        return _state().get_data_parallel_world_size()

    def sum_over_model(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks that hold the parts of one model (tensor x pipeline)."""
        dist.all_reduce(tensor, group=_state().get_model_parallel_group())
        return tensor

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """Sum in place over all processes."""
        dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """Return the largest of all processes' values; a collective, so all must call it."""
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def watched(self, timeout_minutes: float) -> AbstractContextManager[None]:
        """Return a context that ends the process if a rank hangs or dies; see `watching`."""
        return watching(self.heartbeat, timeout_minutes, speaks=local_rank() == 0)


def _state():  # type: ignore[no-untyped-def]
    from megatron.core import parallel_state

    return parallel_state


def data_and_context_group() -> dist.ProcessGroup | None:
    """Return the ranks that hold the same shard of the model; None before `start` built groups."""
    if not _state().model_parallel_is_initialized():
        return None
    return _state().get_data_parallel_group(with_context_parallel=True)


def choose_device(config: PlatformConfig) -> torch.device:
    """Return the device that `platform.device` names; for `auto` a GPU if there is one.

    Raises:
        PlatformError: CUDA is requested by name and not available.
    """
    if config.device == "cpu" or (config.device == "auto" and not cuda.is_available()):
        return torch.device("cpu")
    # Slurm may have bound each task to a GPU, and shows it no other.
    is_bound = slurm.task() is not None and cuda.device_count() == 1
    return cuda.device_of_rank(0 if is_bound else local_rank())


def choose_layers(config: PlatformConfig, device: torch.device) -> str:
    """Return the layers that `platform.layers` names; for `auto` the best that is available.

    Raises:
        PlatformError: Transformer Engine is requested, and is not installed or there is no GPU.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if config.layers == "transformer_engine" and not (installed and device.type == "cuda"):
        why = "needs a GPU" if installed else "is not installed: pip install megashear[te]"
        raise PlatformError(
            f"platform.layers = transformer_engine, but Transformer Engine {why}. "
            "Use torch or auto instead"
        )
    wanted = "transformer_engine" if installed and device.type == "cuda" else "torch"
    return wanted if config.layers == "auto" else config.layers


def start(config: PlatformConfig, parallel: ParallelConfig, seed: int) -> Platform:
    """Join the process group, build Megatron's groups and seed its generators.

    Raises:
        PlatformError: what the configuration requests is not available.
        RankError: other processes do not join within a minute after the time-out.
    """
    device = choose_device(config)
    layers = choose_layers(config, device)
    kernels = choose_kernels(config.kernels)
    if device.type == "cpu":
        from megashear.platform.cpu import redirect_cuda, use_one_thread_per_group

        redirect_cuda()
        use_one_thread_per_group()
    from megatron.core import parallel_state

    timeout_minutes = config.timeout_minutes + GRACE_MINUTES
    try:
        if not dist.is_initialized():
            _join(device, datetime.timedelta(minutes=timeout_minutes))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=(
                parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
            ),
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout_minutes,
        )
    except Exception as error:
        if is_lost_connection(error):
            what = f"rank {launched_rank()}: the {world_size()} processes did not come together"
            raise RankError(f"{what}: {str(error).splitlines()[0]}") from error
        raise
    seed_all(seed, dist.get_rank())
    bf16 = config.precision_on(device.type == "cuda") == "bf16"
    return Platform(device, torch.bfloat16 if bf16 else torch.float32, layers, kernels)


def _join(device: torch.device, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    elif slurm.task():
        address, port = slurm.rendezvous()
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            timeout=timeout,
            world_size=world_size(),
            rank=launched_rank(),
        )
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def stop() -> None:
    """Leave the process group, so that another run can start in this process."""
    from megatron.core import parallel_state
    from megatron.core.models.common import embeddings

    parallel_state.destroy_model_parallel()
    # Megatron leaves some groups in its globals, and others in the caches of embeddings. A process
    # forked later would free them when it starts anew or fills the caches, and wait for ever for
    # their threads, which a fork does not have.
    for embedding in (embeddings.RotaryEmbedding, embeddings.YarnRotaryEmbedding):
        embedding.forward.cache_clear()
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def single_process() -> Iterator[Platform]:
    """Run Megatron-Core on the CPU in this one process, in fp32, for tools and checks."""
    platform = start(PlatformConfig(device="cpu", precision="fp32"), ParallelConfig(), seed=0)
    try:
        yield platform
    finally:
        stop()
