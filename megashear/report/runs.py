"""A run as its directory tells it, whatever state that is in: unfinished, empty or damaged.

Reads files only, and neither torch nor Megatron is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megashear.errors import DataError
from megashear.files import read_small
from megashear.records import KEPT_UNITS_FILE, METRICS, unpack, upgrade

CONFIG = "config.yaml"
_OF_A_RUN = {METRICS, CONFIG, "checkpoints", "lock", "report.html"}
"""One of them is in a directory that a run, or a report of it, has begun to fill."""
KINDS = ("start", "step", "evaluation", "save", "end")


@dataclass
class RecordedRun:
    """What a run has recorded so far.

    Attributes:
        records: of each kind (`megashear.records`), in the order of the file; a step that was done
            again after a start is there once, as the last that was written.
        config: the run's options, as its YAML file; empty before its first checkpoint.
        masks: kept units by mask and row, as `[rows][units]` of 0 and 1; empty but in stage prune.
        problems: what could not be read, one line each.
        newest: the last record of the file; empty before the first.
        step: optimizer steps done.
    """

    directory: Path
    records: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {k: [] for k in KINDS})
    config: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, list[list[int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    newest: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    _file: int = 0  # number of the inode of METRICS
    _position: int = 0  # bytes of it that are read
    _line: int = 0
    _redone: set[str] = field(default_factory=set)  # kinds that may go back since a start

    @classmethod
    def read(cls, directory: Path) -> RecordedRun:
        """Read all that is there.

        Raises:
            DataError: there is no directory.
        """
        if not directory.is_dir():
            raise DataError(f"{directory} is no directory of a run")
        run = cls(directory)
        run.follow()
        run._read_masks()
        return run

    def follow(self) -> bool:
        """Read the records that have been written since; whether there were any."""
        if not self.config:  # it is there from the first checkpoint on
            self._read_config()
        file = self.directory / METRICS
        try:
            with file.open("rb") as stream:
                state = os.fstat(stream.fileno())
                if state.st_ino != self._file or state.st_size < self._position:
                    self._begin_again(state.st_ino)  # a resume has dropped records
                stream.seek(self._position)
                text = stream.read()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._problem(f"{METRICS}: {error.strerror}")
            return False
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        for line in whole.splitlines():
            self._line += 1
            self._take(line)
        self._position += len(whole)
        return bool(whole)

    def _begin_again(self, file: int) -> None:
        config, masks = self.config, self.masks
        others = [problem for problem in self.problems if not problem.startswith(METRICS)]
        fresh = RecordedRun(self.directory, config=config, masks=masks, problems=others)
        self.__dict__.update(vars(fresh))
        self._file = file

    def _take(self, line: bytes) -> None:
        try:
            record = upgrade(json.loads(line))
            known = self.records.get(record["kind"])
            step = record["step"] = int(record["step"])
            if not 0 <= step < 2**53:
                raise ValueError(step)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            self._problem(f"{METRICS}, line {self._line}: not a record; passed over")
            return
        if known is None:  # of a later schema
            return
        if record["kind"] == "start":
            self._redone = {"step", "evaluation"}
        elif record["kind"] in ("step", "evaluation") and not self._make_room(known, record):
            return
        known.append(record)
        self.newest = record
        if record["kind"] != "save":  # which may have been written while training went on
            self.step = step

    def _make_room(self, known: list[dict[str, Any]], record: dict[str, Any]) -> bool:
        """Whether a record's step can be true; drops what it does again.

        Steps go back only to a start that came in between. Else a number is damaged: that before,
        where it alone is too high, or this one.
        """
        kind, step = record["kind"], record["step"]
        if kind in self._redone and step >= self.start["step"]:
            self._redone.discard(kind)
            while known and known[-1]["step"] >= step:
                known.pop()
        last = known[-1]["step"] if known else -1
        if last < step:
            return True
        is_true = len(known) < 2 or known[-2]["step"] < step
        if is_true:
            known.pop()
        if not is_true or last > step:
            told = f"{METRICS}, line {self._line}: {kind} {step} after {last}, no start between"
            self._problem(f"{told}; that of {last if is_true else step} is passed over")
        return is_true

    def _read_config(self) -> None:
        try:
            tree = yaml.safe_load(read_small(self.directory / CONFIG))
            self.config = tree if isinstance(tree, dict) else {}
        except FileNotFoundError:
            return
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            self._problem(f"{CONFIG}: {str(error).splitlines()[0]}")

    def _read_masks(self) -> None:
        try:
            stored = json.loads(read_small(self.directory / KEPT_UNITS_FILE))
            self.masks = {name: unpack(mask) for name, mask in stored["masks"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._problem(f"{KEPT_UNITS_FILE}: {type(error).__name__}: {error}")

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    def last(self, kind: str) -> dict[str, Any]:
        """The newest record of a kind; empty where there is none."""
        return self.records[kind][-1] if self.records[kind] else {}

    @property
    def start(self) -> dict[str, Any]:
        """The newest start record; empty where there is none."""
        return self.last("start")

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, where it is known."""
        trainer = self.config.get("trainer")
        configured = trainer.get("steps") if isinstance(trainer, dict) else None
        return self.start.get("steps", configured)


def reject_unrelated_directories(directories: Sequence[Path]) -> None:
    """Tell of directories that hold something else; what is empty or not there may become a run.

    Raises:
        DataError: with a line for each.
    """
    lines = []
    for directory in directories:
        try:
            names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        except OSError as error:
            lines.append(f"{directory} cannot be read: {error.strerror}")
            continue
        if names and not names & _OF_A_RUN:
            lines.append(
                f"{directory} is no directory of a run: it has none of {METRICS}, {CONFIG} and "
                "checkpoints"
            )
    if lines:
        raise DataError("\n".join(lines))
