"""Compare the logits of two models, computed by transformers and by Megatron-Core.

The one module that runs transformers' models, to test imports and exports.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megashear.checkpoint.info import HUGGINGFACE
from megashear.checkpoint.models import Model
from megashear.checkpoint.torch_dist.state import fill_from_reader
from megashear.config.schema import ParallelConfig
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.model.build import build_model
from megashear.model.masked_weights import MaskedWeights
from megashear.platform.parallel import single_process


@dataclass(frozen=True)
class LogitsDifference:
    """How far the logits of one model are from another's, over the same tokens.

    `scale` is the standard deviation of the first model's logits within a token, which unlike their
    size does not change when a constant is added that no probability depends on.
    """

    max_abs: float
    mean_abs: float
    scale: float
    kl_per_token: float  # Kullback-Leibler divergence of the second from the first, nats
    top1_agreement: float  # fraction of positions with the same likeliest token

    @property
    def relative(self) -> float:
        """Largest difference on the scale of the logits; infinite where that scale is 0."""
        return self.max_abs / self.scale if self.scale else float("inf")

    def within(self, tolerance: float) -> bool:
        """Whether the largest difference is below a fraction of the scale; False for NaN."""
        return self.max_abs == 0 or self.relative < tolerance


def logits_difference(a: Tensor, b: Tensor) -> LogitsDifference:
    """Compare logits [b, s, vocab] of two models, in float64.

    Raises:
        CheckpointError: the models have vocabularies of different sizes.
    """
    if a.shape != b.shape:
        raise CheckpointError(f"logits {list(a.shape)} and {list(b.shape)} cannot be compared")
    largest, sums, variance = torch.zeros((), dtype=torch.float64), torch.zeros(3).double(), 0.0
    for row_a, row_b in zip(a.double(), b.double(), strict=True):  # [s, vocab]
        difference = (row_a - row_b).abs()
        largest = torch.maximum(largest, difference.max())  # propagates NaN, as max() would not
        log_p, log_q = row_a.log_softmax(-1), row_b.log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        same = (row_a.argmax(-1) == row_b.argmax(-1)).sum()
        sums += torch.stack([difference.sum(), divergence, same.double()])
        variance += float(row_a.var(-1, correction=0).sum())
    tokens = a.shape[0] * a.shape[1]
    total_abs, divergence, same = sums.tolist()
    return LogitsDifference(
        max_abs=float(largest),
        mean_abs=total_abs / a.numel(),
        scale=(variance / tokens) ** 0.5,
        kl_per_token=divergence / tokens,
        top1_agreement=same / tokens,
    )


def logits(model: Model, tokens: Tensor) -> Tensor:
    """Return the logits [b, s, vocab] of int64 tokens [b, s], in fp32 on the CPU.

    Raises:
        CheckpointError: the model cannot be read.
    """
    return (hf_logits if model.stage == HUGGINGFACE else megatron_logits)(model, tokens)


@torch.no_grad()
def hf_logits(model: Model, tokens: Tensor) -> Tensor:
    """Return `logits` by transformers.

    Raises:
        CheckpointError: transformers cannot load it, ignores a weight or initialises one that is
            missing.
    """
    import transformers

    model.verify()
    directory = model.info.directory
    try:
        hf_model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory),
            # Else transformers 5 rounds the weights to the dtype that config.json names.
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # its checks of config.json raise many kinds
        raise CheckpointError(
            f"{directory}: transformers cannot load it: {error!r:.500}"
        ) from error
    wrong = [f"{kind}: {', '.join(map(str, names))}" for kind, names in info.items() if names]
    if wrong:
        raise CheckpointError(f"{directory}: transformers reports {'; '.join(wrong)}")
    hf_model.eval()
    return torch.cat([hf_model(row[None]).logits for row in _shown(tokens, "transformers")])


def _shown(tokens: Tensor, by: str) -> Iterable[Tensor]:
    return progress(tokens, f"running by {by}", len(tokens), "sequences")


@torch.no_grad()
def megatron_logits(model: Model, tokens: Tensor) -> Tensor:
    """Return `logits` by Megatron-Core in one process.

    A pruning run computes them with its masks, as extraction would fold them in.
    """
    positions = torch.arange(tokens.shape[1])[None]
    with single_process() as platform:
        chunks = build_model(model.shape, platform, ParallelConfig(), tokens.shape[1])
        network = chunks[0].eval()
        fill_from_reader(chunks, model.read, platform)
        masked: AbstractContextManager[None] = nullcontext()
        if model.is_pruning:
            weights = MaskedWeights(chunks, platform, head_unit=model.masks.masks.head_unit)
            masked = weights.masked(model.masks.z)
        with masked:
            rows = _shown(tokens, "Megatron-Core")
            return torch.cat([network(row[None], positions, None) for row in rows])
