"""`megashear import`: a Hugging Face model to a Megatron checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megashear.commands.options import require_model
from megashear.console import table


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "import",
        help="Hugging Face directory to Megatron checkpoint",
        description="Write a Hugging Face model as a Megatron checkpoint that loads in any\n"
        "parallel layout. Every tensor that is missing, unexpected or of another shape is an\n"
        "error that names it; so is every setting of config.json that would change the\n"
        "mathematics and is not supported.",
        epilog="example:\n\n  megashear import --hf models/llama2-7b --out checkpoints/llama2-7b",
    )
    option = parser.add_argument
    option("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory to read")
    option("--out", type=Path, required=True, metavar="DIR", help="checkpoint to write")
    option("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check the model, convert it, and print its shape."""
    from megashear.platform import launched

    with launched.report_once():
        require_model(args.hf)

        from megashear.checkpoint.dense import import_huggingface
        from megashear.checkpoint.description import shape_rows

        info = import_huggingface(args.hf, args.out, overwrite=args.overwrite)
    if launched.launched_rank() == 0:
        print(table([*shape_rows(info.shape), ("tokenizer", info.tokenizer or "none found")]))
        print(f"written to {args.out}")
