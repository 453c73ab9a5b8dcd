"""The `megashear` command: the list of its sub-commands.

A command imports what it computes with in its function, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megashear import __version__, console
from megashear.commands import (
    doctor,
    evaluate,
    export,
    extract,
    import_model,
    inspect,
    launch,
    plan,
    reference_loss,
    report,
    shear,
    tokenize,
    train,
    verify,
    watch,
)
from megashear.commands.options import Parser

COMMANDS = (
    *(doctor, plan, shear, tokenize, import_model, train, launch, watch, extract, export),
    *(verify, inspect, evaluate, reference_loss, report),
)


def main(*words: str) -> None:
    """Run the command line, behind the given words, and leave the process with its exit status."""
    console.run(lambda: execute([*words, *sys.argv[1:]]))


def execute(arguments: Sequence[str]) -> int | None:
    """Run one sub-command, and return its exit status."""
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    args = parser.parse_args(arguments)
    status: int | None = args.run(args)
    return status


def _parser() -> Parser:
    parser = Parser(prog="megashear", description="Make a small language model out of a large one.")
    parser.add_argument("--version", action="version", version=f"megashear {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
