"""Errors that megashear raises on purpose, one class for each party who can mend them.

Everything may import this module; it imports nothing of megashear.
"""

from __future__ import annotations

from collections.abc import Sequence


class ShearError(Exception):
    """Base of every error that a user can cause and mend: printed without a traceback."""


class ConfigError(ShearError):
    """The run's configuration is wrong: mended in the YAML file or on the command line.

    Args:
        source: what was read (a file name, or "command line").
        problems: every problem found, each as (path of the field, what is wrong and the way out).
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
    """Text, token or tokenizer files missing or malformed: mended where the data is prepared."""


class CheckpointError(ShearError):
    """A checkpoint or a Hugging Face directory is missing, damaged or does not fit the model."""


class PlatformError(ShearError):
    """The machine lacks what the run asks for: mended by installing it or by asking for less."""


class RankError(ShearError):
    """Another process of the run hangs or died: mended on its machine, then by starting again."""


class TrainingError(ShearError):
    """The optimisation went wrong (a non-finite loss): mended by other settings or other data."""
