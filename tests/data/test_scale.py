"""A plan of 50 billion tokens: what it costs to start, to resume at its end, to re-weight, to hold.

The token files are real in length alone: their text is a hole in a sparse file.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import _IndexWriter

from megashear.config.schema import DataConfig, Domain
from megashear.data.dataset import build_train_dataset
from megashear.data.domain_weights import DomainWeights, Segment
from megashear.data.loader import TrainLoader
from tests.support.distributed import run_distributed

TOKENS, SEQ, BATCH = 50_000_000_000, 4096, 256
PLAN = TOKENS // SEQ // BATCH * BATCH
WEIGHTS = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
EVALUATIONS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    directory, domains, length = tmp_path_factory.mktemp("plan"), [], 100_000
    for number, weight in enumerate(WEIGHTS):
        prefix, documents = directory / f"d{number}", int(TOKENS * weight / length)
        with _IndexWriter(f"{prefix}.idx", np.uint16) as index:
            index.write(np.full(documents, length), None, np.arange(documents + 1))
        with open(f"{prefix}.bin", "wb") as text:
            text.truncate(2 * documents * length)
        domains.append(Domain(prefix.name, str(prefix), str(prefix), weight, reference_loss=1.0))
    return DataConfig(seq_length=SEQ, domains=tuple(domains))


def own_memory() -> int:
    """Bytes that this process shares with no other and no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def start(config: DataConfig, segments: int, position: int) -> tuple[TrainLoader, DomainWeights]:
    """A run's data at a position; segments are of even length and of turned weights."""
    domain_weights = DomainWeights.from_config(config)
    domain_weights.segments = tuple(
        Segment(number * PLAN // segments, tuple(np.roll(WEIGHTS, number).tolist()))
        for number in range(segments)
    )
    dataset = build_train_dataset(config, 32000, domain_weights)
    loader = TrainLoader(
        dataset,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        data_rank=0,
        data_size=1,
        consumed_samples=position,
        # Located as ever, and not read: that would need the index of every domain.
        fetcher=lambda reader, order, workers: Located(order),
    )
    return loader, domain_weights


class Located:
    """Gives, for the text of a sequence, the number of its sample."""

    def __init__(self, order: object) -> None:
        self.order = order

    def __iter__(self):  # type: ignore[no-untyped-def]
        for located in self.order:  # type: ignore[attr-defined]
            domains, samples = np.array(located).T
            yield np.stack([samples, samples], axis=1), domains


@pytest.mark.parametrize("segments", [1, EVALUATIONS])
@pytest.mark.parametrize("position", [0, PLAN - BATCH])
def test_it_starts_within_5_s_and_an_update_takes_50_ms(
    config: DataConfig, segments: int, position: int
) -> None:
    before, began = own_memory(), time.perf_counter()
    loader, domain_weights = start(config, segments, position)
    (batch,) = loader.next_step()
    assert time.perf_counter() - began < 5
    assert own_memory() - before < 64 * 2**20
    if position:
        counts = np.bincount(batch["dataset_id"], minlength=7)
        assert abs(counts - BATCH * np.array(domain_weights.weights)).max() <= 2
        took = []
        for _ in range(3):
            losses = {name: 1.0 + number for number, name in enumerate(domain_weights.names)}
            began = time.perf_counter()
            domain_weights.update(loader.consumed_samples, losses)
            loader.next_step()
            took.append(time.perf_counter() - began)
        assert min(took) < 0.05, took


def read_some(config: DataConfig) -> int:
    """Bytes of its own that a process takes to read samples of the first domain."""
    domain = build_train_dataset(config, 32000, DomainWeights.from_config(config)).members[0]
    before = own_memory()
    for k in range(0, domain.samples_per_epoch, 400_000):
        assert not domain[k].any()
    return own_memory() - before


def test_a_worker_holds_no_index(config: DataConfig) -> None:
    """The index of 8.2 M samples is 98 MB, of which the process that builds it lets go as well."""
    for _ in range(2):  # builds, then maps
        (taken,) = run_distributed(read_some, 1, config)
        assert taken < 40 * 2**20  # what was freed may stay with the heap
