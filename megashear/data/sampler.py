"""Which global samples a data-parallel rank takes in a step. Pure arithmetic, no imports."""

from __future__ import annotations


def microbatch_samples(
    first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[list[int]]:
    """Sample numbers of this rank's micro-batches in the step that begins at `first_sample`.

    Micro-batch i of rank r takes `micro_batch_size` consecutive samples from
    `first_sample + (i * dp_size + r) * micro_batch_size` on, so the ranks together take exactly the
    global batch, whatever their number.
    """
    across = micro_batch_size * dp_size
    assert global_batch_size % across == 0, "global batch is not a whole number of micro-batches"
    starts = range(
        first_sample + dp_rank * micro_batch_size, first_sample + global_batch_size, across
    )
    return [list(range(start, start + micro_batch_size)) for start in starts]
