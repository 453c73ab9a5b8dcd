"""How a command ends and how a table looks, for `megashear` and everything in tools/.

Imports the standard library and `errors` only.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

from megashear.errors import RankError, ShearError

FAILED, USAGE, LOST, BROKEN_PIPE = 1, 2, 75, 141
"""Exit statuses: a negative answer; wrong use or input; a rank is lost, so start again; the
reader of stdout left. For a signal it is 128 + its number, as in a shell."""
SIGNAL_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}

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
        status = _status(main)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        status = BROKEN_PIPE
    sys.exit(status)


def _status(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except ShearError as error:
        say(f"error: {error}")
        return LOST if isinstance(error, RankError) else USAGE
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        say(SIGNAL_WORDS[number])
        return 128 + int(number)


def say(text: str) -> None:
    """Print a message on stderr; on a terminal over a bar, which another rank may have left."""
    try:
        print("\r\x1b[K" * sys.stderr.isatty() + text, file=sys.stderr, flush=True)
    except OSError:  # a terminal that is lost
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Point a stream at /dev/null: Python flushes it once more while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave_terminal() -> None:
    """Discard from now on what is printed to a terminal; a file or a pipe still gets it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):  # isatty denies a lost one
                _discard(stream)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a scheduler's limit, a lost terminal) end the block as Ctrl-C does.

    Only what would end the process is caught: no signal that is ignored (nohup) or handled.
    """
    process = os.getpid()

    def interrupt(number: int, _: Any) -> None:
        if os.getpid() != process:  # a fork has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        for caught in mine:
            signal.signal(caught, signal.SIG_IGN)  # a second one must not end the cleaning up
        raise KeyboardInterrupt(signal.Signals(number))

    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    stops = (signal.SIGTERM, signal.SIGHUP) if is_main else ()
    mine = [number for number in stops if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def progress(
    items: Iterable[T], what: str, total: int, unit: str, *, speaks: bool = True
) -> Iterable[T]:
    """Return the items, with a progress bar if stderr is a terminal and this process `speaks`."""
    from tqdm import tqdm

    return tqdm(items, what, total, unit=f" {unit}", leave=False, disable=None if speaks else True)


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Return plain text in aligned columns, two spaces apart; numbers are aligned right."""
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
