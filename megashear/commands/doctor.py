"""`megashear doctor`: what is here, what a run would use, what is wrong, and what to do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear import console
from megashear.config.schema import PlatformConfig, RunConfig
from megashear.errors import ConfigError

if TYPE_CHECKING:
    from megashear.platform.machine import Finding

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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="check it as well")
    parser.add_argument("--dir", type=Path, help="for runs (default: run_dir, or this one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look, print, and say whether something is wrong."""
    return show(list(_findings(args)), as_json=args.json)


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print what was found; the exit status."""
    from megashear.platform import machine

    if as_json:
        found = {"host": machine.host(), "findings": [asdict(each) for each in findings]}
        print(json.dumps(found, indent=1))
    else:
        print(f"{machine.host()}\n{_text(findings)}", flush=True)
    return console.FAILED if any(each.mark == machine.PROBLEM for each in findings) else 0


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    """All checks; those that import something run beside each other."""
    from megashear.platform import machine, pair, software

    config, of_config = _config(args.config)
    where = args.dir or Path(config.run_dir if config else ".")
    with ThreadPoolExecutor() as pool:
        megatron = pool.submit(software.megatron)
        used = pool.submit(software.used, config.platform if config else PlatformConfig())
        basis = list(software.torch_and_gpus())
        gpus = next((_count(each.text) for each in basis if each.item == "GPUs"), 0)
        both = pool.submit(pair.collective, gpus)
        yield software.python()
        yield from basis
        yield megatron.result()
        yield from software.optional(gpus > 0)
        yield software.launcher()
        yield software.scheduler()
        yield from machine.directory(where)
        yield machine.shared_memory()
        yield machine.cores()
        yield machine.memory()
        yield machine.limits()
        yield both.result()
        yield used.result()
    yield from of_config


def _count(text: str) -> int:
    first = text.split()[0]
    return int(first) if first.isdecimal() else 0


def _config(file: Path | None) -> tuple[RunConfig | None, Sequence[Finding]]:
    """A run's configuration, where it can be read, and what is wrong with it."""
    from megashear.platform.machine import OK, PROBLEM, Finding

    if file is None:
        return None, ()
    from megashear.config.loader import load_config

    try:
        config = load_config(file)
        return config, (Finding(OK, "configuration", f"{file}: no problem"),)
    except ConfigError as error:
        found = [
            Finding(PROBLEM, "configuration", f"{file}: {path} {text}", "change it, or the machine")
            for path, text in error.problems
        ]
    try:
        return load_config(file, check_files=False), found
    except ConfigError:
        return None, found


def _text(findings: Sequence[Finding]) -> str:
    """One line for each, its remedy below it, and a count."""
    from megashear.platform.machine import PROBLEM, WARNING

    lines = []
    for each in findings:
        lines.append(f"  {each.mark:<8} {each.item:<18} {each.text}")
        if each.remedy:
            lines.append(f"  {'':<8} {'':<18} -> {each.remedy}")
    counts = {mark: sum(each.mark == mark for each in findings) for mark in (PROBLEM, WARNING)}
    said = (f"{n} {m.lower()}{'s' if n != 1 else ''}" for m, n in counts.items())
    return "\n".join([*lines, ", ".join(said)])
