"""What loading costs: sequences/s, start and update at 12 M samples, share of a run's time.

Reading: sequences/s that reach the training loop, of text in the page cache, beside Megatron's
static BlendedDataset under torch's DataLoader. Waiting: what real runs of the trainer record. Plan:
start-up, update and memory for 50 billion tokens in seven domains, whose token files are real in
length alone (their text is a hole in a sparse file); each in a process of its own.

Example (four minutes on two idle cores):
  OMP_NUM_THREADS=1 python benchmarks/data_loading.py
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import LLAMA_2, Report, interleaved, parser, ratio
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from runs import WEIGHTS, of_kind, run_config, train, write_domains
from torch.utils.data import DataLoader

from megashear.config.schema import DataConfig, EvaluationConfig, ModelShape, TrainerConfig
from megashear.console import run
from megashear.data.dali import DaliFetcher
from megashear.data.dataset import DynamicBlendedDataset, build_train_dataset
from megashear.data.domain_weights import DomainWeights, Segment
from megashear.data.loader import Fetcher, TrainLoader, micro_batch_samples, torch_fetcher
from megashear.hardware import gpu_of_device
from megashear.pruning.counting import flops_per_token

VOCAB, GLOBAL_BATCH, MICRO_BATCH, EVALUATIONS = 32000, 32, 4, 120
TORCH, DALI, STATIC = "megashear, torch", "megashear, dali", "Megatron BlendedDataset"
FETCHERS: dict[str, Fetcher] = {
    TORCH: torch_fetcher,
    DALI: partial(DaliFetcher, device=torch.device("cpu")),
}
SMALL = ModelShape(
    num_layers=4, hidden_size=128, num_attention_heads=4, ffn_hidden_size=344, vocab_size=2000
)
SHARE_OF_PEAK = 0.4


def main() -> None:
    """Measure, print and keep all tables."""
    options = parser(__doc__, rounds=3)
    option = options.add_argument
    option("--tokens", type=float, default=50e9, help="of the plan (default: 50e9)")
    option("--seq-length", type=int, default=4096, metavar="N", help="default: 4096")
    option("--workers", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    option("--seconds", type=float, default=1.0, help="of one measured rate (default: 1)")
    option("--steps", type=int, default=20, help="of a real run (default: 20)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    report = Report("data_loading", __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="data-loading-") as name:
        folder = Path(name)
        rates = show_reading(report, folder, arguments)
        show_need(report, rates, arguments)
        show_waiting(report, folder, arguments)
        show_plan(report, folder, arguments)
    report.write(arguments.out)


def show_reading(
    report: Report, folder: Path, arguments: argparse.Namespace
) -> dict[tuple[str, int], list[float]]:
    """Sequences/s by loader and number of workers."""
    length, seconds = arguments.seq_length, arguments.seconds
    domains = write_domains(folder / "text", 60_000_000, 1000, VOCAB)
    config = DataConfig(seq_length=length, domains=domains)
    found: dict[tuple[str, int], list[float]] = {}
    for workers in arguments.workers:
        cases = {
            name: partial(sequences_per_second, partial(read_steps, each, config, workers), seconds)
            for name, each in FETCHERS.items()
        }
        static = partial(read_static, config, workers)
        cases[STATIC] = partial(sequences_per_second, static, seconds)
        rates = interleaved(cases, arguments.rounds, warm_up=0)
        found |= {(name, workers): each for name, each in rates.items()}
    rows = [
        (name, workers, round(median(each)), ratio(each, found[STATIC, workers]))
        for (name, workers), each in sorted(found.items())
    ]
    title = f"Reading: sequences/s of {length} tokens, micro-batches of {MICRO_BATCH}"
    report.table(title, ["loader", "workers", "sequences/s", f"over {STATIC}"], rows)
    return found


def sequences_per_second(read: Callable[[], Iterator[Any]], seconds: float) -> float:
    """Over some time, once all is going."""
    micro_batches = read()
    for _ in range(40):
        next(micro_batches)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(micro_batches)
        count += 1
    return MICRO_BATCH * count / (time.perf_counter() - began)


def show_need(
    report: Report, rates: dict[tuple[str, int], list[float]], arguments: argparse.Namespace
) -> None:
    """What a GPU would take of the measured rates: arithmetic, no measurement of a GPU."""
    gpu = gpu_of_device("NVIDIA H200")
    assert gpu is not None
    rows = []
    for model in ("1.3B", "7B"):
        shape = LLAMA_2[model]
        flops = flops_per_token(shape, arguments.seq_length) * arguments.seq_length
        needed = SHARE_OF_PEAK * gpu.bf16_flops / flops
        for (name, workers), found in sorted(rates.items()):
            if name != STATIC:
                share = needed / median(found)
                rows.append((model, round(needed, 1), name, workers, round(100 * share, 3)))
    title = f"Arithmetic: one {gpu.name} that trains at {SHARE_OF_PEAK:.0%} of its peak, against "
    header = ["model", "needs sequences/s", "loader", "workers", "% of time if nothing hides"]
    report.table(title + "the rates above", header, rows)


def show_waiting(report: Report, folder: Path, arguments: argparse.Namespace) -> None:
    """Share of the steps' time that real runs spend waiting for data, from their records."""
    domains = write_domains(folder / "short", 2_000_000, 1000, SMALL.vocab_size)
    shares: dict[int, list[float]] = {}
    starts: dict[int, list[float]] = {}
    step_seconds: list[float] = []
    for number in range(arguments.rounds):
        for workers in (0, 1, 2):
            config = run_config(
                folder / f"run-{number}-{workers}",
                DataConfig(seq_length=512, num_workers=workers, domains=domains),
                model=SMALL,
                evaluation=EvaluationConfig(interval=10, sequences_per_domain=1),
                trainer=TrainerConfig(
                    steps=arguments.steps,
                    global_batch_size=4,
                    micro_batch_size=4,
                    save_interval=arguments.steps,
                ),
            )
            first, *steps = of_kind(train(config), "step")
            starts.setdefault(workers, []).append(1000 * first["data_seconds"])
            waited = sum(step["data_seconds"] for step in steps)
            seconds = sum(step["seconds"] for step in steps)
            shares.setdefault(workers, []).append(100 * waited / seconds)
            step_seconds.append(seconds / len(steps))
    rows = []
    for workers, found in shares.items():
        figures = (min(found), median(found), max(found))
        rows.append(
            (workers, *(round(each, 3) for each in figures), round(median(starts[workers])))
        )
    title = (
        f"Waiting: % of step time in real runs on the CPU ({SMALL.num_layers} layers, hidden "
        f"{SMALL.hidden_size}, 4 x 512 tokens a step of {median(step_seconds):.2f} s, an "
        "evaluation every 10); the first step, which starts the workers, apart"
    )
    report.table(title, ["workers", "least", "median", "most", "first step's wait (ms)"], rows)


