"""Unfinished work of `megashear tokenize`, so that it can continue where it was interrupted.

The files of PREFIX are written in the hidden folder `.NAME.tokenize` next to it. A journal there
says which job they belong to, and how much of the input they hold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megashear.data.fingerprint import Fingerprint
from megashear.data.tokenize.jsonl import START, Position
from megashear.data.tokenize.token_files import Counts, Documents, TokenFile, holds, publish
from megashear.errors import DataError, PlatformError
from megashear.files import locked, write_whole
from megashear.tokenizer.load import Tokenizer

SAVE_SECONDS = 10.0  # work that a crash loses, at most
_JOURNAL = "journal.json"

Job = dict[str, Any]
"""All that the result depends on, as JSON values."""


@dataclass(frozen=True)
class Progress:
    """Progress of a job."""

    counts: tuple[Counts, ...]  # counts of each token file
    end: Position = START  # end of the input that the files hold
    empty: int = 0  # documents without text up to there
    seconds: float = 0.0  # duration of the work
    finished: bool = False  # the files hold all input, and remain to be published


def folder_of(output: str) -> Path:
    """Return the folder of the unfinished files of PREFIX."""
    return Path(output).with_name(f".{Path(output).name}.tokenize")


def id_of(job: Job) -> str:
    """Return the hash of a job."""
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()


@contextmanager
def work_folder(output: str, *, verbose: bool = False) -> Iterator[Path]:
    """Lock the folder of the unfinished files of PREFIX for this process.

    It is removed at the end unless it has a journal to continue from; `verbose` prints that.

    Raises:
        DataError: another process is using it.
    """
    folder = folder_of(output)
    lock = folder / "lock"
    text = f"another `megashear tokenize` is writing {output} (it holds {lock}). Wait for it to "
    with locked(lock, DataError(text + "end, or give another --output")):
        try:
            yield folder
        finally:
            if not (folder / _JOURNAL).exists():
                shutil.rmtree(folder)
            elif verbose:
                text = f"unfinished work is kept in {folder}: the same command continues it"
                print(text, file=sys.stderr)


class Unfinished:
    """The unfinished token files of a job, as a context that opens and closes them.

    Args:
        folder: their `work_folder`.
        prefixes: prefixes of the finished files.
        job: the job that makes them.
        dtype: dtype of the tokens.
        keep: whether the input can be read again from where it was interrupted.

    Attributes:
        progress: what the files hold.
        note: message about a journal that was found; empty if there is none.
    """

    def __init__(
        self, folder: Path, prefixes: Sequence[str], job: Job, dtype: np.dtype, keep: bool
    ) -> None:
        self.folder, self.note = folder, ""
        self.prefixes, self._job, self._dtype, self._keep = prefixes, job, dtype, keep
        self.progress = self._read()
        self._files: list[TokenFile] = []
        self._saved = time.monotonic()

    def __enter__(self) -> Unfinished:
        if self.progress.end == START:
            (self.folder / _JOURNAL).unlink(missing_ok=True)  # its files are truncated now
        for prefix, counts in zip(self.prefixes, self.progress.counts, strict=True):
            self._files.append(TokenFile(prefix, self.folder, self._dtype, counts))
        self._saved = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)
            if kind in (KeyboardInterrupt, PlatformError):
                self.save()
            elif kind is DataError:  # the input must change, which makes it another job
                (self.folder / _JOURNAL).unlink(missing_ok=True)

    def add(self, parts: Sequence[Documents], end: Position, empty: int) -> None:
        """Append documents to each file: the rest of the input up to `end`."""
        for file, documents in zip(self._files, parts, strict=True):
            file.add(documents)
        now = zip(self.progress.counts, parts, strict=True)
        counts = tuple(before.plus(documents) for before, documents in now)
        empty += self.progress.empty
        # One assignment, so that an interrupt leaves the old or the new progress.
        self.progress = replace(self.progress, counts=counts, end=end, empty=empty)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Flush the files and write the journal, if there is progress to keep."""
        now = time.monotonic()
        seconds = self.progress.seconds + now - self._saved
        self.progress, self._saved = replace(self.progress, seconds=seconds), now
        if self.progress.finished or (self._keep and self.progress.end != START):
            for file in self._files:
                file.flush()
            content = {"job": self._job, "progress": asdict(self.progress)}
            write_whole(self.folder / _JOURNAL, json.dumps(content) + "\n")

    def finish(self, tokenizer: Tokenizer) -> None:
        """Write indices and fingerprints; after that only `publish` remains."""
        known = (tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        self.save()
        for file, counts in zip(self._files, self.progress.counts, strict=True):
            file.finish(Fingerprint(*known, **asdict(counts), made_from=id_of(self._job)))
        self.progress = replace(self.progress, finished=True)
        self.save()

    def publish(self) -> None:
        """Move the files to their destination."""
        publish(self.prefixes, self.folder)
        (self.folder / _JOURNAL).unlink()

    def _read(self) -> Progress:
        """Return the progress that the journal records, if it belongs to this job."""
        fresh = Progress((Counts(),) * len(self.prefixes))
        try:
            content = json.loads((self.folder / _JOURNAL).read_bytes())
            job, saved = content["job"], content["progress"]
            counts = tuple(Counts(**count) for count in saved.pop("counts"))
            progress = Progress(counts, Position(**saved.pop("end")), **saved)
            changed = [name for name, value in self._job.items() if job.get(name) != value]
            wrong = f"from another {' and '.join(changed)}" if changed else ""
            if not (wrong or progress.finished):
                kept = zip(self.prefixes, counts, strict=True)
                held = all(holds(self.folder, *each, self._dtype) for each in kept)
                wrong = "" if held else "damaged"
        except FileNotFoundError:
            return fresh
        except (ValueError, TypeError, KeyError, AttributeError):
            wrong = "damaged"
        if wrong:
            self.note = f"unfinished work in {self.folder} is {wrong}: starting again"
            return fresh
        documents = sum(count.documents for count in counts)
        self.note = f"continuing after {documents:,} documents"
        return progress
