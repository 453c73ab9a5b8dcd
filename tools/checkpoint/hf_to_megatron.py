"""Import a Hugging Face model: a Megatron checkpoint that loads in any parallel layout.

Every tensor that is missing, unexpected or of another shape, and every setting in config.json that
would change the mathematics and is not supported, is an error that names it.

Example:
  python tools/checkpoint/hf_to_megatron.py --hf models/llama2-7b --out checkpoints/llama2-7b
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megashear.console import run, table


def main() -> None:
    """Check, convert, say what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face directory to read")
    add("--out", type=Path, required=True, metavar="DIR", help="checkpoint to write")
    add("--overwrite", action="store_true", help="replace an existing checkpoint")
    arguments = parser.parse_args()

    from megashear.checkpoint.dense import import_huggingface
    from megashear.checkpoint.description import shape_rows
    from megashear.platform import launched

    with launched.report_once():
        info = import_huggingface(arguments.hf, arguments.out, overwrite=arguments.overwrite)
    if launched.launched_rank() > 0:
        return
    print(table([*shape_rows(info.shape), ("tokenizer", info.tokenizer or "none found")]))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    run(main)
