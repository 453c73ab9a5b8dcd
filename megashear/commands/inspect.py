"""`megashear inspect`: what a checkpoint, a run or a Hugging Face directory holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.commands.options import require_model

if TYPE_CHECKING:
    from megashear.checkpoint.models import Model

EPILOG = """\
Keys of --json:
  path, stage           where it is; pretrain, prune, continue, imported, extracted, huggingface
                        or megatron-lm
  step, tokens          of this stage; tokens_of_all_stages: including the stages before it
  parameters, dtypes    number (a tied embedding counts once); dtypes of the weights on disk
  shape                 sizes and features, named as in a run's YAML (`model`)
  target                the shape that a pruning run leads to, or null
  layouts               parallel layouts that fit: sizes of `tensor`, and of `pipeline` stages times
                        virtual stages; data and context parallelism always fit
  masks                 for a pruning run, else null: a list of mask, rows, expected_sparsity
                        (lowest, highest), target, kept (fewest, most), units, off_target
  losses                last validation loss of each domain, nats per token
  history               the stages before, oldest first: stage, path, shape, steps, tokens, losses
  tokenizer, versions   path of the tokenizer, or null; the versions that wrote the checkpoint

example:

  megashear inspect runs/prune
"""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "inspect",
        help="what a checkpoint, a run or a Hugging Face directory holds",
        description="Show what a checkpoint, a run or a Hugging Face directory holds, as a table\n"
        "or as JSON. Reads descriptions and tables of contents, no weights. Megatron-LM's own\n"
        "checkpoints (`iter_0000100/`, or the directory above it) need --shape.",
        epilog=EPILOG,
    )
    option = parser.add_argument
    option("path", metavar="PATH", help="a checkpoint, a run, or a Hugging Face directory")
    option("--json", action="store_true", help="print JSON")
    option("--shape", type=Path, metavar="YAML", help="the model's shape, for Megatron-LM's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the description of the model, and print it."""
    from megashear.platform.launched import launched_rank

    if launched_rank() > 0:
        return  # under torchrun the first process reports everything
    require_model(args.path, args.shape)

    from megashear.checkpoint import models
    from megashear.checkpoint.description import facts

    model = models.open(args.path, args.shape)
    print(json.dumps(facts(model), indent=1) if args.json else "\n\n".join(tables(model)))


def tables(model: Model) -> Iterator[str]:
    """Yield the tables of a model's description."""
    from megashear.checkpoint import description as of
    from megashear.checkpoint.foreign import printable
    from megashear.console import table

    info = model.info
    written = printable(", ".join(f"{name} {number}" for name, number in info.versions.items()))
    about = {
        "path": str(info.directory),
        "stage": info.stage,
        "step": f"{info.step:,}",
        "tokens": f"{info.tokens:,}",
        "tokens of all stages": f"{sum(record.tokens for record in info.records):,}",
        "dtypes of weights": ", ".join(model.dtypes),
        "tokenizer": printable(info.tokenizer or "none"),
        "written with": written or "not known",
    }
    yield table(about.items())
    if info.target:
        yield table(of.compared_rows(info.shape, info.target), ("", "source", "target"))
    else:
        yield table(of.shape_rows(info.shape))
    if model.is_pruning:
        yield model.masks.report
    yield "parallel layouts that fit\n" + table(of.layout_rows(info.shape))
    if info.history:
        yield table(of.record_rows(info.history), of.RECORD)
    if losses := info.records[-1].losses:
        rows = [(printable(domain), f"{loss:.4f}") for domain, loss in losses.items()]
        yield table(rows, ("domain", "validation loss (nats per token)"))
