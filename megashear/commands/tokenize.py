"""`megashear tokenize`: JSONL text to the token files that training reads."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from megashear import console
from megashear.errors import DataError


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "tokenize",
        help="JSONL text to the token files that training reads",
        description="Write JSONL text (plain, gzip or zstd) as Megatron token files, one domain\n"
        "at a time: PREFIX.bin, PREFIX.idx, and PREFIX.json, which names their tokenizer.\n"
        "After an interruption the same command continues where it stopped; until then its files\n"
        "are in the hidden folder .NAME.tokenize next to PREFIX. docs/data.md describes the files.",
        epilog="example: each file of a folder is a domain, with 5% of its documents held out as\n"
        "data/NAME_valid\n\n"
        "  megashear tokenize --input 'text/*.jsonl' --output 'data/{name}' \\\n"
        "      --tokenizer llama/tokenizer.model --valid-fraction 0.05",
    )
    option = parser.add_argument
    option("--input", nargs="+", required=True, metavar="FILE", help="files or quoted patterns")
    option(
        "--tokenizer",
        required=True,
        metavar="PATH",
        help="sentencepiece .model, Hugging Face tokenizer.json, or a folder with one of them",
    )
    option(
        "--output",
        required=True,
        metavar="PREFIX",
        help="path of the token files without suffix; with {name} in it, each input file becomes a "
        "domain, and {name} stands for the file's name without suffixes",
    )
    option(
        "--valid-fraction",
        type=float,
        metavar="F",
        help="write PREFIX_train and PREFIX_valid, which gets this fraction of the documents; a "
        "hash of the text decides, so copies of a document are on the same side",
    )
    option("--field", default="text", help="field of a record that holds its text (default: text)")
    option("--workers", type=int, metavar="N", help="processes (default: as many as CPUs)")
    option(
        "--overwrite",
        action="store_true",
        help="replace existing files of other input, tokenizer or options; files that the same "
        "command has made are kept",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Tokenize every domain that the arguments name, and print the number of its tokens."""
    from megashear.data.tokenize.preprocess import tokenize_files

    # So that SIGTERM of a batch system keeps finished work, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows, problems, empty = [], [], 0
    notes: set[str] = set()
    for output, inputs in _domains(args.input, args.output).items():
        try:
            report = tokenize_files(
                inputs,
                args.tokenizer,
                output,
                valid_fraction=args.valid_fraction,
                field=args.field,
                workers=args.workers,
                overwrite=args.overwrite,
                progress=True,
            )
        except DataError as error:  # the other domains do not depend on this one
            problems.append(str(error))
            continue
        empty += report.empty
        if report.note and report.note not in notes:
            notes.add(report.note)
            print(report.note, file=sys.stderr)
        tokens = sum(made.tokens for made in report.outputs.values())
        speed = f"{tokens / report.seconds:,.0f}" if report.seconds else "there already"
        for prefix, made in report.outputs.items():
            rows.append((prefix, f"{made.documents:,}", f"{made.tokens:,}", speed))
    if rows:
        print(console.table(rows, ("output", "documents", "tokens", "tokens/s")))
    if empty:
        print(f"skipped {empty:,} empty documents")
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))


def _domains(inputs: Sequence[str], output: str) -> dict[str, list[str]]:
    """Return the input files by the prefix that they are written to.

    Raises:
        DataError: two files would make one domain, or the output has another placeholder.
    """
    from megashear.data.tokenize.jsonl import find_inputs

    if "{name}" not in output:
        if "{" in output:
            raise DataError(f"--output {output}: the one placeholder is {{name}}")
        return {output: list(inputs)}
    files: dict[str, list[str]] = {}
    for file in find_inputs(inputs):
        name = re.sub(r"(\.jsonl?)?(\.gz|\.zst)?$", "", file.name)
        files.setdefault(output.replace("{name}", name), []).append(str(file))
    if shared := [f"  {prefix}: {', '.join(f)}" for prefix, f in files.items() if len(f) > 1]:
        raise DataError(
            "files of one name would make one domain:\n" + "\n".join(shared) + "\nRename them, or "
            "tokenize that domain with an --output of its own"
        )
    return files
