"""Run the micro-batches of one step, forward and backward or forward only, as Megatron does."""

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
    """Losses by domain.

    Args:
        totals: what `run_micro_batches` returns, summed over all ranks, on the host.

    Attributes:
        sums: sums of token losses in nats, float64 [domains].
        tokens: numbers of tokens, float64 [domains].
    """

    def __init__(self, totals: Tensor) -> None:
        self.sums, self.tokens = totals

    @property
    def mean(self) -> float:
        """Return the mean loss over all tokens (nats per token)."""
        return float(self.sums.sum() / self.tokens.sum())

    def of_domains(self) -> list[float]:
        """Return the loss of each domain (nats per token); NaN for a domain without tokens."""
        return (self.sums / self.tokens).tolist()


def run_micro_batches(
    models: Sequence[Any],
    batches: Sequence[MicroBatch],
    platform: Platform,
    num_domains: int,
    *,
    forward_only: bool = False,
) -> Tensor:
    """Run all micro-batches of this rank; after a backward pass, gradients are reduced.

    Args:
        models: this rank's shard of the model, one for each virtual pipeline stage.
        batches: this rank's micro-batches; all ranks have the same number, of the same shape.
        platform: process group and device.
        num_domains: number of domains; `dataset_id` is below it.
        forward_only: skip the backward pass.

    Returns:
        Sums of token losses (nats) and numbers of tokens, float64 [2, domains]. Summed over all
        ranks, each token counts once.
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
    if platform.tensor_rank == 0:  # the other tensor ranks have the same losses
        for report in reports:  # empty except on the last pipeline stage
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
    """Return the causal mask that keeps attention within the documents of a sequence.

    Args:
        document_ids: number of the document that each token belongs to, [b, s].

    Returns:
        [b, s, s], True where a token (axis 1) must not attend to another (axis 2), as in Megatron:
        to a later token, or to another document.
    """
    length = document_ids.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).triu(1)
    return later | (document_ids[:, :, None] != document_ids[:, None, :])


def _loss(
    losses: Tensor, *, batch: MicroBatch, num_domains: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Reduce token losses [b, s] for Megatron: sum, number of tokens, and both by domain."""
    mask = batch["loss_mask"].float()
    per_sample = (losses.float() * mask).sum(1)  # [b]
    tokens = mask.sum(1)
    domains = torch.zeros(2, num_domains, dtype=torch.float64, device=losses.device)
    domains[0].index_add_(0, batch["dataset_id"], per_sample.detach().double())
    domains[1].index_add_(0, batch["dataset_id"], tokens.double())
    return per_sample.sum(), tokens.sum().to(torch.int), {"domains": domains}
