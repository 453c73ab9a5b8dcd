"""Masks of a whole model: which units are masked, and what they give."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megashear.config.schema import QUERY_HEAD, ModelShape, TargetShape
from megashear.pruning.masks import Masks, resolve_target
from megashear.pruning.table import MASK_KINDS, mask_sizes

SOURCE = ModelShape(4, 48, 8, 60, 50, num_query_groups=4, kv_channels=6)
TARGET = resolve_target(SOURCE, TargetShape(3, 32, 6, 40))
WIDE = ModelShape(2, 48, 12, 60, 50, num_query_groups=3, kv_channels=6)
WIDE_TARGET = resolve_target(WIDE, TargetShape(num_attention_heads=6), QUERY_HEAD)


def _random(masks: Masks, seed: int, limit: float = 7.0) -> Masks:
    """Masks with log_alpha inside and outside the clamp."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for log_alpha in masks.parameters():
            log_alpha.uniform_(-limit, limit, generator=generator)
    return masks


def test_log_alpha_starts_at_5_and_is_really_clamped_by_the_first_use() -> None:
    masks = Masks(SOURCE, TARGET)
    assert all((a == 5.0).all() for a in masks.parameters())
    masks.sample(seed=0, step=0)
    assert all((a == math.log(100)).all() for a in masks.parameters())


@pytest.mark.parametrize("use", ["sample", "deterministic", "probability_kept"])
def test_every_use_clamps_the_parameter_itself(use: str) -> None:
    masks = _random(Masks(SOURCE, TARGET), seed=1)
    before = {name: value.clone() for name, value in masks.state_dict().items()}
    arguments = {"sample": (0, 0), "deterministic": ("current",)}.get(use, ())
    getattr(masks, use)(*arguments)
    for name, value in masks.state_dict().items():
        assert torch.equal(value, before[name].clamp(-math.log(100), math.log(100)))
        assert not torch.equal(value, before[name])


def test_sizes_and_target_sparsities() -> None:
    masks = Masks(SOURCE, TARGET)
    assert masks.sizes == mask_sizes(SOURCE)
    assert masks.target_units == {"layer": 3, "hidden": 32, "head": 3, "intermediate": 40}
    assert masks.target_sparsity == pytest.approx(
        {"layer": 1 / 4, "hidden": 1 / 3, "head": 1 / 4, "intermediate": 1 / 3}
    )
    assert {n: tuple(a.shape) for n, a in masks.log_alpha.items()} == mask_sizes(SOURCE)


def test_a_kind_that_keeps_its_size_is_not_masked() -> None:
    masks = Masks(SOURCE, resolve_target(SOURCE, TargetShape(hidden_size=32, num_layers=3)))
    assert set(masks.sizes) == set(masks.log_alpha) == {"layer", "hidden"}
    given = (masks.sample(0, 0), masks.deterministic("target"), masks.probability_kept())
    for z in given:
        assert tuple(z) == MASK_KINDS
        assert {mask: tuple(value.shape) for mask, value in z.items()} == mask_sizes(SOURCE)
        assert (z["head"] == 1).all()
        assert (z["intermediate"] == 1).all()
    assert set(masks.expected_sparsity()) == {"layer", "hidden"}


def test_samples_are_a_function_of_seed_and_step_alone() -> None:
    masks, again = (_random(Masks(SOURCE, TARGET), seed=2) for _ in range(2))
    torch.manual_seed(99)  # the global generator has no say
    z = masks.sample(seed=3, step=10)
    assert all(torch.equal(z[mask], again.sample(3, 10)[mask]) for mask in MASK_KINDS)
    assert any(not torch.equal(z[mask], again.sample(3, 11)[mask]) for mask in MASK_KINDS)
    assert not torch.equal(z["head"][0], z["head"][1])


def test_gradients_of_samples_reach_unclamped_units_only() -> None:
    masks = _random(Masks(SOURCE, TARGET), seed=2)
    z = masks.sample(seed=3, step=10)
    torch.cat([value.flatten() for value in z.values()]).sum().backward()
    for mask, log_alpha in masks.log_alpha.items():
        inside = (z[mask] > 0) & (z[mask] < 1)
        assert torch.equal(log_alpha.grad != 0, inside)


