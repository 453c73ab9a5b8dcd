"""Token files have the same bytes as those of Megatron's own writer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType

from megashear.data.fingerprint import Fingerprint
from megashear.data.tokenize.token_files import Counts, Documents, TokenFile, publish, token_type
from tests.support.make_data import random_documents, write_tokens


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
