"""Extraction against plain numpy slicing, and against the masked model's own logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape, TargetShape
from megashear.errors import CheckpointError
from megashear.pruning.extract import extract, uniform_shape
from megashear.pruning.lagrangian import format_off_target, off_target
from megashear.pruning.masks import Masks, resolve_target
from megashear.pruning.table import MASK_KINDS, mask_sizes, param_rules
from tests.support.reference_llama import forward, random_masks, random_weights

SHAPES = {
    "mha": ModelShape(4, 48, 6, 60, 50, kv_channels=6, layernorm_epsilon=1e-2),
    "gqa": ModelShape(4, 48, 12, 60, 50, num_query_groups=6, kv_channels=6, layernorm_epsilon=1e-2),
}
SHAPES |= {f"{name}-tied": replace(s, tied_embeddings=True) for name, s in SHAPES.items()}
SHAPES["bias-norms"] = replace(SHAPES["gqa"], qkv_bias=True, qk_norm=True)
BY_HEAD = {name: replace(SHAPES[name], num_query_groups=4) for name in ("gqa", "bias-norms")}
SHAPES |= {f"{name}-query-head": shape for name, shape in BY_HEAD.items()}


def _head_unit(source: ModelShape) -> str:
    return QUERY_HEAD if source in BY_HEAD.values() else QUERY_GROUP


def _target(source: ModelShape) -> ModelShape:
    """Four query groups; all four groups with two of their three heads."""
    units = 4 * (2 if source in BY_HEAD.values() else source.heads_per_group)
    return resolve_target(source, TargetShape(3, 32, units, 40), _head_unit(source))


def _masks(source: ModelShape, seed: int) -> dict[str, Tensor]:
    return random_masks(source, _target(source), seed, _head_unit(source))


def _extract(
    source: ModelShape, z: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    return dict(extract(source, z, weights.__getitem__, _head_unit(source)))


def _double(z: dict[str, Tensor]) -> dict[str, Tensor]:
    return {mask: value.double() for mask, value in z.items()}


def _in_numpy(
    source: ModelShape, masks: dict[str, Tensor], weights: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """Slicing by hand, parameter by parameter, in float64."""
    z = {mask: value.numpy().astype(np.float64) for mask, value in masks.items()}
    w = {name: value.numpy().astype(np.float64) for name, value in weights.items()}
    c, per_group, m = source.kv_channels, source.heads_per_group, source.ffn_hidden_size
    d = np.flatnonzero(z["hidden"][0])
    zd = z["hidden"][0, d]
    out = {
        "embedding.word_embeddings.weight": w["embedding.word_embeddings.weight"][:, d] * zd,
        "decoder.final_layernorm.weight": w["decoder.final_layernorm.weight"][d] * zd,
    }
    if not source.tied_embeddings:
        out["output_layer.weight"] = w["output_layer.weight"][:, d]
    for new, old in enumerate(np.flatnonzero(z["layer"][0])):
        attention, mlp = (f"decoder.layers.{old}.{part}." for part in ("self_attention", "mlp"))
        rows = zd * z["layer"][0, old]
        f = np.flatnonzero(z["intermediate"][old])
        groups, norm = source.num_query_groups, attention + "linear_qkv.layer_norm_weight"
        head = z["head"].reshape(source.num_layers, groups, -1)[old]
        head = np.broadcast_to(head, (groups, per_group))  # a group's mask is that of all its heads
        on = [(g, q) for g in range(groups) for q in range(per_group) if head[g, q]]
        rows_of_qkv = [
            (g, part)  # a group's queries that are on, then its key and value
            for g in sorted({g for g, _ in on})
            for part in (*(q for group, q in on if group == g), per_group, per_group + 1)
        ]
        qkv = w[attention + "linear_qkv.weight"].reshape(groups, per_group + 2, c, -1)[..., d]
        proj = w[attention + "linear_proj.weight"][d].reshape(len(d), groups, per_group, c)
        proj = [proj[:, g, q] * rows[:, None] * head[g, q] for g, q in on]
        gate, up = w[mlp + "linear_fc1.weight"][:m], w[mlp + "linear_fc1.weight"][m:]
        fc2 = w[mlp + "linear_fc2.weight"][d][:, f] * np.outer(rows, z["intermediate"][old, f])
        layer = {
            "self_attention.linear_qkv.layer_norm_weight": w[norm][d] * zd,
            "self_attention.linear_qkv.weight": np.concatenate([qkv[at] for at in rows_of_qkv]),
            "self_attention.linear_proj.weight": np.concatenate(proj, axis=1),
            "mlp.linear_fc1.layer_norm_weight": w[mlp + "linear_fc1.layer_norm_weight"][d] * zd,
            "mlp.linear_fc1.weight": np.concatenate((gate[f][:, d], up[f][:, d])),
            "mlp.linear_fc2.weight": fc2,
        }
        if source.qkv_bias:
            bias = w[attention + "linear_qkv.bias"].reshape(groups, per_group + 2, c)
            layer["self_attention.linear_qkv.bias"] = np.concatenate(
                [bias[at] for at in rows_of_qkv]
            )
        for name in ("q_layernorm.weight", "k_layernorm.weight") if source.qk_norm else ():
            layer[f"self_attention.{name}"] = w[attention + name]
        out |= {f"decoder.layers.{new}.{name}": value for name, value in layer.items()}
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES)
def test_every_parameter_is_what_slicing_by_hand_gives(source: ModelShape, seed: int) -> None:
    weights, z = random_weights(source, seed), _masks(source, seed)
    extracted = _extract(source, z, weights)
    expected = _in_numpy(source, z, weights)
    assert list(extracted) == [rule.name for rule in param_rules(_target(source))]
    assert set(extracted) == set(expected)
    for name, value in extracted.items():
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES)
def test_masked_and_extracted_models_have_the_same_logits(source: ModelShape) -> None:
    weights, z = random_weights(source, 1, torch.float64), _double(_masks(source, 1))
    assert all(len(value.unique()) > 3 for value in z.values())
    tokens = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(2))
    masked = forward(source, weights, tokens, z)
    extracted = forward(_target(source), _extract(source, z, weights), tokens)
    torch.testing.assert_close(extracted, masked, rtol=0, atol=1e-10)

    dense = forward(source, weights, tokens)
    assert (masked - dense).abs().max() > 0.1  # the masks do something


@pytest.mark.parametrize("mistake", ["head folded twice", "norm with sqrt(n/d)", "other layer"])
def test_the_comparison_of_logits_sees_a_mistake(mistake: str) -> None:
    source = SHAPES["gqa"]
    target = _target(source)
    weights, z = random_weights(source, 1, torch.float64), _double(random_masks(source, target, 1))
    tokens = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(2))
    masked = forward(source, weights, tokens, z)
    wrong = dict(extract(source, z, weights.__getitem__))
    if mistake == "head folded twice":
        wrong["output_layer.weight"] *= z["hidden"][0][z["hidden"][0] > 0]
    elif mistake == "norm with sqrt(n/d)":
        wrong["decoder.final_layernorm.weight"] *= (32 / 48) ** 0.5
    else:
        first, second = (f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in (0, 1))
        wrong[first], wrong[second] = wrong[second], wrong[first]
    difference = (forward(target, wrong, tokens) - masked).abs().max()
    assert difference > 1e-2 * masked.abs().max()


@pytest.mark.parametrize("name", ["gqa", "gqa-query-head"])
def test_deterministic_masks_of_a_run_extract_to_its_target(name: str) -> None:
    source = SHAPES[name]
    target = _target(source)
    masks = Masks(source, target, _head_unit(source))
    with torch.no_grad():
        for log_alpha in masks.parameters():
            log_alpha.uniform_(-4, 4, generator=torch.Generator().manual_seed(1))
    z = masks.deterministic("target")
    assert uniform_shape(source, z, masks.head_unit) == target
    weights = random_weights(source, 5)
    shapes = {name: tuple(w.shape) for name, w in _extract(source, z, weights).items()}
    assert shapes == {rule.name: rule.shape() for rule in param_rules(target)}


def test_half_precision_is_folded_in_float32_and_rounded_once() -> None:
    source = SHAPES["mha"]
    z = random_masks(source, _target(source), 3)
    weights = {n: w.bfloat16() for n, w in random_weights(source, 3).items()}
    expected = _in_numpy(source, z, {n: w.float() for n, w in weights.items()})
    for name, value in extract(source, z, weights.__getitem__):
        assert value.dtype == torch.bfloat16
        once = torch.from_numpy(expected[name]).float().bfloat16()
        # float32 products of three factors may round to the other side of a tie, rarely.
        assert (value != once).float().mean() < 1e-3, name


def test_reads_one_parameter_at_a_time_and_none_of_the_dropped_layers() -> None:
    source = SHAPES["mha"]
    z = random_masks(source, _target(source), 4)
    weights, read = random_weights(source, 4), []

    def reading(name: str) -> Tensor:
        read.append(name)
        return weights[name]

    for position, _ in enumerate(extract(source, z, reading), start=1):
        assert len(read) == position
    dropped = int((z["layer"][0] == 0).nonzero())
    assert not any(name.startswith(f"decoder.layers.{dropped}.") for name in read)


def test_a_parameter_of_another_shape_is_an_error_that_names_it() -> None:
    source = SHAPES["mha"]
    weights = random_weights(replace(source, ffn_hidden_size=62), 0)
    z = random_masks(source, _target(source), 0)
    with pytest.raises(
        CheckpointError, match=r"mlp\.linear_fc1\.weight .*\(124, 48\).*\(120, 48\)"
    ):
        list(extract(source, z, weights.__getitem__))


def test_layers_that_differ_are_refused_with_their_counts() -> None:
    source = SHAPES["gqa"]
    z = random_masks(source, _target(source), 6)
    kept = z["layer"][0].nonzero().flatten().tolist()
    z["head"][kept[1]] = 1.0
    z["intermediate"][kept[0], :] = 0.0
    with pytest.raises(CheckpointError) as error:
        uniform_shape(source, z)
    text = str(error.value)
    assert f"query groups: 4 in {kept[0]}, 6 in {kept[1]}, 4 in {kept[2]}" in text
    assert f"intermediate units: 0 in {kept[0]}, 40 in {kept[1]}, 40 in {kept[2]}" in text


def test_groups_that_differ_are_refused_with_their_counts() -> None:
    source = SHAPES["gqa-query-head"]
    z = _masks(source, 6)
    first, *_ = z["layer"][0].nonzero().flatten().tolist()
    z["head"][first * 4 + 2] = 1.0
    with pytest.raises(CheckpointError) as error:
        uniform_shape(source, z, QUERY_HEAD)
    text = f"query heads: 2 in {first} group 0, 2 in {first} group 1, 3 in {first} group 2, 2 in"
    assert text in str(error.value)


def test_layers_that_are_off_do_not_count() -> None:
    source = SHAPES["gqa"]
    target = _target(source)
    z = random_masks(source, target, 6)
    off = int((z["layer"][0] == 0).nonzero())
    z["head"][off], z["intermediate"][off] = 1.0, 0.0
    assert uniform_shape(source, z) == target


@pytest.mark.parametrize("mask", MASK_KINDS)
def test_nothing_left_is_refused(mask: str) -> None:
    source = SHAPES["gqa"]
    z = {name: torch.ones(size) for name, size in mask_sizes(source).items()}
    z[mask] = torch.zeros_like(z[mask])
    with pytest.raises(CheckpointError, match="are kept"):
        uniform_shape(source, z)


def _settled(masks: Masks) -> None:
    """Sets log_alpha so that every row's expected sparsity is its target, to 1e-3."""
    with torch.no_grad():
        for mask, log_alpha in masks.log_alpha.items():
            t = torch.tensor(masks.target_sparsity[mask], dtype=torch.float64)
            log_alpha.fill_(float(2 / 3 * np.log(1 / 11) - torch.logit(t)))


