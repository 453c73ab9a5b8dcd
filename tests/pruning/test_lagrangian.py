"""The penalty and its gradients against float64 recomputation in numpy; and that it works."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.schema import HEAD_UNITS, QUERY_GROUP, ModelShape, TargetShape
from megashear.pruning.counting import parameter_count
from megashear.pruning.lagrangian import Lagrangian, constraint_targets, constraints
from megashear.pruning.masks import Masks, resolve_target

SOURCE = ModelShape(4, 48, 8, 60, 50, num_query_groups=4, kv_channels=6)
TARGET = resolve_target(SOURCE, TargetShape(3, 32, 6, 40))
ROWS = {"layer": 1, "hidden": 1, "head": 4, "intermediate": 4}


def _lagrangian(masks: Masks, warmup_steps: int, per_row: bool, seed: int) -> Lagrangian:
    result = Lagrangian(masks.target_sparsity, ROWS, warmup_steps, per_row)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for multipliers in result.parameters():
            multipliers.normal_(generator=generator)
    return result


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.booleans(), st.integers(0, 30))
def test_penalty_and_all_its_gradients(seed: int, per_row: bool, step: int) -> None:
    masks = Masks(SOURCE, TARGET)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for log_alpha in masks.parameters():
            log_alpha.uniform_(-7, 7, generator=generator)
    lagrangian = _lagrangian(masks, 20, per_row, seed)
    penalty = lagrangian.penalty(constraints(masks), step)
    penalty.backward()

    total = 0.0
    for mask, rows in ROWS.items():
        a = masks.log_alpha[mask].detach().numpy().astype(np.float64)
        removed = 1 / (1 + np.exp(a - 2 / 3 * np.log(1 / 11)))  # within the clamp: never clipped
        off = removed.mean(1) - masks.target_sparsity[mask] * min(1, step / 20)
        l1, l2 = lagrangian.multipliers[mask].detach().numpy().astype(np.float64)
        total += (l1 * off + l2 * off**2).mean()
        for_rows = np.stack((off, off**2)) / rows  # d penalty / d (lambda1, lambda2) of each row
        expected = for_rows if per_row else for_rows.sum(1, keepdims=True)
        np.testing.assert_allclose(lagrangian.multipliers[mask].grad, expected, atol=1e-6)
        slope = (l1 + 2 * l2 * off)[:, None] / (rows * a.shape[1])
        np.testing.assert_allclose(
            masks.log_alpha[mask].grad, -slope * removed * (1 - removed), atol=1e-6
        )
    assert float(penalty.detach()) == pytest.approx(total, abs=2e-6)


def test_multipliers_start_at_zero_one_pair_for_a_mask_or_for_a_row() -> None:
    targets = Masks(SOURCE, TARGET).target_sparsity
    for per_row in (False, True):
        lagrangian = Lagrangian(targets, ROWS, 0, per_row)
        for mask, multipliers in lagrangian.multipliers.items():
            assert multipliers.shape == (2, ROWS[mask] if per_row else 1)
            assert multipliers.dtype == torch.float32
            assert (multipliers == 0).all()


def test_targets_rise_linearly_from_0() -> None:
    lagrangian = Lagrangian({"hidden": 0.5}, {"hidden": 1}, 640, False)
    warmed = [lagrangian.warmed_targets(step)["hidden"] for step in (0, 160, 639, 640, 10_000)]
    assert warmed == pytest.approx([0, 0.125, 0.5 * 639 / 640, 0.5, 0.5])
    assert Lagrangian({"hidden": 0.5}, {"hidden": 1}, 0, False).warmed_targets(0)["hidden"] == 0.5


def test_the_whole_model_is_one_constraint_without_a_target_shape() -> None:
    masks = Masks(SOURCE, None)
    with torch.no_grad():
        for log_alpha in masks.parameters():
            log_alpha.uniform_(-4, 4, generator=torch.Generator().manual_seed(1))
    found = constraints(masks)
    assert list(found) == ["model"]
    assert found["model"].shape == (1,)
    assert constraint_targets(masks, 0.4) == {"model": 0.4}

    kept = {
        mask: 1 / (1 + np.exp(2 / 3 * np.log(1 / 11) - a.detach().numpy().astype(np.float64)))
        for mask, a in masks.log_alpha.items()
    }
    d, heads, ffn = kept["hidden"].sum(), kept["head"].sum(1), kept["intermediate"].sum(1)
    layers = kept["layer"][0] * (d * heads * 6 * (2 * 2 + 2) + 3 * d * ffn + 2 * d)
    count = 2 * 50 * d + d + layers.sum()
    assert float(found["model"].detach()) == pytest.approx(
        1 - count / parameter_count(SOURCE), abs=1e-6
    )
    found["model"].sum().backward()
    for log_alpha in masks.parameters():  # more kept, less sparsity
        assert log_alpha.grad is not None
        assert (log_alpha.grad < 0).all()


def _optimise(masks: Masks, lagrangian: Lagrangian, steps: int) -> None:
    """The mask optimizer of docs/masks.md, with no loss but a pull to keep every unit."""
    groups: list[dict[str, Any]] = [
        {"params": list(masks.parameters())},
        {"params": list(lagrangian.parameters()), "maximize": True},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        # The pull differs from unit to unit, as a loss does that some units matter more to.
        pull = sum(
            (z * torch.linspace(0, 2, z.shape[1])).mean() for z in masks.sample(0, step).values()
        )
        (lagrangian.penalty(constraints(masks), step) - 0.05 * pull).backward()
        for parameters in (masks.parameters(), lagrangian.parameters()):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("whole_model", [False, True])
@pytest.mark.parametrize("head_unit", HEAD_UNITS)
def test_the_multipliers_drive_the_masks_to_their_targets(
    per_row: bool, whole_model: bool, head_unit: str
) -> None:
    per_group = 1 if head_unit == QUERY_GROUP else 4
    source = replace(SOURCE, num_attention_heads=SOURCE.num_query_groups * per_group)
    target = resolve_target(source, TargetShape(3, 32, 3 * per_group, 40), head_unit)
    masks = Masks(source, None if whole_model else target, head_unit)
    targets = constraint_targets(masks, 0.5 if whole_model else None)
    rows = {name: len(sparsity) for name, sparsity in constraints(masks).items()}
    _optimise(masks, Lagrangian(targets, rows, 60, per_row), steps=300)
    for name, sparsity in constraints(masks).items():
        for value in sparsity.tolist():
            assert value == pytest.approx(targets[name], abs=0.02)
