"""Read files that anybody may have written, and report problems in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megashear.errors import CheckpointError
from megashear.files import read_small

MAX_LINES, MAX_LENGTH = 50, 500
"""Problems in one message, and characters of each; a wrong file can cause thousands."""


def refuse(source: object, problems: Sequence[str]) -> NoReturn:
    """Raise one CheckpointError that lists every problem found in `source`."""
    count = len(problems)
    lines = [f"{source}: {count} problem{'s' if count != 1 else ''}"]
    lines += [f"  {printable(problem)}" for problem in problems[:MAX_LINES]]
    lines += [f"  and {count - MAX_LINES} more"] if count > MAX_LINES else []
    raise CheckpointError("\n".join(lines))


def printable(text: str) -> str:
    """Return text of a foreign file as one line without control characters, cut if it is long."""
    text = text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def read_json(file: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds.

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
