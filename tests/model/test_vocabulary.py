"""A vocabulary that tensor parallelism does not divide: padding has no part in what is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megashear.checkpoint.torch_dist.state import fill_from_reader
from megashear.config.schema import ModelShape, ParallelConfig, PlatformConfig
from megashear.model.build import bound_rules, build_model
from megashear.platform import parallel
from tests.support.distributed import run_distributed
from tests.support.reference_llama import forward, random_weights
from tests.support.runs import MHA


def compute(shape: ModelShape, tensor: int, tokens: Tensor) -> dict[str, Tensor]:
    """A rank's part of the initial vocabulary; logits and losses with the oracle's weights."""
    layout = ParallelConfig(tensor=tensor)
    platform = parallel.start(PlatformConfig(device="cpu", precision="fp32"), layout, seed=0)
    chunks = build_model(shape, platform, layout, tokens.shape[1])
    rules = [bound for bound in bound_rules(chunks) if bound.rule.axes[0].vocabulary]
    found = {bound.rule.name: bound.parameter.detach().clone() for bound in rules}
    fill_from_reader(chunks, random_weights(shape, seed=0).__getitem__, platform)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        found["logits"] = chunks[0](tokens, positions, None)
        found["losses"] = chunks[0](tokens, positions, None, labels=tokens.roll(-1, 1))
    parallel.stop()
    return found


@pytest.mark.parametrize(
    ("size", "tensor", "tied"), [(61, 2, False), (62, 4, True), (5, 4, False), (5, 4, True)]
)
def test_padding_is_zero_and_unlikely(size: int, tensor: int, tied: bool) -> None:
    shape = replace(MHA, vocab_size=size, tied_embeddings=tied)
    tokens = torch.randint(size, (2, 8), generator=torch.Generator().manual_seed(0))
    ranks = run_distributed(compute, tensor, shape, tensor, tokens)
    initial = {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}
    for name in ("embedding.word_embeddings.weight", *(["output_layer.weight"] * (not tied))):
        assert initial[name][:size].all()
        assert not initial[name][size:].any()
    logits = torch.cat([rank["logits"] for rank in ranks], -1)
    assert logits.shape[-1] % tensor == 0
    assert not logits[..., size:].any()
    expected = forward(shape, random_weights(shape, seed=0), tokens)
    assert torch.allclose(logits[..., :size], expected, rtol=1e-5, atol=1e-5)
    losses = cross_entropy(expected.transpose(1, 2), tokens.roll(-1, 1), reduction="none")
    for rank in ranks:
        assert torch.allclose(rank["losses"], losses, rtol=1e-6, atol=1e-5)
