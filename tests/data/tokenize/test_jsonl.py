"""Reading JSONL: which files a pattern names, compressed or not, and what a bad line is told."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from megashear.data.tokenize import jsonl
from megashear.data.tokenize.jsonl import find_inputs, read_chunks, text_of
from megashear.errors import DataError

TWO_FRAMES = b"".join(zstandard.compress(b"x\n" * lines) for lines in (1000, 500))
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # a frame without data, as pzstd writes


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
    """Also from any place on between two chunks, as after an interruption."""
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 1000)
    lines = [b"%d" % i + b"x" * (i % 97) + b"\n" for i in range(500)] + [b"no newline at the end"]
    content = b"".join(lines)
    half = len(content) // 2  # within a line
    frames = zstandard.compress(content[:half]) + SKIPPABLE + zstandard.compress(content[half:])
    packed = {
        "a.jsonl": content,
        "b.jsonl.gz": gzip.compress(content[:half]) + gzip.compress(content[half:]),
        "c.jsonl.zst": SKIPPABLE + frames,
    }
    files = [tmp_path / name for name in packed]
    for file in files:
        file.write_bytes(packed[file.name])
    chunks = list(read_chunks(files))
    assert [line for chunk in chunks for line in chunk.lines] == lines * 3
    assert len(chunks) > 30
    for chunk in filter(lambda chunk: chunk.lines, chunks):
        assert lines[chunk.first_line - 1] == chunk.lines[0]
    assert chunks[-1].end.read == sum(map(len, packed.values()))
    for number, chunk in enumerate(chunks):
        rest = [line for later in read_chunks(files, chunk.end) for line in later.lines]
        assert rest == [line for later in chunks[number + 1 :] for line in later.lines]


def test_packing_is_told_by_content(tmp_path: Path) -> None:
    path = tmp_path / "named.jsonl"
    for pack in (gzip.compress, zstandard.compress):
        path.write_bytes(pack(b'{"text": "a"}\n'))
        assert [chunk.lines for chunk in read_chunks([path])] == [[b'{"text": "a"}\n']]


def test_zstd_with_the_largest_window(tmp_path: Path) -> None:
    """What `zstd --long=31` writes needs more memory than the library allows by default."""
    path = tmp_path / "a.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path.write_bytes(packer.compress(b"line\n" * 1000) + packer.flush())
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
    assert sum(len(chunk.lines) for chunk in read_chunks([path])) == 1000


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(b"x\n" * 1000)[:-20], "damaged gzip data after line [1-9]"),
        ("a.jsonl.gz", gzip.compress(b"x\n" * 1000)[:-4], "damaged gzip data after line 1,000 "),
        ("a.jsonl.gz", gzip.compress(b"x\n" * 1000)[:18] + b"junk" * 9, "damaged gzip"),
        ("a.jsonl.gz", b'{"text": "plain"}\n', "not gzip data"),
        ("a.jsonl.zst", TWO_FRAMES[:-1], "damaged zstd data after line 1,[05]00 .*`zstd -t`"),
        ("a.jsonl.zst", TWO_FRAMES + b"junk", "damaged zstd data after line 1,500 "),
        ("a.jsonl.zst", TWO_FRAMES[:6], "damaged zstd data after line 0 "),
        ("a.jsonl.zst", b'{"text": "plain"}\n', "not zstd data"),
        ("a.jsonl.bz2", b"BZh91AY", "bzip2 data. Convert it to JSONL, plain, gzip or zstd"),
        ("a.parquet", b"PAR1 rest", "parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(read_chunks([path]))
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
        (b'["text"]', "an array is not an object"),
        (b'{"content": "a", "id": 3}', "no field 'text'; the record's fields: 'content', 'id'"),
        (b"{}", "fields: none"),
        (b'{"text": null}', "field 'text' is null, not a string"),
        (b'{"text": true}', "is true, not"),
        (b'{"text": ["a"]}', "is an array, not"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
    ],
)
def test_bad_lines_say_what_they_are(line: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_of(line, "text")
