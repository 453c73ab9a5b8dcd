"""Calls commands as a user does."""

from __future__ import annotations

from pathlib import Path

import pytest

from megashear.cli import execute
from megashear.console import run

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint"


class Tool:
    """Calls a command in this process, which saves the 5 seconds of importing Megatron."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, name: str, *arguments: object) -> tuple[int, str, str]:
        """Exit status, output and messages."""
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(lambda: execute([name, *map(str, arguments)]))
        code = ended.value.code
        return (code if isinstance(code, int) else 0), *self.capsys.readouterr()


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(capsys)