def test_target_masks_keep_the_target_in_every_row() -> None:
    z = _random(Masks(SOURCE, TARGET), seed=4).deterministic("target")
    assert {mask: set((value > 0).sum(1).tolist()) for mask, value in z.items()} == {
        "layer": {3},
        "hidden": {32},
        "head": {3},
        "intermediate": {40},
    }
    assert not any(value.requires_grad for value in z.values())


@pytest.mark.parametrize("target", [TARGET, None])
@pytest.mark.parametrize("seed", range(5))
def test_current_masks_keep_what_is_expected_by_now(target: ModelShape | None, seed: int) -> None:
    masks = _random(Masks(SOURCE, target), seed)
    z = masks.deterministic("current")
    for mask, log_alpha in masks.log_alpha.items():
        values = log_alpha.detach().numpy().astype(np.float64)
        removed = 1 / (1 + np.exp(values - 2 / 3 * np.log(1 / 11)))
        expected = np.round(removed.clip(1e-6, 1 - 1e-6).sum(1)).astype(int)
        assert (z[mask] == 0).sum(1).tolist() == expected.tolist()


def test_without_a_target_shape_all_four_kinds_are_masked_and_target_means_current() -> None:
    masks = _random(Masks(SOURCE, None), seed=5)
    assert set(masks.log_alpha) == set(MASK_KINDS)
    assert masks.target_units == masks.target_sparsity == {}
    target, current = masks.deterministic("target"), masks.deterministic("current")
    assert all(torch.equal(target[mask], current[mask]) for mask in MASK_KINDS)


def test_expected_sparsity_is_the_mean_of_each_row() -> None:
    masks = _random(Masks(SOURCE, TARGET), seed=6)
    for mask, sparsity in masks.expected_sparsity().items():
        values = masks.log_alpha[mask].detach().numpy().astype(np.float64)
        removed = 1 / (1 + np.exp(values - 2 / 3 * np.log(1 / 11)))
        np.testing.assert_allclose(sparsity.detach(), removed.mean(1), atol=1e-6)


def test_state_goes_out_and_in_as_plain_tensors() -> None:
    masks = _random(Masks(SOURCE, TARGET), seed=7)
    state = masks.state_dict()
    assert set(state) == {f"log_alpha.{mask}" for mask in MASK_KINDS}
    again = Masks(SOURCE, TARGET)
    again.load_state_dict({name: value.clone() for name, value in state.items()})
    z, expected = again.sample(1, 1), masks.sample(1, 1)
    assert all(torch.equal(z[mask], expected[mask]) for mask in MASK_KINDS)


def test_query_heads_are_a_row_for_each_group_and_keep_every_group() -> None:
    assert replace(WIDE, num_attention_heads=6) == WIDE_TARGET
    assert (WIDE_TARGET.num_query_groups, WIDE_TARGET.heads_per_group) == (3, 2)
    masks = _random(Masks(WIDE, WIDE_TARGET, QUERY_HEAD), seed=4)
    assert masks.sizes == {"head": (2 * 3, 4)}
    assert masks.target_units == {"head": 2}
    assert masks.target_sparsity == {"head": 0.5}
    assert masks.expected_sparsity()["head"].shape == (6,)
    z = masks.deterministic("target")["head"]
    assert (z > 0).sum(1).tolist() == [2] * 6
    assert masks.sample(1, 1)["head"].shape == (6, 4)


def test_rows_are_told_by_layer_and_group() -> None:
    by_head, by_group = Masks(WIDE, WIDE_TARGET, QUERY_HEAD), Masks(WIDE, None)
    assert by_head.row_name("head", 4) == "head of layer 1, group 1"
    assert by_group.row_name("head", 1) == "head of layer 1"
    assert by_head.row_name("intermediate", 1) == "intermediate of layer 1"
    assert (by_head.row_name("hidden", 0), by_head.row_name("model", 0)) == ("hidden", "model")


def test_a_target_keeps_what_it_does_not_name() -> None:
    assert resolve_target(SOURCE, TargetShape(num_attention_heads=6)) == replace(
        SOURCE, num_attention_heads=6, num_query_groups=3
    )
    assert resolve_target(SOURCE, TargetShape(hidden_size=32)).kv_channels == SOURCE.kv_channels
