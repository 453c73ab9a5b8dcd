"""What pruning adds to a step: prune / dense, and masks on activations / dense.

Three trainers with equal weights, batches, layout and optimizer take turns in the same processes,
each by `Trainer.train_step`: stage continue; stage prune; stage prune with its masks on
activations, the published way (activation_masks.py), whose first loss must be that of masks in the
weights. Peak memory is counted of each alone; on CPU processes by LiveMemory, in bf16.

    OMP_NUM_THREADS=1 python benchmarks/mask_overhead.py    # 4 to 5 minutes, then all GPUs
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import (
    LLAMA_2,
    Report,
    devices,
    gpus,
    interleaved,
    parser,
    progress,
    ratio,
    take_device,
)

# isort: split
from activation_masks import ActivationMasks
from runs import run_config, run_distributed, silence, write_domains

from megashear import console
from megashear.config.schema import (
    DataConfig,
    ModelShape,
    ParallelConfig,
    PlatformConfig,
    RunConfig,
    TrainerConfig,
)
from megashear.hardware import gpu_of_device
from megashear.planning.memory import stage_memory
from megashear.planning.setup import TORCH, setup_of
from megashear.pruning.counting import flops_per_token, parameter_count
from megashear.training.run_records import peak_flops
from megashear.training.trainer import Trainer
from tests.performance.counting import saved_bytes
from tests.performance.steps import half, trainers
from tests.planning.measured import LiveMemory
from tests.support.runs import records

DENSE, PRUNE, ACTIVATIONS = KINDS = ("dense", "prune", "activations")
FOLD, RESTORE, CHAIN_RULE, UPDATE = PARTS = ("fold", "restore", "chain rule", "penalty, update")


@dataclass(frozen=True)
class Size:
    """A model, and the batches of its steps."""

    shape: ModelShape
    seq_length: int
    micro_batch_size: int = 1
    micro_batches: int = 4

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batches * self.micro_batch_size * self.seq_length


SIZES = {
    "4M": Size(ModelShape(8, 192, 6, 512, 2048), 256),
    "20M": Size(ModelShape(8, 384, 6, 1024, 8192), 128),
    "80M": Size(ModelShape(10, 768, 12, 2048, 8192), 96),
}
"""Layers, hidden size, heads, intermediate size, vocabulary; sequence length."""
GPU_SIZES = {
    "LLaMA-2 1.3B": Size(LLAMA_2["1.3B"], 4096, 2, 16),
    "LLaMA-2 7B": Size(LLAMA_2["7B"], 4096, 1, 32),
}
ROOM = 0.85
"""Of a GPU's memory: what trainers side by side may take by the memory model of `plan`."""


def main() -> None:
    """Measure on CPU processes, or on the GPUs of this machine, and print the tables."""
    made = parser(__doc__, rounds=4)
    take_device(made)
    every = {"cpu": SIZES, "cuda": GPU_SIZES}
    names = [name for sizes in every.values() for name in sizes]
    made.add_argument("--size", action="append", choices=names, help="one or more (default: all)")
    args = made.parse_args()
    asked = args.size or names
    measured = devices(args.device)
    sizes = {of: {n: s for n, s in every[of].items() if n in asked} for of in measured}
    if not any(sizes.values()):
        made.error(f"--size: none of {', '.join(asked)} is measured on {' or '.join(measured)}")
    report = Report(
        "mask_overhead_cuda" if args.device == "cuda" else "mask_overhead", __doc__ or ""
    )
    with tempfile.TemporaryDirectory() as name:
        if sizes.get("cpu"):
            on_cpu(report, Path(name), sizes["cpu"], args.rounds)
        if sizes.get("cuda"):
            on_gpu(report, Path(name), sizes["cuda"], args.rounds)
        else:
            lacking = [[name, *[None] * len(GPU_COLUMNS)] for name in GPU_SIZES]
            report.table("GPU, bf16", ["model", *GPU_COLUMNS], lacking)
    report.note(
        "Trainers with all layers side by side take a GPU of 141 GB for 1.3B, eight of 80 GB for "
        "7B; where there is less memory, GPUs are measured with fewer layers, as many as are said."
    )
    report.write(args.out)


def on_cpu(report: Report, folder: Path, sizes: dict[str, Size], rounds: int) -> None:
    """CPU processes: three sizes on one and two ranks; tokens of a step; memory."""
    rows = []
    for name, size in sizes.items():
        for ranks in (1, 2):
            progress(f"{name}, tensor {ranks}: {rounds} rounds")
            config = configure(folder / f"{name}-{ranks}", size, ParallelConfig(tensor=ranks))
            found = run_distributed(measure, ranks, config, rounds, KINDS)[0]
            rows.append([name, ranks, size.tokens, *overhead(found)])
    times = ["prune / dense", "on activations / dense", "dense s", *(f"{p} %" for p in PARTS)]
    differences = [*times, "saved MB: dense", "prune", "on activations", "loss differs by"]
    report.table("fp32, times", ["model", "tensor", "tokens", *differences], rows)

    name, smallest = next(iter(sizes.items()))
    rows = []
    for number in (1, 4, 8):
        progress(f"{name}, micro-batches {number}: {rounds} rounds")
        size = replace(smallest, micro_batches=number)
        config = configure(folder / f"tokens-{number}", size)
        found = run_distributed(measure, 1, config, rounds, (DENSE, PRUNE))[0]
        rows.append([size.tokens, number, ratio(*(found["seconds"][k] for k in (PRUNE, DENSE)))])
    report.table(f"{name}, by the length of a step", ["tokens", "micro-batches", times[0]], rows)

    rows = []
    for name, size in list(sizes.items())[:2]:
        progress(f"{name}, memory")
        config = configure(folder / f"memory-{name}", replace(size, micro_batches=1))
        config = replace(config, platform=PlatformConfig(device="cpu", precision="bf16"))
        peaks = [run_distributed(peak_memory, 1, config, kind)[0] for kind in KINDS]
        rows.append([name, *memory(size.shape, peaks)])
    report.table("bf16, peak memory, counted", ["model", *MEMORY], rows)


MEMORY = ["dense MB", "prune: more bytes a parameter", "on activations: more bytes a parameter"]
GPU_COLUMNS = [
    *("layers", "GPUs", "prune / dense", "on activations / dense"),
    *("tokens/s: dense", "tokens/s: prune", "MFU: dense", "MFU: prune", *MEMORY[:2]),
]


def on_gpu(report: Report, folder: Path, sizes: dict[str, Size], rounds: int) -> None:
    """All GPUs of this machine, in tensor parallelism. This process leaves CUDA to its forks."""
    ranks = len(gpus())
    # Fused layers leave no activation between norm and matrix to multiply.
    kinds = KINDS[: 2 if importlib.util.find_spec("transformer_engine") else 3]
    rows = []
    for name, size in sizes.items():
        progress(f"{name}: {rounds} rounds on {ranks} GPUs")
        layout = ParallelConfig(tensor=ranks)
        config = configure(folder / name.replace(" ", "-"), size, layout, PlatformConfig("cuda"))
        config = fitted(config, ranks, gpus()[0], len(kinds))
        found = run_distributed(measure, ranks, config, rounds, kinds)[0]
        peaks = [run_distributed(peak_memory, ranks, config, kind)[0] for kind in kinds]
        shape = config.model
        assert shape is not None
        speed = [size.tokens / median(found["seconds"][kind]) for kind in (DENSE, PRUNE)]
        share = flops_per_token(shape, size.seq_length) / (found["peak_flops"] or math.nan)
        mfu = [None if math.isnan(share) else round(share * s, 3) for s in speed]
        row = [name, shape.num_layers, ranks, *overhead(found)[:2], *map(round, speed), *mfu]
        rows.append([*row, *memory(shape, peaks, ranks)[:2]])
    report.table("GPU, bf16, 131,072 tokens a step", ["model", *GPU_COLUMNS], rows)


def configure(
    folder: Path,
    size: Size,
    layout: ParallelConfig | None = None,
    platform: PlatformConfig | None = None,
) -> RunConfig:
    """A pruning run on random tokens, to half of each size."""
    folder.mkdir()
    shape, length = size.shape, size.seq_length
    domains = write_domains(folder / "data", 2000 * length, length, shape.vocab_size)
    return run_config(
        folder / "run",
        DataConfig(seq_length=length, domains=domains),
        stage="prune",
        model=shape,  # random weights: nothing to write and read first
        target=half(shape),
        trainer=TrainerConfig(
            global_batch_size=size.micro_batches * size.micro_batch_size,
            micro_batch_size=size.micro_batch_size,
            log_interval=1000,
        ),
        parallel=layout or ParallelConfig(),
        platform=platform or PlatformConfig(device="cpu", precision="fp32"),
    )


def fitted(config: RunConfig, ranks: int, device: str, number: int) -> RunConfig:
    """With as many layers as leave room for so many trainers side by side."""
    gpu, shape = gpu_of_device(device), config.model
    assert shape is not None
    while gpu is not None and shape.num_layers > 2:
        setup = setup_of(config, shape, ranks, TORCH)
        if number * stage_memory(setup, 0).total < ROOM * gpu.memory_gib * 2**30:
            break
        shape = replace(shape, num_layers=shape.num_layers - 2)
    return replace(config, model=shape, target=half(shape))


@contextmanager
def of_kinds(config: RunConfig, kinds: Sequence[str]) -> Iterator[dict[str, Trainer]]:
    """The trainers of this rank, a fork, one of them with its masks on activations."""
    silence()
    with trainers(config, tuple(kinds)) as made:
        if trainer := made.get(ACTIVATIONS):
            tokens = config.trainer.global_batch_size * config.data.seq_length
            masks = ActivationMasks(trainer.optimizer.chunks, trainer.platform, tokens)
            trainer.objective.masked_weights = masks  # type: ignore[attr-defined]
        yield made


