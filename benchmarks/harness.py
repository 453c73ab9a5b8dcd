"""What every benchmark does alike: interleaved repeats, ratios with their spread, table and JSON.

Times of a shared machine say little; ratios within one run say much. So the cases of a comparison
take turns, in an order that turns round from one round to the next, and what is told is the median
of the ratios of the same round, with the quartiles around it.

    rounds = interleaved({"dense": dense, "prune": prune}, rounds=9)
    overhead = ratio(rounds["prune"], rounds["dense"])      # 1.021 [1.013, 1.034]
    report = Report("mask_overhead", __doc__)
    report.table("CPU, fp32", ["model", "prune / dense"], [["5M", overhead]])
    report.write()
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from megashear.config.schema import ModelShape
from megashear.console import table
from megashear.errors import PlatformError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "numpy", "safetensors")
# Of optional packages that are not there, at every import of Megatron: here before the imports of
# the benchmarks, which come after this one's.
warnings.filterwarnings("ignore", module=r"megatron\.")
LLAMA_2 = {
    "1.3B": ModelShape(24, 2048, 16, 5504, 32000),
    "7B": ModelShape(32, 4096, 32, 11008, 32000),
    "70B": ModelShape(80, 8192, 64, 28672, 32000, num_query_groups=8),
}
"""Layers, hidden size, heads, intermediate size, vocabulary; 1.3B is Sheared LLaMA's."""
MIN_ROUNDS = 3
"""Of which there are quartiles."""
THREADS = "OMP_NUM_THREADS"
NOT_MEASURED = "not measured"
"""What a table says where this machine has not what a figure needs."""


@dataclass(frozen=True)
class Ratio:
    """A median of ratios, with their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Of what was measured in the same rounds.

    Raises:
        ValueError: fewer than 3 rounds, or not as many of both.
    """
    found = [a / b for a, b in zip(numerators, denominators, strict=True)]
    if len(found) < MIN_ROUNDS:
        raise ValueError(f"a spread needs {MIN_ROUNDS} rounds or more, not {len(found)}")
    low, _, high = quantiles(found, n=4)
    return Ratio(median(found), low, high)


def interleaved(
    cases: Mapping[str, Callable[[], float | None]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each case in each round, or what the case returns in their place.

    Args:
        cases: what to measure, by name; each is called once in a round. It waits for its device.
        rounds: that count.
        warm_up: rounds before them, which do not.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(warm_up + rounds):
        for name in order:
            progress(f"{name}: round {max(0, number - warm_up) + 1} of {rounds}")
            began = time.perf_counter()
            value = cases[name]()
            seconds = time.perf_counter() - began if value is None else value
            if number >= warm_up:
                found[name].append(seconds)
        order.reverse()  # whoever came after another comes before it now
    progress()
    return found


def progress(text: str = "") -> None:
    """Say on a terminal what is measured now, in place of what was said before."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Report:
    """What a benchmark found: printed as tables as it goes, and kept as JSON.

    Args:
        name: of its file in benchmarks/results.
        about: what was measured, in a line or more.
    """

    def __init__(self, name: str, about: str) -> None:
        self.name = name
        self._content: dict[str, Any] = {"benchmark": name, "about": about.strip(), **conditions()}
        self._content["tables"] = []
        print(self._content["about"].splitlines()[0])
        print(", ".join(f"{k} {v}" for k, v in self._content["versions"].items()), end="; ")
        print("{cpu}, {cores} cores, load {load}, {gpu}".format(**self._content["machine"]))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table; a cell is text, a number, a Ratio, or None for what was not measured."""
        progress()
        shown = [[NOT_MEASURED if cell is None else cell for cell in row] for row in rows]
        print(f"\n{title}\n{table(shown, header)}", flush=True)
        kept = [[asdict(c) if is_dataclass(c) else c for c in row] for row in rows]
        self._content["tables"].append({"title": title, "header": list(header), "rows": kept})

    def note(self, text: str) -> None:
        """Print a remark, and keep it with the tables."""
        print(f"\n{text}", flush=True)
        self._content.setdefault("notes", []).append(text)

    def write(self, path: Path | None = None) -> None:
        """Keep all of it as JSON, by default benchmarks/results/NAME.json."""
        path = path or RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._content, indent=1) + "\n")
        print(f"\nwritten to {path}")


def conditions() -> dict[str, Any]:
    """Commit, command, threads of torch, versions and machine."""
    import torch

    threads = f"{THREADS}={os.environ[THREADS]} " if THREADS in os.environ else ""
    return {
        "commit": _commit(),
        "command": threads + shlex.join(["python", *sys.argv]),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "gpu": gpus()[0] if gpus() else "no GPU",
        },
    }


def _commit() -> str:
    """Of the working tree, and whether files of what is measured, or measures, differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True).strip()
        measured = ("megashear", "benchmarks", "tests")
        changed = subprocess.call([*git, "diff", "--quiet", "HEAD", "--", *measured])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # an export without git
    return f"{head}, changed" if changed else head


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@cache
def gpus() -> list[str]:
    """Names of this machine's, asked for in a fork: who has used CUDA can fork no user of it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_gpus)


def _gpus() -> list[str]:
    from megashear.platform import cuda

    return [cuda.device_name(cuda.device_of_rank(rank)) for rank in range(cuda.device_count())]


def devices(asked: str | None) -> list[str]:
    """What to measure: the CPU, and a GPU where there is one; or that of both which is asked for.

    Raises:
        PlatformError: a GPU is asked for, and there is none.
    """
    if asked == "cuda" and not gpus():
        raise PlatformError("there is no GPU here; without --device cuda, the CPU is measured")
    return [asked] if asked else ["cpu", "cuda"] if gpus() else ["cpu"]


def parser(about: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: --rounds and --out."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--rounds",
        type=_rounds,
        default=rounds,
        metavar="N",
        help=f"of all cases, {MIN_ROUNDS} or more (default: {rounds})",
    )
    made.add_argument(
        "--out", type=_new_file, metavar="FILE", help="of the JSON (default: benchmarks/results/)"
    )
    return made


def take_device(made: argparse.ArgumentParser) -> None:
    """Add --device, for `devices`."""
    shown = "default: the CPU, and the GPU where there is one"
    made.add_argument("--device", choices=("cpu", "cuda"), help=shown)


def take_directory(made: argparse.ArgumentParser) -> None:
    """Add --directory, for benchmarks of a disk."""
    shown = "on the disk to measure (default: TMPDIR)"
    made.add_argument("--directory", type=_directory, help=shown)


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < MIN_ROUNDS:
        raise argparse.ArgumentTypeError(f"{text}: a spread needs {MIN_ROUNDS} rounds or more")
    return int(text)


def _directory(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: there is no such directory")
    if not os.access(text, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: nothing can be written there")
    return Path(text)


def _new_file(text: str) -> Path:
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: is a directory, not a file")
    _directory(os.path.dirname(text) or ".")
    return Path(text)
