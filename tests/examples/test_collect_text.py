"""The demo's corpus: real, large enough, of different entropy, without repeats, reproducible."""

from __future__ import annotations

import json
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.errors import DataError
from tests.support.make_tokenizer import example

collect_text = example("demo/collect_text")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text")
    collect_text.collect(out, 6.0, 0)
    return out


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_domains_are_large_and_of_clearly_different_entropy(corpus: Path) -> None:
    texts = {p.stem: [r["text"] for r in records(p)] for p in corpus.glob("*.jsonl")}
    assert len(texts) >= 4
    sizes = {name: sum(len(text.encode()) for text in found) for name, found in texts.items()}
    assert sum(sizes.values()) >= 5_000_000
    assert min(sizes.values()) > 0.5 * max(sizes.values())
    ratios = []
    for found in texts.values():
        plain = "\n".join(found).encode()
        ratios.append(len(zlib.compress(plain)) / len(plain))
    ratios.sort()
    assert ratios[-1] > 1.8 * ratios[0]
    assert all(b / a > 1.03 for a, b in pairwise(ratios)), ratios


def test_documents_are_short_and_their_sources_exist(corpus: Path) -> None:
    roots = [collect_text.Sources(0).stdlib, collect_text.Sources(0).site, Path("/usr/share")]
    for path in corpus.glob("*.jsonl"):
        for record in records(path):
            assert record.keys() == {"text", "source"}
            assert 200 <= len(record["text"]) <= collect_text.DOCUMENT_CHARS
            source = record["source"].removeprefix("stdlib/")
            if not source.startswith(("unicodedata/", "pydoc_data.topics/")):
                assert any((root / source).is_file() for root in roots), source


def test_no_document_and_no_long_paragraph_stands_twice(corpus: Path) -> None:
    seen: dict[str, str] = {}
    for path in sorted(corpus.glob("*.jsonl")):
        for record in records(path):
            for paragraph in [record["text"], *record["text"].split("\n\n")]:
                key = " ".join(paragraph.split())
                if len(key) > 400:
                    assert key not in seen or seen[key] == record["source"], record["source"]
                    seen[key] = record["source"]


def test_licence_headers_are_not_in_every_file(corpus: Path) -> None:
    phrase = "WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND"
    counts = [sum(phrase in r["text"] for r in records(p)) for p in corpus.glob("*.jsonl")]
    assert sum(counts) < 15, counts


def test_same_seed_same_corpus_other_seed_other_corpus(corpus: Path, tmp_path: Path) -> None:
    collect_text.collect(tmp_path / "again", 6.0, 0)
    collect_text.collect(tmp_path / "other", 6.0, 1)
    for path in corpus.glob("*.jsonl"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "other" / path.name).read_bytes() != path.read_bytes()


def test_a_machine_without_sources_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"stdlib": str(tmp_path / "none"), "purelib": str(tmp_path / "empty")}
    monkeypatch.setattr(collect_text.sysconfig, "get_paths", lambda: paths)
    with pytest.raises(DataError, match="Install megashear's requirements"):
        collect_text.collect(tmp_path / "out", 8.0, 0)
    assert not (tmp_path / "out").exists()


def test_headers_differing_in_year_and_owner_are_dropped_but_code_stays() -> None:
    known = collect_text.Deduplicator()
    licence = (
        "# Licensed under the Apache License, Version 2.0 (the License); you may not\n# use it."
    )
    for year, owner in ((2019, "First"), (2023, "Second")):
        code = f"def {owner.lower()}(x):\n    return x\n" * 10
        text = known.new_text(f"# Copyright {year} {owner}.\n#\n{licence}\n\n{code}")
        assert code.strip() in text
        assert ("Apache" in text) == (owner == "First")
    assert known.new_text("short") == ""


@given(st.text(st.sampled_from("ab \n#-*"), max_size=300))
def test_paragraphs_and_pieces_lose_nothing(text: str) -> None:
    assert "".join(collect_text.paragraphs(text)) == text
    long = text * 100
    pieces = list(collect_text.pieces(long))
    assert "".join(pieces) == long
    assert all(0 < len(piece) <= collect_text.DOCUMENT_CHARS for piece in pieces)


def test_prose_is_told_from_code() -> None:
    prose = (
        "This is a sentence that tells the reader something about a function, at some length. "
        "And another one."
    )
    code = ">>> x = f(3)\n>>> y = {'a': x} | {k: v for k, v in z.items() if k not in seen}\nok."
    assert collect_text.sentences(f"{code}\n\n{prose}\n\nshort\n\n{code}") == prose
