"""Everything that ships works as it lies there: modules, configurations, scripts."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import megashear.training.trainer  # noqa: F401 - so that forks have what scripts import
from megashear.config.chain import load_chain
from megashear.config.loader import load_config, to_yaml
from tests.support.forks import Forked

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megashear"
EXTRAS = (
    *("transformer_engine", "apex", "amp_C", "nvidia.dali"),
    *("tensorboard", "torch.utils.tensorboard", "wandb"),
)
"""What is not there unless somebody installs an extra."""

MODULES = sorted(
    file.relative_to(ROOT)
    .as_posix()
    .removesuffix(".py")
    .removesuffix("/__init__")
    .replace("/", ".")
    for file in PACKAGE.rglob("*.py")
    if file.name != "__main__.py"
)
CHAINS = sorted((ROOT / "examples").rglob("chain.yaml"))
CONFIGS = sorted({*(ROOT / "examples").rglob("*.yaml")} - {*CHAINS})
SCRIPTS = sorted(
    file
    for folder in ("examples", "tools", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
    if "__main__" in file.read_text(encoding="utf-8")
)
SHELL = [
    *sorted((ROOT / ".ci").iterdir()),
    *sorted(
        file
        for suffix in ("sh", "sbatch", "slurm")
        for file in (ROOT / "examples").rglob(f"*.{suffix}")
    ),
]

# Imports what is slow once, then each module in a process of its own, so that none is helped by
# what another has imported before.
IMPORT_EACH = """
import importlib, json, os, sys, traceback
extras, modules = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(extras))
import torch, megatron.core
failed = []
for name in modules:
    process = os.fork()
    if process == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        failed.append(name)
print(json.dumps(failed))
"""

LIGHT = """
import sys
import megashear.config.loader, megashear.console, megashear.cli
print([name for name in ("torch", "megatron", "transformers") if name in sys.modules])
"""


def run(*arguments: str | Path, cwd: Path = ROOT, timeout: int = 300) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def name(path: Path) -> str:
    """A file's name in the list of tests."""
    return path.relative_to(ROOT).as_posix()


@pytest.mark.slow  # 5 to 20 s, most of it importing torch and Megatron-Core
def test_every_module_imports_without_extras() -> None:
    assert len(MODULES) > 20
    output = run(sys.executable, "-c", IMPORT_EACH, json.dumps([EXTRAS, MODULES]))
    assert json.loads(output.splitlines()[-1]) == []


def test_what_answers_at_once_imports_nothing_heavy() -> None:
    assert run(sys.executable, "-c", LIGHT).strip() == "[]"


@pytest.mark.parametrize("file", CONFIGS, ids=name)
def test_every_configuration_is_right(file: Path, tmp_path: Path) -> None:
    """Its data and checkpoints may be absent; all else holds, also after a round through YAML."""
    config = load_config(file, check_files=False)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(copy, check_files=False) == config


@pytest.mark.parametrize("file", CHAINS, ids=name)
def test_every_chain_is_right(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    load_chain(Path(file.name), check_files=False)


@pytest.mark.parametrize("file", SCRIPTS, ids=name)
def test_every_script_explains_itself(file: Path, tmp_path: Path) -> None:
    """From another directory, as a user's job script would call it."""

    def call() -> None:
        sys.argv = [str(file), "--help"]
        sys.path.insert(0, str(file.parent))
        runpy.run_path(str(file), run_name="__main__")

    status, out, err = Forked(call, tmp_path).end(60)
    assert status == 0, err
    assert "usage:" in out.lower()


def test_the_command_explains_itself(tmp_path: Path) -> None:
    assert "tokenize" in run(sys.executable, "-m", "megashear", "--help", cwd=tmp_path)


@pytest.mark.parametrize("file", SHELL, ids=name)
def test_every_shell_script_parses(file: Path) -> None:
    run("bash", "-n", file)
