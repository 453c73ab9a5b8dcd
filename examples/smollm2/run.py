"""Shears SmolLM2-135M, a real pretrained model, on the CPU of one machine: import to export.

    python examples/smollm2/run.py

Everything is made below one folder (default: smollm2-run). A second run reuses what is there; a
stage whose command or configuration changed is made again, and all that follow it. Ctrl-C is safe.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megashear.console import run
from megashear.stages import ROOT, Runner, Stage

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from commands import export, extract, import_model, script, tokenize, train  # noqa: E402

MODELS = ("source", "pruned-hf", "sheared-hf")


def stages() -> list[Stage]:
    """The example: source, text, import, prune, extract, continue, export; each is checked."""
    return [
        script("source", "source", "examples/smollm2/to_huggingface.py", "--out", "source",
               "--overwrite"),
        script("text", "text", "examples/demo/collect_text.py", "--out", "text"),
        tokenize("source"),
        import_model("source", "imported"),
        verify("source", "imported"),
        measure("references.yaml", "reference-loss", "source", "imported", "--out"),
        train(HERE / "prune.yaml", 1),
        extract("prune"),
        export("export-pruned", "prune/extracted", "pruned-hf"),
        verify("prune", "pruned-hf"),
        train(HERE / "continue.yaml", 1),
        export("export", "continue", "sheared-hf"),
        verify("continue", "sheared-hf"),
        script("other-engine", "sheared-ct2", "examples/smollm2/other_engine.py",
               "--hf", "sheared-hf", "--out", "sheared-ct2"),
        measure("losses.json", "evaluate", *MODELS, "--json"),
        script("summary", "summary.txt", "examples/smollm2/summary.py", *MODELS),
    ]  # fmt: skip


def verify(a: str, b: str) -> Stage:
    """The stage that compares two models' logits on text; it makes nothing but its log."""
    name = f"verify-{b}"
    command = ("tools/checkpoint/verify.py", a, b, "--text", str(ROOT / "README.md"))
    return script(name, f"logs/{name}.log", *command, "--tokenizer", "source", "--tokens", "256")


def measure(out: str, *command: str) -> Stage:
    """The stage of a sub-command that measures losses on the pruning run's validation text."""
    config = HERE / "prune.yaml"
    words = (*command, out, "--domains", str(config), "--overwrite")
    return Stage(Path(out).stem, out, (sys.executable, "-m", "megashear", *words), (config,))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages, of which the last says what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "smollm2-run", help="the example's folder")
    add("--threads", type=int, default=os.cpu_count(), help="of the CPU (default: all)")
    args = parser.parse_args(arguments)
    Runner(args.out.resolve(), threads=args.threads).run_all(stages())


if __name__ == "__main__":
    run(main)
