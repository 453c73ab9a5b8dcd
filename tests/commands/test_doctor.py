"""`megashear doctor` on this machine, and on what a broken one looks like to it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megashear.commands import doctor as command
from megashear.doctor import machine, pair, software
from megashear.doctor.machine import OK, PROBLEM, WARNING, Finding
from tests.support.make_tokenizer import REPOSITORY


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megashear", "doctor", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def program(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{text}\n")
    (directory / name).chmod(0o755)


def package(directory: Path, name: str, text: str) -> None:
    (directory / name).mkdir(parents=True)
    (directory / name / "__init__.py").write_text(text)


def test_a_broken_machine_is_told_with_remedies(tmp_path: Path) -> None:
    """About 10 s.

    A GPU that this torch cannot use, Transformer Engine of another torch, an Apex that crashes, a
    launcher's variables left over, a configuration with a mistake.
    """
    program(tmp_path / "bin", "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 550.54'")
    packages = tmp_path / "packages"
    why = "libtransformer_engine.so: undefined symbol: _ZN3c10"
    package(packages, "transformer_engine", f"raise ImportError({why!r})")
    package(packages, "amp_C", "import os; os.abort()")
    (tmp_path / "run.yaml").write_text(f"stage: prune\nrun_dir: {tmp_path}\ntrainer: {{step: 3}}\n")
    done = doctor(
        *("--config", tmp_path / "run.yaml"),
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        PYTHONPATH=str(packages),
        WORLD_SIZE="4",
        RANK="0",
    )
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == machine.host()
    remedies = {
        line.split()[1]: (line, lines[number + 1].strip())
        for number, line in enumerate(lines)
        if line.startswith(f"  {PROBLEM}")
    }
    gpus = "driver 550.54, torch can use none" if torch.version.cuda else "torch is built for CPUs"
    assert gpus in remedies["GPUs"][0]
    assert why in remedies["Transformer"][0]
    assert "killed by signal 6" in remedies["Apex"][0]
    assert "unset RANK WORLD_SIZE" in remedies["launcher"][1]
    assert "trainer.step unknown option. Did you mean 'steps'?" in done.stdout
    assert all(remedy.startswith("-> ") for _, remedy in remedies.values())
    assert any(line.split()[:2] == [OK, "torch"] for line in lines)
    assert "Apex" in remedies["megatron-core"][1]  # which imports it, and so is gone too
    collective = next(line for line in lines if " collective " in line)
    assert collective.startswith("  ok") and "gloo: two processes agree" in collective


def test_only_a_problem_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    well = [Finding(OK, "torch", "2.13.0"), Finding(WARNING, "cores", "1 of 2", "ask for more")]
    assert command.show(well, as_json=False) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  ok       torch              2.13.0",
        "  warning  cores              1 of 2",
        "                              -> ask for more",
        "0 problems, 1 warning",
    ]
    assert command.show([*well, Finding(PROBLEM, "GPUs", "lost")], as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["mark"] for each in found["findings"]] == [OK, WARNING, PROBLEM]
    assert found["host"] == machine.host()


def test_processes_that_never_meet_end_in_a_remedy() -> None:
    """A time-out that importing torch exceeds."""
    began = time.monotonic()
    found = pair.collective(gpus=0, seconds=1)
    assert found.mark == PROBLEM and "GLOO_SOCKET_IFNAME" in found.remedy
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("script", "mark", "words"),
    [
        ("exit 9", PROBLEM, "exit status 9, no output"),
        ("exit 0", OK, "none: a run uses the CPU"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", PROBLEM, "NVIDIA-SMI has failed"),
    ],
)
def test_a_driver_that_says_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, mark: str, words: str
) -> None:
    program(tmp_path / "bin", "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (_, gpus), _ = software.torch_and_gpus()
    assert gpus.item == "GPUs" and gpus.mark == mark and words in gpus.text


def test_transformer_engine_is_imported_after_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported first, a good installation in a pip environment does not find NCCL."""
    package(tmp_path, "torch", "")
    needs_torch = "import sys\nif 'torch' not in sys.modules: raise ImportError('libnccl.so.2')\n"
    package(tmp_path, "transformer_engine", f"{needs_torch}__version__ = '2.20.2'")
    (tmp_path / "transformer_engine" / "pytorch.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    found = next(software.optional(has_gpu=True))
    assert found == Finding(OK, "Transformer Engine", "2.20.2")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096),
        ("0::/job/step\n", {"job/memory.max": "4096", "job/step/memory.max": "100"}, 100),
        ("0::/\n", {"memory.max": "8192", "job/memory.max": "1"}, 8192),
        ("4:memory:/job\n1:cpu:/x\n", {"memory/job/memory.limit_in_bytes": "64"}, 64),
        # In a container: the host's name of the group, and only the group itself is there.
        ("4:memory:/docker/5f\n0::/\n", {"memory/memory.limit_in_bytes": "77"}, 77),
        ("2:cpu,memory:/\n", {}, math.inf),
    ],
)
def test_the_memory_limit_is_that_of_the_process(
    tmp_path: Path, groups: str, limits: dict[str, str], expected: float
) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in limits.items():
        file = tmp_path / "mounted" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert machine.memory_limit(tmp_path / "groups", tmp_path / "mounted") == expected


@pytest.mark.parametrize(
    ("status", "output", "mark", "words"),
    [
        (0, "2 idle", OK, "nodes: 2 idle"),
        (1, "slurm_load_partitions: Unable to contact slurm controller", WARNING, "Unable"),
    ],
)
def test_slurm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, output: str, mark: str, words: str
) -> None:
    program(tmp_path / "bin", "sinfo", f"echo '{output}'; exit {status}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    found = software.scheduler()
    assert found.mark == mark and words in found.text


def test_a_lock_that_another_holds_does_not_pass_for_working_ones(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert machine.locks(file, "ext4").mark == OK
    code = f"{machine.LOCK}\n    print('held', flush=True)\n    sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    assert machine.locks(file, "ext4").mark == PROBLEM
    other.communicate()


def test_locks_that_keep_nobody_out_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that says yes to everybody: the second process takes no lock at all."""
    monkeypatch.setattr(machine, "LOCK", "pass")
    assert machine.locks(tmp_path / "file", "nfs").mark == PROBLEM


def test_a_directory_that_is_not_there_yet_is_looked_at_above(tmp_path: Path) -> None:
    found = list(machine.directory(tmp_path / "runs" / "prune"))
    assert str(tmp_path) in found[0].text and "runs" not in found[0].text
    assert list(tmp_path.iterdir()) == []


def test_file_systems_are_told_by_the_nearest_mount() -> None:
    assert machine.file_system(Path("/proc/self")) == "proc"
    assert machine.file_system(Path("/dev/shm")) == "tmpfs"


def test_a_probe_survives_crashes_and_hangs() -> None:
    assert machine.probe("print(1 + 1)") == (True, "2")
    assert machine.probe("raise SystemExit('no')") == (False, "no")
    assert machine.probe("import os; os.kill(os.getpid(), 11)") == (False, "killed by signal 11")
    assert machine.probe("input()", seconds=0.2)[0] is False
