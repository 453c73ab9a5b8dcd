"""Fills a model from weights that are read whole, tensor by tensor, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from megashear.errors import CheckpointError
from megashear.model.build import bound_rows
from megashear.platform.parallel import Platform


@torch.no_grad()
def fill_from_reader(
    chunks: Iterable[nn.Module], read: Callable[[str], Tensor], platform: Platform
) -> None:
    """Give each parameter of this rank its tensor-parallel shard of what `read` returns.

    Args:
        chunks: this rank's part of the model.
        read: returns a whole tensor by its name in the table.
        platform: says which shard this rank holds.

    Raises:
        CheckpointError: a tensor has another shape than the model's.
    """
    for bound in bound_rows(chunks):
        whole = read(bound.row.name)
        if tuple(whole.shape) != bound.row.shape():
            raise CheckpointError(
                f"{bound.row.name} is {tuple(whole.shape)}; the model needs {bound.row.shape()}"
            )
        shard = bound.row.shard(whole, platform.tensor_rank, platform.tensor_size)
        bound.parameter.copy_(shard)
