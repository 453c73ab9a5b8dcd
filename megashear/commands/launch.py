"""`megashear launch`: a script on all GPUs of this machine, or of all nodes of a Slurm step."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from typing import Any

from megashear import console
from megashear.commands.evaluate import positive
from megashear.errors import RankError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""That torchrun passes on to the processes; of the last one it would die."""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "launch",
        help="run a script on all GPUs of this machine, or of all nodes of a Slurm step",
        description="Start SCRIPT in as many processes as there are GPUs, by torchrun, which\n"
        "needs no options: on one machine it takes any free port; where srun started\n"
        "one task for each node, nodes, address and port are what Slurm says. Where srun\n"
        "started several tasks on a node, each is one process of the script.\n\n"
        "Ctrl-C, SIGTERM, SIGUSR1 and, but under nohup, SIGHUP reach the processes, which\n"
        "save. The exit status is that of the process that ended first, or 128 + the signal.",
        epilog="examples:\n"
        "  megashear launch examples/pretrain_shear.py --config prune.yaml\n"
        "  srun --nodes=2 --ntasks-per-node=1 megashear launch SCRIPT ARGUMENTS",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--nproc-per-node",
        type=positive,
        metavar="N",
        help="processes on each machine (default: as many as GPUs; 1 without any)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=positive,
        metavar="S",
        help="seconds that the processes have after a signal, for a step and a save, before they "
        "are killed (default: 150; in a Slurm job 600, if Slurm does not kill them before)",
    )
    parser.add_argument("script", metavar="SCRIPT", help="Python file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Start the processes and wait for them; the run's exit status."""
    from megashear.platform import slurm

    task = slurm.task()
    if task is None:
        return _torchrun(args, ["--standalone"], 600 if slurm.job() else 150)
    if task.tasks > task.nodes:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, args.script, *args.arguments])
    address, port = slurm.rendezvous()
    nodes = [f"--nnodes={task.nodes}", f"--node-rank={task.node}"]
    return _torchrun(args, [*nodes, f"--master-addr={address}", f"--master-port={port}"], 600)


def _torchrun(args: argparse.Namespace, where: list[str], shutdown_timeout: int) -> int:
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from megashear.platform import cuda

    processes = args.nproc_per_node or cuda.device_count() or 1
    options = [*where, f"--nproc-per-node={processes}", "--", args.script, *args.arguments]
    parsed = torchrun.parse_args(options)
    # As attributes: torchrun's options of older torch releases lack them.
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    parsed.signals_to_handle = ",".join(stop.name for stop in SIGNALS if stop not in nohup)
    parsed.shutdown_timeout = args.shutdown_timeout or shutdown_timeout
    # What was wrong is said by the processes themselves; what torchrun adds is said below.
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
    """That of the process that failed first; of one that ended since another did, the other's."""
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:  # it could not say so
            name = failure.signal_name()
            print(f"error: rank {rank} (pid {failure.pid}) died of {name}", file=sys.stderr)
    first = min(failures.values(), key=lambda it: (it.exitcode == console.LOST, it.timestamp))
    return int(first.exitcode if first.exitcode >= 0 else 128 - first.exitcode)
