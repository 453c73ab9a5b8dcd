"""What a run checks of its token files: tokenizer, vocabulary, counts and content."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megashear.data import fingerprint
from megashear.data.fingerprint import (
    Fingerprint,
    check_fingerprint,
    check_one_tokenizer,
    content_hash,
)
from megashear.errors import DataError

KNOWN = Fingerprint("5a" * 32, 500, 1, 2, documents=30, tokens=1000, highest_id=499)


def write_fingerprint(prefix: Path, fingerprint: Fingerprint) -> str:
    Path(f"{prefix}.json").write_text(json.dumps(asdict(fingerprint)))
    return str(prefix)


def test_files_of_another_run_or_vocabulary_are_refused(tmp_path: Path) -> None:
    prefix = write_fingerprint(tmp_path / "x", KNOWN)
    check_fingerprint(prefix, 30, 1000, 500)
    check_fingerprint(prefix, 30, 1000, 512)  # a model pads its vocabulary
    for documents, tokens in ((31, 1000), (30, 999)):
        with pytest.raises(DataError, match=rf"x\.json is for 30 doc.*{tokens:,}: .*one run"):
            check_fingerprint(prefix, documents, tokens, 500)
    with pytest.raises(DataError, match="token id 499, but the vocabulary ends at 498"):
        check_fingerprint(prefix, 30, 1000, 499)
    check_fingerprint(str(tmp_path / "y"), 1, 1, 1)  # made by another program


def test_files_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    other = Fingerprint("77" * 32, 500, 1, 2, 30, 1000)
    prefixes = [write_fingerprint(tmp_path / name, KNOWN) for name in ("a", "b")]
    check_one_tokenizer([*prefixes, str(tmp_path / "unknown")])
    prefixes.append(write_fingerprint(tmp_path / "c", other))
    with pytest.raises(DataError, match=r"(?s)5a5a5a5a5a5a: .*/a, .*/b\n  777777777777: .*/c"):
        check_one_tokenizer(prefixes)


def test_damaged_fingerprints_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .*x\.json"):
        Fingerprint.read(tmp_path / "x")
    for content in ("{", "[]", '{"tokens": 3}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(DataError, match=r"x\.json is damaged"):
            Fingerprint.read(tmp_path / "x")


@pytest.mark.parametrize("sampled", [False, True])
def test_the_content_of_a_file_counts_and_not_its_path(
    tmp_path: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(fingerprint, "_WHOLE", 0)
        monkeypatch.setattr(fingerprint, "_BLOCK", 16)
    tokens = np.random.default_rng(0).integers(0, 500, 100_000).astype(np.uint16)

    def write(name: str, tokens: np.ndarray) -> str:
        (tmp_path / f"{name}.bin").write_bytes(tokens.tobytes())
        (tmp_path / f"{name}.idx").write_bytes(b"the same index" * 9)
        return content_hash(str(tmp_path / name))

    first = write("a", tokens)
    assert write("b", tokens) == first
    others = (tokens[::-1], tokens[:-1], np.append(tokens, tokens[:9]))
    assert len({first, *(write("c", other) for other in others)}) == 4
