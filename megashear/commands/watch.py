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
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "watch",
        help="follow runs in the terminal",
        description="Show how far runs are: one with losses, weights and sparsities, several with\n"
        "a line each. Reads their directories, also of runs on another machine; ends when all\n"
        "are complete, or at Ctrl-C.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="directory of a run, or the work_dir of a chain")  # fmt: skip
    parser.add_argument(
        "--once", action="store_true", help="show it once, as happens where stdout is no terminal"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Show the runs until all are complete.

    Raises:
        DataError: a path is not the directory of a run; or, with --once, does not exist.
    """
    from megashear.report.runs import RecordedRun, reject_unrelated_directories, run_directories

    directories = run_directories(args.runs)
    follow = sys.stdout.isatty() and not args.once
    absent = [str(directory) for directory in args.runs if not directory.is_dir()]
    if absent and not follow:  # else they may come: a job may wait in its queue
        raise DataError(f"no directory of a run: {', '.join(absent)}")
    reject_unrelated_directories(directories)

    from rich.console import Console
    from rich.live import Live

    from megashear.report.frame import frame, is_over

    console = Console()
    runs = [RecordedRun(directory) for directory in directories]

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
