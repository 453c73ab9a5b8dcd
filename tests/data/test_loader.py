"""Micro-batches: one stream for any layout, workers, prefetch, resume and re-weighting."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import default_collate

from megashear.data.dataset import DomainDataset, DynamicBlendedDataset
from megashear.data.domain_weights import DomainWeights
from megashear.data.loader import (
    Fetcher,
    Reader,
    TrainLoader,
    micro_batch,
    micro_batch_samples,
    torch_fetcher,
)
from megashear.errors import DataError
from tests.support.distributed import run_distributed
from tests.support.make_data import random_documents, write_tokens

VOCAB, SEQ = 300, 8
NAMES, WEIGHTS = ("a", "b", "c"), (0.5, 0.3, 0.2)
REFERENCES = {"a": 1.0, "b": 1.0, "c": 1.0}
LOSSES = [{"a": 1.0, "b": 1.2, "c": 3.0}, {"a": 2.5, "b": 1.2, "c": 0.5}]
INTERVAL = 48  # samples from one evaluation to the next
Stream = list[tuple[list[int], int]]


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # 8 tokens a sample: domain a is through its text every 25 samples, so epochs change as well
    root = tmp_path_factory.mktemp("tokens")
    sizes = zip(NAMES, (201, 900, 1500), strict=True)
    return [write_tokens(root / name, random_documents(size, VOCAB), VOCAB) for name, size in sizes]


def make_blend(prefixes: list[str], vocab: int = VOCAB) -> DynamicBlendedDataset:
    members = [
        DomainDataset(name, prefix, seq_length=SEQ, vocab_size=vocab, seed=7, dataset_id=number)
        for number, (name, prefix) in enumerate(zip(NAMES, prefixes, strict=True))
    ]
    return DynamicBlendedDataset(members, DomainWeights(NAMES, WEIGHTS, REFERENCES))


def samples_of(batch: dict[str, Tensor]) -> Stream:
    return list(zip(batch["tokens"].tolist(), batch["dataset_id"].tolist(), strict=True))


def expected_stream(prefixes: list[str], until: int) -> Stream:
    """The stream without a loader: sample after sample, with an update at each evaluation."""
    blend = make_blend(prefixes)
    stream: Stream = []
    for n in range(until):
        if n and n % INTERVAL == 0:
            blend.domain_weights.update(n, LOSSES[n // INTERVAL % 2])
        domain, text = blend[n]
        stream.append((text[:-1].tolist(), domain))
    return stream


def read_stream(
    prefixes: list[str],
    start: int,
    until: int,
    *,
    batch: int = 24,
    micro: int = 2,
    ranks: int = 1,
    workers: int = 0,
    fetcher: Fetcher = torch_fetcher,
) -> Stream:
    """The same by one loader per rank, each with domain weights of its own, put together again."""
    blends = [make_blend(prefixes) for _ in range(ranks)]
    for blend in blends:
        for n in range(INTERVAL, start + 1, INTERVAL):
            blend.domain_weights.update(n, LOSSES[n // INTERVAL % 2])
    loaders = [
        TrainLoader(
            blend,
            global_batch_size=batch,
            micro_batch_size=micro,
            data_rank=rank,
            data_size=ranks,
            num_workers=workers,
            consumed_samples=start,
            fetcher=fetcher,
        )
        for rank, blend in enumerate(blends)
    ]
    stream: Stream = []
    for position in range(start, until, batch):
        if position > start and position % INTERVAL == 0:
            for blend in blends:
                blend.domain_weights.update(position, LOSSES[position // INTERVAL % 2])
        evaluation = (position // INTERVAL + 1) * INTERVAL
        for loader in loaders:
            loader.fetch_until(evaluation)
        steps = [loader.next_step() for loader in loaders]
        assert {loader.consumed_samples for loader in loaders} == {position + batch}
        for round_of_ranks in zip(*steps, strict=True):
            for batch_of_rank in round_of_ranks:
                assert batch_of_rank["tokens"].shape == (micro, SEQ)
                stream += samples_of(batch_of_rank)
    for loader in loaders:
        loader.close()
    return stream


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "workers"),
    [(24, 24, 1, 0), (24, 2, 1, 1), (24, 2, 1, 2), (24, 3, 4, 0), (12, 1, 2, 2), (48, 4, 3, 0)],
)
def test_every_layout_reads_the_stream_of_the_blend(
    prefixes: list[str], batch: int, micro: int, ranks: int, workers: int
) -> None:
    read = read_stream(prefixes, 0, 240, batch=batch, micro=micro, ranks=ranks, workers=workers)
    assert read == expected_stream(prefixes, 240)


@pytest.mark.parametrize(
    ("start", "micro", "ranks", "workers"),
    [(96, 4, 2, 0), (96, 3, 1, 2), (120, 2, 1, 2), (120, 12, 2, 0)],
)
def test_a_resume_goes_on_exactly_on_another_layout(
    prefixes: list[str], start: int, micro: int, ranks: int, workers: int
) -> None:
    until = start + 1008  # 1,000 samples, in whole steps
    read = read_stream(prefixes, start, until, micro=micro, ranks=ranks, workers=workers)
    assert read == expected_stream(prefixes, until)[start:]


@pytest.mark.parametrize(
    ("micro", "ranks"), [(1, 1), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1), (8, 3), (24, 1)]
)
def test_the_ranks_take_each_sample_of_the_global_batch_once(micro: int, ranks: int) -> None:
    taken = [micro_batch_samples(96, 24, micro, rank, ranks) for rank in range(ranks)]
    assert sorted(n for rank in taken for batch in rank for n in batch) == list(range(96, 120))
    assert {len(batch) for rank in taken for batch in rank} == {micro}
    assert {len(rank) for rank in taken} == {24 // (micro * ranks)}


def test_micro_batch_i_of_all_ranks_comes_before_micro_batch_i_plus_1() -> None:
    assert micro_batch_samples(100, 8, 2, 0, 2) == [[100, 101], [104, 105]]
    assert micro_batch_samples(100, 8, 2, 1, 2) == [[102, 103], [106, 107]]


@pytest.mark.parametrize("vocab", [300, 100_000])  # in files of 16 and of 32 bits
def test_a_micro_batch_is_what_megatrons_dataset_gives(tmp_path: Path, vocab: int) -> None:
    documents = [[0] * 40, *random_documents(2000, vocab)]  # no token is padding, 0 neither
    prefix = write_tokens(tmp_path / "cc", documents, vocab)
    domain = DomainDataset("a", prefix, seq_length=SEQ, vocab_size=vocab, seed=7, dataset_id=2)
    samples = range(domain.samples_per_epoch)
    batch = micro_batch(*Reader([domain] * 3)[[(2, k) for k in samples]])
    theirs = default_collate([domain._epoch(0)[k] for k in samples])
    assert batch.pop("dataset_id").tolist() == [2] * len(samples)
    assert batch.keys() == theirs.keys()  # no attention_mask: [s, s] a sample
    for key, tensor in theirs.items():
        assert batch[key].dtype == tensor.dtype and torch.equal(batch[key], tensor)
        assert batch[key].is_contiguous()
    assert (batch["tokens"] == 0).all(1).any() and batch["loss_mask"].all()


def make_loader(
    blend: DynamicBlendedDataset, workers: int, fetcher: Fetcher = torch_fetcher
) -> TrainLoader:
    return TrainLoader(
        blend,
        global_batch_size=4,
        micro_batch_size=2,
        data_rank=0,
        data_size=1,
        num_workers=workers,
        fetcher=fetcher,
    )


def note_located(blend: DynamicBlendedDataset, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every sample that is handed out to be read."""
    sent: list[int] = []
    locate = blend.locate

    def noting_locate(n: int) -> tuple[int, int]:
        sent.append(n)
        return locate(n)

    monkeypatch.setattr(blend, "locate", noting_locate)
    return sent


