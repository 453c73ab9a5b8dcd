"""Epoch indices on disk: shared, never stale, never half, and never needed."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from megashear.config.schema import DataConfig, Domain
from megashear.data import dataset, index_cache
from megashear.data.dataset import DomainDataset, build_train_dataset
from megashear.data.domain_weights import DomainWeights
from tests.support.make_data import random_documents, write_tokens

VOCAB, SEQ = 300, 8


@pytest.fixture(autouse=True)
def everything_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CACHED_FROM", 0)
    index_cache._warn_unwritable.cache_clear()


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_tokens(tmp_path / "tokens" / "cc", random_documents(2000, VOCAB), VOCAB)


def open_domain(prefix: str, **options: Any) -> DomainDataset:
    settings = {"seq_length": SEQ, "vocab_size": VOCAB, "seed": 1, "dataset_id": 0, **options}
    return DomainDataset("cc", prefix, **settings)


def read(prefix: str, **options: Any) -> list[list[int]]:
    """The samples of two epochs."""
    domain = open_domain(prefix, **options)
    return [domain[k].tolist() for k in range(2 * domain.samples_per_epoch)]


def without_cache(prefix: str, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "CACHED_FROM", 10**9)
        return read(prefix)


def entries(prefix: str) -> list[Path]:
    return sorted((Path(prefix).parent / "index_cache").glob("cc-*"))


def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every index that is really built."""
    built: list[int] = []
    original = index_cache.GPTDataset._build_document_sample_shuffle_indices

    def counted(self: Any) -> Any:
        built.append(os.getpid())
        return original(self)

    monkeypatch.setattr(index_cache.GPTDataset, "_build_document_sample_shuffle_indices", counted)
    return built


