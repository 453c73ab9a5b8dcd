"""Collect the demo's text: real files that every machine with Python and our `.venv` has.

Five domains of clearly different entropy, one `DIR/<domain>.jsonl` each. Only packages that
megashear itself requires are read, so installing development tools does not change the corpus, and
every choice is a function of (seed, file name), so the same machine gives the same corpus.

    python examples/demo/collect_text.py --out demo-run/text --megabytes 8
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import sysconfig
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from itertools import islice, zip_longest
from pathlib import Path

from megashear import console
from megashear.errors import DataError

PACKAGES = (
    *("torch", "torchgen", "numpy", "transformers", "sympy", "networkx", "megatron", "mpmath"),
    *("huggingface_hub", "tokenizers", "safetensors", "setuptools", "jinja2", "fsspec", "yaml"),
)
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "_vendor", "test", "tests"}
DOMAINS = ("data", "stubs", "prose", "cpp", "python")  # those with least text first
DOCUMENT_CHARS = 8000  # a longer file becomes several documents,
DOCUMENTS_PER_FILE = 16  # of which these are taken: no file fills a domain
SHORTEST_DOCUMENT = 200  # characters
SHORTEST_REPEAT = 60  # letters and digits: a shorter paragraph may stand in many documents
MIN_DOMAIN_BYTES, MIN_BYTES = 300_000, 5_000_000  # the demo's YAML names all domains

Document = tuple[str, str]
"""(text, where it comes from)"""

_RULE = re.compile(r"[\s#*/\-=~_.;!%]*")  # a line that only separates, also within a comment
_DOCSTRING = re.compile(r'^[ \t]*r?"""(.*?)"""', re.DOTALL | re.MULTILINE)
_SENTENCES = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()`/.?!\n-]{80,}[.?!:]")


@dataclass(frozen=True)
class DomainReport:
    """What was written for one domain; `ratio` is compressed / plain size, a hint at entropy."""

    name: str
    documents: int
    size: int  # bytes of text
    ratio: float


class Sources:
    """The documents of each domain, duplicates and all, in an order that the seed decides."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.stdlib = Path(sysconfig.get_paths()["stdlib"])
        self.site = Path(sysconfig.get_paths()["purelib"])

    def python(self) -> Iterator[Document]:
        """Python sources, comments and all."""
        return self._python(for_prose=False)

    def cpp(self) -> Iterator[Document]:
        """C and C++ headers that torch and numpy install, less those generated per operator."""
        for text, source in self._read(self.site, (".h", ".hpp", ".cuh"), PACKAGES):
            if not source.startswith("torch/include/ATen/ops/"):
                yield text, source

    def stubs(self) -> Iterator[Document]:
        """Type stubs: signatures without code."""
        yield from self._read(self.site, (".pyi",), PACKAGES)

    def prose(self) -> Iterator[Document]:
        """English: Python's documentation topics, package descriptions and docstrings."""
        for name, text in sorted(documentation_topics().items()):
            yield sentences(text), f"pydoc_data.topics/{name}"
        described = [path.name for path in self.site.glob("*.dist-info")]
        described = [name for name in described if name.lower().startswith(PACKAGES)]
        for text, source in self._read(self.site, ("METADATA", ".md", ".rst"), described):
            yield sentences(text.partition("\n\n")[2]), source
        for text, source in self._python(for_prose=True):
            # A pattern, not a parser: ten times as fast, and `sentences` drops what is no prose.
            docstrings = [cleandoc(found) for found in _DOCSTRING.findall(text)]
            yield sentences("\n\n".join(docstrings)), source

    def data(self) -> Iterator[Document]:
        """Records and tables: JSON, YAML, CSV, time zones, Unicode's table of characters."""
        suffixes = (".json", ".yaml", ".yml", ".csv", ".zi", ".tab")
        yield from self._read(self.site, suffixes, PACKAGES)
        zones = Path("/usr/share/zoneinfo")
        yield from self._read(zones, suffixes, label="zoneinfo/")
        yield from unicode_tables()

    def _python(self, for_prose: bool) -> Iterator[Document]:
        """Sources, in turns from the standard library and from a package; 3 of 4 are for prose.

        So a file's docstrings are never in one domain's training text and another's validation.
        """
        library = self._read(self.stdlib, (".py",), label="stdlib/")
        packages = self._read(self.site, (".py",), PACKAGES)
        turns = (file for pair in zip_longest(library, packages) for file in pair if file)
        for text, source in turns:
            if (hashlib.sha256(source.encode()).digest()[0] % 4 > 0) == for_prose:
                yield text, source

    def _read(
        self, root: Path, suffixes: tuple[str, ...], folders: Sequence[str] = ("",), label: str = ""
    ) -> Iterator[Document]:
        names = []
        for start in folders:
            for folder, below, here in os.walk(root / start):
                below[:] = [name for name in below if name not in SKIPPED_FOLDERS]
                names += [Path(folder, name) for name in here if name.endswith(suffixes)]
        sources = {label + path.relative_to(root).as_posix(): path for path in names}
        for source in shuffled(list(sources), self.seed):
            yield read_text(sources[source]), source


