"""The memory model of `megashear plan` against what ranks of real runs allocate, on the CPU.

Each case runs the trainer for two steps and counts every live storage in the second. In MB, of one
rank of each pipeline stage; a pair is measured/expected. The last three cases were chosen after
the model was made.

Example (four minutes on two idle cores):
  OMP_NUM_THREADS=1 python benchmarks/memory_model.py > benchmarks/results/memory_model.txt
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from megashear.console import run, table

PARTS = ("weights", "gradients", "optimizer", "masks", "activations")


def main() -> None:
    """Measure every case, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", help="of its table, one or more (default: all)")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases are those of the tests
    from tests.planning.measured import CASES, HELD_OUT, measure

    cases = {**CASES, **HELD_OUT}
    rows, errors = [], []
    for name in args.case or cases:
        with quiet():
            stages = measure(cases[name])
        for stage, (found, model) in enumerate(stages):
            expected = {part: getattr(model, part) for part in PARTS}
            expected["activations"] += model.logits
            pairs = [f"{found[p] / 1e6:.2f}/{expected[p] / 1e6:.2f}" for p in PARTS]
            errors.append(model.total / found["peak"] - 1)
            peak = f"{found['peak'] / 1e6:.2f}/{model.total / 1e6:.2f}"
            label = f"{name}, stage {stage}" if len(stages) > 1 else name
            rows.append((label, *pairs, peak, f"{errors[-1]:+.1%}"))
    print(f"python {platform.python_version()}, torch {version('torch')}, ", end="")
    print(f"megatron-core {version('megatron-core')}, {os.cpu_count()} cores\n")
    print(table(rows, ("case", *PARTS, "peak", "error")))
    print(f"\nlargest error {max(map(abs, errors)):.1%}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What runs print goes nowhere, that of forks too."""
    with open(os.devnull, "w") as nowhere:
        kept = os.dup(1), os.dup(2)
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)


if __name__ == "__main__":
    run(main)
