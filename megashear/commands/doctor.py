"""`megashear doctor`: check this machine for a run, and print what to do about each problem."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear import console
from megashear.config.schema import PlatformConfig, RunConfig
from megashear.errors import ConfigError

if TYPE_CHECKING:
    from megashear.doctor.machine import Finding

EPILOG = """\
examples:

  megashear doctor --config prune.yaml      # also the run's directory, platform and files
  srun --nodes 2 --ntasks-per-node 1 megashear doctor   # a table for each node

The exit status is 1 if there is a problem.
"""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine for a run",
        description="Check what a run needs of this machine: software, GPUs, the run's directory,\n"
        "limits, and communication between two processes.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--config", type=Path, metavar="RUN.yaml", help="also check this run's configuration"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        help="directory for runs (default: run_dir of RUN.yaml, or the current one)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all checks, print their results, and return the exit status."""
    return show(_findings(args), as_json=args.json)


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print the findings, each with its remedy, and their number; return the exit status."""
    from megashear.doctor.machine import PROBLEM, WARNING, host

    count = {mark: sum(each.mark == mark for each in findings) for mark in (PROBLEM, WARNING)}
    if as_json:
        print(json.dumps({"host": host(), "findings": list(map(asdict, findings))}, indent=1))
    else:
        print(host())
        for each in findings:
            print(f"  {each.mark:<8} {each.item:<18} {each.text}")
            if each.remedy:
                print(f"{'':<30}-> {each.remedy}")
        counted = (f"{n} {mark.lower()}{'s' if n != 1 else ''}" for mark, n in count.items())
        print(", ".join(counted), flush=True)
    return console.FAILED if count[PROBLEM] else 0


def _findings(args: argparse.Namespace) -> list[Finding]:
    """Return the findings of all checks; slow checks run concurrently."""
    from megashear.doctor import machine, pair, software

    config, of_config = _config(args.config)
    where = args.dir or Path(config.run_dir if config else ".")
    with ThreadPoolExecutor() as pool:
        megatron = pool.submit(software.megatron)
        used = pool.submit(software.used, config.platform if config else PlatformConfig())
        basis, gpus = software.torch_and_gpus()
        both = pool.submit(pair.collective, gpus)
        return [
            *(software.python(), *basis, megatron.result(), *software.optional(gpus > 0)),
            *(software.launcher(), software.scheduler(), *machine.directory(where)),
            *(machine.shared_memory(), machine.cores(), machine.memory(), machine.limits()),
            *(both.result(), used.result(), *of_config),
        ]


def _config(file: Path | None) -> tuple[RunConfig | None, list[Finding]]:
    """Return a run's configuration, or None if it cannot be read, and the findings about it."""
    from megashear.config.loader import load_config
    from megashear.doctor.machine import OK, PROBLEM, Finding

    if file is None:
        return None, []
    try:
        return load_config(file), [Finding(OK, "configuration", f"{file}: no problem")]
    except ConfigError as error:
        problems = [f"{file}: {path} {text}" for path, text in error.problems]
    remedy = "change it, or the machine"
    found = [Finding(PROBLEM, "configuration", text, remedy) for text in problems]
    try:
        return load_config(file, check_files=False), found
    except ConfigError:
        return None, found