def shuffled(names: list[str], seed: int) -> list[str]:
    """Names in an order where each one's place depends on the seed and itself only."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def read_text(path: Path) -> str:
    """A file's text with plain newlines; "" where it is not UTF-8 text or cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if "\0" in text else text.replace("\r\n", "\n")


def sentences(text: str) -> str:
    """The paragraphs of a text that read like English: a capital, words, a full stop."""
    paragraphs = (paragraph.strip() for paragraph in text.split("\n\n"))
    return "\n\n".join(p for p in paragraphs if _SENTENCES.fullmatch(p) and ">>>" not in p)


def documentation_topics() -> dict[str, str]:
    """What `help("FOR")` and the like print, by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a minimal Python does without
        return {}
    return dict(topics)


def unicode_tables() -> Iterator[Document]:
    """Unicode's named characters, one line each, a table for every 4,096 code points."""
    for start in range(0, sys.maxunicode + 1, 4096):
        rows = []
        for point in range(start, start + 4096):
            name = unicodedata.name(chr(point), "")
            # Names that only repeat the code point or a running number say nothing.
            if name and not re.search(r"[0-9A-F]{3,}$|^HANGUL SYLLABLE", name):
                rows.append(f"{point:04X};{name};{_properties(chr(point))}")
        yield "\n".join(rows), f"unicodedata/{start:04X}"


def _properties(character: str) -> str:
    category = unicodedata.category(character)
    direction, form = unicodedata.bidirectional(character), unicodedata.decomposition(character)
    return f"{category};{unicodedata.combining(character)};{direction};{form}"


class Deduplicator:
    """Drops documents and longer paragraphs that were seen before, up to space, case and digits.

    Licence headers, copied functions and generated boilerplate would otherwise stand in training
    and validation text alike.
    """

    def __init__(self) -> None:
        self._paragraphs: set[str] = set()
        self._documents: set[str] = set()

    def new_text(self, text: str) -> str:
        """The text without paragraphs seen before; "" if too short, or seen before as a whole."""
        kept = []
        for paragraph in paragraphs(text):
            letters = "".join(filter(str.isalpha, paragraph.lower()))
            if len(letters) < SHORTEST_REPEAT or _add(self._paragraphs, letters):
                kept.append(paragraph)
        text = "".join(kept).strip("\n")
        new = len(text) >= SHORTEST_DOCUMENT and _add(self._documents, " ".join(text.split()))
        return text if new else ""


def _add(seen: set[str], text: str) -> bool:
    """Add the text to those seen; whether it was not there before."""
    before = len(seen)
    seen.add(text)
    return len(seen) > before


