"""What only a GPU can show: training, saving and attention there agree with the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megashear.config.schema import PlatformConfig, RunConfig
from megashear.platform import parallel
from megashear.platform.layers import SDPAttention
from megashear.training.trainer import Trainer
from tests.platform.test_layers import attend, documents_mask, random, windowed
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, prune_options, records, run_config, write_domains, write_source

pytestmark = pytest.mark.gpu

TORCH: dict[str, Any] = {"layers": "torch", "kernels": "torch", "timeout_minutes": 2.0}


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RunConfig]:
    """A pruning run of six steps by name and platform, from one source and on the same tokens."""
    run_distributed(write_source, 1, tmp_path)
    domains, source = write_domains(tmp_path), str(tmp_path / "source")

    def make(name: str, **platform: str) -> RunConfig:
        options = {"run_dir": str(tmp_path / name), "init_from": source, **prune_options(GQA)}
        return run_config(
            tmp_path, domains, platform=PlatformConfig(**{**TORCH, **platform}), **options
        )

    return make


def train(config: RunConfig) -> list[Tensor]:
    """Train a run; its weights after step 3, copied before the next step changes them."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    step = trainer.train_step
    kept: list[Tensor] = []

    def step_and_keep() -> None:
        step()
        if trainer.step == 3:
            trainer.optimizer.gather(wait=True)
            kept.extend(weights(trainer))

    trainer.train_step = step_and_keep  # type: ignore[method-assign]
    trainer.run()
    parallel.stop()
    return kept


def weights(trainer: Trainer) -> list[Tensor]:
    """Copies of a trainer's weights, on the CPU."""
    return [p.detach().cpu().clone() for c in trainer.optimizer.chunks for p in c.parameters()]


def losses(config: RunConfig) -> list[float]:
    """Losses of a run's steps."""
    return [record["loss"] for record in records(config.run_dir, "step")]


def test_a_run_in_fp32_has_the_losses_of_the_cpu(config: Callable[..., RunConfig]) -> None:
    runs = [config(device, device=device, precision="fp32") for device in ("cpu", "cuda")]
    for run in runs:
        run_distributed(train, 1, run)
    assert len(losses(runs[1])) == 6
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)


def test_a_run_in_bf16_is_near_to_fp32(config: Callable[..., RunConfig]) -> None:
    runs = [config(precision, device="cuda", precision=precision) for precision in ("fp32", "bf16")]
    for run in runs:
        run_distributed(train, 1, run)
    # Evaluations change the blend of domains: only the steps before the second see the same tokens.
    assert losses(runs[1])[:3] == pytest.approx(losses(runs[0])[:3], rel=2e-2)


def weights_at(config: RunConfig) -> list[Tensor]:
    """Weights of a trainer that begins with a run's newest checkpoint."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    found = weights(trainer)
    assert trainer.step == 3
    parallel.stop()
    return found


def test_an_asynchronous_save_has_the_state_of_its_step(config: Callable[..., RunConfig]) -> None:
    """Though training changes the weights while they are written."""
    run = config("run", device="cuda", precision="fp32")
    trainer = replace(run.trainer, async_save=True, keep_checkpoints=2)
    run = replace(run, trainer=trainer)
    (kept,) = run_distributed(train, 1, run)
    assert len(kept) > 10
    checkpoints = Path(run.run_dir) / "checkpoints"
    (checkpoints / "latest").write_text("step-00000003\n")
    (found,) = run_distributed(weights_at, 1, run)
    for ours, theirs in zip(found, kept, strict=True):
        assert torch.equal(ours, theirs)


def differences(groups: int, window: int | None, document: int | None) -> list[float]:
    """Compare attention on the GPU with its equation: output and gradients, to the largest."""
    attention = SDPAttention(windowed(window), 1, AttnMaskType.causal, "self")
    query, key, value = (random(9, 2, heads, 6, seed=heads) for heads in (4, groups, groups))
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in (query, key, value)]
    mask = None if document is None else documents_mask(9, document).cuda()
    out = attention(*on_gpu, mask)
    expected = attend(query, key, value, 6**-0.5, window, document)
    upstream = random(9, 2, 24, seed=4).detach()
    ours = torch.autograd.grad((out * upstream.cuda()).sum(), on_gpu)
    theirs = torch.autograd.grad((expected * upstream).sum(), (query, key, value))
    pairs = zip((out, *ours), (expected, *theirs), strict=True)
    return [((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize(
    ("groups", "window", "document"), [(4, None, None), (2, 4, None), (1, None, 5), (2, 3, 5)]
)
def test_attention_with_masks_is_its_equation(
    groups: int, window: int | None, document: int | None
) -> None:
    (found,) = run_distributed(differences, 1, groups, window, document)
    assert len(found) == 4 and max(found) < 1e-12
