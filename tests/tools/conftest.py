"""Calls the commands of tools/checkpoint as a user does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from megashear.console import run

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint"


class Tool:
    """Calls a command in this process, which saves the 5 seconds of importing Megatron."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, name: str, *arguments: object) -> tuple[int, str, str]:
        """Exit status, output and messages."""
        spec = importlib.util.spec_from_file_location(f"tool_{name}", TOOLS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(module.main)
        code = ended.value.code
        return (code if isinstance(code, int) else 0), *self.capsys.readouterr()


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tool:
    return Tool(capsys, monkeypatch)
