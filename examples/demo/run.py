"""Shears a small LLaMA from real text to an exported model, by the commands that a cluster user runs.

    make demo

Everything is made below one folder (default: demo-run). A second run re-uses what is there; a stage
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
DOMAINS = ("prose", "python", "cpp", "stubs", "data")
PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    Attributes:
        name: of the step, and of its log.
        commands: what it runs; several run side by side.
        outputs: files and folders that it makes, below the demo's folder.
        reads: files outside that folder whose content decides the result.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]
    reads: tuple[Path, ...] = ()

    def fingerprint(self, before: str) -> str:
        """Changes with the commands, the files they read, and everything done before."""
        digest = hashlib.sha256(before.encode())
        digest.update(json.dumps(self.commands).encode())
        for file in self.reads:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def stages() -> list[Stage]:
    """The demo: text, tokens, source, import, prune, extract, continue, compare, export."""
    python = sys.executable

    def script(file: str, *arguments: str) -> tuple[str, ...]:
        return (python, str(ROOT / file), *arguments)

    def train(name: str) -> Stage:
        config = DEMO / f"{name}.yaml"
        torchrun = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES))
        shear = (str(ROOT / "examples/pretrain_shear.py"), "--config", str(config))
        return Stage(name, ((*torchrun, *shear),), (name,), (config,))

    def single(name: str, output: str, *command: str) -> Stage:
        return Stage(name, (command,), (output,), (Path(command[1]),))

    def export(name: str, checkpoint: str, out: str) -> Stage:
        arguments = ("--checkpoint", checkpoint, "--out", out, "--overwrite")
        return single(name, out, *script("tools/checkpoint/megatron_to_hf.py", *arguments))

    tokenize = (python, "-m", "megashear", "tokenize", "--tokenizer", "tokenizer", "--overwrite")
    tokens = tuple(
        (*tokenize, "--workers", "1", "--valid-fraction", "0.05", "--input", f"text/{domain}.jsonl",
         "--output", f"data/{domain}")
        for domain in DOMAINS
    )  # fmt: skip
    return [
        single("text", "text", *script("examples/demo/collect_text.py", "--out", "text")),
        single(
            "tokenizer", "tokenizer",
            *script("examples/demo/train_tokenizer.py", "--input", "text/*.jsonl", "--out",
                    "tokenizer"),
        ),
        Stage("tokens", tokens, ("data",)),
        train("source"),
        export("export-source", "source", "source-hf"),
        single(
            "import-source", "source-imported",
            *script("tools/checkpoint/hf_to_megatron.py", "--hf", "source-hf", "--out",
                    "source-imported", "--overwrite"),
        ),
        train("prune"),
        single(
            "extract", "prune/extracted",
            *script("tools/checkpoint/extract.py", "--run", "prune", "--overwrite"),
        ),
        export("export-extracted", "prune/extracted", "extracted-hf"),
        train("continue"),
        export("export", "continue", "sheared-hf"),
        train("scratch"),
    ]  # fmt: skip


class Demo:
    """Runs stages in a folder and remembers what is done there.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._done = folder / "done"
        self._done.mkdir(exist_ok=True)
        self._fingerprint = ""

    def run(self, stage: Stage, number: str) -> None:
        """Run a stage, unless it was run before with the same input."""
        self._fingerprint = stage.fingerprint(self._fingerprint)
        marker = self._done / f"{stage.name}.json"
        done = json.loads(marker.read_text()) if marker.is_file() else {}
        if done.get("fingerprint") == self._fingerprint:
            self.seconds[stage.name] = done["seconds"]
            print(f"[{number}] {stage.name}: done before ({done['seconds']:.0f} s)", flush=True)
            return
        if done:  # made from something else: an unfinished stage, on the other hand, is continued
            marker.unlink()
            for output in stage.outputs:
                shutil.rmtree(self.folder / output, ignore_errors=True)
        print(f"[{number}] {stage.name}", flush=True)
        began = time.perf_counter()
        self._execute(stage)
        seconds = self.seconds[stage.name] = time.perf_counter() - began
        partial = marker.with_suffix(".partial")
        partial.write_text(json.dumps({"fingerprint": self._fingerprint, "seconds": seconds}))
        os.replace(partial, marker)

    def _execute(self, stage: Stage) -> None:
        """Run the commands of a stage side by side, their output here and in the stage's log."""
        log = self.folder / "logs" / f"{stage.name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        processes = []
        for command in stage.commands:
            print("    $ " + " ".join(_short(part) for part in command), flush=True)
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            processes.append((command, process))
        with log.open("w") as stream:
            for command, process in processes:
                try:
                    _show(process, stream)
                except KeyboardInterrupt:  # the children got it too, and save before they end
                    for _, child in processes:
                        child.wait()
                    raise
                if process.wait() != 0:
                    for _, child in processes:
                        child.terminate()
                    raise ShearError(
                        f"stage {stage.name} failed with status {process.returncode}: "
                        f"{' '.join(command)}\nIts output is above and in {log}"
                    )


def _show(process: subprocess.Popen[str], log: object) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        log.write(line)  # type: ignore[attr-defined]
        print("    " + line, end="", flush=True)


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
