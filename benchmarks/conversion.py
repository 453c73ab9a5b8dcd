"""Time and memory of tools/checkpoint/: import and export of a model, extraction of a pruned one.

Models of OpenLLaMA-3B's layers, as many as --size asks for, of random bfloat16 weights. Each
command is a process of its own. Before and after it what it reads is copied on the same disk, and
flushed to it as the commands flush theirs; ratios are to the mean of both. What is read was read
just before (warm), or with --cold dropped from the page cache.

Memory is the largest sum of pages of the process and its children, looked at 20 times a second;
what several share counts once, and mapped pages of the file that is being read count. What a model
of hardly any size takes is the libraries; the rest is taken to grow with the largest tensor, and
time with the bytes, for the extrapolation to 70B.

Example (four minutes on two idle cores, 5 GB of disk):
  OMP_NUM_THREADS=1 python benchmarks/conversion.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import psutil
import torch
from harness import LLAMA_2, ROOT, Report, interleaved, parser, ratio, take_directory
from safetensors.torch import save_file
from torch import Tensor

from megashear.checkpoint import checksums
from megashear.checkpoint.dense import write_model
from megashear.checkpoint.hf.writer import write_huggingface
from megashear.checkpoint.info import MASKS_FILE, CheckpointInfo
from megashear.checkpoint.torch_dist.stream import processes
from megashear.config.schema import ModelShape
from megashear.console import run
from megashear.files import flush
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import Masks
from megashear.pruning.table import param_rules

TOOLS = ROOT / "tools" / "checkpoint"
OPEN_LLAMA_3B = ModelShape(
    num_layers=26,
    hidden_size=3200,
    num_attention_heads=32,
    ffn_hidden_size=8640,
    vocab_size=32000,
    max_position_embeddings=2048,
)
SMALL = replace(OPEN_LLAMA_3B, num_layers=2, hidden_size=64, ffn_hidden_size=96, vocab_size=128)
BYTES = 2  # of a bfloat16 number
OPEN = 4.5
"""log_alpha of a mask that is decided; of one that is shut, its negative."""


@dataclass
class Command:
    """A command on a model's files, and what was measured of it in each round.

    Attributes:
        name: of the case.
        line: script of tools/checkpoint/, and its arguments.
        source: what it reads, and is copied.
        result: what it writes; replaced in each round.
        copies: seconds that a copy takes, mean of one before and one after.
        peak: most memory (bytes).
        written: bytes of the result.
    """

    name: str
    line: tuple[str | Path, ...]
    source: Path
    result: Path
    copies: list[float] = field(default_factory=list)
    peak: int = 0
    written: int = 0

    def measure(self, cold: bool) -> float:
        """Seconds of the command."""
        shutil.rmtree(self.result, ignore_errors=True)
        before = self.copy(cold)
        self.prepare(cold)
        seconds, peak = watch(TOOLS / self.line[0], *self.line[1:])
        self.copies.append((before + self.copy(cold)) / 2)
        self.peak, self.written = max(self.peak, peak), size(self.result)
        return seconds

    def copy(self, cold: bool) -> float:
        """Seconds that a copy takes until all of it is on the disk; it is removed again."""
        self.prepare(cold)
        out = self.source.with_name("copy")
        began = time.perf_counter()
        shutil.copytree(self.source, out)
        for file in files(out):
            flush(file)
        seconds = time.perf_counter() - began
        shutil.rmtree(out)
        return seconds

    def prepare(self, cold: bool) -> None:
        """Bring what is read into the page cache, or drop it from there."""
        for file in files(self.source):
            descriptor = os.open(file, os.O_RDONLY)
            if cold:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(descriptor, 2**24):
                    pass
            os.close(descriptor)


def main() -> None:
    """Measure, print and keep both tables."""
    options = parser(__doc__, rounds=3)
    option = options.add_argument
    option("--size", type=float, default=1.2, metavar="GB", help="of the model (default: 1.2)")
    option("--cold", action="store_true", help="read from the disk, not from the page cache")
    take_directory(options)
    arguments = options.parse_args()
    report = Report("conversion", __doc__ or "")
    shape = replace(OPEN_LLAMA_3B, num_layers=layers_of(arguments.size))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        small = commands(Path(name) / "hardly anything", SMALL)
        large = commands(Path(name) / f"{gigabytes(shape):.1f} GB", shape)
        cases = {each.name: partial(each.measure, arguments.cold) for each in (*small, *large)}
        found = interleaved(cases, arguments.rounds, warm_up=0)
        pairs = list(zip(small, large, strict=True))
        show(report, shape, arguments.cold, pairs, found)
    report.write(arguments.out)


def layers_of(gb: float) -> int:
    """How many layers a model of about this size has."""
    one, two = (gigabytes(replace(OPEN_LLAMA_3B, num_layers=n)) for n in (1, 2))
    return max(2, 1 + round((gb - one) / (two - one)))


def gigabytes(shape: ModelShape) -> float:
    """Of a model in bfloat16."""
    return BYTES * parameter_count(shape) / 1e9


def largest(shape: ModelShape) -> float:
    """GB of the largest tensor, as Megatron has it: never smaller than Hugging Face's."""
    return BYTES * max(prod(rule.shape()) for rule in param_rules(shape)) / 1e9


