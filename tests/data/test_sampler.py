"""Which samples a rank takes: together exactly the global batch, whatever the layout."""

from __future__ import annotations

import pytest

from megashear.data.sampler import microbatch_samples


@pytest.mark.parametrize(
    ("micro", "ranks"), [(1, 1), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1), (8, 3), (24, 1)]
)
def test_the_ranks_take_each_sample_of_the_global_batch_once(micro: int, ranks: int) -> None:
    taken = [microbatch_samples(96, 24, micro, rank, ranks) for rank in range(ranks)]
    assert sorted(n for rank in taken for batch in rank for n in batch) == list(range(96, 120))
    assert {len(batch) for rank in taken for batch in rank} == {micro}
    assert {len(rank) for rank in taken} == {24 // (micro * ranks)}


def test_micro_batch_i_of_all_ranks_comes_before_micro_batch_i_plus_1() -> None:
    assert microbatch_samples(100, 8, 2, 0, 2) == [[100, 101], [104, 105]]
    assert microbatch_samples(100, 8, 2, 1, 2) == [[102, 103], [106, 107]]
