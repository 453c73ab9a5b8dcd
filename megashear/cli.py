"""The `megashear` command: the list of its sub-commands.

Imports of the library stand in their functions, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megashear import console
from megashear.commands import (
    doctor,
    evaluate,
    launch,
    plan,
    reference_loss,
    report,
    shear,
    tokenize,
    watch,
)

COMMANDS = (doctor, plan, shear, tokenize, launch, watch, evaluate, reference_loss, report)


def main() -> None:
    """Run the command line and leave the process with its exit status."""
    console.run(lambda: execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int | None:
    """Run one sub-command; its exit status."""
    args = _parser().parse_args(arguments)
    status: int | None = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megashear", description="Make a small language model out of a large one."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser
