"""`megashear launch`: a command on all GPUs of this machine, or of all nodes of a Slurm step."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from megashear import console
from megashear.commands.options import positive
from megashear.errors import PlatformError, RankError

LAUNCHED = ("train", "import", "extract", "evaluate", "reference-loss")
"""Commands that several processes share."""

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Signals that torchrun forwards to the processes. Without it, SIGUSR1 would end torchrun."""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "launch",
        help="run a command on all GPUs of this machine, or of all nodes of a Slurm step",
        description=f"Start COMMAND in one process for each GPU. It is {', '.join(LAUNCHED)},\n"
        "or a Python script. Slurm's one or several tasks per node work too (docs/cluster.md).\n\n"
        "Ctrl-C, SIGTERM, SIGUSR1 and (except under nohup) SIGHUP reach the processes, which\n"
        "save. The exit status is that of the first process to fail, or 128 + the signal.",
        epilog="examples:\n\n"
        "  megashear launch train prune.yaml\n"
        "  megashear launch --nproc-per-node 4 extract --run runs/prune\n"
        "  srun --nodes=2 --ntasks-per-node=1 megashear launch train prune.yaml",
    )
    parser.add_argument("--nproc-per-node", type=positive, metavar="N",
                        help="processes on each machine (default: its GPUs, or 1)")  # fmt: skip
    parser.add_argument(
        "--shutdown-timeout",
        type=positive,
        metavar="S",
        help="seconds after a signal, for a step and a save, before the processes are killed "
        "(default: 150; in a Slurm job 600, if Slurm does not kill them before)",
    )
    parser.add_argument("command", metavar="COMMAND", help="a command, or a Python script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the processes, wait for them, and return the exit status."""
    from megashear.platform import slurm

    if args.command in LAUNCHED:
        command = ["-m", "megashear", args.command, *args.arguments]
    elif Path(args.command).is_file():
        command = [args.command, *args.arguments]
    else:
        known = ", ".join(LAUNCHED)
        raise PlatformError(f"{args.command}: neither a script nor a command to launch ({known})")

    task = slurm.task()
    if task is None:
        return _torchrun(args, command, ["--standalone"], 600 if slurm.job() else 150)
    if task.tasks > task.nodes:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command])
    address, port = slurm.rendezvous()
    nodes = [f"--nnodes={task.nodes}", f"--node-rank={task.node}"]
    where = [*nodes, f"--master-addr={address}", f"--master-port={port}"]
    return _torchrun(args, command, where, 600)


def _torchrun(
    args: argparse.Namespace, command: list[str], where: list[str], shutdown_timeout: int
) -> int:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megashear.platform import cuda

    processes = args.nproc_per_node or cuda.device_count() or 1
    module = ["-m", "--", *command[1:]] if command[0] == "-m" else ["--", *command]
    parsed = torchrun.parse_args([*where, f"--nproc-per-node={processes}", *module])
    # As attributes: torchrun's options of older torch releases lack them.
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    parsed.signals_to_handle = ",".join(
        stop.name for stop in FORWARDED_SIGNALS if stop not in nohup
    )
    parsed.shutdown_timeout = args.shutdown_timeout or shutdown_timeout
    # The processes report their errors themselves; what torchrun would add is reported below.
    logging.disable(logging.CRITICAL)
    try:
        torchrun.run(parsed)
    except ChildFailedError as error:
        return _status(error.failures)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except DistError as error:
        where_text = " ".join(where)
        raise RankError(f"the nodes did not come together ({where_text}): {error}") from error
    return 0


def _status(failures: dict[int, Any]) -> int:
    """Return the status of the process that failed first, not of one that failed because of it."""
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # it could not report it
            name = failure.signal_name()
            print(f"error: rank {rank} (pid {failure.pid}) died of {name}", file=sys.stderr)
    first = min(failures.values(), key=lambda it: (it.exitcode == console.LOST, it.timestamp))
    return int(first.exitcode if first.exitcode >= 0 else 128 - first.exitcode)
