"""Reads files that anybody may have written, and shows what they say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megashear.errors import CheckpointError
from megashear.files import read_small

MOST_LINES, LONGEST_LINE = 50, 500
"""Problems that one message lists, and characters of each; wrong files can make thousands."""


def refuse(source: object, problems: Sequence[str]) -> NoReturn:
    """Raise one CheckpointError that lists every problem found in `source`."""
    count = len(problems)
    lines = [f"{source}: {count} problem{'s' if count != 1 else ''}"]
    lines += [f"  {printable(problem)}" for problem in problems[:MOST_LINES]]
    lines += [f"  and {count - MOST_LINES} more"] if count > MOST_LINES else []
    raise CheckpointError("\n".join(lines))


def printable(text: str) -> str:
    """A line that says what a foreign file says, and does nothing to a terminal."""
    text = text if len(text) <= LONGEST_LINE else f"{text[:LONGEST_LINE]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        CheckpointError: it is missing or holds something else.
    """
    try:
        value = json.loads(read_small(file))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must be a mapping")
    return value
