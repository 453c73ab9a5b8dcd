"""`megashear doctor`: what is here, what a run would use, what is wrong, and what to do."""

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

  megashear doctor
  megashear doctor --config prune.yaml      # its directory, platform and files as well
  srun --nodes 2 --ntasks-per-node 1 megashear doctor   # a table for each node

Ends with status 1 where something is wrong.
"""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "doctor",
        help="what this machine has for a run, and what is wrong with it",
        description="Look at this machine as a run will: software, GPUs, directory, limits, and\n"
        "whether two processes can talk.",
        epilog=EPILOG,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="check it as well")
    parser.add_argument("--dir", type=Path, help="for runs (default: run_dir, or this one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, print, and say whether something is wrong."""
    return show(_findings(args), as_json=args.json)


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print what was found, each remedy below it, and a count; the exit status."""
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
        said = (f"{n} {mark.lower()}{'s' if n != 1 else ''}" for mark, n in count.items())
        print(", ".join(said), flush=True)
    return console.FAILED if count[PROBLEM] else 0


def _findings(args: argparse.Namespace) -> list[Finding]:
    """All checks; those that import something run beside each other."""
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
    """A run's configuration, where it can be read, and what is wrong with it."""
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
