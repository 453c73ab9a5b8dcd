"""What loading costs, beside Megatron's static BlendedDataset under torch's DataLoader, in one run.

    python benchmarks/data_loading.py

Plan: start-up, update and memory for a plan of 50 billion tokens in seven domains, whose token
files are real in length alone (their text is a hole in a sparse file). Each line is a process of
its own. Reading: sequences/s that reach the training loop, of text in the page cache.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexWriter
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader

from megashear.config.schema import DataConfig, Domain
from megashear.console import table
from megashear.data.dali import DaliFetcher
from megashear.data.dataset import DynamicBlendedDataset, build_train_dataset
from megashear.data.loader import Fetcher, TrainLoader, microbatch_samples, torch_fetcher
from megashear.data.mixture import Mixture, Segment

WEIGHTS = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
VOCAB, GLOBAL_BATCH, MICRO_BATCH, EVALUATIONS = 32000, 32, 4, 120
FETCHERS: dict[str, Fetcher] = {
    "megashear, torch": torch_fetcher,
    "megashear, dali": partial(DaliFetcher, device=torch.device("cpu")),
}
STATIC = "Megatron BlendedDataset"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--tokens", type=float, default=50e9, help="of the plan (default: 50e9)")
    option("--seq-length", type=int, default=4096, metavar="N", help="default: 4096")
    option("--workers", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    option("--seconds", type=float, default=1.5, help="of one measurement (default: 1.5)")
    option("--rounds", type=int, default=5, help="of all measurements (default: 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="data-loading-") as folder:
        show_plan(Path(folder), int(arguments.tokens), arguments.seq_length)
        show_reading(Path(folder), arguments)


def show_plan(folder: Path, tokens: int, seq_length: int) -> None:
    """Start-up, update and memory, each measured in a process of its own."""
    config = write_domains(folder / "plan", tokens, seq_length, 100_000, sparse=True)
    last = tokens // seq_length // GLOBAL_BATCH * GLOBAL_BATCH - GLOBAL_BATCH
    measured = {
        "indices of all domains: built and kept on disk": apart(open_indices, config),
        "indices of all domains: by every other process": apart(open_indices, config),
        "start at the first step": apart(start, config, last, 1, 0),
        "start at the last step, one segment (rule constant)": apart(start, config, last, 1, last),
        f"start at the last step, {EVALUATIONS} segments": apart(
            start, config, last, EVALUATIONS, last
        ),
        f"update after {EVALUATIONS} segments": apart(update, config, last),
        f"{STATIC}, its start": apart(start_static, config, last),
    }
    for part in (100, 10, 1):
        smaller = write_domains(
            folder / f"plan-{part}", tokens // part, seq_length, 100_000, sparse=True
        )
        apart(open_indices, smaller)
        name = f"a worker that has read of all domains, plan of {tokens / part / 1e9:g} B tokens"
        measured[name] = apart(read_some, smaller)
    print(f"{tokens:,} tokens, {last + GLOBAL_BATCH:,} sequences of {seq_length}, seven domains")
    rows = [[name, f"{s:.3f}", f"{size / 2**20:.0f}"] for name, (s, size) in measured.items()]
    print(table(rows, ["", "seconds", "memory (MiB)"]), flush=True)


def apart(function: Callable[..., float], *arguments: Any) -> tuple[float, int]:
    """(what a function returns, bytes that its process took beyond files and the parent's)."""

    def child() -> None:
        before = own_memory()
        seconds = function(*arguments)
        sender.send((seconds, own_memory() - before))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    sender.close()
    result: tuple[float, int] = receiver.recv()
    process.join()
    return result


def own_memory() -> int:
    """Bytes that this process shares with no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


KEPT: list[Any] = []
"""What a measurement holds when its memory is taken."""


def open_indices(config: DataConfig) -> float:
    """Seconds to have the first epoch of each domain."""
    dataset = blend(config)
    KEPT.append(dataset)
    began = time.perf_counter()
    for member in dataset.members:
        member._epoch(0)
    return time.perf_counter() - began


def start(config: DataConfig, last: int, segments: int, position: int) -> float:
    """Seconds to have the loader, and its first step located."""
    began = time.perf_counter()
    dataset = blend(config, last, segments)
    loader = make_loader(dataset, 0, torch_fetcher, position)
    for n in range(position, position + GLOBAL_BATCH):
        dataset.locate(n)
    KEPT.append(loader)
    return time.perf_counter() - began


def update(config: DataConfig, last: int) -> float:
    """Seconds to move the weights, and to locate the step that follows."""
    dataset = blend(config, last, EVALUATIONS)
    dataset.locate(last)
    KEPT.append(dataset)
    began = time.perf_counter()
    dataset.mixture.update(last, {name: 1.5 + n for n, name in enumerate(dataset.mixture.names)})
    for n in range(last, last + GLOBAL_BATCH):
        dataset.locate(n)
    return time.perf_counter() - began


def read_some(config: DataConfig) -> float:
    """Seconds to read a sequence of each domain, in a process that knows nothing of the blend."""
    dataset = blend(config)
    KEPT.append(dataset)
    began = time.perf_counter()
    for member in dataset.members:
        member[0]
    return time.perf_counter() - began


def start_static(config: DataConfig, last: int) -> float:
    """Seconds to have Megatron's dataset, with the indices of all domains built in memory."""
    began = time.perf_counter()
    KEPT.append(static(config, last))
    return time.perf_counter() - began


def blend(config: DataConfig, last: int = 0, segments: int = 1) -> DynamicBlendedDataset:
    """The dataset of a run that has had these many segments of even length."""
    mixture = Mixture.from_config(config)
    mixture.segments = tuple(
        Segment(number * last // segments, tuple(np.roll(WEIGHTS, number).tolist()))
        for number in range(segments)
    )
    return build_train_dataset(config, VOCAB, mixture)


def static(config: DataConfig, samples: int) -> BlendedDataset:
    """Megatron's dataset of the same files and weights."""
    tokenizer = SimpleNamespace(vocab_size=VOCAB, eod=None, pad=-1, unique_identifiers={})
    settings = GPTDatasetConfig(
        random_seed=config.seed,
        sequence_length=config.seq_length,
        blend=([domain.train for domain in config.domains], list(WEIGHTS)),
        split="1",
        path_to_cache="",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    members = []
    for domain in config.domains:
        text = IndexedDataset(domain.train)
        documents = np.arange(len(text), dtype=np.int32)
        needed = int(samples * domain.weight) + 2
        members.append(GPTDataset(text, domain.train, documents, needed, Split.train, settings))
    return BlendedDataset(members, list(WEIGHTS), samples, settings)


def write_domains(
    folder: Path, tokens: int, seq_length: int, length: int, *, sparse: bool
) -> DataConfig:
    """Token files of seven domains, in documents of `length` tokens; random text, or none."""
    folder.mkdir()
    rng, domains = np.random.default_rng(0), []
    for number, weight in enumerate(WEIGHTS):
        prefix, documents = folder / f"d{number}", int(tokens * weight / length)
        with _IndexWriter(f"{prefix}.idx", np.uint16) as index:
            index.write(np.full(documents, length), None, np.arange(documents + 1))
        with open(f"{prefix}.bin", "wb") as file:
            if sparse:
                file.truncate(2 * documents * length)
            else:
                rng.integers(0, VOCAB, documents * length, dtype=np.uint16).tofile(file)
        domains.append(Domain(f"d{number}", str(prefix), str(prefix), weight, 1.0))
    return DataConfig(seq_length=seq_length, domains=tuple(domains))


def show_reading(folder: Path, arguments: argparse.Namespace) -> None:
    """Sequences/s by loader and number of workers: medians, of ratios too, over rounds."""
    config = write_domains(folder / "text", 60_000_000, arguments.seq_length, 1000, sparse=False)
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for workers in arguments.workers:
            for name in (*FETCHERS, STATIC):
                read = read_static if name == STATIC else partial(read_steps, FETCHERS[name])
                rate = sequences_per_second(read(config, workers), arguments.seconds)
                rates.setdefault((name, workers), []).append(rate)
    rows = []
    for name in (*FETCHERS, STATIC):
        row = [name]
        for workers in arguments.workers:
            found, beside = rates[name, workers], rates[STATIC, workers]
            ratio = median(a / b for a, b in zip(found, beside, strict=True))
            row.append(f"{median(found):,.0f} ({ratio:.2f})")
        rows.append(row)
    print(f"\nsequences/s of {arguments.seq_length}, micro-batches of {MICRO_BATCH}, by workers;")
    print(f"in brackets, over those of {STATIC}; medians of {arguments.rounds} rounds")
    print(table(rows, ["", *map(str, arguments.workers)]))


def sequences_per_second(micro_batches: Iterator[Any], seconds: float) -> float:
    """Over some time, once all is going."""
    for _ in range(40):
        next(micro_batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(micro_batches)
        count += 1
    return MICRO_BATCH * count / (time.perf_counter() - began)


def make_loader(
    dataset: DynamicBlendedDataset, workers: int, fetcher: Fetcher, position: int = 0
) -> TrainLoader:
    """A loader of the only rank."""
    return TrainLoader(
        dataset,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        dp_rank=0,
        dp_size=1,
        num_workers=workers,
        consumed_samples=position,
        fetcher=fetcher,
    )


def read_steps(fetcher: Fetcher, config: DataConfig, workers: int) -> Iterator[Any]:
    """Micro-batches by megashear, without an end."""
    loader = make_loader(blend(config), workers, fetcher)
    loader.fetch_until(10**6 * GLOBAL_BATCH)
    try:
        while True:
            yield from loader.next_step()
    finally:
        loader.close()


def read_static(config: DataConfig, workers: int) -> Iterator[Any]:
    """Micro-batches by Megatron's dataset, in the order of its sampler."""
    samples = 200_000
    batches: Iterable[list[int]] = (
        batch
        for first in range(0, samples, GLOBAL_BATCH)
        for batch in microbatch_samples(first, GLOBAL_BATCH, MICRO_BATCH, 0, 1)
    )
    yield from DataLoader(
        static(config, samples),
        batch_sampler=list(batches),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


if __name__ == "__main__":
    main()
