"""Validation micro-batches: each sequence once over the ranks, read when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from megashear.data.dataset import DomainDataset
from megashear.data.validation import valid_microbatches
from tests.make_data import counting_documents, write_tokens

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
    taken = [valid_microbatches(domain, sequences, micro, rank, ranks) for rank in range(ranks)]
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
