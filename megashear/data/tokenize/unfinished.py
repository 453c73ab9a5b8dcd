"""What `megashear tokenize` has done so far, so that it can go on where it stopped.

The files of PREFIX are made in the hidden folder `.NAME.tokenize` beside it. A journal there says
how much of the input is in them, and of which job they are. Imports `errors` and its siblings.
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
from megashear.data.tokenize.jsonl import START, Place
from megashear.data.tokenize.token_files import Counts, Documents, TokenFile, holds, publish
from megashear.errors import DataError, PlatformError
from megashear.files import locked, write_whole
from megashear.tokenizer.load import Tokenizer

SAVE_SECONDS = 10.0  # of work, at most, are lost by a crash
_JOURNAL = "journal.json"

Job = dict[str, Any]
"""All that a result depends on, in terms of JSON."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    counts: tuple[Counts, ...]  # of each token file
    end: Place = START  # of the input that is in them
    empty: int = 0  # documents of it that hold no text
    seconds: float = 0.0  # of work
    finished: bool = False  # all input is in them: what remains is to move them to their places


def folder_of(output: str) -> Path:
    """Where the unfinished files of PREFIX are."""
    return Path(output).with_name(f".{Path(output).name}.tokenize")


def id_of(job: Job) -> str:
    """Hash of a job."""
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()


@contextmanager
def workplace(output: str, *, says: bool = False) -> Iterator[Path]:
    """The folder for the unfinished files of PREFIX, for one process at a time.

    It is removed at the end unless a journal in it says how to go on; then this is said.

    Raises:
        DataError: another process is at work there.
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
            elif says:
                text = f"what is done is kept in {folder}: the same command goes on there"
                print(text, file=sys.stderr)


class Unfinished:
    """The token files of a job in the making, as a context that opens and closes them.

    Args:
        folder: their `workplace`.
        prefixes: of their places.
        job: makes them.
        dtype: of tokens.
        keep: whether the input can be read again from where it stopped.

    Attributes:
        progress: what is in the files.
        note: how it begins, where that is not at the beginning, or in spite of a journal.
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
            (self.folder / _JOURNAL).unlink(missing_ok=True)  # of files that are cut now
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
            elif kind is DataError:  # the input must change, and then this is of another
                (self.folder / _JOURNAL).unlink(missing_ok=True)

    def add(self, parts: Sequence[Documents], end: Place, empty: int) -> None:
        """Append documents to each file: all of the input up to `end`."""
        for file, documents in zip(self._files, parts, strict=True):
            file.add(documents)
        now = zip(self.progress.counts, parts, strict=True)
        counts = tuple(before.plus(documents) for before, documents in now)
        empty += self.progress.empty
        # In one assignment, so that an interrupt leaves it as it was, or whole.
        self.progress = replace(self.progress, counts=counts, end=end, empty=empty)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Make the progress survive whatever may happen, if there is any."""
        now = time.monotonic()
        seconds = self.progress.seconds + now - self._saved
        self.progress, self._saved = replace(self.progress, seconds=seconds), now
        if self.progress.finished or (self._keep and self.progress.end != START):
            for file in self._files:
                file.flush()
            content = {"job": self._job, "progress": asdict(self.progress)}
            write_whole(self.folder / _JOURNAL, json.dumps(content) + "\n")

    def finish(self, tokenizer: Tokenizer) -> None:
        """Write what belongs beside the tokens; after that only `publish` remains."""
        known = (tokenizer.sha256, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        self.save()
        for file, counts in zip(self._files, self.progress.counts, strict=True):
            file.finish(Fingerprint(*known, **asdict(counts), made_from=id_of(self._job)))
        self.progress = replace(self.progress, finished=True)
        self.save()

    def publish(self) -> None:
        """Move the files to their places."""
        publish(self.prefixes, self.folder)
        (self.folder / _JOURNAL).unlink()

    def _read(self) -> Progress:
        """What the journal says, if it is of this job."""
        fresh = Progress((Counts(),) * len(self.prefixes))
        try:
            content = json.loads((self.folder / _JOURNAL).read_bytes())
            job, saved = content["job"], content["progress"]
            counts = tuple(Counts(**count) for count in saved.pop("counts"))
            progress = Progress(counts, Place(**saved.pop("end")), **saved)
            changed = [name for name, value in self._job.items() if job.get(name) != value]
            wrong = f"of another {' and '.join(changed)}" if changed else ""
            if not (wrong or progress.finished):
                kept = zip(self.prefixes, counts, strict=True)
                held = all(holds(self.folder, *each, self._dtype) for each in kept)
                wrong = "" if held else "damaged"
        except FileNotFoundError:
            return fresh
        except (ValueError, TypeError, KeyError, AttributeError):
            wrong = "damaged"
        if wrong:
            self.note = f"unfinished work in {self.folder} is {wrong}: beginning anew"
            return fresh
        documents = sum(count.documents for count in counts)
        self.note = f"going on where it stopped, after {documents:,} documents"
        return progress
