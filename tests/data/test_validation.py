"""Validation micro-batches: each sequence once over the ranks, read when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megashear.data.dataset import DomainDataset
from megashear.data.loader import ValidBatches
from tests.support.make_data import counting_documents, write_tokens

VOCAB = 500


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> DomainDataset:
    prefix = write_tokens(
        Path(tmp_path_factory.mktemp("valid")) / "v", counting_documents(185), VOCAB
    )  # 23 sequences of 8
    return DomainDataset("v", prefix, seq_length=8, vocab_size=VOCAB, seed=0, dataset_id=2)


@pytest.mark.parametrize("sequences", [1, 7, 16, 23, 500])
@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (4, 1), (4, 2), (2, 4), (24, 1), (8, 3)])
def test_validation_counts_each_sequence_once_over_ranks(
    domain: DomainDataset, sequences: int, micro: int, ranks: int
) -> None:
    taken = [ValidBatches(domain, sequences, micro, rank, ranks) for rank in range(ranks)]
    assert len({len(batches) for batches in taken}) == 1
    rows: list[tuple[int, ...]] = []
    for batch in (batch for batches in taken for batch in batches):
        assert batch["tokens"].shape == batch["loss_mask"].shape == (micro, 8)
        assert batch["dataset_id"].tolist() == [2] * micro
        for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
            assert mask.unique().numel() == 1
            rows += [tuple(tokens.tolist())] * int(mask[0])
    count = min(sequences, 23)
    assert sorted(rows) == sorted(tuple(domain[k][:-1].tolist()) for k in range(count))
    assert len(set(rows)) == count


def test_a_sequence_is_read_when_its_turn_comes(
    domain: DomainDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    text = DomainDataset.__getitem__

    def note(domain: DomainDataset, k: int) -> Any:
        read.append(k)
        return text(domain, k)

    monkeypatch.setattr(DomainDataset, "__getitem__", note)
    batches = ValidBatches(domain, 500, 4, 1, 2)  # sequences 4 to 7, 12 to 15, 20 to 22
    assert (len(batches), read) == (3, [])
    later = iter(batches)
    next(later)
    assert read == [4, 5, 6, 7]
    assert [batch["loss_mask"][:, 0].tolist() for batch in later] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert [k for k in read if k] == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22]
