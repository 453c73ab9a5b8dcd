"""Shears a small LLaMA, from real text to an exported model, by the commands for a cluster.

    make demo

Everything is made below one folder (default: demo-run). A second run reuses what is there; a stage
whose command or configuration changed is made again, and all that follow it. Ctrl-C is safe.
"""

from __future__ import annotations

import argparse
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

from megashear.console import FAILED, run
from megashear.errors import ShearError

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent.parent
PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: of the step, and of its log.
        output: file or folder that it makes, below the demo's folder.
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


def stages() -> list[Stage]:
    """The demo: text, tokens, source, import, prune, extract, continue, export, compare."""
    python = sys.executable

    def script(name: str, output: str, file: str, *arguments: str) -> Stage:
        return Stage(name, output, (python, str(ROOT / file), *arguments), (ROOT / file,))

    def train(name: str) -> Stage:
        config = DEMO / f"{name}.yaml"
        torchrun = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES))
        shear = (str(ROOT / "examples/pretrain_shear.py"), "--config", str(config))
        return Stage(name, name, (*torchrun, *shear), (config,))

    def export(name: str, checkpoint: str, out: str) -> Stage:
        arguments = ("--checkpoint", checkpoint, "--out", out, "--overwrite")
        return script(name, out, "tools/checkpoint/megatron_to_hf.py", *arguments)

    tokenize = (
        "tokenize",
        "--input",
        "text/*.jsonl",
        "--output",
        "data/{name}",
        "--tokenizer",
        "tokenizer",
        "--valid-fraction",
        "0.05",
        "--overwrite",
    )
    return [
        script("text", "text", "examples/demo/collect_text.py", "--out", "text"),
        script("tokenizer", "tokenizer", "examples/demo/train_tokenizer.py", "--input",
               "text/*.jsonl", "--out", "tokenizer"),
        Stage("tokens", "data", (python, "-m", "megashear", *tokenize)),
        train("source"),
        export("export-source", "source", "source-hf"),
        script("import-source", "source-imported", "tools/checkpoint/hf_to_megatron.py",
               "--hf", "source-hf", "--out", "source-imported", "--overwrite"),
        train("prune"),
        script("extract", "prune/extracted", "tools/checkpoint/extract.py", "--run", "prune",
               "--overwrite"),
        export("export-extracted", "prune/extracted", "extracted-hf"),
        train("continue"),
        export("export", "continue", "sheared-hf"),
        train("scratch"),
    ]  # fmt: skip


class Demo:
    """Runs stages in a folder and remembers what is done there.

    Args:
        folder: made where it is missing.

    Attributes:
        seconds: wall time of each stage, of the run that did it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._markers = folder / "stages"
        self._markers.mkdir(exist_ok=True)
        self._fingerprint = ""

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
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
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
    """A path as one would type it in the demo's folder."""
    if part == sys.executable:
        return "python"
    return part.replace(str(ROOT), "..")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, then summarise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo-run", help="the demo's folder")
    folder = parser.parse_args(arguments).out.resolve()
    demo = Demo(folder)
    began = time.perf_counter()
    todo = stages()
    for number, stage in enumerate(todo, 1):
        demo.run(stage, f"{number}/{len(todo)}")

    from summary import summarise

    good = summarise(folder, demo.seconds)
    print(f"\nthis run took {time.perf_counter() - began:.0f} s")
    return 0 if good else FAILED


if __name__ == "__main__":
    run(main)
