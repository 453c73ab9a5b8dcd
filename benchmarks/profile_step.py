"""Where the time of a pruning step goes, operator by operator, beside that of a dense step.

The trainers of mask_overhead.py take turns under torch.profiler. Told are calls and self time per
step of the operators that a pruning step spends most more on, of all operators, and of what is
outside of them (Python, waiting).

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py --size 4M     # half a minute
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness import Report, parser
from mask_overhead import SIZES, configure
from runs import run_distributed, silence
from torch.profiler import ProfilerActivity, profile

from megashear.config.schema import ParallelConfig, RunConfig
from megashear.console import run
from megashear.training.trainer import Trainer
from tests.performance.steps import KINDS, trainers

Operators = dict[str, list[float]]
"""(calls, self ms) of each."""


def main() -> None:
    """Profile both, and print the table."""
    made = parser(__doc__, rounds=4)
    made.add_argument("--size", choices=SIZES, default="4M", help="of the model (default: 4M)")
    made.add_argument("--tensor", type=int, default=1, metavar="N", help="ranks (default: 1)")
    made.add_argument("--rows", type=int, default=20, metavar="N", help="of the table")
    args = made.parse_args()
    report = Report("profile_step", __doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        config = configure(
            Path(name) / "profile", SIZES[args.size], ParallelConfig(tensor=args.tensor)
        )
        found = run_distributed(profiled, args.tensor, config, args.rounds)[0]
    header = ["operator", "calls: dense", "prune", "ms: dense", "prune", "more"]
    title = f"{args.size}, tensor {args.tensor}, {SIZES[args.size].tokens} tokens: one step"
    report.table(title, header, compared(found, args.rows))
    report.write(args.out)


def profiled(config: RunConfig, rounds: int) -> dict[str, Operators]:
    """Of each kind of step on this rank, the mean of the rounds."""
    found: dict[str, Operators] = {kind: defaultdict(lambda: [0.0, 0.0]) for kind in KINDS}
    silence()
    with trainers(config) as made:
        for number in range(2 + rounds):
            for kind, trainer in made.items():
                step = profile_step(trainer)
                for name, (calls, ms) in step.items() if number >= 2 else ():
                    found[kind][name][0] += calls / rounds
                    found[kind][name][1] += ms / rounds
    return {kind: dict(operators) for kind, operators in found.items()}


def profile_step(trainer: Trainer) -> Operators:
    """Of one step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        trainer.train_step()
        total = 1e3 * (time.perf_counter() - began)
    found: Operators = {}
    for event in profiler.key_averages():
        found[event.key] = [float(event.count), event.self_cpu_time_total / 1e3]
    inside = [sum(values) for values in zip(*found.values(), strict=True)]
    return found | {"all operators": inside, "outside of them": [0.0, total - inside[1]]}


def compared(found: dict[str, Operators], rows: int) -> list[list[Any]]:
    """Rows of the table: the operators that pruning spends most more on, and the sums."""
    dense, prune = (found[kind] for kind in KINDS)
    table = []
    for name in dense | prune:
        (calls, ms), (more_calls, more_ms) = (of.get(name, [0.0, 0.0]) for of in (dense, prune))
        times = [round(value, 2) for value in (ms, more_ms, more_ms - ms)]
        table.append([name, round(calls), round(more_calls), *times])
    sums = ("all operators", "outside of them")
    operators = sorted((row for row in table if row[0] not in sums), key=lambda row: -row[-1])
    return operators[:rows] + [row for row in table if row[0] in sums]


if __name__ == "__main__":
    run(main)
