"""Reading JSONL: which files a pattern names, compressed or not, and what a bad line is told."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from megashear.data import jsonl
from megashear.data.jsonl import find_inputs, read_chunks, text_of
from megashear.errors import DataError


def test_patterns_name_each_file_once_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs(
        [f"{tmp_path}/b.jsonl", f"{tmp_path}/**/*.jsonl", f"{tmp_path}/odd[1].jsonl"]
    )
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["b.jsonl", "a.jsonl", "odd[1].jsonl", "sub/c.jsonl"]


def test_all_missing_inputs_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        find_inputs([f"{tmp_path}/x.jsonl", f"{tmp_path}/y*.gz", str(tmp_path)])
    message = str(caught.value)
    assert "x.jsonl" in message and "y*.gz" in message
    assert f"'{tmp_path}/*.jsonl'" in message  # what to write instead of the folder


def test_chunks_hold_every_line_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 1000)
    lines = [b"%d" % i + b"x" * (i % 97) + b"\n" for i in range(500)] + [b"no newline at the end"]
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(b"".join(lines))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        chunks = list(read_chunks(path))
        assert [line for chunk in chunks for line in chunk.lines] == lines
        assert len(chunks) > 10
        numbers = [chunk.first_line for chunk in chunks]
        assert all(lines[n - 1] == c.lines[0] for n, c in zip(numbers, chunks, strict=True))
        assert sum(chunk.read for chunk in chunks) == path.stat().st_size


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    path = tmp_path / "named.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert [chunk.lines for chunk in read_chunks(path)] == [[b'{"text": "a"}\n']]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(b"x\n" * 1000)[:-20], "damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b"x\n" * 1000)[:18] + b"junk" * 9, "damaged gzip"),
        ("a.jsonl.gz", b'{"text": "plain"}\n', "not gzip data"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd rest", "zstd"),
        ("a.parquet", b"PAR1 rest", "parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_chunks(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["plain", "", "é\u2028🦙\0\n", "a" * 10000])
def test_text_comes_out_as_it_went_in(text: str) -> None:
    import json

    assert text_of(json.dumps({"text": text}).encode(), "text") == text
    assert text_of(json.dumps({"x": 1, "text": text}, ensure_ascii=False).encode(), "text") == text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not JSON: .* at column 13"),
        (b"\xff\xfe", "not UTF-8|not JSON"),
        (b'{"text": "\xe9"}', "not UTF-8 text \\(byte 11 of the line\\)"),
        (b'["text"]', "a JSON array, not an object"),
        (b'{"content": "a", "id": 3}', "no field 'text'; the record's fields: 'content', 'id'"),
        (b"{}", "fields: none"),
        (b'{"text": null}', "field 'text' is null, not a string"),
        (b'{"text": true}', "is boolean"),
        (b'{"text": ["a"]}', "is array"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
    ],
)
def test_bad_lines_say_what_they_are(line: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_of(line, "text")
