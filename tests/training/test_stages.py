"""Runs of stage prune by every way in and out: sources, constraints, multipliers, extraction."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megashear.checkpoint import models
from megashear.checkpoint.checksums import checksum
from megashear.checkpoint.compare import logits, logits_difference
from megashear.checkpoint.dense import extract_checkpoint, import_huggingface
from megashear.checkpoint.info import read_info
from megashear.config.schema import ParallelConfig, PruningConfig, RunConfig
from megashear.errors import CheckpointError
from megashear.platform import parallel
from megashear.pruning.counting import parameter_count
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.hf_models import save_llama
from tests.support.runs import GQA, MHA, TARGETS, records, run_config, write_domains, write_source

MASKS = ("layer", "hidden", "head", "intermediate")


def train(config: RunConfig) -> str:
    """Run to the end; what must be said of the masks then."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    try:
        trainer.run()
    finally:
        parallel.stop()
    return trainer.objective.verdict()


def write_import(directory: Path) -> None:
    import_huggingface(directory / "hf", directory / "imported")


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_hugging_face_directory_is_pruned_as_its_import_is(tensor: int, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    save_llama(tmp_path / "hf", **sizes, tie_word_embeddings=True)
    domains = write_domains(tmp_path)
    run_distributed(write_import, 1, tmp_path)
    found = []
    for source in ("hf", "imported"):
        config = run_config(
            tmp_path,
            domains,
            stage="prune",
            run_dir=str(tmp_path / f"run-{source}"),
            init_from=str(tmp_path / source),
            target=TARGETS[GQA],
            parallel=ParallelConfig(tensor=tensor),
        )
        run_distributed(train, tensor, config)
        found.append([records(config.run_dir, kind) for kind in ("step", "evaluation")])
    assert len(found[0][0]) == 6
    assert found[0] == found[1]  # bit for bit


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stages")
    run_distributed(write_source, 1, directory, MHA)
    return directory


def half_the_size(directory: Path, name: str, steps: int, **changes: Any) -> RunConfig:
    """A run whose one constraint is that half of all parameters go."""
    pruning = PruningConfig(sparsity_warmup_steps=steps // 4, mask_lr=0.15, multiplier_lr=0.5)
    config = run_config(
        directory,
        write_domains(directory),
        stage="prune",
        run_dir=str(directory / name),
        init_from=str(directory / "source"),
        target_sparsity=0.5,
        pruning=pruning,
    )
    trainer = replace(config.trainer, steps=steps, micro_batch_size=2, save_interval=steps)
    evaluation = replace(config.evaluation, interval=steps)
    return replace(config, trainer=trainer, evaluation=evaluation, **changes)


@pytest.fixture(scope="module")
def halved(directory: Path) -> Path:
    """Such a run, long enough to arrive (250 steps, 4 s)."""
    config = half_the_size(directory, "halved", 250)
    assert run_distributed(train, 1, config) == [""]  # nothing is off its target
    return Path(config.run_dir)


def expected_size(log_alpha: dict[str, Tensor]) -> float:
    """Expected parameters of MHA, in numpy, counted as one writes a LLaMA down."""
    kept = {}
    for name in MASKS:
        a = log_alpha[f"log_alpha.{name}"].double().numpy()
        kept[name] = (1 - 1 / (1 + np.exp(-(2 / 3 * math.log(0.1 / 1.1) - a)))).sum(1)
    layer = 1 - 1 / (1 + np.exp(-(2 / 3 * math.log(0.1 / 1.1) - log_alpha["log_alpha.layer"][0])))
    hidden, head = kept["hidden"][0], MHA.kv_channels * kept["head"]
    per_layer = 2 * hidden + 4 * hidden * head + 3 * hidden * kept["intermediate"]
    outer = 2 * MHA.vocab_size * hidden + hidden
    return float(outer + (layer.double().numpy() * per_layer).sum())


def test_a_share_of_the_parameters_is_removed_as_asked(halved: Path) -> None:
    steps, evaluations = records(halved, "step"), records(halved, "evaluation")
    assert all(list(record["sparsity"]) == ["model"] for record in steps)
    warming = [record["target_sparsity"]["model"] for record in steps]
    assert warming[:3] == pytest.approx([0, 0.5 / 62, 1 / 62]) and warming[62:] == [0.5] * 188
    sparsity = [record["sparsity"]["model"] for record in steps]
    assert sparsity[0] < 0.02
    assert abs(sparsity[-1] - 0.5) < 0.02
    size = expected_size(load_file(read_info(halved).directory / "masks.safetensors"))
    assert 1 - size / parameter_count(MHA) == pytest.approx(sparsity[-1], abs=1e-5)
    assert [record["step"] for record in evaluations] == [0, 250]
    assert all(math.isfinite(loss) for r in evaluations for loss in r["losses"].values())


def extraction(run: Path) -> list[Any]:
    """The refusal; or the sizes of what is extracted, and how far it is from the masked model."""
    try:
        shape = extract_checkpoint(models.open(run), run / "extracted").shape
    except CheckpointError as error:
        return [str(error)]
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    difference = logits_difference(
        logits(models.open(run), tokens), logits(models.open(run / "extracted"), tokens)
    )
    sizes = (shape.num_layers, shape.hidden_size, shape.num_query_groups, shape.ffn_hidden_size)
    return [sizes, difference.relative]


def test_layers_that_differ_are_not_extracted_and_the_reason_is_said(halved: Path) -> None:
    z = models.open(halved).masks.z
    kept = {name: (z[name] > 0).sum(1).tolist() for name in MASKS}
    layers = [number for number, value in enumerate(z["layer"][0].tolist()) if value > 0]
    (message,) = run_distributed(extraction, 1, halved)[0]
    assert "these masks do not leave a uniform dense model" in message
    for name, what in (("head", "query groups"), ("intermediate", "intermediate units")):
        counts = [kept[name][layer] for layer in layers]
        listed = ", ".join(f"{n} in {layer}" for layer, n in zip(layers, counts, strict=True))
        assert (f"differ in {what}: {listed}" in message) == (len(set(counts)) > 1)
    assert len(set(kept["intermediate"])) > 1
    assert not (halved / "extracted").exists()


def test_layers_that_came_out_alike_are_extracted(halved: Path, tmp_path: Path) -> None:
    shutil.copytree(halved, tmp_path / "alike")
    file = read_info(tmp_path / "alike").directory / "masks.safetensors"
    stored = load_file(file)
    for name in ("head", "intermediate"):
        stored[f"log_alpha.{name}"][:] = stored[f"log_alpha.{name}"][2].clone()
    save_file(stored, file)
    sums = json.loads((file.parent / "checksums.json").read_text())
    sums[file.name] = checksum(file)
    (file.parent / "checksums.json").write_text(json.dumps(sums))
    z = models.open(tmp_path / "alike").masks.z
    expected = tuple(int((z[name] > 0).sum(1)[0]) for name in MASKS)
    assert all(0 < size < full for size, full in zip(expected, (3, 32, 4, 48), strict=True))
    sizes, difference = run_distributed(extraction, 1, tmp_path / "alike")[0]
    assert tuple(sizes) == expected
    assert difference < 1e-4


def test_the_size_of_the_model_is_constrained_alike_under_tensor_parallelism(
    directory: Path,
) -> None:
    for tensor in (1, 2):
        layout = ParallelConfig(tensor=tensor)
        config = half_the_size(directory, f"tensor-{tensor}", 4, parallel=layout)
        run_distributed(train, tensor, config)
    pairs = zip(*(records(directory / f"tensor-{n}", "step") for n in (1, 2)), strict=True)
    for one, two in pairs:
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["penalty"] == pytest.approx(one["penalty"], rel=1e-4, abs=1e-7)
        assert two["sparsity"] == pytest.approx(one["sparsity"], rel=1e-4)


def penalties(config: RunConfig) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Penalties of five steps, as logged and by their formula in numpy; the multipliers then."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    logged: list[float] = []
    trainer.log.record = lambda record: logged.append(record["penalty"])  # type: ignore
    expected = []
    for step in range(5):
        total = 0.0
        state = {name: value.double().numpy() for name, value in trainer.objective.state().items()}
        for name, target in trainer.objective.lagrangian.targets.items():
            removed = 1 / (1 + np.exp(state[f"log_alpha.{name}"] - 2 / 3 * math.log(0.1 / 1.1)))
            excess = removed.mean(1) - min(step / 3, 1) * target
            lambda1, lambda2 = state[f"multipliers.{name}"]
            total += float((lambda1 * excess + lambda2 * excess**2).mean())
        expected.append(total)
        trainer.train_step()
    parallel.stop()
    multipliers = trainer.objective.lagrangian.multipliers
    found = {name: value.tolist() for name, value in multipliers.items()}
    return list(zip(logged, expected, strict=True)), found


@pytest.mark.parametrize("multipliers", ["shared", "per_layer"])
def test_penalty_and_multipliers_are_of_each_mask_or_of_each_layer(
    multipliers: str, directory: Path
) -> None:
    config = run_config(
        directory,
        write_domains(directory),
        stage="prune",
        run_dir=str(directory / multipliers),
        init_from=str(directory / "source"),
        target=TARGETS[MHA],
        pruning=PruningConfig(sparsity_warmup_steps=3, multipliers=multipliers),
    )
    pairs, found = run_distributed(penalties, 1, config)[0]
    for logged, expected in pairs:
        assert logged == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert abs(pairs[-1][0]) > 0.1
    rows = {"layer": 1, "hidden": 1, "head": 3, "intermediate": 3}
    for name, (lambda1, lambda2) in found.items():
        assert len(lambda1) == len(lambda2) == (rows[name] if multipliers == "per_layer" else 1)
        if len(lambda1) > 1:  # layers went their own ways
            assert len(set(lambda1)) == 3
