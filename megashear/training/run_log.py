"""Write the records of a run to metrics.jsonl and to its views. Only rank 0 writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megashear.config.schema import RunConfig
from megashear.errors import PlatformError
from megashear.files import flush, write_durably
from megashear.records import METRICS, Record
from megashear.training.terminal import Terminal
from megashear.training.views import View, views


class RunLog:
    """Appends records to metrics.jsonl, and shows them on the console and in the views of `log`.

    Args:
        config: configuration of the run.
        writes: whether this process writes (rank 0); the others are silent.
        resumed_step: step that the run resumes from: records of later steps are dropped, since
            these steps are repeated. None in a new run, which drops the records of all steps.
    """

    def __init__(self, config: RunConfig, writes: bool, resumed_step: int | None) -> None:
        self.config, self.writes, self.resumed_step = config, writes, resumed_step
        self.file = Path(config.run_dir) / METRICS  # RunLock has made the directory
        self._terminal = Terminal(config.trainer)
        self._views: list[View] = [self._terminal]
        if writes:
            self._drop_after(resumed_step)

    def _drop_after(self, step: int | None) -> None:
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                repeated = step is None or record["step"] > step
                keep = not repeated or record["kind"] in ("start", "end")
            except (ValueError, TypeError, KeyError):
                continue  # a line cut by a crash belongs to a step that is repeated
            if keep:
                kept.append(line + "\n")
        write_durably(self.file, "".join(kept), PlatformError)

    def flush(self) -> None:
        """Flush the records to disk before a checkpoint is written.

        A run that resumes from the checkpoint writes only the records of later steps.
        """
        if self.writes and self.file.exists():  # it does not before the first record
            flush(self.file)
            flush(self.file.parent)

    def say(self, text: str) -> None:
        """Print a message, on rank 0 only."""
        if self.writes:
            self._terminal.say(text)

    def warn(self, text: str) -> None:
        """Print a message on stderr, on rank 0 only."""
        if self.writes:
            self._terminal.say(text, sys.stderr)

    def record(self, record: Record) -> None:
        """Append a record to metrics.jsonl and show it in the views, which a start record opens."""
        if not self.writes:
            return
        if record["kind"] == "start":
            self._views += views(self.config, self.resumed_step, self.warn)
        try:
            with self.file.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        except OSError as error:
            raise PlatformError(f"{self.file} cannot be written: {error}") from error
        for view in self._views:
            view.take(record)

    def close(self) -> None:
        """Close the views; messages are still printed."""
        for view in self._views:
            view.close()
