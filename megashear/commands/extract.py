"""`megashear extract`: the pruned model of a pruning run, as a dense checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megashear.commands.options import require_model
from megashear.console import FAILED, table


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "extract",
        help="cut the pruned model out of a pruning run",
        description="Cut the pruned model out of a pruning run: a dense Megatron checkpoint of\n"
        "the target shape. Units with the largest masks are kept, and their masks are folded into\n"
        "the weights, so the result computes what the masked model computed. The run may have any\n"
        "parallel layout; memory is needed for a few tensors only.",
        epilog="examples:\n\n"
        "  megashear extract --run runs/llama2-7b-to-1.3b/prune\n"
        "  megashear launch --nproc-per-node 8 extract --run runs/llama2-7b-to-1.3b/prune",
    )
    option = parser.add_argument
    option("--run", type=Path, required=True, dest="path", metavar="RUN",
           help="a pruning run or its checkpoint")  # fmt: skip
    option("--out", type=Path, metavar="DIR", help="directory to write (default: RUN/extracted)")
    option("--strict", action="store_true", help="refuse if a mask is off its target")
    option("--overwrite", action="store_true", help="replace an existing result")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Extract; the first process on each machine reports errors."""
    from megashear.platform import launched

    with launched.report_once():
        require_model(args.path)
        return extract(args, speaks=launched.launched_rank() == 0)


def extract(args: argparse.Namespace, speaks: bool) -> int:
    """Read the masks, report how near they are to their targets, cut, and print the sizes."""
    from megashear.checkpoint import models
    from megashear.checkpoint.dense import extract_checkpoint
    from megashear.checkpoint.description import compared_rows, layout_rows
    from megashear.config.chain import EXTRACTED

    model = models.open(args.path)
    pruned = model.masks
    if speaks:
        print(pruned.report)
    if pruned.off_target:
        headline = pruned.off_target.splitlines()[0]
        if args.strict:
            headline = headline.split(".")[0] + ". Refused by --strict: nothing was written"
        if speaks:
            print(headline, file=sys.stderr)
        if args.strict:
            return FAILED
    out = args.out or args.path / EXTRACTED
    dense = extract_checkpoint(model, out, overwrite=args.overwrite)
    if speaks:
        sizes = compared_rows(model.shape, dense.shape)
        print(f"\n{table(sizes, ('', 'source', 'target'))}\n\nwritten to {out}")
        print(f"it loads in parallel layouts of\n{table(layout_rows(dense.shape))}")
    return 0
