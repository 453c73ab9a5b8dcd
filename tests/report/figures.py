"""What a plot shows, read from the figure as it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megashear.report import plots


@contextmanager
def saved_figures() -> Iterator[list[Any]]:
    """The figures that are saved in the block, once they are."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, file: Path) -> None:
        save(figure, file)
        figures.append(figure)

    with patch.object(plots, "_save", keep):
        yield figures
