"""Shears a small LLaMA, from real text to an exported model, by the commands for a cluster.

    make demo

Everything is made below one folder (default: demo-run). A second run reuses what is there; a stage
whose command or configuration changed is made again, and all that follow it. Ctrl-C is safe.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megashear.console import FAILED, run
from megashear.stages import ROOT, Runner, Stage

DEMO = Path(__file__).resolve().parent
sys.path.insert(0, str(DEMO.parent))

from commands import export, extract, import_model, report, script, tokenize, train  # noqa: E402

PROCESSES = 2


def stages() -> list[Stage]:
    """The demo: text, tokens, source, import, prune, extract, continue, export, compare."""
    return [
        script("text", "text", "examples/demo/collect_text.py", "--out", "text"),
        script("tokenizer", "tokenizer", "examples/demo/train_tokenizer.py", "--input",
               "text/*.jsonl", "--out", "tokenizer"),
        tokenize("tokenizer"),
        train(DEMO / "source.yaml", PROCESSES),
        export("export-source", "source", "source-hf"),
        import_model("source-hf", "source-imported"),
        train(DEMO / "prune.yaml", PROCESSES),
        extract("prune"),
        export("export-extracted", "prune/extracted", "extracted-hf"),
        train(DEMO / "continue.yaml", PROCESSES),
        export("export", "continue", "sheared-hf"),
        train(DEMO / "scratch.yaml", PROCESSES),
        report("source", "prune", "continue", "scratch"),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, then summarise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "demo-run", help="the demo's folder")
    folder = parser.parse_args(arguments).out.resolve()
    demo = Runner(folder)
    began = time.perf_counter()
    demo.run_all(stages())

    from summary import summarise

    good = summarise(folder, demo.seconds)
    print(f"\nthis run took {time.perf_counter() - began:.0f} s")
    return 0 if good else FAILED


if __name__ == "__main__":
    run(main)
