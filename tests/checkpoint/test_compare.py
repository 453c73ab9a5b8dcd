"""The comparison itself, and the two models it is for: transformers' and Megatron-Core's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megashear.checkpoint import models
from megashear.checkpoint.compare import logits, logits_difference
from megashear.checkpoint.dense import extract_checkpoint, write_model
from megashear.checkpoint.hf.writer import write_huggingface
from megashear.checkpoint.info import CheckpointInfo
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape, TargetShape
from megashear.errors import CheckpointError
from megashear.platform.parallel import single_process
from megashear.pruning.masks import Masks, resolve_target
from tests.support.hf_models import VARIANTS, save_llama, tokens_of
from tests.support.reference_llama import random_weights


def import_model(source: Path, out: Path) -> None:
    """A Megatron checkpoint of a Hugging Face directory."""
    reader = models.open_huggingface(source).weights
    with single_process():
        write_model(out, CheckpointInfo(reader.shape, "imported"), reader.items())


def test_difference_against_numpy() -> None:
    rng = np.random.default_rng(0)
    a = 3 * rng.standard_normal((2, 5, 7)).astype(np.float32)
    b = a + 0.5 * rng.standard_normal((2, 5, 7)).astype(np.float32)
    found = logits_difference(torch.from_numpy(a), torch.from_numpy(b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    assert found.max_abs == pytest.approx(np.abs(a - b).max())
    assert found.mean_abs == pytest.approx(np.abs(a - b).mean())
    assert found.scale == pytest.approx(np.sqrt(a.var(-1).mean()))
    assert found.kl_per_token == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.within(found.relative * 1.01)
    assert not found.within(found.relative * 0.99)


def test_scale_does_not_grow_with_a_constant() -> None:
    a = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    plain, shifted = logits_difference(a, a + 1e-3), logits_difference(a + 1000, a + 1000)
    assert plain.scale == pytest.approx(shifted.scale, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_within_no_tolerance(value: float) -> None:
    a = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0, 0, 2] = value  # not the last, for a later finite row must not hide it
    for pair in ((a, b), (b, a), (b, b)):
        assert not logits_difference(*pair).within(1e9)


def test_vocabularies_must_be_the_same() -> None:
    with pytest.raises(CheckpointError, match="cannot be compared"):
        logits_difference(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("variant", ["grouped_query", "qwen3"])
def test_imported_model_computes_what_transformers_computes(tmp_path: Path, variant: str) -> None:
    model = save_llama(tmp_path / "hf", **VARIANTS[variant])
    import_model(tmp_path / "hf", tmp_path / "megatron")
    tokens = tokens_of(model)
    expected = logits(models.open(tmp_path / "hf"), tokens)
    with torch.no_grad():
        assert torch.allclose(expected, model(tokens).logits, atol=1e-5)
    found = logits_difference(expected, logits(models.open(tmp_path / "megatron"), tokens))
    assert found.within(1e-4)
    assert found.top1_agreement == 1.0
    assert found.kl_per_token < 1e-8


@pytest.mark.parametrize("variant", ["grouped_query", "tied"])
def test_megatron_checkpoint_exports_the_same_tensors(tmp_path: Path, variant: str) -> None:
    model = save_llama(tmp_path / "hf", **VARIANTS[variant])
    import_model(tmp_path / "hf", tmp_path / "megatron")
    shape = models.open_huggingface(tmp_path / "hf").shape
    with single_process():
        reader = WeightsReader(tmp_path / "megatron" / "model", shape)
        write_huggingface(tmp_path / "out", shape, reader.items())
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(exported.pop(name), tensor), name
    assert not exported
    assert model.config.tie_word_embeddings == (variant == "tied")


def test_a_wrong_conversion_is_found(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "hf", num_key_value_heads=2)
    reader = models.open_huggingface(tmp_path / "hf").weights
    weights = dict(reader.items())
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    group = weights[name].unflatten(0, (2, 4, 8))  # key and value of each group changed over
    weights[name] = group[:, [0, 1, 3, 2]].flatten(0, 2)
    with single_process():
        info = CheckpointInfo(reader.shape, "imported")
        write_model(tmp_path / "megatron", info, weights.items())
    tokens = tokens_of(model)
    found = logits_difference(
        logits(models.open(tmp_path / "hf"), tokens),
        logits(models.open(tmp_path / "megatron"), tokens),
    )
    assert not found.within(1e-2)


@pytest.mark.parametrize(
    ("tied", "head_unit"), [(False, QUERY_GROUP), (True, QUERY_GROUP), (False, QUERY_HEAD)]
)
def test_masked_run_equals_its_extraction_and_export(
    tmp_path: Path, tied: bool, head_unit: str
) -> None:
    shape = ModelShape(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=48,
        vocab_size=96,
        tied_embeddings=tied,
    )
    sizes = TargetShape(num_layers=2, hidden_size=24, num_attention_heads=4, ffn_hidden_size=32)
    target = resolve_target(shape, sizes, head_unit)
    masks = Masks(shape, target, head_unit)
    state = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        for number, (name, value) in enumerate(masks.state_dict().items())
    }
    config = (
        f"{{stage: prune, run_dir: run, pruning: {{head_unit: {head_unit}}}}}"
        if head_unit != QUERY_GROUP
        else None
    )
    info = CheckpointInfo(shape, "prune", target=target, config=config)
    run, cut, out = (tmp_path / name for name in ("run", "cut", "out"))
    with single_process():
        write_model(run, info, random_weights(shape, 0).items())
        save_file(state, run / "masks.safetensors")
        dense = extract_checkpoint(models.open(run), cut)
        weights = WeightsReader(cut / "model", dense.shape)
        write_huggingface(out, dense.shape, weights.items())
    tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))
    masked = logits(models.open(run), tokens)
    assert logits_difference(masked, logits(models.open(cut), tokens)).within(1e-4)
    assert logits_difference(masked, logits(models.open(out), tokens)).within(1e-4)
    twice = tmp_path / "twice"  # the mistake of folding the final norm a second time
    wrong = dict(models.open_huggingface(out).weights.items())
    wrong["decoder.final_layernorm.weight"] *= wrong["decoder.final_layernorm.weight"]
    write_huggingface(twice, dense.shape, wrong.items())
    assert not logits_difference(masked, logits(models.open(twice), tokens)).within(1e-2)


def test_weights_are_compared_as_the_files_have_them(tmp_path: Path) -> None:
    """Transformers 5 rounds weights to the dtype of config.json: a right import would differ."""
    model = save_llama(tmp_path / "hf", num_key_value_heads=2)  # fp32 weights
    file = tmp_path / "hf" / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "dtype"}
    file.write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    import_model(tmp_path / "hf", tmp_path / "megatron")
    sides = (logits(models.open(tmp_path / name), tokens_of(model)) for name in ("hf", "megatron"))
    assert logits_difference(*sides).within(1e-4)


def test_what_transformers_cannot_load_is_an_error(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "hf", num_key_value_heads=2)
    file = tmp_path / "hf" / "config.json"
    config = {**json.loads(file.read_text()), "rms_norm_eps": 1}
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        logits(models.open(tmp_path / "hf"), tokens_of(model))
