"""What is installed and whether it works, and what a run would use.

Each package is imported in a new process, so that doctor still answers if one is broken.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megashear.config.schema import PlatformConfig
from megashear.doctor.machine import OK, PROBLEM, WARNING, Finding, judged, probe, run
from megashear.platform import slurm

TORCH = """
import json, torch
from torch import cuda
works = cuda.is_available()
print(json.dumps({
    "version": torch.__version__, "built": torch.version.cuda, "cuda": works,
    "gpus": [cuda.get_device_name(i) for i in range(cuda.device_count())] if works else [],
    "nccl": ".".join(map(str, cuda.nccl.version())) if works else "not asked",
}))
"""
CHOICE = """
import json, sys
from megashear.config.schema import PlatformConfig
from megashear.errors import ShearError
from megashear.platform import kernels, parallel
config = PlatformConfig(**json.loads(sys.argv[1]))
try:
    device = parallel.choose_device(config)
    layers = parallel.choose_layers(config, device)
    print(json.dumps([device.type, layers, kernels.choose_kernels(config.kernels)]))
except ShearError as error:
    sys.exit(str(error))
"""
MEGATRON = (
    "import megatron.core as m; from megatron.core.models.gpt import GPTModel; print(m.__version__)"
)
# torch first: it loads NVIDIA's libraries (NCCL) that Transformer Engine does not find by itself.
TRANSFORMER_ENGINE = (
    "import torch, transformer_engine as t, transformer_engine.pytorch; print(t.__version__)"
)
DALI = "import nvidia.dali as d; import nvidia.dali.fn; print(d.__version__)"
APEX = "import amp_C; from apex.optimizers import FusedAdam; print('fused kernels work')"

MEGATRON_INSTALL = "pip install 'megatron-core>=0.16.1,<0.20'"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def python() -> Finding:
    """Check the Python release."""
    other = not (3, 10) <= sys.version_info[:2] <= (3, 12)
    text = f"{sys.version.split()[0]}, {sys.executable}"
    return judged("python", text, (other, PROBLEM, "Megatron-Core here needs Python 3.10 to 3.12"))


def torch_and_gpus() -> tuple[list[Finding], int]:
    """Check torch, the driver, and that both find the same GPUs; count the usable ones."""
    works, output = probe(TORCH)
    if not works:
        return [Finding(PROBLEM, "torch", output, "install torch in a fresh environment")], 0
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    build = f"CUDA {found['built']}, NCCL {found['nccl']}" if found["built"] else "CPU"
    torch = Finding(OK, "torch", f"{found['version']}, built for {build}")
    return [torch, _gpus(found)], len(found["gpus"])


def _gpus(found: dict[str, Any]) -> Finding:
    """Compare the GPUs of the driver with those of torch."""
    status, output = run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    lines = output.splitlines() if status == 0 else []
    driver = f"driver {lines[0].rpartition(',')[2].strip() if lines else 'unknown'}"
    if found["cuda"]:
        return Finding(OK, "GPUs", f"{len(found['gpus'])} x {found['gpus'][0]}, {driver}")
    if not lines and not devices and status in (0, 127):
        return Finding(OK, "GPUs", "none: a run uses the CPU")
    if not lines:
        what = f"/dev has {len(devices)} of them, but nvidia-smi fails: " if devices else ""
        why = output.splitlines()[0] if output else "it lists none"
        remedy = "the driver does not work: reboot, or ask the administrator"
        return Finding(PROBLEM, "GPUs", f"{what}{why}", remedy)
    text = f"{driver}, torch can use none"
    remedy = f"install a torch built for an older CUDA, or a driver for CUDA {found['built']}"
    if not found["built"]:
        text = "but torch is built for CPUs"
        remedy = "install the torch for your CUDA release: see pytorch.org, Get started"
    elif hidden is not None:
        text = f"none of them visible: CUDA_VISIBLE_DEVICES={hidden!r}"
        remedy = "unset it, or ask Slurm for GPUs: --gpus-per-node"
    return Finding(PROBLEM, "GPUs", f"{len(lines)}, {text}", remedy)


def megatron() -> Finding:
    """Check Megatron-Core, which every run needs."""
    works, output = probe(MEGATRON)
    if not works:
        remedy = f"{MEGATRON_INSTALL}; or fix Transformer Engine or Apex, which it imports"
        return Finding(PROBLEM, "megatron-core", output, remedy)
    number = output.splitlines()[-1]
    other = not (0, 16) <= tuple(map(int, number.split(".")[:2])) < (0, 20)
    return judged("megatron-core", number, (other, PROBLEM, MEGATRON_INSTALL))


def optional(has_gpu: bool) -> Iterator[Finding]:
    """Check the optional packages."""
    te = "pip install megashear[te]; it must be built for this torch"
    yield _optional("Transformer Engine", "transformer_engine", TRANSFORMER_ENGINE, has_gpu, te)
    apex = "build it from NVIDIA's sources (github.com/NVIDIA/apex)"
    if find_spec("apex") and not find_spec("amp_C"):
        text = "the package `apex` is not NVIDIA's, or has no CUDA kernels"
        yield Finding(WARNING, "Apex", text, f"pip uninstall apex; {apex} if you want it")
    else:
        yield _optional("Apex", "amp_C", APEX, False, apex)
    nvidia = find_spec("nvidia") and find_spec("nvidia.dali")
    yield _optional("DALI", "nvidia.dali" if nvidia else "", DALI, False, "megashear[dali]")
    for name in ("tensorboard", "wandb"):
        try:
            yield Finding(OK, name, version(name))
        except PackageNotFoundError:
            yield Finding(OK, name, "not installed: a run writes no log for it")


def _optional(name: str, module: str, code: str, wanted: bool, remedy: str) -> Finding:
    if not module or find_spec(module) is None:
        return judged(name, "not installed", (wanted, WARNING, remedy))
    works, output = probe(code)
    if works:
        return Finding(OK, name, output.splitlines()[-1])
    text = f"is installed and cannot be used: {output}"
    return Finding(PROBLEM, name, text, f"uninstall it, or {remedy}")


def used(config: PlatformConfig) -> Finding:
    """Report the device, precision, layers and kernels that a run would use."""
    works, output = probe(CHOICE, json.dumps(asdict(config)))
    if not works:
        return Finding(PROBLEM, "will be used", output, "see above, or change `platform`")
    device, layers, kernels = json.loads(output.splitlines()[-1])
    there = "a GPU is available" if device == "cuda" else "no GPU is available"
    why = there if config.device == "auto" else f"platform.device = {config.device}"
    precision = config.precision_on(device == "cuda")
    text = f"{device} ({why}), {precision}, {layers} layers, {kernels} kernels"
    return Finding(OK, "will be used", text)


def launcher() -> Finding:
    """Check for variables of a launcher that did not start this process."""
    found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if not found:
        return Finding(OK, "launcher", "none: this is one process")
    text = ", ".join(f"{name}={value}" for name, value in found.items())
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Finding(OK, "launcher", f"torchrun: {text}")
    waits = "RANK" in found and found.get("WORLD_SIZE", "1") != "1"
    remedy = f"without a launcher: unset {' '.join(found)}"
    waiting = (waits, PROBLEM, f"a run would wait for other processes; {remedy}")
    return judged("launcher", f"set, and not by torchrun: {text}", waiting, (True, WARNING, remedy))


def scheduler() -> Finding:
    """Check that Slurm answers, if it is installed."""
    if shutil.which("sinfo") is None:
        return Finding(OK, "Slurm", "not installed")
    job = f"in job {number}, " if (number := slurm.job()) else ""
    status, output = run("sinfo", "-h", "-o", "%D %T", seconds=15)
    lines = [line.strip() for line in output.splitlines()] or ["no nodes"]
    if status != 0:
        text = f"{job}installed, and does not answer: {lines[-1]}"
        return Finding(WARNING, "Slurm", text, "jobs cannot be submitted: ask the administrator")
    return Finding(OK, "Slurm", f"{job}nodes: {', '.join(lines)}")
