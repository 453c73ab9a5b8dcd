"""Where a run stands: what is chosen, what is refused, and over which ranks sums are taken."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.errors import PlatformError
from megashear.platform import launched, parallel
from tests.support.distributed import run_distributed

CPU = torch.device("cpu")
no_transformer_engine = pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="Transformer Engine is installed"
)


@no_transformer_engine
def test_transformer_engine_by_name_is_an_error_that_says_how_to_get_it() -> None:
    with pytest.raises(PlatformError) as refused:
        parallel.choose_layers(PlatformConfig(layers="transformer_engine"), CPU)
    message = str(refused.value)
    assert message.startswith("platform.layers = transformer_engine")
    assert "pip install megashear[te]" in message and "Use torch or auto" in message


def test_on_a_cpu_the_layers_are_torchs() -> None:
    assert parallel.choose_layers(PlatformConfig(), CPU) == "torch"
    assert parallel.choose_layers(PlatformConfig(layers="torch"), CPU) == "torch"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the machine's GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("no_gpu")
def test_cuda_by_name_is_an_error_and_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(PlatformError) as refused:
        parallel.choose_device(PlatformConfig(device="cuda"))
    assert "process 3 of this machine finds 0 GPU(s)" in str(refused.value)
    assert "platform.device=cpu" in str(refused.value)
    assert parallel.choose_device(PlatformConfig()) == CPU


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (launched.launched_rank(), launched.world_size()) == (0, 1)


def refused_start() -> list[Any]:
    """What is left behind by a start that is refused, and whether another one then works."""
    found = []
    try:
        parallel.start(PlatformConfig(device="cuda"), ParallelConfig(), seed=0)
    except PlatformError as error:
        found += [str(error), dist.is_initialized()]
    for precision, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        config = PlatformConfig(device="cpu", precision=precision)
        platform = parallel.start(config, ParallelConfig(), seed=0)
        found.append(platform.dtype == dtype)
        parallel.stop()
        found.append(not dist.is_initialized())
    return found


@pytest.mark.usefixtures("no_gpu")
def test_a_refused_start_leaves_nothing_and_runs_can_follow_each_other() -> None:
    message, initialised, *good = run_distributed(refused_start, 1)[0]
    assert "GPU" in message
    assert not initialised
    assert good == [True] * 4


def places(tensor: int) -> dict[str, Any]:
    """A rank's place, and the sums of 10 ** rank over each of its groups."""
    platform = parallel.start(PlatformConfig(device="cpu"), ParallelConfig(tensor=tensor), seed=0)
    one = torch.tensor(10**platform.rank)
    found = {
        "place": (platform.tensor_rank, platform.tensor_size, platform.data_rank),
        "data_size": platform.data_size,
        "world_size": platform.world_size,
        "model": platform.sum_over_model(one.clone()).item(),
        "all": platform.sum_over_all(one.clone()).item(),
        "largest": platform.largest(7 - platform.rank),
    }
    parallel.stop()
    return found


def test_sums_are_over_the_ranks_of_one_model_or_over_all() -> None:
    ranks = run_distributed(places, 4, 2)
    assert [rank["place"] for rank in ranks] == [(0, 2, 0), (1, 2, 0), (0, 2, 1), (1, 2, 1)]
    assert {(rank["data_size"], rank["world_size"]) for rank in ranks} == {(2, 4)}
    assert [rank["model"] for rank in ranks] == [11, 11, 1100, 1100]
    assert [rank["all"] for rank in ranks] == [1111] * 4
    assert {rank["largest"] for rank in ranks} == {7}
