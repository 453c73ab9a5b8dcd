"""`megashear watch`: follows runs in the terminal, from their files alone."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from megashear.errors import DataError

PERIOD = 1.0
"""Seconds between two looks at the files."""


def add(commands: Any) -> None:
    """Add the sub-command to the parser's."""
    parser = commands.add_parser(
        "watch",
        help="follow runs in the terminal",
        description="Show how far runs are: one with losses, weights and sparsities, several with "
        "a line each. Reads their directories, also of another machine; ends when all are "
        "complete, or at Ctrl-C.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="directory of a run, or the work_dir of a chain")  # fmt: skip
    parser.add_argument(
        "--once", action="store_true", help="show it once, as where stdout is no terminal"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Show the runs until all are complete.

    Raises:
        DataError: a directory is not of a run; or nothing is to be followed, and there is none.
    """
    from rich.console import Console
    from rich.live import Live

    from megashear.report.frame import frame, is_over
    from megashear.report.runs import (
        RecordedRun,
        reject_unrelated_directories,
        run_directories,
    )

    console = Console()
    directories = run_directories(args.runs)
    runs = [RecordedRun(directory) for directory in directories]
    follow = sys.stdout.isatty() and not args.once
    absent = [str(directory) for directory in args.runs if not directory.is_dir()]
    if absent and not follow:  # else they may come: a job may wait in its queue
        raise DataError(f"no directory of a run: {', '.join(absent)}")

    reject_unrelated_directories(directories)

    def look() -> Any:
        for each in runs:
            each.follow()
        return frame(runs, time.time(), console.width)

    shown = look()
    try:
        if follow:
            with Live(shown, console=console, screen=True, auto_refresh=False) as live:
                while not all(map(is_over, runs)):
                    live.update(shown, refresh=True)
                    time.sleep(PERIOD)
                    shown = look()
    finally:  # also after Ctrl-C
        console.print(shown)