def measure(config: RunConfig, rounds: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Seconds of each kind of step by round; seconds of the parts of pruning; bytes saved."""
    with of_kinds(config, kinds) as made:
        for trainer in made.values():
            step(trainer)
        differs = same_loss(config, made)
        found = {
            "seconds": interleaved({k: partial(step, t) for k, t in made.items()}, rounds, 0),
            "saved": {kind: saved_bytes(trainer) for kind, trainer in made.items()},
            "peak_flops": (peak_flops(made[DENSE].platform) or 0) * made[DENSE].platform.world_size,
            "differs": differs,
        }
        with timed_parts(made[PRUNE]) as parts:
            for _ in range(3):
                step(made[PRUNE])
        return found | {"parts": {part: sum(parts[part]) / 3 for part in PARTS}}


def step(trainer: Trainer) -> None:
    """One, to its end on the device."""
    trainer.train_step()
    wait(trainer)


def wait(trainer: Trainer) -> None:
    """For all that was asked of the device."""
    if trainer.platform.device.type == "cuda":
        torch.accelerator.synchronize()


def same_loss(config: RunConfig, made: dict[str, Trainer]) -> float:
    """By how much loss or mask gradients of the first step differ on activations; else 0."""
    if ACTIVATIONS not in made or made[DENSE].platform.rank > 0:  # the first rank has the records
        return 0.0
    first = [records(f"{config.run_dir}-{kind}", "step")[0] for kind in (PRUNE, ACTIVATIONS)]
    differences = [abs(first[1][k] / first[0][k] - 1) for k in ("loss", "mask_grad_norm")]
    if max(differences) > 1e-4 and made[DENSE].platform.precision == "fp32":
        raise RuntimeError(f"masks on activations: loss and mask gradients differ by {differences}")
    return max(differences)


@contextmanager
def timed_parts(trainer: Trainer) -> Iterator[dict[str, list[float]]]:
    """Seconds of what pruning adds to a step, of each call."""
    objective: Any = trainer.objective
    found: dict[str, list[float]] = defaultdict(list)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait(trainer)
            began, before = time.perf_counter(), sum(found[CHAIN_RULE])
            result = function(*args, **kwargs)
            wait(trainer)
            inside = sum(found[CHAIN_RULE]) - before  # of what calls it
            found[part].append(time.perf_counter() - began - inside)
            return result

        return call

    plain = objective.step_weights

    @contextmanager
    def step_weights(number: int) -> Iterator[None]:
        context = plain(number)
        timed(FOLD, context.__enter__)()
        yield
        timed(RESTORE, context.__exit__)(None, None, None)

    objective.step_weights = step_weights
    weights = objective.masked_weights
    weights.backward = timed(CHAIN_RULE, weights.backward)
    names = ("backward", "update", "numbers", "metrics")
    for name in names:
        setattr(objective, name, timed(UPDATE, getattr(objective, name)))
    try:
        yield found
    finally:
        del weights.backward
        for name in ("step_weights", *names):
            delattr(objective, name)


def overhead(found: dict[str, Any]) -> list[Any]:
    """Columns of a table of times."""
    seconds, saved = found["seconds"], found["saved"]
    dense = median(seconds[DENSE])
    ratios = [ratio(seconds[k], seconds[DENSE]) if k in seconds else None for k in KINDS[1:]]
    parts = [round(100 * found["parts"][part] / dense, 2) for part in PARTS]
    megabytes = [round(saved[k] / 1e6, 3) if k in saved else None for k in KINDS]
    return [*ratios, round(dense, 2), *parts, *megabytes, f"{found['differs']:.0e}"]


def peak_memory(config: RunConfig, kind: str) -> int:
    """Bytes of a rank at the peak of its third step."""
    is_cpu = config.platform.device == "cpu"
    of_kind = replace(config, run_dir=f"{config.run_dir}-memory")
    with LiveMemory() if is_cpu else nullcontext() as live, of_kinds(of_kind, [kind]) as made:
        for _ in range(2):
            step(made[kind])
        if live:
            live.peak = live.live
        else:
            torch.accelerator.reset_peak_memory_stats()
        step(made[kind])
        return live.peak if live else torch.accelerator.max_memory_allocated()


def memory(shape: ModelShape, peaks: Sequence[int], ranks: int = 1) -> list[Any]:
    """Columns of a rank's peak memory: of the dense step in MB, and bytes a parameter more."""
    parameters = parameter_count(shape) / ranks
    more = [round((peak - peaks[0]) / parameters, 3) for peak in peaks[1:]]
    return [round(peaks[0] / 1e6, 1), *more]


if __name__ == "__main__":
    console.run(main)
