"""`megashear verify`: whether two models compute the same logits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.commands.options import positive, require_model
from megashear.console import FAILED, table
from megashear.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from megashear.checkpoint.models import Model

LENGTH = 256
"""Maximum number of tokens in a sequence."""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "verify",
        help="compare the logits of two models",
        description="Compare the logits of two models; status 0 only within the tolerance.\n\n"
        "Each side is a Hugging Face directory (run by transformers), or a checkpoint or run (run\n"
        "by Megatron-Core; for a pruning run, the model with its masks). Both run in fp32 on the\n"
        "CPU. Megatron-LM's own checkpoints need --shape.",
        epilog="example:\n\n  megashear verify models/llama2-7b checkpoints/llama2-7b",
    )
    option = parser.add_argument
    option("a", metavar="A", help="the model to compare with")
    option("b", metavar="B", help="the model to check")
    option("--tokens", type=positive, default=512, metavar="N", help="tokens to run (default: 512)")
    option("--seed", type=int, default=0, help="seed of the random tokens (default: 0)")
    option(
        "--text", type=Path, metavar="FILE", help="run this text, which tests real models better"
    )
    option("--tokenizer", metavar="PATH", help="for --text (default: the one that A or B names)")
    option("--shape", type=Path, metavar="YAML", help="the model's shape, for Megatron-LM's own")
    option(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest difference allowed, as a fraction of the logits' scale (default: 1e-4)",
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Run both models, compare them, and print the verdict."""
    if not 0 <= args.seed < 2**63:
        args.parser.error(f"--seed {args.seed} must be 0 or more, and below 2**63")
    if not 0 <= args.tolerance < float("inf"):
        args.parser.error(f"--tolerance {args.tolerance} must be 0 or more, and finite")

    from megashear.platform import launched

    with launched.report_once():
        if launched.world_size() > 1:
            raise CheckpointError("verify runs in one process: start it without a launcher")
        for side in (args.a, args.b):
            require_model(side, args.shape)

    import transformers

    from megashear.checkpoint.compare import logits, logits_difference

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    sides = open_sides(args)
    tokens = choose_tokens(args, *sides)
    a, b = (logits(side, tokens) for side in sides)
    found = logits_difference(a, b)
    same = found.within(args.tolerance)
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
    verdict = "within" if same else "NOT within"
    print(f"{verdict} the tolerance of {args.tolerance:g} of the scale")
    return 0 if same else FAILED


def open_sides(args: argparse.Namespace) -> list[Model]:
    """Open both models; --shape is for the side that does not state its own."""
    from megashear.checkpoint import models
    from megashear.checkpoint.info import is_megatron_lm

    paths = (args.a, args.b)
    if args.shape and not any(map(is_megatron_lm, paths)):
        text = "neither A nor B is a checkpoint of Megatron-LM's own. Leave --shape out"
        raise CheckpointError(f"--shape {args.shape}: {text}")
    return [models.open(path, args.shape if is_megatron_lm(path) else None) for path in paths]


def choose_tokens(args: argparse.Namespace, *sides: Model) -> Tensor:
    """Return the tokens that both models run on, int64 [b, s]."""
    import torch

    a, b = (side.shape for side in sides)
    if a.vocab_size != b.vocab_size:
        raise CheckpointError(
            f"{args.a} has {a.vocab_size:,} tokens, {args.b} {b.vocab_size:,}: they "
            "cannot be compared"
        )
    if args.text is None:
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(a.vocab_size, (args.tokens,), generator=generator)
    else:
        ids = torch.tensor(read_text(args, *sides), dtype=torch.int64)[: args.tokens]
    if not len(ids) or int(ids.max()) >= a.vocab_size:
        raise CheckpointError(f"{args.text}: no text, or tokens that the models do not have")
    length = min(LENGTH, len(ids), a.max_position_embeddings)
    return ids[: len(ids) // length * length].view(-1, length)


def read_text(args: argparse.Namespace, *sides: Model) -> list[int]:
    """Return the token ids of the text, by the tokenizer of whichever side has one."""
    from megashear.tokenizer.load import load_tokenizer

    path = args.tokenizer
    for side in sides:
        path = path or side.tokenizer
    if path is None:
        raise CheckpointError("neither model names a tokenizer. Name one with --tokenizer")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{args.text}: cannot be read as text: {error}") from None
    return load_tokenizer(path).encode([text])[0]
