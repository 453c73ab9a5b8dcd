"""Read a run from its directory, which may be unfinished, empty or damaged.

The records are read strictly: a line of metrics.jsonl that is no record is named, and nothing after
it is read. Imports neither torch nor Megatron.
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
from megashear.files import read_small, write_whole
from megashear.records import KEPT_UNITS_FILE, METRICS, unpack, upgrade

CONFIG = "config.yaml"
_OF_A_RUN = {METRICS, CONFIG, "checkpoints", "lock", "report.html"}
"""Files of a run's directory; one that has none of them belongs to something else."""
CHAIN_RUNS = "runs.json"
"""In the work directory of a chain: the directories of its runs, relative to it."""
KINDS = ("start", "step", "evaluation", "save", "end")


@dataclass
class RecordedRun:
    """What a run has recorded so far.

    Attributes:
        records: records by kind (`megashear.records`), in the order of the file; of a step that was
            repeated after a resume, the last one.
        config: the run's options; empty before its first checkpoint.
        masks: kept units by mask, as `[rows][units]` of 0 and 1; empty except in stage prune.
        problems: what could not be read, one line each.
        newest: the last record of the file; empty before the first.
        step: optimizer steps completed.
    """

    directory: Path
    records: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {k: [] for k in KINDS})
    config: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, list[list[int]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    newest: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    _file: int = 0  # inode of METRICS
    _position: int = 0  # bytes of it that were read
    _line: int = 0
    _is_damaged: bool = False  # a line is no record

    @classmethod
    def read(cls, directory: Path) -> RecordedRun:
        """Read everything that the directory has.

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
        """Read the records that were written since the last call; return whether there were any."""
        if not self.config:  # a run writes it at its first checkpoint
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
            self.report_problem(f"{METRICS}: {error.strerror}")
            return False
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        for line in whole.splitlines():
            self._line += 1
            if self._is_damaged:
                break
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
        """Add the record in a line; the first line that is no record ends the reading."""
        record = _record(line)
        if problem := "not a record" if record is None else self._add(record):
            self.report_problem(
                f"{METRICS}, line {self._line}: {problem}. Nothing after it is shown"
            )
            self._is_damaged = True

    def _add(self, record: dict[str, Any]) -> str:
        """Add a record; return why its step cannot be true, or nothing."""
        kind, step = record["kind"], record["step"]
        if (known := self.records.get(kind)) is None:  # of a later schema
            return ""
        if kind == "start":  # training resumes from its step
            for repeated in (self.records["step"], self.records["evaluation"]):
                while repeated and repeated[-1]["step"] > step:
                    repeated.pop()
        elif kind in ("step", "evaluation") and known:
            if step < (last := known[-1]["step"]):
                return f"{kind} {step} after {last}, and no start between them"
            if step == last:  # repeated after a resume
                known.pop()
        known.append(record)
        self.newest = record
        if kind != "save":  # an asynchronous save may be recorded after later steps
            self.step = step
        return ""

    def _read_config(self) -> None:
        try:
            tree = yaml.safe_load(read_small(self.directory / CONFIG))
            self.config = tree if isinstance(tree, dict) else {}
        except FileNotFoundError:
            return
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            self.report_problem(f"{CONFIG}: {str(error).splitlines()[0]}")

    def _read_masks(self) -> None:
        try:
            stored = json.loads(read_small(self.directory / KEPT_UNITS_FILE))
            self.masks = {name: unpack(mask) for name, mask in stored["masks"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.report_problem(f"{KEPT_UNITS_FILE}: {type(error).__name__}: {error}")

    def report_problem(self, text: str) -> None:
        """Add a problem, once."""
        if text not in self.problems:
            self.problems.append(text)

    def last(self, kind: str) -> dict[str, Any]:
        """The newest record of a kind; empty if there is none."""
        return self.records[kind][-1] if self.records[kind] else {}

    @property
    def start(self) -> dict[str, Any]:
        """The newest start record; empty if there is none."""
        return self.last("start")

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, if they are known."""
        trainer = self.config.get("trainer")
        configured = trainer.get("steps") if isinstance(trainer, dict) else None
        return self.start.get("steps", configured)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is none."""
    try:
        record = upgrade(json.loads(line))
        step = record["step"]
        is_record = isinstance(record["kind"], str) and type(step) is int and 0 <= step < 2**53
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if is_record else None


def write_chain_runs(work_dir: Path, run_dirs: Sequence[str]) -> None:
    """Note the runs of a chain in its work directory, so that `watch` and `report` find them."""
    relative = [os.path.relpath(run_dir, work_dir) for run_dir in run_dirs]
    write_whole(work_dir / CHAIN_RUNS, json.dumps(relative))


def run_directories(directories: Sequence[Path]) -> list[Path]:
    """Replace the work directory of a chain by the directories of its runs; each is there once."""
    found: dict[Path, Path] = {}
    for directory in directories:
        try:
            names = json.loads(read_small(directory / CHAIN_RUNS))
            runs = [Path(os.path.normpath(directory / name)) for name in names]
        except (OSError, ValueError, TypeError):
            runs = [directory]
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def reject_unrelated_directories(directories: Sequence[Path]) -> None:
    """Refuse directories that hold something else; an empty or absent one may become a run.

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
