"""Do two models compute the same? Compares their logits; exit status 0 only within the tolerance.

Each side is a Hugging Face directory (run by transformers), or a checkpoint or run (run by
Megatron-Core; of a pruning run, the model with its masks). Both run in fp32 on the CPU. Of a side
that is Megatron-LM's own checkpoint, --shape tells what model it is of.

Example:
  python tools/checkpoint/verify.py models/llama2-7b checkpoints/llama2-7b
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megashear.console import FAILED, run, table
from megashear.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from megashear.checkpoint.models import Model

LENGTH = 256
"""Tokens in a sequence, at most."""


def main() -> int:
    """Run both, compare, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("a", metavar="A", help="the model to compare with")
    add("b", metavar="B", help="the model to be checked")
    add("--tokens", type=int, default=512, metavar="N", help="tokens to run (default: 512)")
    add("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    add("--text", type=Path, metavar="FILE", help="run this text; of a real model it says more")
    add("--tokenizer", metavar="PATH", help="of the text (default: the one that A or B names)")
    add("--shape", type=Path, metavar="YAML", help="the model's shape, of Megatron-LM's own")
    add(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference allowed, as a share of the logits' scale (default: 1e-4)",
    )
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        parser.error(f"--tokens {arguments.tokens} must be 1 or more")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed {arguments.seed} must be 0 or more, and below 2**63")
    if not 0 <= arguments.tolerance < float("inf"):
        parser.error(f"--tolerance {arguments.tolerance} must be 0 or more, and finite")

    import transformers

    from megashear.checkpoint.compare import logits, logits_difference
    from megashear.platform import launched

    with launched.report_once():
        if launched.world_size() > 1:
            raise CheckpointError("verify.py runs in one process: start it without torchrun")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    sides = open_sides(arguments)
    tokens = choose_tokens(arguments, *sides)
    a, b = (logits(side, tokens) for side in sides)
    found = logits_difference(a, b)
    same = found.within(arguments.tolerance)
    verdict = "within" if same else "NOT within"
    rows = [
        ("tokens compared", f"{tokens.numel():,}"),
        ("scale of the logits", f"{found.scale:.4g}"),
        ("max difference", f"{found.max_abs:.3e}"),
        ("mean difference", f"{found.mean_abs:.3e}"),
        ("max difference / scale", f"{found.relative:.3e}"),
        ("KL (nats per token)", f"{found.kl_per_token:.3e}"),
        ("same likeliest token", f"{found.top1_agreement:.2%}"),
    ]
    print(table(rows))
    print(f"{verdict} the tolerance of {arguments.tolerance:g} of the scale")
    return 0 if same else FAILED


def open_sides(arguments: argparse.Namespace) -> list[Model]:
    """Both models; --shape is for the side that does not state its own."""
    from megashear.checkpoint import models
    from megashear.checkpoint.info import is_megatron_lm

    paths = (arguments.a, arguments.b)
    if arguments.shape and not any(map(is_megatron_lm, paths)):
        text = "neither A nor B is a checkpoint of Megatron-LM's own. Leave --shape out"
        raise CheckpointError(f"--shape {arguments.shape}: {text}")
    return [models.open(path, arguments.shape if is_megatron_lm(path) else None) for path in paths]


def choose_tokens(arguments: argparse.Namespace, *sides: Model) -> Tensor:
    """int64 [b, s]: the tokens that both models run on."""
    import torch

    a, b = (side.shape for side in sides)
    if a.vocab_size != b.vocab_size:
        raise CheckpointError(
            f"{arguments.a} has {a.vocab_size:,} tokens, {arguments.b} {b.vocab_size:,}: they "
            "cannot be compared"
        )
    if arguments.text is None:
        generator = torch.Generator().manual_seed(arguments.seed)
        ids = torch.randint(a.vocab_size, (arguments.tokens,), generator=generator)
    else:
        ids = torch.tensor(read_text(arguments, *sides), dtype=torch.int64)[: arguments.tokens]
    if not len(ids) or int(ids.max()) >= a.vocab_size:
        raise CheckpointError(f"{arguments.text}: no text, or tokens that the models do not have")
    length = min(LENGTH, len(ids), a.max_position_embeddings)
    return ids[: len(ids) // length * length].view(-1, length)


def read_text(arguments: argparse.Namespace, *sides: Model) -> list[int]:
    """The ids of the text, by the tokenizer of whichever side has one."""
    from megashear.tokenizer.load import load_tokenizer

    path = arguments.tokenizer
    for side in sides:
        path = path or side.tokenizer
    if path is None:
        raise CheckpointError("neither model names a tokenizer. Name one with --tokenizer")
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{arguments.text}: cannot be read as text: {error}") from None
    return load_tokenizer(path).encode([text])[0]


if __name__ == "__main__":
    run(main)
