"""Who imports whom: the direction of the packages, and the one home of each optional part.

Read from the syntax trees, so that imports inside functions count as well.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DIRECTION: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "records": set(),
    "hardware": set(),
    "config": {"errors", "files"},
    "console": {"errors"},
    "tasks": {"errors", "files", "console"},
    "pruning": {"errors", "config"},
    "planning": {"errors", "config", "console", "hardware", "pruning"},
    "platform": {"errors", "config", "console", "hardware"},
    "doctor": {"config", "platform"},
    "model": {"errors", "config", "pruning", "platform", "hardware"},
    "tokenizer": {"errors"},
    "data": {"errors", "files", "config", "platform", "tokenizer"},
    "checkpoint": {
        "errors",
        "files",
        "config",
        "console",
        "model",
        "pruning",
        "platform",
        "tokenizer",
    },
    "training": {
        *("errors", "files", "config", "console", "records", "hardware"),
        *("checkpoint", "data", "model", "pruning", "platform", "tokenizer"),
    },
    "reference": {"errors", "config"},
    "report": {"errors", "files", "config", "reference", "records"},
}
"""Part of megashear -> the parts that it may import. The command line may import all of them."""

EVERYTHING = {"cli", "commands", "__main__"}
LIGHT = {
    "tokenizer",
    "errors",
    "files",
    "records",
    "hardware",
    "tasks",
    "config",
    "console",
    "reference",
    "report",
}
"""Parts that answer at once: they import neither torch nor Megatron."""

HOMES = {
    "torch.cuda": "megashear/platform/",
    "transformer_engine": "megashear/platform/layers.py",
    "apex": "megashear/platform/kernels.py",
    "amp_C": "megashear/platform/kernels.py",
    "nvidia.dali": "megashear/data/dali.py",
    "wandb": "megashear/training/views.py",
    "torch.utils.tensorboard": "megashear/training/views.py",
}
"""What may be touched in one place only."""


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module of `package` imports; and `torch.cuda`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield node.lineno, "torch.cuda"


def inside(name: str, package: str) -> bool:
    """Whether a dotted name is a package or something in it."""
    return name == package or name.startswith(package + ".")


def misplaced(file: str, name: str) -> str | None:
    """Why the file must not import the name; None where it may."""
    for part, home in HOMES.items():
        if inside(name, part) and not file.startswith(home):
            return f"{part} belongs in {home}"
    if not file.startswith("megashear/") or file == "megashear/__init__.py":
        return None
    unit = file.split("/")[1].removesuffix(".py")
    if unit in EVERYTHING:
        return None
    if unit not in DIRECTION:
        return f"{unit} has no line in DIRECTION"
    target = name.removeprefix("megashear.").split(".")[0] if inside(name, "megashear") else unit
    if target in {*DIRECTION, *EVERYTHING} - {unit, *DIRECTION[unit]}:
        return f"{unit} must not import {target}"
    if unit in LIGHT and (inside(name, "torch") or inside(name, "megatron")):
        return f"{unit} imports neither torch nor Megatron"
    if unit == "pruning" and inside(name, "megatron"):
        return "pruning is torch only"
    if unit == "data" and inside(name, "megatron") and not inside(name, "megatron.core.datasets"):
        return "data imports megatron.core.datasets only"
    return None


def violations(root: Path) -> list[str]:
    """All that is wrong with the imports below a directory that holds megashear/."""
    found = []
    graph: dict[str, set[str]] = {}
    files = {file.relative_to(root).as_posix(): file for file in sources(root)}
    modules = {module_name(file) for file in files}
    for file, path in files.items():
        module = module_name(file)
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        graph[module] = set()
        for line, name in imports(path.read_text(encoding="utf-8"), package):
            reason = misplaced(file, name)
            if reason:
                found.append(f"{file}:{line}: imports {name}; {reason}")
            graph[module] |= {longest(name, modules)} - {None, module, package}
    return found + cycles(graph)


def sources(root: Path) -> Iterable[Path]:
    """Every Python file that ships."""
    folders = ("megashear", "tools", "examples", "benchmarks")
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def module_name(file: str) -> str:
    """`megashear/config/loader.py` -> `megashear.config.loader`."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def longest(name: str, modules: set[str]) -> str | None:
    """The module that an imported name stands in: of `a.b.Name`, `a.b`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle of a graph, if it has one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["import cycle: " + " -> ".join(reversed(error.args[1]))]
    return []


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


def test_the_direction_itself_has_no_cycle() -> None:
    assert cycles(DIRECTION) == []


def test_every_part_has_a_line() -> None:
    paths = [path for path in (ROOT / "megashear").iterdir() if path.name != "py.typed"]
    parts = {path.stem for path in paths if path.name[0] not in "_."}
    assert parts <= set(DIRECTION) | EVERYTHING


WRONG = {
    "megashear/pruning/masks.py": [
        ("import megatron.core", "pruning is torch only"),
        ("def f():\n    from megatron.core import parallel_state", "pruning is torch only"),
        ("from megashear.model import build", "pruning must not import model"),
        ("from megashear import model", "pruning must not import model"),
        ("from ..model.build import x", "pruning must not import model"),
        ("from .. import platform", "pruning must not import platform"),
        ("import torch\ntorch.cuda.synchronize()", "torch.cuda belongs in"),
        ("from torch import cuda", "torch.cuda belongs in"),
        ("import torch.cuda.amp", "torch.cuda belongs in"),
        ("import importlib\nimportlib.import_module('megatron.core')", "pruning is torch only"),
    ],
    "megashear/config/schema.py": [
        ("import torch", "neither torch nor Megatron"),
        ("from megatron.core import x", "neither torch nor Megatron"),
        ("from megashear.checkpoint.models import open", "must not import checkpoint"),
    ],
    "megashear/errors.py": [("from megashear.config import schema", "must not import config")],
    "megashear/data/dataset.py": [
        ("from megatron.core import parallel_state", "megatron.core.datasets only"),
        ("import nvidia.dali.fn", "megashear/data/dali.py"),
        ("from nvidia import dali", "megashear/data/dali.py"),
    ],
    "megashear/model/specs.py": [
        ("import transformer_engine.pytorch as te", "megashear/platform/layers.py"),
        ("from apex.optimizers import FusedAdam", "megashear/platform/kernels.py"),
        ("from megashear.training import trainer", "must not import training"),
    ],
    "megashear/platform/cpu.py": [("from megashear.model import build", "must not import model")],
    "megashear/report/plots.py": [("import torch", "neither torch nor Megatron")],
    "megashear/new_part.py": [("import os", "has no line in DIRECTION")],
    "tools/inspect.py": [("import torch\ntorch.cuda.is_available()", "torch.cuda belongs in")],
    "examples/demo/run.py": [("import amp_C", "megashear/platform/kernels.py")],
}

RIGHT = {
    "megashear/platform/cuda.py": "import torch, megatron.core\ntorch.cuda.synchronize()",
    "megashear/platform/layers.py": "def f():\n    import transformer_engine.pytorch",
    "megashear/platform/kernels.py": "from apex.optimizers import FusedAdam",
    "megashear/data/dali.py": "from nvidia.dali import fn",
    "megashear/data/dataset.py": "from megatron.core.datasets.gpt_dataset import GPTDataset",
    "megashear/pruning/masks.py": "import torch\nfrom .hard_concrete import sample\n"
    "from megashear.config.schema import ModelShape\ntext = 'torch.cuda'",
    "megashear/training/trainer.py": "import megashear\nfrom megashear.data import loader",
    "megashear/cli.py": "from megashear.training import trainer\nimport torch",
    "tools/extract.py": "import megatron.core\nfrom megashear.model import build",
}


def tree(root: Path, files: dict[str, str]) -> Path:
    """A directory with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [(file, text, reason) for file, cases in WRONG.items() for text, reason in cases],
)
def test_the_checker_sees(tmp_path: Path, file: str, text: str, reason: str) -> None:
    found = violations(tree(tmp_path, {file: text}))
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")
    assert reason in found[0]


def test_the_checker_lets_pass(tmp_path: Path) -> None:
    assert violations(tree(tmp_path, RIGHT)) == []


@pytest.mark.parametrize(
    "files",
    [
        {"a": "from megashear.config import b", "b": "import megashear.config.a"},
        {"a": "from . import b", "b": "from .c import x", "c": "def f():\n    from .a import y"},
    ],
)
def test_the_checker_sees_cycles_within_a_part(tmp_path: Path, files: dict[str, str]) -> None:
    named = {f"megashear/config/{name}.py": text for name, text in files.items()}
    found = violations(tree(tmp_path, {"megashear/config/__init__.py": "", **named}))
    assert len(found) == 1
    assert found[0].startswith("import cycle: ")
    assert all(f"megashear.config.{name}" in found[0] for name in files)
