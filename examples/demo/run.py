"""Shears a small LLaMA, from real text to an exported model, by the commands for a cluster.

    make demo

Everything is made below one folder (default: demo-run): text, a tokenizer and a source model; then
`megashear shear chain.yaml`; then a model of the same shape from scratch, to compare with. A second
run reuses what is there; a task whose command or configuration changed is done again, and so are
all tasks after it. Ctrl-C is safe.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megashear.commands.shear import chain_tasks, export, train
from megashear.config.chain import load_chain
from megashear.config.loader import load_config
from megashear.console import FAILED, run
from megashear.tasks import Task, TaskRunner, megashear, script

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO))


def tasks() -> list[Task]:
    """Return the demo's tasks: text, tokens, source, the chain, the model from scratch, report."""
    chain, prune, continue_run = load_chain(Path("chain.yaml"), check_files=False)
    tokenize, *shear = chain_tasks(chain, prune, continue_run)
    source = load_config(Path("source.yaml"), check_files=False)
    scratch = load_config(Path("scratch.yaml"), check_files=False)
    runs = [each.run_dir for each in (source, prune, continue_run, scratch)]
    return [
        script("text", "text", DEMO / "collect_text.py", "--out", "text"),
        script("tokenizer", "tokenizer", DEMO / "train_tokenizer.py", "--input", "text/*.jsonl",
               "--out", "tokenizer"),
        tokenize,
        train("source.yaml", source, chain.processes, "source"),
        export("export-source", "source", chain.source),
        *shear,
        export("export-extracted", "prune/extracted", "extracted-hf"),
        train("scratch.yaml", scratch, chain.processes, "scratch"),
        Task("compare", "report.html", megashear("report", *runs, "--out", "report.html")),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all tasks, then summarise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=DEMO.parents[1] / "demo-run", metavar="DIR",
                        help="the demo's folder (default: demo-run)")  # fmt: skip
    folder = parser.parse_args(arguments).out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for file in DEMO.glob("*.yaml"):
        shutil.copy(file, folder)
    os.chdir(folder)
    demo = TaskRunner(folder)
    began = time.perf_counter()
    demo.run_all(tasks())

    from summary import summarise

    good = summarise(folder, demo.seconds)
    print(f"\nthis run took {time.perf_counter() - began:.0f} s")
    return 0 if good else FAILED


if __name__ == "__main__":
    run(main)
