"""Errors that megashear raises on purpose, one class per person who can fix them.

Everything may import this module; it imports nothing of megashear.
"""

from __future__ import annotations

from collections.abc import Sequence


class ShearError(Exception):
    """Base of every error that a user can cause and fix; printed without a traceback."""


class ConfigError(ShearError):
    """The configuration is wrong: fix the YAML file or the command line.

    Args:
        source: what was read (a file name, or "command line").
        problems: every problem, each as (path of the field, what is wrong and how to fix it).
    """

    def __init__(self, source: str, problems: Sequence[tuple[str, str]]) -> None:
        self.source = source
        self.problems = list(problems)
        width = min(34, max((len(path) for path, _ in self.problems), default=0))
        count = len(self.problems)
        lines = [f"{source}: {count} problem{'s' if count != 1 else ''}"]
        lines += [f"  {path:<{width}}  {text}" for path, text in self.problems]
        super().__init__("\n".join(lines))


class DataError(ShearError):
    """Text, token or tokenizer files are missing or malformed: fix the preparation of the data."""


class CheckpointError(ShearError):
    """A checkpoint or a Hugging Face directory is missing, damaged or does not fit the model."""


class PlatformError(ShearError):
    """The machine lacks what the run asks for: install it, or ask for less."""


class RankError(ShearError):
    """Another process of the run hangs or died: fix its machine, then start again."""


class TrainingError(ShearError):
    """The optimisation failed (a non-finite loss): change settings or data."""
