"""A command in a fork of this process, which has imported torch: that takes 3 to 5 s."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn


class Forked:
    """A function that goes on in a fork, with files for its stdout and stderr.

    Args:
        function: its SystemExit gives the status.
        cwd: where it runs.
        variables: of its environment; None unsets one.
    """

    def __init__(
        self, function: Callable[[], Any], cwd: str | os.PathLike[str], **variables: str | None
    ) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, cwd, variables)

    def _run(self, function: Callable[[], Any], cwd: Any, variables: dict[str, Any]) -> NoReturn:
        status = 1
        gc.freeze()  # what this process left is not for the fork to free
        try:
            for number, file in enumerate(self._files, 1):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.chdir(cwd)
            for name, value in variables.items():
                os.environ.pop(name, None)
                os.environ.update({name: value} if value is not None else {})
            status = function() or 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def said(self) -> tuple[str, str]:
        """What is in stdout and stderr by now."""
        # Not by seek and read: the fork writes where the files, which it shares, stand.
        out, err = (os.pread(file.fileno(), 1 << 24, 0).decode() for file in self._files)
        return out, err

    def send_signal(self, number: signal.Signals) -> None:
        """Send it to the fork."""
        os.kill(self.pid, number)

    def end(self, timeout: float) -> tuple[int, str, str]:
        """Wait for the end: status (minus a signal that ended it), stdout, stderr."""
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1]), *self.said()
