"""Cuts the pruned model out of a pruning run: a dense Megatron checkpoint of the target shape.

The kept units are those with the largest masks; their mask values are folded into the weights, so
the result computes what the masked model computed. Of any layout, with memory for a few tensors.

On one process:  python tools/checkpoint/extract.py --run runs/llama2-7b-to-1.3b/prune
On many:         torchrun --nproc-per-node 8 -- tools/checkpoint/extract.py --run ...
                 (without the -- torchrun takes --run for an option of its own)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megashear.console import FAILED, run, table


def main() -> int:
    """Extract; of several processes the first on each machine says what went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a pruning run or its checkpoint")
    parser.add_argument("--out", type=Path, help="directory of the result (default: RUN/extracted)")
    parser.add_argument(
        "--strict", action="store_true", help="refuse if masks are off their targets"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing result")
    arguments = parser.parse_args()

    from megashear.platform import launched

    with launched.report_once():
        return extract(arguments, speaks=launched.launched_rank() == 0)


def extract(arguments: argparse.Namespace, speaks: bool) -> int:
    """Read the masks, say how near they are to their targets, cut, say what came of it."""
    from megashear.checkpoint import models
    from megashear.checkpoint.dense import extract_checkpoint
    from megashear.checkpoint.description import compared_rows, layout_rows
    from megashear.config.chain import EXTRACTED

    model = models.open(arguments.run)
    pruned = model.masks
    if speaks:
        print(pruned.report)
    if pruned.off_target:
        headline = pruned.off_target.splitlines()[0]
        if arguments.strict:
            headline = headline.split(".")[0] + ". Refused by --strict: nothing was written"
        if speaks:
            print(headline, file=sys.stderr)
        if arguments.strict:
            return FAILED
    out = arguments.out or arguments.run / EXTRACTED
    dense = extract_checkpoint(model, out, overwrite=arguments.overwrite)
    if speaks:
        sizes = compared_rows(model.shape, dense.shape)
        print(f"\n{table(sizes, ('', 'source', 'target'))}\n\nwritten to {out}")
        print(f"it loads in parallel layouts of\n{table(layout_rows(dense.shape))}")
    return 0


if __name__ == "__main__":
    run(main)
