"""What checkpoints cost a run: seconds that training stands still for a save, seconds of a load.

Save: real runs of two ranks, with and without trainer.async_save, as their records tell. The last
save of a run, which is waited for in any case, is left out; so is the first, which makes what later
ones find. Load: of the same checkpoints (the check of all files, then weights and optimizer),
beside one process that reads the files. All files are in the page cache.

Example (three minutes on two idle cores, 3 GB of disk):
  OMP_NUM_THREADS=1 python benchmarks/checkpoints.py
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from harness import Report, interleaved, parser, ratio, take_directory
from runs import begin, of_kind, run_config, train, write_domains

from megashear.config.schema import (
    DataConfig,
    EvaluationConfig,
    ModelShape,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from megashear.console import run
from megashear.platform import parallel
from megashear.pruning.counting import parameter_count
from tests.support.distributed import run_distributed

RANKS, STEPS, INTERVAL, USUAL_INTERVAL = 2, 10, 3, TrainerConfig().save_interval
LAYOUTS = {
    "data 2, distributed optimizer": ParallelConfig(distributed_optimizer=True),
    "tensor 2": ParallelConfig(tensor=2),
}
SHAPE = ModelShape(
    num_layers=6, hidden_size=512, num_attention_heads=8, ffn_hidden_size=1376, vocab_size=16000
)
WAITED, BESIDE = "waited for", "async_save"


def main() -> None:
    """Measure, print and keep both tables."""
    options = parser(__doc__, rounds=3)
    options.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all"
    )
    take_directory(options)
    arguments = options.parse_args()
    report = Report("checkpoints", __doc__ or "")
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="checkpoints-") as name:
        folder = Path(name)
        domains = write_domains(folder / "text", 200_000, 1000, SHAPE.vocab_size)
        config = run_config(
            folder / "run",
            DataConfig(seq_length=64, domains=domains),
            model=SHAPE,
            evaluation=EvaluationConfig(interval=STEPS, sequences_per_domain=1),
            trainer=TrainerConfig(
                steps=STEPS,
                global_batch_size=2,
                micro_batch_size=1,
                save_interval=INTERVAL,
            ),
        )
        saves, loads = [], []
        for layout in arguments.layouts:
            laid = replace(config, parallel=LAYOUTS[layout])
            saves += save_rows(layout, laid, arguments.rounds)
            loads.append(load_row(layout, laid, arguments.rounds))
    size = f"{parameter_count(SHAPE) / 1e6:.0f} M parameters and their optimizer's state in fp32"
    header = ["layout", "save", "stands still s", "over waited for", "step s"]
    header += [f"% of time, saved every {n} steps" for n in (INTERVAL, USUAL_INTERVAL)]
    report.table(f"Save: {size}, {RANKS} ranks", header, saves)
    header = ["layout", "GB", "read files s", "check s", "over reading", "load s", "over reading"]
    report.table(f"Load: {size}, {RANKS} ranks", header, loads)
    report.write(arguments.out)


def save_rows(layout: str, config: RunConfig, rounds: int) -> list[tuple[Any, ...]]:
    """Both ways to save, by runs that take turns."""
    steps: dict[str, list[float]] = {WAITED: [], BESIDE: []}

    def case(way: str) -> Callable[[], float]:
        def measure() -> float:
            shutil.rmtree(config.run_dir, ignore_errors=True)
            trainer = replace(config.trainer, async_save=way == BESIDE)
            records = train(replace(config, trainer=trainer), RANKS)
            _, *saves, _ = of_kind(records, "save")
            steps[way] += [record["seconds"] for record in of_kind(records, "step")[INTERVAL:]]
            return median(save["seconds"] for save in saves)

        return measure

    found = interleaved({way: case(way) for way in steps}, rounds, warm_up=0)
    rows = []
    for way, seconds in found.items():
        still, step = median(seconds), sum(steps[way]) / len(steps[way])
        shares = (100 * still / (still + n * step) for n in (INTERVAL, USUAL_INTERVAL))
        figures = (round(share, 2) for share in shares)
        over = ratio(seconds, found[WAITED])
        rows.append((layout, way, round(still, 2), over, round(step, 2), *figures))
    return rows


def load_row(layout: str, config: RunConfig, rounds: int) -> tuple[Any, ...]:
    """What the last run of `save_rows` has left."""
    found = run_distributed(load, RANKS, config, rounds)[0]
    files = [file for file in Path(config.run_dir).rglob("step-*/**/*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / config.trainer.keep_checkpoints / 1e9
    row: list[Any] = [layout, round(size, 2), round(median(found["read"]), 2)]
    for name in ("check", "load"):
        row += [round(median(found[name]), 2), ratio(found[name], found["read"])]
    return tuple(row)


def load(config: RunConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of this rank, for reading the files, for the check, and for loading."""
    trainer = begin(config)
    manager, optimizer = trainer.checkpoints, trainer.optimizer
    info = manager.latest()
    assert info is not None

    def read() -> None:
        if trainer.platform.rank == 0:
            for file in info.directory.rglob("*"):
                if file.is_file():
                    with file.open("rb", buffering=0) as stream:
                        while stream.read(2**24):
                            pass
        trainer.platform.largest(0)  # the others wait

    def check() -> None:
        manager.newest_whole()

    def load_all() -> None:
        manager.load(info, optimizer.chunks, optimizer.megatron)

    found = interleaved({"read": read, "check": check, "load": load_all}, rounds)
    parallel.stop()
    return found


if __name__ == "__main__":
    run(main)
