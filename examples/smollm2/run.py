"""Shears SmolLM2-135M, a real pretrained model, on the CPU of one machine: import to export.

    python examples/smollm2/run.py

Everything is made below one folder (default: smollm2-run), by the tasks of `megashear shear` with
checks between them. A second run reuses what is there; a task whose command or configuration
changed is done again, and so are all tasks after it. Ctrl-C is safe.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megashear.commands.shear import chain_tasks, export
from megashear.config.chain import load_chain
from megashear.console import run
from megashear.tasks import Task, TaskRunner, megashear, script

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
MODELS = ("source", "pruned-hf", "sheared-hf")


def tasks() -> list[Task]:
    """Return the example's tasks: source, text, and those of the chain, each of them checked."""
    chain = chain_tasks(*load_chain(Path("chain.yaml"), check_files=False))
    shear = {task.name: task for task in chain}
    return [
        script("source", "source", HERE / "to_huggingface.py", "--out", "source", "--overwrite"),
        script("text", "text", HERE.parent / "demo" / "collect_text.py", "--out", "text"),
        shear["tokenize"],
        shear["convert"],
        verify("source", "imported"),
        measure("references.yaml", "reference-loss", "source", "imported", "--out"),
        shear["prune"],
        shear["extract"],
        export("export-pruned", "prune/extracted", "pruned-hf"),
        verify("prune", "pruned-hf"),
        shear["continue"],
        shear["export"],
        verify("continue", "sheared-hf"),
        script("other-engine", "sheared-ct2", HERE / "other_engine.py", "--hf", "sheared-hf",
               "--out", "sheared-ct2"),
        measure("losses.json", "evaluate", *MODELS, "--json"),
        script("summary", "summary.txt", HERE / "summary.py", *MODELS),
    ]  # fmt: skip


def verify(a: str, b: str) -> Task:
    """Return the task that compares two models' logits on text; it makes nothing but its log."""
    name = f"verify-{b}"
    text = ("--text", os.path.relpath(README), "--tokenizer", "source", "--tokens", "256")
    return Task(name, f"logs/{name}.log", megashear("verify", a, b, *text))


def measure(out: str, *command: str) -> Task:
    """Return the task of a command that measures losses on the pruning run's validation text."""
    words = (*command, out, "--domains", "prune.yaml", "--overwrite")
    return Task(Path(out).stem, out, megashear(*words), (Path("prune.yaml"),))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all tasks; the last one reports what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=HERE.parents[1] / "smollm2-run", metavar="DIR",
        help="the example's folder (default: smollm2-run)")  # fmt: skip
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    args = parser.parse_args(arguments)
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for file in HERE.glob("*.yaml"):
        shutil.copy(file, folder)
    os.chdir(folder)
    TaskRunner(folder, threads=args.threads).run_all(tasks())


if __name__ == "__main__":
    run(main)
