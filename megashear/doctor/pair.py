"""Whether collectives work on this machine: two processes add up a number.

`python -m megashear.doctor.pair RANK PORT BACKEND` runs one of them.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from megashear.doctor.machine import OK, PROBLEM, Finding, run

SECONDS = 90
GLOO = (
    "does this machine's name resolve (getent hosts $(hostname))? Else name the interface: "
    "export GLOO_SOCKET_IFNAME=eth0 (or lo)"
)
NCCL = "export NCCL_DEBUG=INFO shows where it stops; try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"


def collective(gpus: int, seconds: float = SECONDS) -> Finding:
    """Run an all-reduce of two processes, by NCCL if there are two GPUs, else by gloo."""
    backend = "nccl" if gpus > 1 else "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def process(rank: int) -> tuple[int, str]:
        command = (sys.executable, "-m", "megashear.doctor.pair", str(rank), port, backend)
        return run(*command, seconds=seconds)

    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        failed = [output for status, output in pool.map(process, (0, 1)) if status != 0]
    if failed:
        text = f"{backend}: {failed[0].splitlines()[-1][:300]}"
        return Finding(PROBLEM, "collective", text, NCCL if gpus > 1 else GLOO)
    text = f"{backend}: two processes agree, in {time.monotonic() - began:.0f} s with imports"
    return Finding(OK, "collective", text)


def main() -> None:
    """Run one of the two processes."""
    import torch
    from torch import distributed

    from megashear.platform import cuda

    rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # set by a torchrun around this
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = cuda.device_of_rank(rank) if backend == "nccl" else torch.device("cpu")
    distributed.init_process_group(backend, rank=rank, world_size=2)
    number = torch.tensor([rank + 1.0], device=device)
    distributed.all_reduce(number)
    assert number.item() == 3.0, f"1 + 2 gave {number.item()}"
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
