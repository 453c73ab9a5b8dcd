"""Cuts the pruned model out of a pruning run: a dense Megatron checkpoint of the target shape.

The kept units are those with the largest masks; their mask values are folded into the weights, so
the result computes what the masked model computed.

Example:
  python tools/checkpoint/extract.py --run runs/llama2-7b-to-1.3b/prune
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megashear.console import FAILED, run, table


def main() -> int:
    """Read the masks, say how near they are to their targets, cut."""
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

    from megashear.checkpoint.extraction import extract_checkpoint, read_pruned
    from megashear.pruning.counting import parameter_count

    pruned = read_pruned(arguments.run)
    if pruned.off_target:
        print(pruned.off_target, file=sys.stderr)
        if arguments.strict:
            return FAILED
    out = arguments.out or arguments.run / "extracted"
    dense = extract_checkpoint(pruned, out, overwrite=arguments.overwrite)
    sizes = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "ffn_hidden_size",
    )
    rows = [(name, getattr(pruned.info.shape, name), getattr(dense.shape, name)) for name in sizes]
    counts = [f"{parameter_count(shape):,}" for shape in (pruned.info.shape, dense.shape)]
    print(table([*rows, ("parameters", *counts)], ("", "source", "target")))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    run(main)
