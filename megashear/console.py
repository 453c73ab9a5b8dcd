"""How a command ends and how a table looks, for `megashear` and everything in tools/.

Imports the standard library and `errors` only.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from megashear.errors import RankError, ShearError

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit statuses: a negative answer, or a rank is lost; wrong use or input; Ctrl-C; the reader of
our output left."""

T = TypeVar("T")


def run(main: Callable[[], int | None]) -> None:
    """Run a command's main function and leave the process with its exit status.

    A ShearError becomes one message on stderr and a status; a bug keeps its traceback.
    """
    # One for every optional package that is not there, at every import; the log says what is used.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # How Megatron's checkpoints call torch (a deprecated class, in 0.19 an old order of arguments,
    # and one process reading for all): nothing a user can change.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
    # Collectives that Megatron calls by names which torch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On a login node (torch with CUDA, a compiler, no GPU) Megatron's imports make it warn.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        status = main() or 0
        sys.stdout.flush()
    except ShearError as error:
        print(f"error: {error}", file=sys.stderr)
        status = FAILED if isinstance(error, RankError) else USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more while it exits: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    sys.exit(status)


def progress(
    items: Iterable[T], what: str, total: int, unit: str, *, speaks: bool = True
) -> Iterable[T]:
    """The same items, with a progress bar where somebody watches and this process `speaks`."""
    from tqdm import tqdm

    return tqdm(items, what, total, unit=f" {unit}", leave=False, disable=None if speaks else True)


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Plain text in aligned columns, two spaces apart; a column of numbers stands to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    lines = ([list(header)] if header else []) + body
    columns = []
    for column in zip(*lines, strict=True):
        numbers = bool(body) and all(map(_is_number, column[-len(body) :]))
        width = max(map(len, column))
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%"))
    except ValueError:
        return False
    return True