def test_a_second_reader_maps_what_the_first_built(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = without_cache(prefix, monkeypatch)
    built = builds(monkeypatch)
    assert read(prefix) == read(prefix) == expected
    assert len(built) == len(entries(prefix)) == 2  # epochs
    assert not list((Path(prefix).parent / "index_cache").glob(".cc*"))  # nothing half-written
    domain = open_domain(prefix)
    domain[0]
    for array in (domain._epochs[0].sample_index, domain._epochs[0].shuffle_index):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable


def test_small_domains_leave_no_files(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cache(prefix, monkeypatch)
    assert [path.suffix for path in Path(prefix).parent.iterdir()].count("") == 0


def test_another_directory_by_name(tmp_path: Path, prefix: str) -> None:
    domains = (Domain("a", prefix, prefix, 0.5), Domain("b", prefix, prefix, 0.5))
    elsewhere = tmp_path / "not" / "yet"
    config = DataConfig(seq_length=SEQ, domains=domains, index_cache=str(elsewhere))
    blend = build_train_dataset(config, VOCAB, DomainWeights.from_config(config))
    assert [blend[0][0], blend[1][0]] == [0, 1]
    assert len(list(elsewhere.glob("cc-*"))) == 2 and not entries(prefix)


@pytest.mark.parametrize("change", [{"seq_length": 9}, {"seed": 2}])
def test_other_settings_have_other_entries(prefix: str, change: dict[str, int]) -> None:
    assert read(prefix) != read(prefix, **change)
    assert len(entries(prefix)) == 4


def test_text_tokenized_anew_under_the_same_name_never_meets_an_old_index(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.stat(f"{prefix}.idx"), os.stat(f"{prefix}.bin")
    read(prefix)
    # of the same size in both files, and, to the file system, of the same time
    documents = random_documents(2000, VOCAB)
    documents[0], documents[1] = documents[0][:-1], [*documents[1], 0]
    write_tokens(prefix, documents, VOCAB)
    for suffix, stat in zip((".idx", ".bin"), before, strict=True):
        os.utime(prefix + suffix, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert os.stat(prefix + suffix).st_size == stat.st_size
    assert read(prefix) == without_cache(prefix, monkeypatch)
    assert len(entries(prefix)) == 4


def damage(entry: Path, how: str) -> None:
    whole = entry.read_bytes()
    if how.startswith("flipped"):
        place = {"flipped checksum": 5, "flipped header": 50, "flipped": len(whole) // 2}[how]
        entry.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    else:
        entry.write_bytes({"empty": b"", "short": whole[:20], "cut": whole[:-1]}[how])


@pytest.mark.parametrize(
    "how", ["empty", "short", "cut", "flipped checksum", "flipped header", "flipped"]
)
def test_a_damaged_entry_is_built_again_and_that_is_said_once(
    prefix: str, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read(prefix)
    entry = entries(prefix)[0]
    damage(entry, how)
    built = builds(monkeypatch)
    assert read(prefix) == read(prefix) == expected
    assert len(built) == 1
    assert [r.getMessage() for r in caplog.records] == [
        f"{entry} is damaged: this index is built again"
    ]


def test_where_nothing_can_be_written_memory_serves_and_that_is_said_once(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = without_cache(prefix, monkeypatch)
    blocked = tmp_path / "file"
    blocked.write_text("")
    for _ in range(2):
        assert read(prefix, index_cache=str(blocked / "cache")) == expected
    (record,) = caplog.records
    assert str(blocked / "cache") in record.getMessage()
    assert "data.index_cache" in record.getMessage()


def test_a_full_disk_leaves_nothing_half(
    prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = without_cache(prefix, monkeypatch)

    def full(file: BinaryIO, array: Any, **_: Any) -> None:
        file.write(b"\x93NUMPY")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        assert read(prefix) == expected
    assert "No space left" in caplog.text
    assert not list((Path(prefix).parent / "index_cache").iterdir())
    assert read(prefix) == expected and len(entries(prefix)) == 2


def test_what_a_killed_builder_left_is_removed(prefix: str) -> None:
    expected = read(prefix)
    entry = entries(prefix)[0]
    left = entry.with_name(f".{entry.name}.host-1")
    entry.rename(left)
    left.write_bytes(b"half")
    assert read(prefix) == expected
    assert entry.exists() and not left.exists()


def start_together(prefix: str, queue: Any, begin: Any, locks: bool) -> None:
    dataset.CACHED_FROM = 0
    if not locks:
        fcntl.flock = no_locks
    original = index_cache.GPTDataset._build_document_sample_shuffle_indices
    built = []

    def slow(self: Any) -> Any:
        built.append(1)
        time.sleep(0.2)  # so that all are there before the first is done
        return original(self)

    index_cache.GPTDataset._build_document_sample_shuffle_indices = slow
    domain = open_domain(prefix)
    begin.wait()
    samples = [domain[k].tolist() for k in range(domain.samples_per_epoch)]
    queue.put((len(built), samples))


def no_locks(*_: Any) -> None:
    raise OSError(37, "No locks available")


@pytest.mark.parametrize("locks", [True, False])
def test_many_processes_that_start_at_once(
    prefix: str, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With locks one builds; without, some do, and all get the whole index."""
    expected = without_cache(prefix, monkeypatch)
    context = multiprocessing.get_context("fork")
    queue, begin = context.Queue(), context.Barrier(6)
    arguments = (prefix, queue, begin, locks)
    processes = [context.Process(target=start_together, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert all(samples == expected[: len(samples)] for _, samples in results)
    built = sum(count for count, _ in results)
    assert built == 1 if locks else built > 1
    (entry,) = entries(prefix)
    assert index_cache._read(entry) is not None
    assert not list(entry.parent.glob(".cc*"))


def test_a_lock_file_that_cannot_be_opened_is_done_without(prefix: str) -> None:
    """As one that belongs to another user; this process may be root, who can open any file."""
    expected = read(prefix)
    for entry in entries(prefix):
        entry.unlink()
        entry.with_name(f".lock-{entry.name}").mkdir()
    assert read(prefix) == expected
    assert len(entries(prefix)) == 2