def test_off_target_lists_every_row_that_is_off_and_no_other() -> None:
    source = SHAPES["gqa"]
    masks = Masks(source, _target(source))
    _settled(masks)
    assert off_target(masks) == []
    assert format_off_target([]) == ""

    with torch.no_grad():
        masks.log_alpha["head"][2] += 0.5
        masks.log_alpha["hidden"] -= 0.3
    found = {(row.mask, row.row): (row.expected, row.target) for row in off_target(masks)}
    assert set(found) == {("head", 2), ("hidden", 0)}
    expected, target = found["head", 2]
    assert expected == pytest.approx(1 / (1 + 2 * np.exp(0.5)), abs=1e-5)
    assert target == pytest.approx(1 / 3)
    text = format_off_target(off_target(masks))
    assert "head of layer 2" in text
    assert "expected sparsity 0.233, target 0.333  (-0.101)" in text
    assert off_target(masks, tolerance=0.5) == []


@pytest.mark.parametrize("share", [1 / 4, 1 / 2])
def test_a_row_that_has_decided_for_the_target_is_on_target(share: float) -> None:
    source = ModelShape(4, 48, 8, 60, 50, kv_channels=6)
    masks = Masks(source, resolve_target(source, TargetShape(num_attention_heads=int(8 * share))))
    with torch.no_grad():
        masks.log_alpha["head"][:] = torch.where(torch.arange(8) < 8 * share, 100.0, -100.0)
    expected = masks.expected_sparsity()["head"]
    assert (expected - (1 - share)).abs().min() > 0.02  # as far as the clamp lets it come
    assert off_target(masks) == []
    with torch.no_grad():
        masks.log_alpha["head"][1, 0] = -100.0  # one head more than the target allows
    assert [(mask, row) for mask, row, *_ in off_target(masks)] == [("head", 1)]


def test_off_target_lists_masks_that_are_not_numbers() -> None:
    masks = Masks(SHAPES["mha"], _target(SHAPES["mha"]))
    _settled(masks)
    with torch.no_grad():
        masks.log_alpha["layer"][0, 1] = float("nan")
    assert [(mask, row) for mask, row, *_ in off_target(masks)] == [("layer", 0)]


def test_off_target_names_the_query_group() -> None:
    source = SHAPES["gqa-query-head"]
    masks = Masks(source, _target(source), QUERY_HEAD)
    _settled(masks)
    assert off_target(masks) == []
    with torch.no_grad():
        masks.log_alpha["head"][3 * 4 + 1] += 0.5
    text = format_off_target(off_target(masks))
    assert text.splitlines()[1:] == [
        "  head of layer 3, group 1  expected sparsity 0.233, target 0.333  (-0.101)"
    ]


def test_off_target_of_a_run_without_a_target_shape_is_the_whole_model() -> None:
    masks = Masks(SHAPES["mha"], None)
    [(mask, row, expected, target, name)] = off_target(masks, target_sparsity=0.5)
    assert (mask, row, target, name) == ("model", 0, 0.5, "model")
    assert 0 < expected < 0.05
