"""Runs the stages of an example in a folder; what is done is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megashear.errors import ShearError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One step of an example.

    Attributes:
        name: of the step, and of its log.
        output: file or folder that it makes, below the example's folder.
        command: what it runs.
        reads: files outside that folder whose content decides the result.
    """

    name: str
    output: str
    command: tuple[str, ...]
    reads: tuple[Path, ...] = ()

    def fingerprint(self, before: str) -> str:
        """Changes with the command, the files it reads, and everything done before."""
        digest = hashlib.sha256(before.encode())
        digest.update(json.dumps(self.command).encode())
        for file in self.reads:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def script(name: str, output: str, file: str, *arguments: str) -> Stage:
    """The stage of a script of this repository."""
    return Stage(name, output, (sys.executable, str(ROOT / file), *arguments), (ROOT / file,))


def train(config: Path, processes: int) -> Stage:
    """The stage of a training run, whose directory is named like its YAML file."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes))
    shear = (str(ROOT / "examples/pretrain_shear.py"), "--config", str(config))
    return Stage(config.stem, config.stem, (*torchrun, *shear), (config,))


def tokenize(tokenizer: str) -> Stage:
    """The stage that makes a domain of every file of text."""
    options = ("--tokenizer", tokenizer, "--valid-fraction", "0.05", "--overwrite")
    files = ("--input", "text/*.jsonl", "--output", "data/{name}")
    return Stage(
        "tokens", "data", (sys.executable, "-m", "megashear", "tokenize", *files, *options)
    )


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


class Runner:
    """Runs stages in a folder and remembers what is done there.

    Args:
        folder: made where it is missing.
        threads: of each process.

    Attributes:
        seconds: wall time of each stage, of the run that did it.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder, self.threads = folder, threads
        self.seconds: dict[str, float] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._markers = folder / "stages"
        self._markers.mkdir(exist_ok=True)
        self._fingerprint = ""

    def run_all(self, stages: Sequence[Stage]) -> None:
        """Run stages in turn."""
        for number, stage in enumerate(stages, 1):
            self.run(stage, f"{number}/{len(stages)}")

    def run(self, stage: Stage, number: str) -> None:
        """Run a stage, unless it was run before with the same input; an unfinished one goes on."""
        self._fingerprint = stage.fingerprint(self._fingerprint)
        marker = self._markers / f"{stage.name}.json"
        before = json.loads(marker.read_text()) if marker.is_file() else {}
        same = before.get("fingerprint") == self._fingerprint
        spent = before.get("seconds", 0.0) if same else 0.0
        if same and before["done"] and (self.folder / stage.output).exists():
            print(f"[{number}] {stage.name}: done before ({spent:.0f} s)", flush=True)
        else:
            if not same:
                shutil.rmtree(self.folder / stage.output, ignore_errors=True)
            print(f"[{number}] {stage.name}", flush=True)
            began = time.perf_counter()
            self._mark(marker, spent, done=False)
            try:
                self._execute(stage)
            finally:
                spent += time.perf_counter() - began
                self._mark(marker, spent, done=False)
            self._mark(marker, spent, done=True)
        self.seconds[stage.name] = spent

    def _mark(self, marker: Path, seconds: float, *, done: bool) -> None:
        state = {"fingerprint": self._fingerprint, "seconds": seconds, "done": done}
        partial = marker.with_suffix(".partial")
        partial.write_text(json.dumps(state))
        os.replace(partial, marker)

    def _execute(self, stage: Stage) -> None:
        """Run the command of a stage, its output shown here and kept in the stage's log."""
        log = self.folder / "logs" / f"{stage.name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        print("    $ " + " ".join(_short(part) for part in stage.command), flush=True)
        process = subprocess.Popen(
            stage.command, cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with log.open("w") as stream:

            def show() -> None:
                for line in process.stdout or ():
                    stream.write(line)
                    print("    " + line, end="", flush=True)

            try:
                show()
            except KeyboardInterrupt:  # the command got it too, and saves before it ends
                show()
                process.wait()
                raise
        if process.wait() != 0:
            raise ShearError(
                f"stage {stage.name} failed with status {process.returncode}. Its output is above "
                f"and in {log}"
            )


def _short(part: str) -> str:
    """A path as one would type it in the example's folder."""
    if part == sys.executable:
        return "python"
    return part.replace(str(ROOT), "..")
