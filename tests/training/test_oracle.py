"""Three steps of a pruning run against the same three steps written out in plain PyTorch.

The oracle shares with the run only the batches and the noise: masks act on activations, gradients
come from autograd, both optimizers are torch's, and schedule, clipping and penalty are spelt out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megashear.config.schema import ModelShape, RunConfig
from megashear.model.build import bound_rules
from megashear.platform import parallel
from megashear.pruning.masks import Masks
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.reference_llama import forward, random_weights
from tests.support.runs import (
    GQA,
    GQA_QUERY_HEAD,
    MHA,
    QWEN,
    masks_of,
    prune_options,
    run_config,
    write_domains,
    write_source,
)

STEPS, SEED = 3, 1234
SHAPES = {
    "mha": MHA,
    "gqa-tied": replace(GQA, tied_embeddings=True),
    "query-head": GQA_QUERY_HEAD,
    "bias-norms": QWEN,
}


def run_steps(config: RunConfig) -> dict[str, Any]:
    """Losses, batches and the state after three steps of the trainer."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    batches: list[Any] = []
    losses: list[float] = []
    next_step = trainer.loader.next_step

    def keep() -> Any:
        batches.append(next_step())
        return batches[-1]

    trainer.loader.next_step = keep  # type: ignore[method-assign]
    trainer.log.record = lambda record: losses.append(record["loss"])  # type: ignore
    for _ in range(STEPS):
        trainer.train_step()
    rules = bound_rules(trainer.optimizer.chunks)
    weights = {b.rule.name: b.parameter.detach().clone() for b in rules}
    parallel.stop()
    return {"losses": losses, "batches": batches, "weights": weights, **trainer.objective.state()}


def learning_rate_share(step: int, config: RunConfig) -> float:
    """Of step 1, 2, ...: linear warm-up, then cosine to min_lr_ratio at the last step."""
    warmup, steps = config.optimizer.warmup_steps, config.trainer.steps
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / (steps - warmup)
    low = config.optimizer.min_lr_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def clip(parameters: list[Tensor], most: float) -> None:
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))  # type: ignore
    for parameter in parameters:
        parameter.grad *= min(1.0, most / (norm + 1e-6))  # type: ignore[operator]


def penalty_of(masks: Masks, multipliers: dict[str, Tensor], step: int, warmup: int) -> Tensor:
    total = torch.zeros(())
    for name, log_alpha in masks.log_alpha.items():
        s = torch.sigmoid(2 / 3 * math.log(1 / 11) - log_alpha).clamp(1e-6, 1 - 1e-6)
        sparsity = s.mean(1)  # P(z = 0), by row
        target = masks.target_sparsity[name] * min(1.0, step / warmup)
        lambda1, lambda2 = multipliers[name]
        total = total + (lambda1 * (sparsity - target) + lambda2 * (sparsity - target) ** 2).mean()
    return total


def oracle(config: RunConfig, shape: ModelShape, batches: list[Any]) -> dict[str, Any]:
    """The same steps by hand."""
    weights = {n: w.requires_grad_() for n, w in random_weights(shape, seed=0).items()}
    masks = masks_of(shape)
    width = {n: len(a) if config.pruning.multipliers == "per_layer" else 1
             for n, a in masks.log_alpha.items()}  # fmt: skip
    multipliers = {n: torch.zeros(2, width[n], requires_grad=True) for n in masks.log_alpha}
    adam = {"betas": (0.9, 0.95), "eps": config.optimizer.adam_eps, "weight_decay": 0.0}
    logits_of_masks = list(masks.log_alpha.values())
    optimizers = [
        (config.optimizer.lr, torch.optim.AdamW(weights.values(), **adam)),
        (config.pruning.mask_lr, torch.optim.AdamW(logits_of_masks, **adam)),
        (
            config.pruning.multiplier_lr,
            torch.optim.AdamW(multipliers.values(), maximize=True, **adam),
        ),
    ]
    losses = []
    for step, microbatches in enumerate(batches):
        for _, optimizer in optimizers:
            optimizer.zero_grad()
        z = masks.sample(SEED, step)
        sums = torch.zeros(())
        for batch in microbatches:
            logits = forward(shape, weights, batch["tokens"], z).flatten(0, 1)
            sums = sums + functional.cross_entropy(
                logits, batch["labels"].flatten(), reduction="sum"
            )
        loss = sums / sum(batch["labels"].numel() for batch in microbatches)
        loss.backward()
        losses.append(loss.item())
        penalty_of(masks, multipliers, step, config.pruning.sparsity_warmup_steps).backward()
        share = learning_rate_share(step + 1, config)
        for (lr, optimizer), most in zip(
            optimizers, (config.optimizer.clip_grad, *[config.pruning.clip_grad] * 2), strict=True
        ):
            clip(optimizer.param_groups[0]["params"], most)
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
        with torch.no_grad():
            for log_alpha in logits_of_masks:
                log_alpha.clamp_(-math.log(100), math.log(100))
    return {"losses": losses, "weights": weights, "masks": masks, "multipliers": multipliers}


@pytest.mark.parametrize("multipliers", ["shared", "per_layer"])
@pytest.mark.parametrize("shape_name", SHAPES)
def test_three_pruning_steps_equal_plain_pytorch(
    shape_name: str, multipliers: str, tmp_path: Path
) -> None:
    shape = SHAPES[shape_name]
    run_distributed(write_source, 1, tmp_path, shape)
    options = prune_options(shape)
    options["pruning"] = replace(options["pruning"], multipliers=multipliers)
    init_from = str(tmp_path / "source")
    config = run_config(tmp_path, write_domains(tmp_path), init_from=init_from, **options)
    found = run_distributed(run_steps, 1, config)[0]
    expected = oracle(config, shape, found["batches"])
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, weight in expected["weights"].items():
        assert_close(found["weights"][name], weight.detach(), name)
    for name, log_alpha in expected["masks"].log_alpha.items():
        assert_close(found[f"log_alpha.{name}"], log_alpha.detach(), name)
        multiplier = expected["multipliers"][name].detach()
        assert_close(found[f"multipliers.{name}"], multiplier, f"multipliers of {name}")


def assert_close(ours: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max()
    assert scale > 0, f"{what}: nothing to compare"
    assert (ours - expected).abs().max() < 1e-4 * scale, what
