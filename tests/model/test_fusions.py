"""Megatron-Core's fused SwiGLU and cross entropy, as on a GPU, compute what its plain ones do.

They run uncompiled here: what is compiled on a GPU is this same code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.common.language_module import language_module
from megatron.core.transformer import mlp
from torch import Tensor

from megashear.checkpoint.torch_dist.state import fill_from_reader
from megashear.config.schema import ModelShape, ParallelConfig, PlatformConfig
from megashear.model import build
from megashear.platform import parallel
from megashear.platform.kernels import can_compile
from tests.support.distributed import run_distributed
from tests.support.reference_llama import random_weights
from tests.support.runs import BIASES, GQA

FUSED = {"bias_swiglu_impl": mlp, "fused_vocab_parallel_cross_entropy": language_module}
"""Megatron-Core's functions, and the modules that call them."""


def compute(shape: ModelShape, tensor: int, precision: str, fused: bool) -> dict[str, Tensor]:
    """Losses and gradients of a rank, and how often it called what is fused."""
    torch.compiler.set_stance("force_eager")
    calls = dict.fromkeys(FUSED, 0)

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name, module in FUSED.items():
        setattr(module, name, counted(name, getattr(module, name)))
    build.can_compile = lambda device: fused  # type: ignore[assignment]
    layout = ParallelConfig(tensor=tensor)
    config = PlatformConfig(device="cpu", precision=precision)
    platform = parallel.start(config, layout, seed=0)
    (model,) = chunks = build.build_model(shape, platform, layout, 8)
    fill_from_reader(chunks, random_weights(shape, seed=0).__getitem__, platform)
    tokens = torch.randint(shape.vocab_size, (2, 8), generator=torch.Generator().manual_seed(1))
    losses = model(tokens, torch.arange(8).expand(2, -1), None, labels=tokens.roll(-1, 1))
    losses.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    parallel.stop()
    found = {name: torch.tensor(number) for name, number in calls.items()}
    return found | {"losses": losses.detach()} | gradients


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [GQA, replace(BIASES, vocab_size=61)], ids=["gqa", "biases"])
def test_fused_and_plain_compute_the_same(shape: ModelShape, precision: str, tensor: int) -> None:
    ranks = run_distributed(compute, tensor, shape, tensor, precision, True)
    plain = run_distributed(compute, tensor, shape, tensor, precision, False)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for fused, expected in zip(ranks, plain, strict=True):
        calls = [int(fused.pop(name)) for name in FUSED]
        assert calls == [shape.num_layers, int(precision == "bf16")]
        assert [int(expected.pop(name)) for name in FUSED] == [0, 0]
        for name, value in expected.items():
            scale = value.abs().max()
            assert scale > 0, name
            assert (fused[name] - value).abs().max() / scale < tolerance, name


def test_compiled_only_on_a_gpu() -> None:
    assert not can_compile(torch.device("cpu"))
