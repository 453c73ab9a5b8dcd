"""Say what a checkpoint, a run or a Hugging Face directory holds, as a table or as JSON.

Reads descriptions and tables of contents, no weights. Of Megatron-LM's own torch_dist checkpoints
(`iter_0000100/`, or the directory above it), which do not say their model's shape, --shape does.

Keys of --json:
  path, stage           where it lies; pretrain, prune, continue, imported, extracted, huggingface
                        or megatron-lm
  step, tokens          of this stage; tokens_of_all_stages: with those before it
  parameters, dtypes    their number, a tied embedding once; types of the weights on disk
  shape                 sizes and features, named as in a run's YAML (`model`)
  target                shape that a pruning run leads to, or null
  layouts               parallel layouts that fit: sizes of `tensor`, and of `pipeline` stages times
                        virtual ones; data and context parallelism fit always
  masks                 of a pruning run, else null: a list of mask, rows, expected_sparsity
                        (lowest, highest), target, kept (fewest, most), units, off_target
  losses                last validation loss of each domain, nats per token
  history               the stages before, oldest first: stage, path, shape, steps, tokens, losses
  tokenizer, versions   where the tokenizer lies, or null; what it was written with

Example:
  python tools/checkpoint/inspect.py runs/prune
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megashear.checkpoint.models import Model


def be_the_standard_library() -> None:
    """Put Python's own `inspect` in this module's place.

    Python looks for modules in the folder of a script first: there this file has the name of one
    that dataclasses, torch and others import, of all scripts of the folder.
    """
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("inspect", elsewhere)
    assert spec is not None and spec.loader is not None
    sys.modules["inspect"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def main() -> None:
    """Read, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="a checkpoint, a run, or a Hugging Face directory")
    add("--json", action="store_true", help="print JSON")
    add("--shape", type=Path, metavar="YAML", help="the model's shape, of Megatron-LM's own")
    arguments = parser.parse_args()

    from megashear.checkpoint import models
    from megashear.checkpoint.description import facts
    from megashear.platform.launched import launched_rank

    if launched_rank() > 0:
        return  # under torchrun the first process tells it all
    model = models.open(arguments.path, arguments.shape)
    if arguments.json:
        print(json.dumps(facts(model), indent=1))
    else:
        print("\n\n".join(tables(model)))


def tables(model: Model) -> Iterator[str]:
    """What there is to say, in parts."""
    from megashear.checkpoint.description import (
        RECORD,
        compared_rows,
        layout_rows,
        record_rows,
        shape_rows,
    )
    from megashear.checkpoint.foreign import printable
    from megashear.console import table

    info = model.info
    written = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    written = printable(written)
    about = {
        "path": printable(str(info.directory)),
        "stage": info.stage,
        "step": f"{info.step:,}",
        "tokens": f"{info.tokens:,}",
        "tokens of all stages": f"{sum(record.tokens for record in info.records):,}",
        "types of weights": ", ".join(model.dtypes),
        "tokenizer": printable(info.tokenizer or "none"),
        "written with": written or "not known",
    }
    yield table(about.items())
    if info.target:
        yield table(compared_rows(info.shape, info.target), ("", "source", "target"))
    else:
        yield table(shape_rows(info.shape))
    if model.is_pruning:
        yield model.masks.report
    yield "parallel layouts that fit\n" + table(layout_rows(info.shape))
    if info.history:
        yield table(record_rows(info.history), RECORD)
    if losses := info.records[-1].losses:
        rows = [(printable(domain), f"{loss:.4f}") for domain, loss in losses.items()]
        yield table(rows, ("domain", "validation loss (nats per token)"))


if __name__ == "inspect":
    be_the_standard_library()
elif __name__ == "__main__":
    from megashear.console import run

    run(main)
