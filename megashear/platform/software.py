"""What is installed and whether it works, each tried in a process of its own; what a run would use.

Imports neither torch nor Megatron: where they are broken, this still answers.
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
from megashear.platform import slurm
from megashear.platform.machine import OK, PROBLEM, WARNING, Finding, judged, probe, run

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
TRANSFORMER_ENGINE = (
    "import transformer_engine as t; import transformer_engine.pytorch; print(t.__version__)"
)
DALI = "import nvidia.dali as d; import nvidia.dali.fn; print(d.__version__)"
APEX = "import amp_C; from apex.optimizers import FusedAdam; print('fused kernels work')"

MEGATRON_INSTALL = "pip install 'megatron-core>=0.16.1,<0.20'"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def python() -> Finding:
    """The interpreter."""
    other = not (3, 10) <= sys.version_info[:2] <= (3, 12)
    text = f"{sys.version.split()[0]}, {sys.executable}"
    return judged("python", text, (other, PROBLEM, "Megatron-Core here needs Python 3.10 to 3.12"))


def torch_and_gpus() -> tuple[list[Finding], int]:
    """torch, the driver, and whether they find the same GPUs; how many a run can use."""
    works, said = probe(TORCH)
    if not works:
        return [Finding(PROBLEM, "torch", said, "install torch anew, in a fresh environment")], 0
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    build = f"CUDA {found['built']}, NCCL {found['nccl']}" if found["built"] else "CPU"
    torch = Finding(OK, "torch", f"{found['version']}, built for {build}")
    return [torch, _gpus(found)], len(found["gpus"])


def _gpus(found: dict[str, Any]) -> Finding:
    """What the driver says against what torch finds."""
    status, said = run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    lines = said.splitlines() if status == 0 else []
    driver = f"driver {lines[0].rpartition(',')[2].strip() if lines else 'unknown'}"
    if found["cuda"]:
        return Finding(OK, "GPUs", f"{len(found['gpus'])} x {found['gpus'][0]}, {driver}")
    if not lines and not devices and status in (0, 127):
        return Finding(OK, "GPUs", "none: runs go on the CPU")
    if not lines:
        what = f"/dev has {len(devices)} of them, but nvidia-smi fails: " if devices else ""
        why = said.splitlines()[0] if said else "it names none"
        remedy = "the driver does not work: reboot, or ask who looks after the machine"
        return Finding(PROBLEM, "GPUs", f"{what}{why}", remedy)
    text, remedy = f"{driver}, torch can use none", "take a torch built for an older CUDA, or a "
    remedy += f"driver for CUDA {found['built']}"
    if not found["built"]:
        text = "but torch is a CPU build"
        remedy = "install the build of torch for your CUDA: see pytorch.org, Get started"
    elif hidden is not None:
        text = f"none of them visible: CUDA_VISIBLE_DEVICES={hidden!r}"
        remedy = "unset it, or ask Slurm for GPUs: --gpus-per-node"
    return Finding(PROBLEM, "GPUs", f"{len(lines)}, {text}", remedy)


def megatron() -> Finding:
    """Megatron-Core, which nothing goes without."""
    works, said = probe(MEGATRON)
    if not works:
        remedy = f"{MEGATRON_INSTALL}; or mend Transformer Engine or Apex, which it imports"
        return Finding(PROBLEM, "megatron-core", said, remedy)
    number = said.splitlines()[-1]
    other = not (0, 16) <= tuple(map(int, number.split(".")[:2])) < (0, 20)
    return judged("megatron-core", number, (other, PROBLEM, MEGATRON_INSTALL))


def optional(has_gpu: bool) -> Iterator[Finding]:
    """What a run uses where it is there."""
    te = "pip install megashear[te]; it must be built for this torch"
    yield _optional("Transformer Engine", "transformer_engine", TRANSFORMER_ENGINE, has_gpu, te)
    apex = "build it from NVIDIA's sources (github.com/NVIDIA/apex)"
    if find_spec("apex") and not find_spec("amp_C"):
        text = "the package of that name is not NVIDIA's, or has no CUDA kernels"
        yield Finding(WARNING, "Apex", text, f"pip uninstall apex; {apex} if you want it")
    else:
        yield _optional("Apex", "amp_C", APEX, False, apex)
    nvidia = find_spec("nvidia") and find_spec("nvidia.dali")
    yield _optional("DALI", "nvidia.dali" if nvidia else "", DALI, False, "megashear[dali]")
    for name in ("tensorboard", "wandb"):
        try:
            yield Finding(OK, name, version(name))
        except PackageNotFoundError:
            yield Finding(OK, name, "not installed: its log is not written")


def _optional(name: str, module: str, code: str, wanted: bool, remedy: str) -> Finding:
    if not module or find_spec(module) is None:
        return judged(name, "not installed", (wanted, WARNING, remedy))
    works, said = probe(code)
    if works:
        return Finding(OK, name, said.splitlines()[-1])
    text = f"is installed and cannot be used: {said}"
    return Finding(PROBLEM, name, text, f"uninstall it, or {remedy}")


def used(config: PlatformConfig) -> Finding:
    """What `platform` of a configuration comes to here."""
    works, said = probe(CHOICE, json.dumps(asdict(config)))
    if not works:
        return Finding(PROBLEM, "will be used", said, "see above, or change `platform`")
    device, layers, kernels = json.loads(said.splitlines()[-1])
    there = "a GPU is there" if device == "cuda" else "there is no GPU torch can use"
    why = there if config.device == "auto" else f"platform.device = {config.device}"
    precision = config.precision_on(device == "cuda")
    text = f"{device} ({why}), {precision}, {layers} layers, {kernels} kernels"
    return Finding(OK, "will be used", text)


def launcher() -> Finding:
    """Variables of a launcher that did not start this process."""
    found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if not found:
        return Finding(OK, "launcher", "none: this is one process")
    text = ", ".join(f"{name}={value}" for name, value in found.items())
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Finding(OK, "launcher", f"torchrun: {text}")
    waits = "RANK" in found and found.get("WORLD_SIZE", "1") != "1"
    remedy = f"outside of a launcher: unset {' '.join(found)}"
    waiting = (waits, PROBLEM, f"a run would wait for the others; {remedy}")
    return judged("launcher", f"set, and not by torchrun: {text}", waiting, (True, WARNING, remedy))


def scheduler() -> Finding:
    """Slurm, if it is here."""
    if shutil.which("sinfo") is None:
        return Finding(OK, "Slurm", "not here")
    place = f"in job {job}, " if (job := slurm.job()) else ""
    status, said = run("sinfo", "-h", "-o", "%D %T", seconds=15)
    lines = [line.strip() for line in said.splitlines()] or ["no nodes"]
    if status != 0:
        text = f"{place}installed, and does not answer: {lines[-1]}"
        return Finding(WARNING, "Slurm", text, "no job can be sent from here: ask who runs it")
    return Finding(OK, "Slurm", f"{place}nodes: {', '.join(lines)}")