def test_workers_are_ahead_of_the_step_but_never_past_the_limit(
    prefixes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blend = make_blend(prefixes)
    sent = note_located(blend, monkeypatch)
    loader = make_loader(blend, workers=2)
    loader.next_step()
    assert max(sent) == 3  # nothing ahead before a limit is known
    loader.fetch_until(18)
    loader.next_step()
    assert max(sent) > 7
    loader.next_step()
    loader.next_step()
    assert max(sent) == 15 and loader.consumed_samples == 16
    loader.next_step()  # 18 is not at the end of a step: the step that was asked for, and no more
    assert sent == list(range(20))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_new_weights_inside_what_was_allowed_are_a_mistake(
    prefixes: list[str], workers: int
) -> None:
    blend = make_blend(prefixes)
    loader = make_loader(blend, workers)
    loader.fetch_until(40)
    loader.next_step()
    blend.domain_weights.update(4, LOSSES[0])
    with pytest.raises(AssertionError, match="weights changed at sample 4"):
        loader.next_step()
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_token_id_reads_the_same_from_a_worker(prefixes: list[str], workers: int) -> None:
    loader = make_loader(make_blend(prefixes, vocab=5), workers)
    with pytest.raises(DataError) as raised:
        loader.next_step()
    assert str(raised.value).startswith(prefixes[0]) and "Traceback" not in str(raised.value)
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_the_run_is_left_alone(prefixes: list[str], workers: int) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loader = make_loader(make_blend(prefixes), workers)
    for _ in range(5):
        loader.next_step()
    loader.close()
    assert torch.equal(before, torch.get_rng_state())


def test_closing_ends_the_workers(prefixes: list[str]) -> None:
    loader = make_loader(make_blend(prefixes), workers=2)
    loader.fetch_until(400)
    loader.next_step()
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(AssertionError, match="closed"):
        loader.next_step()


def test_signals_to_the_whole_job_do_not_end_workers_but_their_parent_can(
    prefixes: list[str],
) -> None:
    blend = make_blend(prefixes)
    loader = make_loader(blend, workers=1)
    loader.fetch_until(400)
    stream = samples_of(loader.next_step()[0])
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in ("INT", "TERM", "USR1"):  # from another process, as a scheduler does
        assert os.system(f"kill -{number} {worker.pid}") == 0
    for _ in range(9):
        stream += samples_of(loader.next_step()[0])
    assert len(stream) == 20 and worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(timeout=20)
    assert worker.exitcode == 0
    loader.close()


def beside_gloo(prefixes: list[str]) -> list[list[int]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dist.all_reduce(torch.ones(10_000))  # starts gloo's threads before the workers are forked
    loader = TrainLoader(
        make_blend(prefixes),
        global_batch_size=8,
        micro_batch_size=2,
        data_rank=rank,
        data_size=2,
        num_workers=2,
    )
    loader.fetch_until(48)
    steps = []
    for _ in range(6):
        batches = loader.next_step()
        gathered = [torch.empty_like(batches[0]["tokens"]) for _ in range(2)]
        for batch in batches:
            dist.all_gather(gathered, batch["tokens"])
            steps += torch.cat(gathered).tolist()
    if rank == 0:
        loader.close()  # rank 1 leaves without: that must not keep its process from ending
    dist.destroy_process_group()
    return steps


def test_workers_beside_a_gloo_group(prefixes: list[str]) -> None:
    expected = [tokens for tokens, _ in expected_stream(prefixes, 48)]
    assert run_distributed(beside_gloo, 2, prefixes) == [expected, expected]