def commands(folder: Path, shape: ModelShape) -> list[Command]:
    """The commands, and what the first and the last read; import makes what export reads."""
    hf, imported, exported, pruned, cut = (
        folder / name for name in ("hf", "imported", "exported", "pruned", "extracted")
    )
    write_huggingface(hf, shape, random_weights(shape), max_shard_bytes=2**31)
    write_pruned(pruned, shape)
    os.sync()
    of = f" {folder.name}"
    return [
        Command("import" + of, ("hf_to_megatron.py", "--hf", hf, "--out", imported), hf, imported),
        Command(
            "export" + of,
            ("megatron_to_hf.py", "--checkpoint", imported, "--out", exported),
            imported,
            exported,
        ),
        Command("extract" + of, ("extract.py", "--run", pruned, "--out", cut), pruned, cut),
    ]


def random_weights(shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model: pieces of one block of random numbers, which is soon made."""
    block = torch.randn(2**24).bfloat16()
    for rule in param_rules(shape):
        numel = prod(rule.shape())
        yield rule.name, block.repeat(-(-numel // len(block)))[:numel].view(rule.shape())


def write_pruned(directory: Path, shape: ModelShape) -> None:
    """A checkpoint of a pruning run whose masks keep half of the model's hidden units and mlp."""
    target = replace(
        shape, hidden_size=shape.hidden_size // 2, ffn_hidden_size=shape.ffn_hidden_size // 2
    )
    masks = Masks(shape, target)
    for name, log_alpha in masks.log_alpha.items():
        log_alpha.data[:, masks.target_units[name] :] = -OPEN
    info = CheckpointInfo(shape, "prune", target=target)
    with processes():
        write_model(directory, info, random_weights(shape))
        save_file(masks.state_dict(), directory / MASKS_FILE)
        checksums.seal(directory, {})


def files(directory: Path) -> list[Path]:
    """All files of a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size(directory: Path) -> int:
    """Bytes of all files of a directory."""
    return sum(file.stat().st_size for file in files(directory))


def watch(*line: str | Path) -> tuple[float, int]:
    """Seconds that a command takes, and the most memory that it and its children had, in bytes."""
    began, peak = time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = psutil.Popen(
        [sys.executable, *map(str, line)], env=environment, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{line[0]} failed")
    return time.perf_counter() - began, peak


def resident(process: psutil.Process) -> int:
    """Bytes that it and its children have in memory."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            total += each.memory_full_info().pss
    return total


def show(
    report: Report,
    shape: ModelShape,
    cold: bool,
    pairs: list[tuple[Command, Command]],
    found: dict[str, list[float]],
) -> None:
    """What was measured, and what it comes to at 70B."""
    measured, large = [], []
    share_70b = gigabytes(LLAMA_2["70B"]) / gigabytes(shape)
    for small, command in pairs:
        seconds, libraries = found[command.name], found[small.name]
        net = [each - median(libraries) for each in seconds]
        figures = [size(command.source) / 1e9, command.written / 1e9, median(command.copies)]
        figures += [median(seconds), median(libraries)]
        peaks = command.peak / 1e9, small.peak / 1e9
        ratios = ratio(seconds, command.copies), ratio(net, command.copies)
        rounded = [round(figure, 2) for figure in (*figures, *peaks)]
        measured.append((command.name, *rounded[:5], *ratios, *rounded[5:]))
        expected = median(libraries) + share_70b * median(net)
        copies = share_70b * median(command.copies)
        peak = peaks[1] + (peaks[0] - peaks[1]) / largest(shape) * largest(LLAMA_2["70B"])
        limit = 3 * largest(LLAMA_2["70B"]) + 1.5
        row = (expected / 60, expected / copies, peak, limit)
        large.append((command.name, *(round(figure, 2) for figure in row)))
    header = ["", "reads GB", "writes GB", "copy s", "seconds", "of it libraries s", "over a copy"]
    header += ["without libraries", "peak GB", "of it libraries GB"]
    cache = "cold" if cold else "warm"
    report.table(f"{gigabytes(shape):.2f} GB, {cache} page cache", header, measured)
    header = ["", "minutes", "over a copy", "peak GB", "3 times the largest tensor + 1.5 GB"]
    report.table("Arithmetic: the same at 70B, 138 GB", header, large)


if __name__ == "__main__":
    run(main)
