"""`megashear report`: runs as a page for a browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megashear.errors import DataError


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "report",
        help="runs as an HTML page",
        description="Write one HTML page of a run, or of several in the same figures: results,\n"
        "losses and references, domain weights and data, masks, speed, configuration. The page\n"
        "needs no other file and no network. Runs may be unfinished or damaged: the page says\n"
        "what could not be read.",
        epilog="example:\n\n  megashear report runs/prune runs/continue --out report.html",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="directory of a run, or the work_dir of a chain")  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page to write or replace (default: report.html, in RUN if only one is given)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Read the runs and write their page.

    Raises:
        DataError: a path is not the directory of a run, or the page cannot be written.
    """
    from megashear.report.runs import RecordedRun, reject_unrelated_directories, run_directories

    given = {path.resolve(): path for path in args.runs}
    directories = run_directories(args.runs)
    if lacking := [str(path) for path in directories if not path.is_dir()]:
        raise DataError("\n".join(f"{path} is no directory of a run" for path in lacking))
    reject_unrelated_directories(directories)

    from megashear import __version__
    from megashear.files import write_whole
    from megashear.records import utc
    from megashear.report.page import render

    out = args.out or Path(args.runs[0] if len(given) == 1 else ".", "report.html")
    runs = [RecordedRun.read(directory) for directory in directories]
    page = render(runs, __version__, utc())
    try:
        write_whole(out, page)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}") from error
    for read in runs:
        for problem in read.problems:
            print(f"{read.directory}: {problem}")
    print(f"written to {out} ({len(page) / 1e6:.1f} MB)")
