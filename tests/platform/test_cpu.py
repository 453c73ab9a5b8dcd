"""The patches that let Megatron-Core run on CPUs reach Megatron, and little else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.platform import parallel
from megashear.platform.cpu import redirect_cuda
from tests.support.distributed import run_distributed

DTYPES = {
    torch.float32: "FloatTensor",
    torch.float64: "DoubleTensor",
    torch.float16: "HalfTensor",
    torch.bfloat16: "BFloat16Tensor",
    torch.int64: "LongTensor",
    torch.bool: "BoolTensor",
}


def types() -> dict[str, Any]:
    """`Tensor.type` in all its uses, after the redirection (twice, which must not matter)."""
    redirect_cuda()
    redirect_cuda()
    one = torch.tensor([1.75])
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    return {
        "names": [torch.zeros(1, dtype=dtype).type() for dtype in DTYPES],
        "parameter": parameter.type(),
        "sparse": torch.eye(2).to_sparse().type(),
        "by_dtype": one.type(torch.int64),
        "by_keyword": one.type(dtype=torch.float64),
        "by_name": one.type("torch.DoubleTensor"),
        "as_other": one.type_as(parameter.detach()),
        "module": torch.nn.Linear(2, 2).type(torch.float64).weight.detach(),
    }


def test_type_names_cuda_types_and_still_converts() -> None:
    found = run_distributed(types, 1)[0]
    assert found["names"] == [f"torch.cuda.{name}" for name in DTYPES.values()]
    assert all(hasattr(torch.cuda, name) for name in DTYPES.values())  # as CUDA names them
    assert found["parameter"] == "torch.cuda.DoubleTensor"
    assert found["sparse"] == "torch.cuda.sparse.FloatTensor"
    assert found["by_dtype"].tolist() == [1] and found["by_dtype"].dtype == torch.int64
    for name in ("by_keyword", "by_name", "as_other"):
        assert found[name].tolist() == [1.75], name
        assert found[name].dtype == torch.float64, name
    assert found["module"].dtype == torch.float64


def literals() -> dict[str, Any]:
    """Where a literal "cuda" ends up: in Megatron's modules, and in everybody else's."""
    redirect_cuda()
    from megatron.core.optimizer import clip_grads, optimizer

    found: dict[str, Any] = {
        "megatron": [
            str(optimizer.torch.zeros(2, device="cuda").device),
            str(clip_grads.torch.tensor([1.0], device="cuda:0", dtype=torch.float64).device),
            str(optimizer.torch.empty_like(torch.ones(1), device=torch.device("cuda")).device),
        ],
        "pinned": optimizer.torch.zeros(2, device="cpu", pin_memory=True).is_pinned(),
        "current": str(torch.cuda.current_device()),
        "moved": str(torch.ones(1).cuda().device),
        "same": optimizer.torch.float32 is torch.float32,
    }
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    try:
        torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError):
        found["elsewhere"] = "an error"
    return found


def test_cuda_literals_of_megatron_mean_the_cpu_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = run_distributed(literals, 1)[0]
    assert found["megatron"] == ["cpu"] * 3
    assert found["current"] == found["moved"] == "cpu"
    assert not found["pinned"]
    assert found["same"]
    assert found["elsewhere"] == "an error"


def threads_of_groups(parallel_config: ParallelConfig) -> list[int]:
    """How many threads do the collectives of each group that there is."""
    parallel.start(PlatformConfig(device="cpu"), parallel_config, seed=0)
    groups = dist.distributed_c10d._world.pg_map
    backends: list[Any] = [group._get_backend(torch.device("cpu")) for group in groups]
    threads = [backend.options._threads for backend in backends]
    parallel.stop()
    return threads


def test_two_collectives_of_a_group_never_end_at_the_same_moment() -> None:
    """With torch's two threads of a group they did, and broke its memory."""
    for threads in run_distributed(threads_of_groups, 2, ParallelConfig(tensor=2)):
        assert len(threads) > 10 and set(threads) == {1}
