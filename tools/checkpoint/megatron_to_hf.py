"""Export a checkpoint as a Hugging Face directory that transformers loads as it is.

Takes a checkpoint of stage pretrain or continue, an imported or extracted one, or a run directory
(its latest checkpoint); of any parallel layout. Nothing else is needed, no configuration.

Of Megatron-LM's own checkpoints (torch_dist: `iter_0000100/`, or the directory above it) --shape
tells what model they are of: a YAML file with the sizes and features of `model` in a run's.

Example:
  python tools/checkpoint/megatron_to_hf.py --checkpoint runs/continue --out models/sheared-1.3b
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from megashear.console import run, signals_interrupt, table
from megashear.errors import CheckpointError


def main() -> None:
    """Convert, with the tokenizer; say what it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="checkpoint or run to read")
    add("--out", type=Path, required=True, metavar="DIR", help="Hugging Face directory to write")
    add("--shape", type=Path, metavar="YAML", help="the model's shape, of Megatron-LM's own")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: as they are in the checkpoint)",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="directory or file of the tokenizer, or `none` (default: what the checkpoint names)",
    )
    add("--overwrite", action="store_true", help="replace an existing model")
    arguments = parser.parse_args()

    from megashear.platform.launched import launched_rank

    if launched_rank() > 0:
        return  # under torchrun the first process does it all

    from megashear.checkpoint import models
    from megashear.checkpoint.dense import export_huggingface
    from megashear.checkpoint.description import shape_rows
    from megashear.checkpoint.foreign import printable

    model = models.open(arguments.checkpoint, arguments.shape)
    named = model.tokenizer if arguments.tokenizer is None else arguments.tokenizer
    with signals_interrupt(), tempfile.TemporaryDirectory() as scratch:
        export_huggingface(
            model,
            arguments.out,
            dtype=arguments.dtype,
            tokenizer=find_tokenizer(named, Path(scratch)),
            other_tokenizer=arguments.tokenizer is not None,
            overwrite=arguments.overwrite,
        )
    print(table([*shape_rows(model.shape), ("tokenizer", printable(named or "none"))]))
    print(f"written to {printable(str(arguments.out))}")


def find_tokenizer(named: str | None, scratch: Path) -> Path | None:
    """The tokenizer to copy; of a bare sentencepiece model, one made in `scratch` with its twin."""
    from megashear.checkpoint.foreign import printable
    from megashear.tokenizer.convert import save_for_transformers

    if named in (None, "none"):
        return None
    path = Path(named)
    try:
        there = path.exists()
    except OSError:  # a name that is too long
        there = False
    if not there:
        text = "the tokenizer is not there. Name one with --tokenizer"
        raise CheckpointError(f"{printable(named)}: {text}")
    model = path / "tokenizer.model" if path.is_dir() else path
    if (
        model.suffix != ".model"
        or not model.is_file()
        or model.with_name("tokenizer.json").is_file()
    ):
        return path
    save_for_transformers(model, scratch)
    return scratch


if __name__ == "__main__":
    run(main)
