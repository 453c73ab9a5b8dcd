"""`megashear evaluate`: validation losses by domain of any checkpoint or Hugging Face directory."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megashear.commands.measuring import add_options, measure_all, measured_table, record
from megashear.commands.options import require_outputs
from megashear.errors import DataError
from megashear.files import write_durably


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "evaluate",
        help="validation losses by domain, of any checkpoint",
        description="Measure models on the validation sets of a run: the losses that the run\n"
        "itself would log. MODEL is a run directory (its latest checkpoint), a checkpoint of any\n"
        "stage and parallel layout, or a Hugging Face directory.",
        epilog="example: a run, and the model exported from it\n\n"
        "  megashear evaluate runs/continue models/sheared-1.3b --domains runs/continue",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="what to measure")
    add_options(parser, "the run that the first MODEL is, or is a checkpoint of")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure every model and print its table."""
    from megashear.platform import launched

    with launched.report_once():
        require_outputs([args.json] if args.json else [], args.overwrite)
    config, measured = measure_all(args.models, args)
    if launched.launched_rank() > 0:
        return
    for each in measured:
        print(f"\n{measured_table(each, config)}")
    if args.json is not None:
        records = [record(each, config) for each in measured]
        write_durably(args.json, json.dumps({"models": records}, indent=1) + "\n", DataError)
        print(f"\nwritten to {args.json}")
