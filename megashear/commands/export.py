"""`megashear export`: a checkpoint to a Hugging Face directory that transformers loads as it is."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from megashear.commands.options import require_model
from megashear.console import signals_interrupt, table
from megashear.errors import CheckpointError


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "export",
        help="Megatron checkpoint to Hugging Face directory",
        description="Export a checkpoint as a Hugging Face directory that transformers loads as\n"
        "it is. DIR is a checkpoint of stage pretrain or continue, an imported or extracted one,\n"
        "or a run (its latest checkpoint), of any parallel layout. Nothing else is needed.\n\n"
        "For Megatron-LM's own checkpoints (torch_dist: `iter_0000100/`, or the directory above\n"
        "it) --shape names a YAML file with the sizes and features of `model` in a run's file.",
        epilog="example:\n\n"
        "  megashear export --checkpoint runs/continue --out models/sheared-1.3b",
    )
    option = parser.add_argument
    option("--checkpoint", type=Path, required=True, metavar="DIR", help="checkpoint or run")
    option("--out", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    option("--shape", type=Path, metavar="YAML", help="the model's shape, for Megatron-LM's own")
    option("--dtype", choices=("float32", "bfloat16", "float16"),
           help="dtype of the weights (default: the checkpoint's)")  # fmt: skip
    option("--tokenizer", metavar="PATH", help="directory or file of the tokenizer, or `none` "
           "(default: what the checkpoint names)")  # fmt: skip
    option("--overwrite", action="store_true", help="replace an existing model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert the weights, copy the tokenizer, and print the shape."""
    from megashear.platform.launched import launched_rank

    if launched_rank() > 0:
        return  # under torchrun the first process does everything
    require_model(args.checkpoint, args.shape)

    from megashear.checkpoint import models

    model = models.open(args.checkpoint, args.shape).without_masks()  # before Megatron is imported

    from megashear.checkpoint.dense import export_huggingface
    from megashear.checkpoint.description import shape_rows
    from megashear.checkpoint.foreign import printable

    named = model.tokenizer if args.tokenizer is None else args.tokenizer
    with signals_interrupt(), tempfile.TemporaryDirectory() as scratch:
        export_huggingface(
            model,
            args.out,
            dtype=args.dtype,
            tokenizer=find_tokenizer(named, Path(scratch)),
            other_tokenizer=args.tokenizer is not None,
            overwrite=args.overwrite,
        )
    print(table([*shape_rows(model.shape), ("tokenizer", printable(named or "none"))]))
    print(f"written to {args.out}")
    if named is None:
        text = "the model has no tokenizer, so an engine cannot read or write text with it"
        print(f"{text}. Add one: export again with --tokenizer PATH --overwrite", file=sys.stderr)


def find_tokenizer(named: str | None, scratch: Path) -> Path | None:
    """Return the tokenizer to copy; for a bare sentencepiece model, one made of it in `scratch`."""
    from megashear.checkpoint.foreign import printable
    from megashear.tokenizer.convert import save_for_transformers

    if named in (None, "none"):
        return None
    path = Path(named)
    if not os.path.exists(named):  # also of a name that is too long
        text = "the tokenizer is not there. Name one with --tokenizer"
        raise CheckpointError(f"{printable(named)}: {text}")
    model = path / "tokenizer.model" if path.is_dir() else path
    is_bare = model.suffix == ".model" and not model.with_name("tokenizer.json").is_file()
    if not (is_bare and model.is_file()):
        return path
    save_for_transformers(model, scratch)
    return scratch