def show_plan(report: Report, folder: Path, arguments: argparse.Namespace) -> None:
    """Start-up, update and memory, each measured in a process of its own."""
    tokens, length = int(arguments.tokens), arguments.seq_length
    config = plan(folder / "plan", tokens, length)
    last = tokens // length // GLOBAL_BATCH * GLOBAL_BATCH - GLOBAL_BATCH
    built = apart(open_indices, config)
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        "indices of all domains: by every other process": partial(apart, open_indices, config),
        "start at the first step": partial(apart, start, config, last, 1, 0),
        "start at the last step, one segment": partial(apart, start, config, last, 1, last),
        f"start at the last step, {EVALUATIONS} segments": partial(
            apart, start, config, last, EVALUATIONS, last
        ),
        f"update after {EVALUATIONS} segments": partial(apart, update, config, last),
        f"{STATIC}, its start": partial(apart, start_static, config, last),
    }
    for part in (100, 10, 1):
        smaller = plan(folder / f"plan-{part}", tokens // part, length)
        apart(open_indices, smaller)
        name = f"a worker that has read of all domains, plan of {tokens / part / 1e9:g} B tokens"
        ways[name] = partial(apart, read_some, smaller)
    memory: dict[str, int] = {}

    def case(name: str) -> float:
        seconds, memory[name] = ways[name]()
        return seconds

    found = interleaved({name: partial(case, name) for name in ways}, arguments.rounds, warm_up=0)
    first = "indices of all domains: built and kept on disk (once)"
    rows = [(first, round(built[0], 3), "", built[1] // 2**20)]
    for name, each in found.items():
        beside = ratio(each, found[f"{STATIC}, its start"])
        rows.append((name, round(median(each), 4), beside, memory[name] // 2**20))
    title = f"Plan: {tokens:,} tokens, {last + GLOBAL_BATCH:,} sequences of {length}, seven domains"
    report.table(title, ["", "seconds", f"over the start of {STATIC}", "memory (MiB)"], rows)


def plan(folder: Path, tokens: int, seq_length: int) -> DataConfig:
    """Domains that are long and hold nothing."""
    domains = write_domains(folder, tokens, 100_000, VOCAB, sparse=True)
    return DataConfig(seq_length=seq_length, domains=domains)


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
    weights = dataset.domain_weights
    weights.update(last, {name: 1.5 + n for n, name in enumerate(weights.names)})
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
    domain_weights = DomainWeights.from_config(config)
    domain_weights.segments = tuple(
        Segment(number * last // segments, tuple(np.roll(WEIGHTS, number).tolist()))
        for number in range(segments)
    )
    return build_train_dataset(config, VOCAB, domain_weights)


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


def make_loader(
    dataset: DynamicBlendedDataset, workers: int, fetcher: Fetcher, position: int = 0
) -> TrainLoader:
    """A loader of the only rank."""
    return TrainLoader(
        dataset,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        data_rank=0,
        data_size=1,
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
        for batch in micro_batch_samples(first, GLOBAL_BATCH, MICRO_BATCH, 0, 1)
    )
    yield from DataLoader(
        static(config, samples),
        batch_sampler=list(batches),
        num_workers=workers,
        persistent_workers=workers > 0,
    )


if __name__ == "__main__":
    run(main)
