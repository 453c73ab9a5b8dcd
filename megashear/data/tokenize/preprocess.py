"""Tokenize JSONL files into Megatron token files: what `megashear tokenize` does.

Documents keep their order, whatever the number of processes and interruptions.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megashear.data.fingerprint import Fingerprint
from megashear.data.tokenize.encoding import Encoded, Encoding, encode_all
from megashear.data.tokenize.jsonl import find_inputs
from megashear.data.tokenize.token_files import SUFFIXES, Counts, token_type
from megashear.data.tokenize.unfinished import Job, Unfinished, folder_of, id_of, work_folder
from megashear.errors import DataError
from megashear.tokenizer.load import Tokenizer, load_tokenizer

BYTES_PER_WORKER = 4_000_000  # with less input, another process costs more than it saves
MAX_PROBLEMS = 20
LINE_SECONDS = 5.0  # interval of progress lines, if there is no terminal for a bar


@dataclass(frozen=True)
class TokenizeReport:
    """What `tokenize_files` did."""

    outputs: dict[str, Counts]  # by prefix
    empty: int = 0  # documents skipped because they hold no text
    seconds: float = 0.0  # duration of reading, encoding and writing; 0 if nothing was left to do
    note: str = ""  # what a user should know of contradictions in the tokenizer's files


def tokenize_files(
    inputs: Sequence[str],
    tokenizer: Path | str,
    output: Path | str,
    *,
    valid_fraction: float | None = None,
    field: str = "text",
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> TokenizeReport:
    """Tokenize JSONL files into PREFIX.bin, .idx and .json; a document is [bos] tokens eos.

    A repeated call with the same arguments (except workers, overwrite and progress) continues where
    the work was interrupted, and keeps files that are complete.

    Args:
        inputs: files or glob patterns: JSONL, plain, gzip or zstd.
        tokenizer: see `load_tokenizer`.
        output: PREFIX.
        valid_fraction: fraction of documents for PREFIX_valid; the rest is PREFIX_train. A hash of
            the text decides, so copies of a document are never in both. None: only PREFIX.
        field: name of the text in each record.
        workers: number of processes; None depends on CPUs and the size of the input.
        overwrite: replace files that were made from other input, tokenizer or arguments.
        progress: show progress on stderr.

    Raises:
        DataError: a problem with the input, the tokenizer or the output; nothing is published.
        PlatformError: a worker was killed.
    """
    files = find_inputs(inputs)
    prefixes = _prefixes(str(output), valid_fraction)
    known = load_tokenizer(tokenizer)
    size = sum(file.stat().st_size for file in files)
    workers = _default_workers(size) if workers is None else workers
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be 1 or more")
    job = _job(files, known, field, valid_fraction)
    encoding = Encoding(str(tokenizer), str(job["tokenizer"]), field, valid_fraction or 0.0)
    keep = all(file.is_file() for file in files)  # a pipe cannot be read again
    made = _made_before(prefixes, id_of(job))
    if made and not folder_of(str(output)).exists():
        return TokenizeReport(made, note=known.note)
    try:
        with work_folder(str(output), verbose=progress) as folder:
            work = Unfinished(folder, prefixes, job, token_type(known.vocab_size), keep)
            if not work.progress.finished:
                if made:
                    return TokenizeReport(made, note=known.note)
                _refuse_existing(prefixes, overwrite)
                if work.note and progress:
                    print(f"{output}: {work.note}", file=sys.stderr)
                start = work.progress.end
                with work, _progress(size, start.read, progress) as bar:
                    encoded = encode_all(files, start, encoding, workers)
                    _fill(work, encoded, bar, str(output))
                    work.finish(known)
            work.publish()
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror or error}") from error
    done = work.progress
    outputs = dict(zip(prefixes, done.counts, strict=True))
    return TokenizeReport(outputs, done.empty, done.seconds, known.note)


def _prefixes(output: str, valid_fraction: float | None) -> list[str]:
    """Return the prefixes to write: one, or those of training and validation tokens."""
    if valid_fraction is not None and not 0.0 < valid_fraction < 1.0:
        raise DataError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1")
    if output.endswith(("/", *SUFFIXES)) or Path(output).is_dir():
        raise DataError(f"output {output}: give the files' path without suffix, as in data/prose")
    parts = [""] if valid_fraction is None else ["_train", "_valid"]
    return [output + part for part in parts]


def _job(
    files: Sequence[Path], tokenizer: Tokenizer, field: str, valid_fraction: float | None
) -> Job:
    """Describe all that the result depends on; a pipe never has the same content again."""
    stats = [(str(file), file.stat(), file.is_file()) for file in files]
    return {
        "input": [
            [name, stat.st_size, stat.st_mtime_ns if regular else time.time_ns()]
            for name, stat, regular in stats
        ],
        "tokenizer": [tokenizer.sha256, tokenizer.bos_id, tokenizer.eos_id],
        "field": field,
        "valid fraction": valid_fraction,
    }


def _made_before(prefixes: Sequence[str], job_id: str) -> dict[str, Counts]:
    """Return the counts of existing files, if all are complete and this very job made them."""
    made = {}
    for prefix in prefixes:
        if not all(Path(prefix + suffix).exists() for suffix in SUFFIXES):
            return {}
        found = Fingerprint.read(prefix)
        size = found.tokens * token_type(found.vocab_size).itemsize
        if found.made_from != job_id or Path(f"{prefix}.bin").stat().st_size != size:
            return {}
        made[prefix] = Counts(found.documents, found.tokens, found.highest_id or 0)
    return made


def _refuse_existing(prefixes: Sequence[str], overwrite: bool) -> None:
    paths = [Path(prefix + suffix) for prefix in prefixes for suffix in SUFFIXES]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise DataError(
            f"existing files from other input, tokenizer or options: {', '.join(existing)}. Use "
            "--overwrite to replace them"
        )


def _default_workers(size: int) -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # the CPUs of a Slurm job; not on macOS
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cpus, 1 + size // BYTES_PER_WORKER)


def _fill(
    work: Unfinished, encoded: Generator[Encoded, None, None], bar: tqdm, output: str
) -> None:
    """Write all documents. Problems are collected and raised together."""
    problems: list[str] = []
    with closing(encoded):
        for chunk in encoded:
            problems += chunk.problems
            if len(problems) >= MAX_PROBLEMS:
                break
            if not problems:  # else nothing will be published
                work.add(chunk.parts, chunk.end, chunk.empty)
            tokens = sum(count.tokens for count in work.progress.counts)
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(chunk.end.read - bar.n)
    if problems:
        found = problems[:MAX_PROBLEMS]
        lines = "line" if len(found) == 1 else "lines"
        more = "; there may be more" if len(found) == MAX_PROBLEMS else ""
        head = f"{len(found)} malformed {lines}; {output} was not written{more}:"
        raise DataError("\n  ".join([head, *found]))
    counts, empty = work.progress.counts, work.progress.empty
    documents = sum(count.documents for count in counts)
    if documents == 0:
        raise DataError(f"the input of {output} holds no text ({empty:,} empty documents)")
    for prefix, count in zip(work.prefixes, counts, strict=True):
        if count.documents == 0:
            raise DataError(
                f"none of {documents:,} documents is for {prefix}. Give more text, or another "
                "valid fraction"
            )


def _progress(size: int, done: int, shown: bool) -> tqdm:
    """Show bytes read and tokens made: a bar on a terminal, else a line every few seconds."""
    line = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"
    plain = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "bar_format": line, "leave": True}
    style: dict[str, Any] = {"leave": False} if sys.stderr.isatty() else plain
    style |= {"unit": "B", "unit_scale": True, "miniters": 1}
    return tqdm(total=size, initial=done, disable=not shown, **style)
