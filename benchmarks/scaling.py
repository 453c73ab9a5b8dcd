"""Layouts: what ranks send in a step, counted and as planned; step times; and GPUs, predicted.

Counted at c10d's operators in the second step of the real trainer, on gloo processes of this
machine; sent in a ring (of an all-reduce of B bytes over n ranks 2 (n - 1) / n B). "as planned"
is megashear/planning/communication.py, by arithmetic. What is counted besides are sums of a few
numbers, and padding. The masks' part is what stage prune sends more than stage pretrain.

Step times are ratios to one rank with the same batch. More ranks than cores share them: these times
tell what a layout costs, and are no curve of scaling. Predictions for GPUs come last.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py                 # 4 minutes on two idle cores
    OMP_NUM_THREADS=1 python benchmarks/scaling.py --no-times      # bytes and predictions alone
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from harness import ROOT, Report, interleaved, parser, ratio

from megashear.config.schema import ModelShape, RunConfig
from megashear.console import run
from megashear.planning.communication import COLLECTIVES, MASK_GRADIENTS, transfers
from megashear.planning.setup import CPU, setup_of
from megashear.platform import parallel
from megashear.platform.parallel import Platform
from megashear.training.trainer import Trainer

sys.path.insert(0, str(ROOT))  # the processes, the runs and the counter are those of the tests
from predicted import tables
from runs import silence

from tests.planning.measured import OVERLAPPED, SEQUENCE, Case, config_of
from tests.support.collectives import counted
from tests.support.distributed import run_distributed

SHAPE = ModelShape(4, 256, 8, 704, 2048)
DISTRIBUTED = {"distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, SEQUENCE),
    "tensor 4": (4, {"tensor": 4}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2": (2, {}),
    "data 2, distributed": (2, DISTRIBUTED),
    "data 4": (4, {}),
    "data 4, distributed": (4, DISTRIBUTED),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2, sequence, data 2, overlapped": (4, {**SEQUENCE, **OVERLAPPED}),
}
"""Ranks, and options of `parallel`."""
STAGES = ("pretrain", "prune")


def main() -> None:
    """Count, time, predict."""
    args = parser(__doc__, rounds=3)
    args.add_argument("--layout", action="append", choices=LAYOUTS, help="default: all")
    args.add_argument("--no-times", action="store_true", help="bytes and predictions alone")
    given = args.parse_args()
    report = Report("scaling", __doc__ or "")
    names = given.layout or list(LAYOUTS)
    with tempfile.TemporaryDirectory() as name:
        runs = {name: _runs(Path(directory), name) for directory, name in _folders(name, names)}
        _bytes(report, runs)
        if not given.no_times:
            _times(report, runs, given.rounds)
    tables(report)
    report.write(given.out)


def _folders(folder: str, names: list[str]) -> list[tuple[str, str]]:
    found = [(f"{folder}/{number}", name) for number, name in enumerate(names)]
    for directory, _ in found:
        os.mkdir(directory)
    return found


def _runs(folder: Path, layout: str) -> tuple[int, dict[str, RunConfig]]:
    """Ranks, and the configuration of each stage: 8 sequences of 64 tokens a step."""
    ranks, options = LAYOUTS[layout]
    case = Case(ranks, SHAPE, layout=options, seq_length=64)
    configs = {}
    for stage in STAGES:
        config = config_of(folder, replace(case, prune=stage == "prune"))
        configs[stage] = replace(config, run_dir=str(folder / stage))
    return ranks, configs


def _trainers(configs: dict[str, RunConfig]) -> tuple[Platform, dict[str, Trainer]]:
    """Of each stage, on this rank, after their first step; what they print goes nowhere."""
    silence()
    first = configs[STAGES[0]]
    platform = parallel.start(first.platform, first.parallel, first.trainer.seed)
    trainers = {stage: Trainer(config, platform) for stage, config in configs.items()}
    for trainer in trainers.values():
        trainer.train_step()
    return platform, trainers


def _sent(configs: dict[str, RunConfig]) -> dict[str, dict[str, float]]:
    """Bytes that this rank sends in a step, by stage and collective."""
    sent: dict[str, dict[str, float]] = {}
    for stage, trainer in _trainers(configs)[1].items():
        with counted() as collectives:
            trainer.train_step()
        sent[stage] = {}
        for each in collectives:
            sent[stage][each.kind] = sent[stage].get(each.kind, 0) + each.sent
    parallel.stop()
    return sent


def _seconds(configs: dict[str, RunConfig], steps: int) -> dict[str, float]:
    """Of a step, by stage; stages take turns."""
    platform, trainers = _trainers(configs)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(steps):
        for stage, trainer in trainers.items():
            platform.largest(0)  # all ranks are here
            began = time.perf_counter()
            trainer.train_step()
            seconds[stage].append(time.perf_counter() - began)
    parallel.stop()
    return {stage: median(of) for stage, of in seconds.items()}


def _bytes(report: Report, runs: dict[str, tuple[int, dict[str, RunConfig]]]) -> None:
    rows = []
    for name, (ranks, configs) in runs.items():
        found = run_distributed(_sent, ranks, configs)
        stages = configs[STAGES[0]].parallel.pipeline
        for pipeline_stage in range(stages):
            label = f"{name}, stage {pipeline_stage}" if stages > 1 else name
            sent = found[pipeline_stage * ranks // stages]
            rows += _rows(label, pipeline_stage, ranks, configs, sent)
    header = ("layout", "run", *COLLECTIVES, "all", "as planned", "error")
    masks = ("masks", "as planned")
    report.table("kB that a rank sends in a step, by collective", (*header, *masks), rows)


def _rows(
    label: str,
    pipeline_stage: int,
    ranks: int,
    configs: dict[str, RunConfig],
    sent: dict[str, dict[str, float]],
) -> list[tuple[str, ...]]:
    rows = []
    for stage, config in configs.items():
        every = transfers(setup_of(config, SHAPE, ranks, CPU), pipeline_stage)
        planned = sum(each.sent for each in every)
        total = sum(sent[stage].values())
        error = f"{planned / total - 1:+.3%}" if total else "-"
        masks = ["", ""]
        if stage == "prune":
            of_masks = sum(each.sent for each in every if each.kind == MASK_GRADIENTS)
            masks = [_kb(total - sum(sent["pretrain"].values())), _kb(of_masks)]
        by_collective = (_kb(sent[stage].get(collective, 0)) for collective in COLLECTIVES)
        rows.append((label, stage, *by_collective, _kb(total), _kb(planned), error, *masks))
    return rows


def _kb(size: float) -> str:
    return f"{size / 1e3:,.2f}"


def _times(report: Report, runs: dict[str, tuple[int, dict[str, RunConfig]]], rounds: int) -> None:
    """Layouts take turns as whole runs, stages step by step within them."""
    pruning: dict[str, list[float]] = {name: [] for name in runs}

    def case(name: str) -> Callable[[], float]:
        def seconds() -> float:
            ranks, configs = runs[name]
            found = run_distributed(_seconds, ranks, configs, 3)[0]
            pruning[name].append(found["prune"])
            return found["pretrain"]

        return seconds

    dense = interleaved({name: case(name) for name in runs}, rounds, warm_up=0)
    one = dense.get("1 rank")
    rows = [
        (
            name,
            f"{median(dense[name]) * 1e3:.0f}",
            ratio(dense[name], one) if one else "-",
            ratio(pruning[name], dense[name]),
        )
        for name in runs
    ]
    title = f"a step of 8 x 64 tokens on {os.cpu_count()} cores, whatever the ranks"
    report.table(title, ("layout", "dense (ms)", "/ 1 rank", "prune / dense"), rows)


if __name__ == "__main__":
    run(main)
