"""One run at a time in a run directory: rank 0 holds a lock on the file `lock` in it.

It is a POSIX lock, unlike `files.locked`: processes that the run forks (data workers, checkpoint
writers) do not inherit it, so the lock ends with the run itself even if one of them lives on; and
it holds between machines that share a file system.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import pwd
import socket
import time
from pathlib import Path
from typing import IO, Any

from megashear.errors import CheckpointError, PlatformError
from megashear.platform import slurm
from megashear.platform.collectives import on_first_process
from megashear.platform.launched import report_once

FORMER_SELF_S = 60.0
"""Seconds that a requeued job waits for its previous incarnation to release the lock."""


class RunLock:
    """Holds the lock from its creation until `close`. All processes create it together.

    Raises:
        CheckpointError: another run holds it.
        PlatformError: the run directory cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.file = run_dir / "lock"
        self._stream: IO[str] | None = None
        if holder := on_first_process(self._take):
            with report_once():
                raise CheckpointError(self._refusal(holder))

    def close(self) -> None:
        """Release the lock."""
        if self._stream is not None:
            self._stream.truncate(0)
            self._stream.close()

    def _take(self) -> dict[str, Any] | None:
        """Lock the file, or return who holds it."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.file.open("a+")
        except OSError as error:
            raise PlatformError(f"run_dir {self.file.parent} cannot be created: {error}") from error
        until = time.monotonic() + FORMER_SELF_S
        while not _lock(self._stream):
            holder = _read(self._stream)
            was_me = slurm.restarts() > 0 and holder.get("job") == slurm.job()
            if not was_me or time.monotonic() > until:
                self._stream.close()
                self._stream = None
                return holder
            time.sleep(1)
        self._stream.truncate(0)
        self._stream.write(json.dumps(_me()) + "\n")
        self._stream.flush()
        return None

    def _refusal(self, holder: dict[str, Any]) -> str:
        job, end = holder.get("job"), "kill it there"
        who = f"process {holder.get('pid', '?')} of {holder.get('user', '?')} "
        who += f"on {holder.get('host', '?')}, since {holder.get('since', '?')}"
        if job:
            who, end = f"Slurm job {job}, {who}", f"scancel --signal=INT {job}"
        return (
            f"{self.file.parent} is in use by another run: {who}. Wait for it to end, end it "
            f"({end}), or give another run_dir. If that machine is gone, remove {self.file}"
        )


def _lock(stream: IO[str]) -> bool:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        warning = "%s cannot be locked (%s): nothing prevents a second run in its directory"
        logging.getLogger(__name__).warning(warning, stream.name, error.strerror)
    return True


def _read(stream: IO[str]) -> dict[str, Any]:
    stream.seek(0)
    try:
        return dict(json.loads(stream.read()))
    except (ValueError, TypeError):
        return {}  # its holder is just writing it


def _me() -> dict[str, Any]:
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container
        user = f"user {os.getuid()}"
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    me = {"host": socket.gethostname(), "pid": os.getpid(), "user": user, "since": since}
    return {**me, "job": slurm.job()}