def paragraphs(text: str) -> Iterator[str]:
    """The blocks of a text, each with the separating lines that follow it; joined, they are it."""
    block: list[str] = []
    ended = False
    for line in text.splitlines(keepends=True):
        separates = _RULE.fullmatch(line) is not None
        if ended and not separates:
            yield "".join(block)
            block = []
        ended = separates
        block.append(line)
    yield "".join(block)


def pieces(text: str) -> Iterator[str]:
    """A text in documents of at most DOCUMENT_CHARS characters, cut at line ends if it has any."""
    start = 0
    while start < len(text):
        end = start + DOCUMENT_CHARS
        if end < len(text):
            newline = text.rfind("\n", start, end)
            end = newline + 1 if newline > start else end
        yield text[start:end]
        start = end


def collect(out: Path, megabytes: float, seed: int) -> list[DomainReport]:
    """Write `out/<domain>.jsonl` for every domain that this machine has text for.

    Each domain gets an equal share of the size; what one cannot fill goes to those after it.

    Raises:
        DataError: too few domains or too little text; nothing is written then.
    """
    sources, known = Sources(seed), Deduplicator()
    left = int(megabytes * 1e6)
    found: dict[str, list[Document]] = {}
    for position, name in enumerate(DOMAINS):
        share = left // (len(DOMAINS) - position)
        documents = take(getattr(sources, name)(), known, share)
        size = sum(map(_size, documents))
        if size >= min(MIN_DOMAIN_BYTES, share // 2):
            found[name] = documents
            left -= size
    _check_amount(found, megabytes)
    out.mkdir(parents=True, exist_ok=True)
    return [_write(out, name, found[name]) for name in sorted(found)]


def take(documents: Iterator[Document], known: Deduplicator, share: int) -> list[Document]:
    """New documents, in pieces, up to `share` bytes of text."""
    taken: list[Document] = []
    size = 0
    for text, source in documents:
        for piece in islice(pieces(known.new_text(text)), DOCUMENTS_PER_FILE):
            if size >= share:
                return taken
            if len(piece) >= SHORTEST_DOCUMENT:
                taken.append((piece, source))
                size += _size(taken[-1])
    return taken


def _size(document: Document) -> int:
    return len(document[0].encode())


def _check_amount(found: dict[str, list[Document]], megabytes: float) -> None:
    size = sum(_size(document) for documents in found.values() for document in documents)
    needed = min(MIN_BYTES, int(megabytes * 0.9e6))
    if len(found) < len(DOMAINS) or size < needed:
        raise DataError(
            f"found {size / 1e6:.1f} MB of text in {len(found)} domains ({', '.join(found)}), need "
            f"{needed / 1e6:.1f} MB in {len(DOMAINS)}. Install megashear's requirements (torch, "
            f"numpy, transformers) into the environment of {sys.executable}, and the complete "
            "standard library of Python"
        )


def _write(out: Path, name: str, documents: list[Document]) -> DomainReport:
    """Write one domain beside its place, then move it there."""
    path = out / f"{name}.jsonl"
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for text, source in documents:
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    os.replace(partial, path)
    plain = "\n".join(text for text, _ in documents).encode()
    return DomainReport(name, len(documents), len(plain), len(zlib.compress(plain)) / len(plain))


def main() -> None:
    """Collect the text and print what there is of each domain."""
    parser = argparse.ArgumentParser(description="Collect the demo's text from this machine.")
    parser.add_argument("--out", type=Path, required=True, help="folder for <domain>.jsonl")
    parser.add_argument("--megabytes", type=float, default=8.0, help="text in all (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="chooses among the files (default 0)")
    args = parser.parse_args()
    reports = collect(args.out, args.megabytes, args.seed)
    rows = [(r.name, f"{r.documents:,}", f"{r.size / 1e6:.2f}", f"{r.ratio:.3f}") for r in reports]
    print(console.table(rows, ("domain", "documents", "MB", "compressed / plain")))


if __name__ == "__main__":
    console.run(main)
