"""The stages that the examples share; paths are below the example's folder."""

from __future__ import annotations

from pathlib import Path

from megashear import stages
from megashear.stages import ROOT, Stage, python


def script(name: str, output: str, file: str, *arguments: str) -> Stage:
    """The stage of a script of this repository."""
    return Stage(name, output, stages.script(file, *arguments), (ROOT / file,))


def train(config: Path, processes: int) -> Stage:
    """The stage of a training run, whose directory is named like its YAML file."""
    launch = ("-m", "megashear", "launch", "--nproc-per-node", str(processes))
    shear = (str(ROOT / "examples/pretrain_shear.py"), "--config", str(config))
    return Stage(config.stem, config.stem, python(*launch, *shear), (config,))


def tokenize(tokenizer: str) -> Stage:
    """The stage that makes a domain of every file of text."""
    options = ("--tokenizer", tokenizer, "--valid-fraction", "0.05", "--overwrite")
    files = ("--input", "text/*.jsonl", "--output", "data/{name}")
    return Stage("tokens", "data", python("-m", "megashear", "tokenize", *files, *options))


def import_model(directory: str, out: str) -> Stage:
    """The stage that makes a Megatron checkpoint of a Hugging Face directory."""
    files = ("--hf", directory, "--out", out, "--overwrite")
    return script(f"import-{directory}", out, "tools/checkpoint/hf_to_megatron.py", *files)


def extract(run: str) -> Stage:
    """The stage that cuts the model out of a pruning run."""
    command = "tools/checkpoint/extract.py"
    return script("extract", f"{run}/extracted", command, "--run", run, "--overwrite")


def export(name: str, checkpoint: str, out: str) -> Stage:
    """The stage that makes a Hugging Face directory of a checkpoint or run."""
    files = ("--checkpoint", checkpoint, "--out", out, "--overwrite")
    return script(name, out, "tools/checkpoint/megatron_to_hf.py", *files)


def report(*runs: str) -> Stage:
    """The stage that shows runs on one page."""
    command = python("-m", "megashear", "report", *runs, "--out", "report.html")
    return Stage("report", "report.html", command)
