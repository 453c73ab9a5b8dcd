"""Extraction: the same model from a checkpoint of any layout, by any number of processes."""

from __future__ import annotations

import filecmp
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megashear.checkpoint import checksums, models
from megashear.checkpoint.dense import extract_checkpoint
from megashear.checkpoint.info import CheckpointInfo, read_info
from megashear.checkpoint.torch_dist import background, stream
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.checkpoint.torch_dist.state import without_extra_state
from megashear.config.schema import ParallelConfig, PlatformConfig, RunConfig
from megashear.model.build import build_model
from megashear.platform import parallel
from megashear.pruning.extract import extract
from megashear.pruning.masks import Masks
from megashear.pruning.table import param_rules
from megashear.training.trainer import Trainer
from tests.checkpoint.torch_dist.test_stream import BIG, peak_of
from tests.support.distributed import run_distributed
from tests.support.runs import (
    GENERATION,
    GQA,
    TARGETS,
    prune_options,
    run_config,
    write_domains,
    write_source,
)
from tests.training.test_layouts import LAYOUTS

SHAPE = replace(GQA, num_layers=4)


def pruning(directory: Path) -> RunConfig:
    config = run_config(
        directory,
        write_domains(directory),
        init_from=str(directory / "source"),
        **prune_options(SHAPE),
    )
    return replace(config, evaluation=replace(config.evaluation, interval=100))


def save(config: RunConfig, steps: int) -> None:
    """Save a run as it stands, or after steps and with masks in mid-range."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    for _ in range(steps):
        trainer.train_step()
        generator = torch.Generator().manual_seed(7)
        for log_alpha in trainer.objective.masks.log_alpha.values():
            log_alpha.data.copy_(torch.randn(log_alpha.shape, generator=generator))
    trainer.save()
    parallel.stop()


def extract_to(run: Path, out: Path, file_numel: int) -> None:
    """This process's part of an extraction."""
    stream.FILE_NUMEL = file_numel
    extract_checkpoint(models.open(run), out)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, a step old, and what one process extracts from it."""
    directory = tmp_path_factory.mktemp("one")
    run_distributed(write_source, 1, directory, SHAPE)
    run_distributed(save, 1, pruning(directory), 1)
    run_distributed(extract_to, 1, directory / "run", directory / "extracted", 2048)
    return directory


def assert_same(found: Path, expected: Path) -> None:
    """The same tensors, byte for byte."""
    names = sorted(path.name for path in (expected / "model").glob("__0_*"))
    assert len(names) > 3
    same = filecmp.cmpfiles(expected / "model", found / "model", names, shallow=False)[0]
    assert sorted(same) == names
    reader = WeightsReader(found / "model", read_info(found).shape)
    for name, tensor in WeightsReader(expected / "model", read_info(expected).shape).items():
        assert torch.equal(reader.read(name), tensor), name


def test_it_is_what_the_table_says(one: Path) -> None:
    pruned, dense = models.open(one / "run"), read_info(one / "extracted")
    whole = WeightsReader(pruned.info.model_directory, SHAPE)
    expected = dict(extract(SHAPE, pruned.masks.z, whole.read))
    found = dict(WeightsReader(dense.model_directory, dense.shape).items())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    target = TARGETS[GQA]
    assert dense.shape.num_layers == target.num_layers
    assert dense.shape.ffn_hidden_size == target.ffn_hidden_size
    assert (dense.stage, dense.step) == ("extracted", 0)
    assert dense.generation == pruned.info.generation == GENERATION
    stages = [(record.stage, record.steps, record.shape) for record in dense.history]
    assert stages == [("imported", 0, SHAPE), ("prune", 1, SHAPE)]


@pytest.mark.parametrize(
    "layout",
    ["tp2", "tp2-sp", "pp2", "pp2-interleaved", "dp2-distopt", "tp2-sp-pp2-dp2-distopt-overlap"],
)
def test_a_checkpoint_of_any_layout_gives_the_same(layout: str, one: Path, tmp_path: Path) -> None:
    """The run goes on in the layout, which saves all it took up again."""
    ranks, parallel_config = LAYOUTS[layout]
    config = replace(pruning(one), parallel=parallel_config, run_dir=str(tmp_path / "run"))
    shutil.copytree(one / "run", tmp_path / "run")
    before = read_info(tmp_path / "run").model_directory
    pieces = {path.name: path.stat().st_size for path in before.glob("*.distcp")}
    run_distributed(save, ranks, config, 0)
    assert {p.name: p.stat().st_size for p in before.glob("*.distcp")} != pieces
    run_distributed(extract_to, 1, tmp_path / "run", tmp_path / "extracted", 2048)
    assert_same(tmp_path / "extracted", one / "extracted")


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes_extracts_the_same(ranks: int, one: Path, tmp_path: Path) -> None:
    run_distributed(extract_to, ranks, one / "run", tmp_path / "extracted", 2048)
    assert_same(tmp_path / "extracted", one / "extracted")
    mine = (tmp_path / "extracted" / "checkpoint.json").read_text()
    assert mine == (one / "extracted" / "checkpoint.json").read_text()


def save_big(directory: Path) -> None:
    """A pruning run's checkpoint, but for the optimizer, from two tensor-parallel ranks."""
    layout = ParallelConfig(tensor=2)
    platform = parallel.start(PlatformConfig(device="cpu"), layout, seed=0)
    chunks = build_model(BIG, platform, layout, seq_length=8)
    if platform.rank == 0:
        target = replace(BIG, num_layers=8, hidden_size=384, ffn_hidden_size=1536)
        (directory / "run").mkdir()
        save_file(Masks(BIG, target).state_dict(), directory / "run" / "masks.safetensors")
        info = CheckpointInfo(BIG, "prune", target=target)
        (directory / "run" / "checkpoint.json").write_text(info.to_json())
    platform.largest(0)
    state = without_extra_state(chunks[0].sharded_state_dict())
    background.save(state, directory / "run" / "model")
    checksums.seal(directory / "run", {})
    parallel.stop()


def peaks(directory: Path) -> tuple[int, int]:
    """Of an extraction, and of one that first reads everything."""
    pruned = models.open(directory / "run")
    with stream.processes():
        extract_checkpoint(pruned, directory / "warm-up")
        extracting = peak_of(lambda: extract_checkpoint(pruned, directory / "out"))
        whole = WeightsReader(directory / "run" / "model", BIG)
        return extracting, peak_of(lambda: dict(whole.items()))


def test_a_model_is_extracted_with_memory_for_a_few_tensors(tmp_path: Path) -> None:
    run_distributed(save_big, 2, tmp_path)
    sizes = [4 * torch.Size(rule.shape()).numel() for rule in param_rules(BIG)]
    extracting, reading = run_distributed(peaks, 1, tmp_path)[0]
    assert reading > 0.8 * sum(sizes) > 20 * max(sizes)
    assert extracting < 8 * max(sizes)  # 2 to 3 are held; the heap gives some back late
