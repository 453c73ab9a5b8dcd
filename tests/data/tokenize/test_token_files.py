"""Token files: the same bytes as Megatron's own writer, and what a run checks of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from megashear.data.fingerprint import Fingerprint, check_fingerprint, check_one_tokenizer
from megashear.data.tokenize.token_files import Counts, Documents, TokenFile, publish, token_type
from megashear.errors import DataError
from tests.support.make_data import random_documents, write_tokens

KNOWN = Fingerprint("5a" * 32, 500, 1, 2, documents=30, tokens=1000, highest_id=499)


@pytest.mark.parametrize("vocab", [500, 65499, 65500, 128_256])
def test_bytes_are_those_of_megatrons_writer(tmp_path: Path, vocab: int) -> None:
    assert token_type(vocab) == np.dtype(DType.optimal_dtype(vocab))
    documents = random_documents(20_000, vocab)
    expected = write_tokens(tmp_path / "theirs", documents, vocab)
    (tmp_path / "unfinished").mkdir()
    prefix = str(tmp_path / "ours")
    file = TokenFile(prefix, tmp_path / "unfinished", token_type(vocab), Counts())
    counts = Counts()
    for part in (documents[:1], documents[1:300], [], documents[300:]):
        tokens = np.array([token for document in part for token in document], dtype=np.int64)
        new = Documents(tokens, np.array([len(document) for document in part], dtype=np.int64))
        file.add(new)
        counts = counts.plus(new)
    fingerprint = Fingerprint("", vocab, None, 0, **asdict(counts))
    file.finish(fingerprint)
    file.close()
    publish([prefix], tmp_path / "unfinished")
    for suffix in (".bin", ".idx"):
        assert Path(prefix + suffix).read_bytes() == Path(expected + suffix).read_bytes()
    assert Fingerprint.read(prefix) == fingerprint
    assert counts == Counts(len(documents), 20_000, max(map(max, documents)))


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
