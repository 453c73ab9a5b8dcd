"""Forward and backward of one step, or forward alone, by Megatron-Core's own schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megashear.data.loader import MicroBatch
from megashear.platform.cuda import upload
from megashear.platform.layers import context_part
from megashear.platform.parallel import Platform


class DomainLosses:
    """Losses of domains, from sums that the host has.

    Args:
        totals: float64 [2, domains] as of `run_micro_batches`, over all ranks.

    Attributes:
        sums: nats, float64 [domains].
        tokens: float64 [domains].
    """

    def __init__(self, totals: Tensor) -> None:
        self.sums, self.tokens = totals

    @property
    def mean(self) -> float:
        """Loss over all tokens (nats per token)."""
        return float(self.sums.sum() / self.tokens.sum())

    def of_domains(self) -> list[float]:
        """Loss of each domain (nats per token); NaN for one without tokens."""
        return (self.sums / self.tokens).tolist()


def run_micro_batches(
    models: Sequence[Any],
    batches: Sequence[MicroBatch],
    platform: Platform,
    num_domains: int,
    *,
    forward_only: bool = False,
) -> Tensor:
    """Run all micro-batches of this rank; with the backward pass, gradients end up reduced.

    Args:
        models: this rank's part, one for each virtual pipeline stage.
        batches: this rank's micro-batches, equally shaped and equally many on every rank.
        platform: where to compute.
        num_domains: domains that `dataset_id` may name.
        forward_only: without the backward pass.

    Returns:
        Sums of token losses (nats) and numbers of tokens, float64 [2, domains], such that the sum
        over all ranks is over all tokens, each once.
    """
    micro_batch_size, seq_length = batches[0]["tokens"].shape
    iterators = [iter(batches) for _ in models]
    reports = get_forward_backward_func()(
        forward_step_func=partial(_forward, platform=platform, num_domains=num_domains),
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=list(models),
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    total = torch.zeros(2, num_domains, dtype=torch.float64, device=platform.device)
    if platform.tensor_rank == 0:  # the others have the same
        for report in reports:  # there are none but on the last pipeline stage
            total += report["domains"]
    return total


def _forward(
    batches: Iterator[MicroBatch], model: Any, *, platform: Platform, num_domains: int
) -> tuple[Tensor, Any]:
    platform.heartbeat.mark()
    batch = {key: upload(value, platform.device) for key, value in next(batches).items()}
    documents = batch.pop("document_ids", None)
    mask = None if documents is None else context_part(within_documents(documents))[:, None]
    batch |= {key: context_part(part) for key, part in batch.items() if part.dim() == 2}
    losses = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    return losses, partial(_loss, batch=batch, num_domains=num_domains)


def within_documents(document_ids: Tensor) -> Tensor:
    """The causal mask of documents that lie one after another in sequences.

    Args:
        document_ids: number of the document that each token belongs to, [b, s].

    Returns:
        [b, s, s], True where a token (axis 1) must not look at another (axis 2), as Megatron has
        it: at a later one, or at another document.
    """
    length = document_ids.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).triu(1)
    return later | (document_ids[:, :, None] != document_ids[:, None, :])


def _loss(
    losses: Tensor, *, batch: MicroBatch, num_domains: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses [b, s], number of tokens, and both per domain, for Megatron."""
    mask = batch["loss_mask"].float()
    per_sample = (losses.float() * mask).sum(1)  # [b]
    tokens = mask.sum(1)
    domains = torch.zeros(2, num_domains, dtype=torch.float64, device=losses.device)
    domains[0].index_add_(0, batch["dataset_id"], per_sample.detach().double())
    domains[1].index_add_(0, batch["dataset_id"], tokens.double())
    return per_sample.sum(), tokens.sum().to(torch.int), {"domains": domains}
