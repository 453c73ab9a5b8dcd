"""Two processes that add up a number: whether collectives work on this machine.

`python -m megashear.platform.pair RANK PORT BACKEND` is one of them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

from megashear.platform.machine import OK, PROBLEM, Finding

SECONDS = 90
GLOO = (
    "does this machine's name resolve (getent hosts $(hostname))? Else name the interface: "
    "export GLOO_SOCKET_IFNAME=eth0 (or lo)"
)
NCCL = "export NCCL_DEBUG=INFO shows where it stops; try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"


def collective(gpus: int, seconds: float = SECONDS) -> Finding:
    """Start both, by NCCL where two GPUs are, else by gloo, and wait for their sum."""
    backend = "nccl" if gpus > 1 else "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "megashear.platform.pair"]
    began = time.monotonic()
    pair = [
        subprocess.Popen(
            [*command, rank, port, backend],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = ""
    try:
        for process in pair:
            _, errors = process.communicate(timeout=max(1, began + seconds - time.monotonic()))
            lines = errors.strip().splitlines()
            if process.returncode and not said:
                said = lines[-1][:300] if lines else f"ended with status {process.returncode}"
    except subprocess.TimeoutExpired:
        said = f"two processes did not come to their sum within {seconds:.0f} s"
    finally:
        for process in pair:
            process.kill()
            process.wait()
    if said:
        return Finding(PROBLEM, "collective", f"{backend}: {said}", NCCL if gpus > 1 else GLOO)
    took = time.monotonic() - began
    return Finding(
        OK, "collective", f"{backend}: two processes agree, in {took:.0f} s with imports"
    )


def main() -> None:
    """One of the two."""
    import torch
    from torch import distributed

    from megashear.platform import cuda

    rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # of a torchrun around this
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    device = cuda.device_of_rank(rank) if backend == "nccl" else torch.device("cpu")
    distributed.init_process_group(backend, rank=rank, world_size=2)
    number = torch.tensor([rank + 1.0], device=device)
    distributed.all_reduce(number)
    assert number.item() == 3.0, f"1 + 2 came to {number.item()}"
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
