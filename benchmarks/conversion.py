"""Time and memory of tools/checkpoint/hf_to_megatron.py and megatron_to_hf.py, at a 3B shape.

A Hugging Face directory of OpenLLaMA-3B's shape is made with random bfloat16 weights, imported and
exported again, each by the command in a process of its own. Before and after each, the same files
are copied on the same disk, and flushed to it as the commands flush theirs; the ratio is to the
mean of both. Warm: what is read was read just before. Cold: it was dropped from the page cache.

Memory is the largest sum of resident pages of the process and its children, looked at 50 times a
second, against three times the largest tensor and 1.5 GB. Mapped pages of the file that is being
read count. What a small model takes is the libraries; the rest is taken to grow with the largest
tensor, and time with the bytes, for the extrapolation to 70B.

    python benchmarks/conversion.py [--directory DIR]         # takes 20 GB there for a time
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import psutil
import safetensors
import torch
from torch import Tensor

from megashear import console
from megashear.checkpoint.hf import write_huggingface
from megashear.config.schema import ModelShape
from megashear.files import flush
from megashear.pruning.counting import parameter_count
from megashear.pruning.table import table

TOOLS = Path(__file__).parents[1] / "tools" / "checkpoint"
OPEN_LLAMA_3B = ModelShape(
    num_layers=26,
    hidden_size=3200,
    num_attention_heads=32,
    ffn_hidden_size=8640,
    vocab_size=32000,
    max_position_embeddings=2048,
)
LLAMA_70B = ModelShape(
    num_layers=80,
    hidden_size=8192,
    num_attention_heads=64,
    num_query_groups=8,
    ffn_hidden_size=28672,
    vocab_size=32000,
)
SMALL = replace(OPEN_LLAMA_3B, num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=128)
BYTES = 2  # of a bfloat16 number


class Measured(NamedTuple):
    """A command beside copies: seconds, its peak memory in bytes, and the machine's load then."""

    command: str
    cache: str
    copies: tuple[float, float]
    seconds: float
    peak: int
    load: float


def random_weights(shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model: pieces of one block of random numbers, which is soon made."""
    block = torch.randn(2**24).bfloat16()
    for row in table(shape):
        numel = prod(row.shape())
        yield row.name, block.repeat(-(-numel // len(block)))[:numel].view(row.shape())


def files(directory: Path) -> list[Path]:
    """All files of a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def drop_from_cache(directory: Path) -> None:
    """The next reading comes from the disk."""
    for file in files(directory):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, out: Path, cold: bool) -> float:
    """Seconds that a copy takes until all of it is on the disk; it is removed again."""
    prepare(source, cold)
    started = time.perf_counter()
    shutil.copytree(source, out)
    for file in files(out):
        flush(file)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def watch(*command: str | Path) -> tuple[float, int]:
    """Seconds that a command takes, and the most memory that it and its children had, in bytes."""
    started, peak = time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parents[1])}
    process = psutil.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - started, peak


def resident(process: psutil.Process) -> int:
    """Bytes that it and its children have in memory."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def prepare(source: Path, cold: bool) -> None:
    """Bring files into the page cache, or drop them from it."""
    if cold:
        drop_from_cache(source)
    else:
        for file in files(source):
            read_through(file)


def measure(directory: Path, shape: ModelShape, colds: Sequence[bool]) -> list[Measured]:
    """Import and export a model, beside copies, from a warm and a cold page cache."""
    hf, megatron, out = (directory / name for name in ("hf", "megatron", "out"))
    write_huggingface(hf, shape, random_weights(shape), max_shard_bytes=2**31)
    commands = {
        "import": (hf, megatron, ("hf_to_megatron.py", "--hf", hf, "--out", megatron)),
        "export": (megatron, out, ("megatron_to_hf.py", "--checkpoint", megatron, "--out", out)),
    }
    measured = []
    for name, (source, result, (script, *arguments)) in commands.items():
        for cold in colds:
            shutil.rmtree(result, ignore_errors=True)
            before = copy(source, directory / "copy", cold)
            prepare(source, cold)
            seconds, peak = watch(TOOLS / script, *arguments)
            after = copy(source, directory / "copy", cold)
            state = "cold" if cold else "warm"
            load = os.getloadavg()[0]
            measured.append(Measured(name, state, (before, after), seconds, peak, load))
    shutil.rmtree(directory)
    return measured


def read_through(file: Path) -> None:
    """Bring a file into the page cache."""
    with file.open("rb", buffering=0) as stream:
        while stream.read(2**24):
            pass


def gigabytes(shape: ModelShape) -> float:
    """Of the largest tensor of a model, as Megatron has it: never smaller than Hugging Face's."""
    return BYTES * max(prod(row.shape()) for row in table(shape)) / 1e9


def row(measured: Measured, libraries: Measured) -> tuple[object, ...]:
    """What is printed of a measurement, with the extrapolation."""
    size = BYTES * parameter_count(OPEN_LLAMA_3B) / 1e9
    large = BYTES * parameter_count(LLAMA_70B) / 1e9
    seconds, copy = measured.seconds - libraries.seconds, sum(measured.copies) / 2
    tensors = (measured.peak - libraries.peak) / 1e9 / gigabytes(OPEN_LLAMA_3B)
    return (
        *(measured.command, measured.cache, f"{measured.load:.0f}"),
        " and ".join(f"{seconds:.1f}" for seconds in measured.copies),
        f"{measured.seconds:.1f}",
        f"{measured.seconds / copy:.2f}",
        f"{measured.peak / 1e9:.2f}",
        f"{3 * gigabytes(OPEN_LLAMA_3B) + 1.5:.2f}",
        f"{(libraries.seconds + seconds / size * large) / 60:.0f}",
        f"{(libraries.seconds + seconds / size * large) / (copy / size * large):.2f}",
        f"{libraries.peak / 1e9 + tensors * gigabytes(LLAMA_70B):.2f}",
        f"{3 * gigabytes(LLAMA_70B) + 1.5:.2f}",
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, help="on the disk to measure (default: TMPDIR)")
    arguments = parser.parse_args()
    print("$ python", shlex.join(sys.argv))
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load};", end=" ")
    print(f"Python {platform.python_version()}, torch {torch.__version__},", end=" ")
    print(f"safetensors {safetensors.__version__}")
    print(f"{BYTES * parameter_count(OPEN_LLAMA_3B) / 1e9:.2f} GB", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        small = measure(Path(name) / "small", SMALL, [False])
        libraries = {measured.command: measured for measured in small}
        found = measure(Path(name) / "3b", OPEN_LLAMA_3B, [False, True])
    header = ("command", "cache", "load", "copies s", "seconds", "ratio", "peak GB", "limit GB")
    header += ("70B: minutes", "ratio", "peak GB", "limit GB")
    print(console.table([row(each, libraries[each.command]) for each in found], header))
    for each in libraries.values():
        print(f"{each.command} of a small model: {each.seconds:.1f} s, {each.peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
