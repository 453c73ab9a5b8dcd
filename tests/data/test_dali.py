"""DALI gives the stream of the blend as torch's loader does, and leaves as little behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from megashear.config.schema import ParallelConfig, RunConfig
from megashear.data.dali import DaliFetcher
from megashear.data.dataset import DomainDataset, DynamicBlendedDataset
from megashear.data.domain_weights import DomainWeights
from megashear.data.loader import Fetcher, TrainLoader, torch_fetcher
from megashear.errors import DataError
from tests.data.test_loader import (
    LOSSES,
    expected_stream,
    make_blend,
    make_loader,
    note_located,
    prefixes,
    read_stream,
)
from tests.support.distributed import run_distributed
from tests.support.make_data import write_tokens
from tests.support.runs import GQA, records, write_source
from tests.training.test_resume import prune_run, train

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (megashear[dali])")

__all__ = ["prefixes"]  # a fixture
CPU = torch.device("cpu")
fetcher: Fetcher = partial(DaliFetcher, device=CPU)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "workers"),
    [(24, 24, 1, 0), (24, 2, 1, 1), (24, 3, 4, 0), (12, 1, 2, 2), (48, 4, 3, 1), (24, 1, 1, 4)],
)
def test_every_layout_reads_the_stream_of_the_blend(
    prefixes: list[str], batch: int, micro: int, ranks: int, workers: int
) -> None:
    """Over five evaluations that move the weights, and epochs of the shortest domain."""
    read = read_stream(
        prefixes, 0, 240, batch=batch, micro=micro, ranks=ranks, workers=workers, fetcher=fetcher
    )
    assert read == expected_stream(prefixes, 240)


@pytest.mark.parametrize(("start", "micro", "workers"), [(96, 3, 2), (120, 12, 0)])
def test_a_resume_goes_on_exactly(
    prefixes: list[str], start: int, micro: int, workers: int
) -> None:
    read = read_stream(prefixes, start, 240, micro=micro, workers=workers, fetcher=fetcher)
    assert read == expected_stream(prefixes, 240)[start:]


@pytest.mark.parametrize("workers", [0, 1])
def test_micro_batches_are_torchs_bit_for_bit(prefixes: list[str], workers: int) -> None:
    ours = make_loader(make_blend(prefixes), workers, fetcher)
    theirs = make_loader(make_blend(prefixes), 0)
    for a, b in zip(ours.next_step(), theirs.next_step(), strict=True):
        assert a.keys() == b.keys()
        for key, tensor in b.items():
            assert a[key].dtype == tensor.dtype and torch.equal(a[key], tensor), key
    ours.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_ahead_of_the_step_but_never_past_the_limit(
    prefixes: list[str], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = make_blend(prefixes)
    sent = note_located(blend, monkeypatch)
    loader = make_loader(blend, workers, fetcher)
    loader.next_step()
    assert max(sent) == 3
    loader.fetch_until(18)
    loader.next_step()
    assert max(sent) > 7
    for _ in range(3):
        loader.next_step()
    assert sent == list(range(20))
    blend.domain_weights.update(20, LOSSES[0])
    loader.next_step()
    loader.close()


def steps_before_error(blend: DynamicBlendedDataset, workers: int, fetcher: Fetcher) -> int:
    """How many steps there are before one with a wrong token id, which has to be told."""
    loader = make_loader(blend, workers, fetcher)
    loader.fetch_until(40)
    with pytest.raises(DataError, match="token id 9") as raised:
        deque(loader.next_step() for _ in range(10))
    assert str(raised.value).startswith(blend.members[0].prefix)
    loader.close()
    assert multiprocessing.active_children() == []
    return loader.consumed_samples // 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_told_in_its_turn_and_as_what_it_is(tmp_path: Path, workers: int) -> None:
    """Not when it is prefetched, and without a worker's traceback; no worker stays behind."""
    prefix = write_tokens(tmp_path / "a", [[1] * 130 + [9] + [1] * 30], 10)  # 40 samples
    domain = DomainDataset("a", prefix, seq_length=4, vocab_size=9, seed=1, dataset_id=0)
    blend = DynamicBlendedDataset([domain], DomainWeights(["a"], [1.0], {}, rule="constant"))
    expected = steps_before_error(blend, 0, torch_fetcher)
    assert expected > 1
    assert steps_before_error(blend, workers, fetcher) == expected


def test_the_random_states_of_the_run_are_left_alone(prefixes: list[str]) -> None:
    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    before = states()
    for workers in (0, 1):
        loader = make_loader(make_blend(prefixes), workers, fetcher)
        for _ in range(5):
            loader.next_step()
        loader.close()
    assert states() == before


def test_closing_ends_the_workers(prefixes: list[str]) -> None:
    loader = make_loader(make_blend(prefixes), 2, fetcher)
    loader.fetch_until(400)
    loader.next_step()
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []


def read_on(loader: TrainLoader, killed: int) -> None:
    os.kill(killed, signal.SIGKILL)
    for _ in range(99):
        loader.next_step()


@pytest.mark.parametrize("fetcher", [torch_fetcher, fetcher], ids=["torch", "dali"])
def test_a_killed_worker_ends_the_run(prefixes: list[str], fetcher: Fetcher) -> None:
    """As where memory ran out: it does not hang, and no other worker is left."""
    loader = make_loader(make_blend(prefixes), 2, fetcher)
    loader.fetch_until(400)
    loader.next_step()
    killed = multiprocessing.active_children()[0].pid or 0
    with pytest.raises(RuntimeError, match=rf"DataLoader worker .*{killed}.* exited"):
        read_on(loader, killed)
    loader.close()
    assert multiprocessing.active_children() == []


def configuration(
    directory: Path, run: str, loader: str, workers: int = 0, *, async_save: bool = False
) -> RunConfig:
    """Six pruning steps on two data-parallel ranks."""
    config = prune_run(directory, run_dir=str(directory / run), parallel=ParallelConfig())
    return replace(
        config,
        data=replace(config.data, num_workers=workers),
        trainer=replace(config.trainer, async_save=async_save),
        platform=replace(config.platform, loader=loader),
    )


def test_a_run_is_that_of_torchs_loader_bit_for_bit_also_resumed(tmp_path: Path) -> None:
    """Dead after five steps, resumed with workers, while forks of the ranks write checkpoints."""
    run_distributed(write_source, 1, tmp_path, GQA)
    whole = configuration(tmp_path, "whole", "torch")
    expected = run_distributed(train, 2, whole, None)[0]
    run_distributed(train, 2, configuration(tmp_path, "broken", "dali"), 5)
    resumed = configuration(tmp_path, "broken", "dali", 1, async_save=True)
    found = run_distributed(train, 2, resumed, None)[0]
    assert (expected.pop("began"), found.pop("began")) == (0, 3)
    for name, weight in expected.pop("weights").items():
        assert torch.equal(found["weights"][name], weight), name
    assert records(resumed.run_dir) == records(whole.run_dir)
    assert len(records(whole.run_dir)) == 9  # 6 steps, 3 evaluations
