"""tools/checkpoint/extract.py as a user calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megashear.checkpoint import models
from megashear.checkpoint.dense import write_model
from megashear.checkpoint.info import CheckpointInfo, read_info
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.model.build import bound_rules, build_model
from megashear.platform import parallel
from megashear.pruning.masks import Masks
from megashear.pruning.table import HEAD, INTERMEDIATE
from tests.support.distributed import run_distributed
from tests.support.reference_llama import random_weights
from tests.support.runs import GQA, masks_of
from tests.tools.conftest import TOOLS, Tool

SHAPE = replace(GQA, num_layers=4)


def decided(masks: Masks) -> Masks:
    """Masks that have decided for the first units of each row, as many as the target keeps."""
    for name, log_alpha in masks.log_alpha.items():
        kept = masks.target_units[name] if masks.target else log_alpha.shape[1]
        log_alpha.data.fill_(-4.6)[:, :kept] = 4.6
    return masks


def write_run(directory: Path, masks: Masks, config: str = "") -> Path:
    """What extraction reads of a pruning run's checkpoint."""
    info = CheckpointInfo(
        SHAPE,
        "prune",
        target=masks.target,
        config=config and f"stage: prune\nrun_dir: run\n{config}",
    )
    write_model(directory, info, random_weights(SHAPE, seed=0).items())
    save_file(masks.state_dict(), directory / "masks.safetensors")
    return directory


@pytest.fixture
def off(tmp_path: Path) -> Path:
    """A run whose masks are on target but for one row of the heads and one of the mlp."""
    masks = decided(masks_of(SHAPE))
    masks.log_alpha[HEAD].data[2, 2] = 4.6
    masks.log_alpha[INTERMEDIATE].data[1, 30:32] = -4.6
    return write_run(tmp_path / "off", masks)


def test_the_report_has_a_line_for_each_mask_and_one_for_each_row_that_is_off(
    off: Path, tmp_path: Path, tool: Tool
) -> None:
    on = write_run(tmp_path / "on", decided(masks_of(SHAPE)))
    status, output, error = tool("extract", "--run", on, "--strict")
    assert (status, error) == (0, "")
    assert output.splitlines()[:5] == [
        "mask                   expected sparsity  target  units kept",
        "layer                              0.477   0.500  2 of 4",
        "hidden                             0.240   0.250  24 of 32",
        "head (4 rows)                      0.477   0.500  2 of 4",
        "intermediate (4 rows)              0.319   0.333  32 of 48",
    ]
    status, output, error = tool("extract", "--run", off)
    assert status == 0
    assert error == ("MASKS OFF THEIR TARGETS: 2. Extraction cuts them by rank all the same.\n")
    assert output.splitlines()[:7] == [
        "mask                     expected sparsity  target  units kept",
        "layer                                0.477   0.500  2 of 4",
        "hidden                               0.240   0.250  24 of 32",
        "head (3 rows)                        0.477   0.500  2 of 4",
        "head of layer 2                      0.240   0.500  2 of 4      OFF TARGET",
        "intermediate (3 rows)                0.319   0.333  32 of 48",
        "intermediate of layer 1              0.359   0.333  32 of 48    OFF TARGET",
    ]
    assert read_info(off / "extracted").shape.num_query_groups == 2


def test_strict_refuses_masks_that_are_off_and_writes_nothing(off: Path, tool: Tool) -> None:
    before = sorted(off.rglob("*"))
    status, output, error = tool("extract", "--run", off, "--strict")
    assert status == 1
    assert "head of layer 2" in output
    assert error == "MASKS OFF THEIR TARGETS: 2. Refused by --strict: nothing was written\n"
    assert sorted(off.rglob("*")) == before


def test_a_run_without_a_target_shape_is_reported_as_a_whole(tmp_path: Path, tool: Tool) -> None:
    run = write_run(tmp_path / "run", decided(Masks(SHAPE, None)), "target_sparsity: 0.5\n")
    status, output, _ = tool("extract", "--run", run, "--strict")
    assert status == 1
    lines = output.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        *("layer", "hidden", "head (4 rows)", "intermediate (4 rows)", "model")
    ]
    assert lines[1].split("  ")[-1] == "4 of 4"
    assert "none" in lines[1]
    assert lines[5].endswith("OFF TARGET")


def parts(checkpoint: Path, layout: ParallelConfig) -> bool:
    """Whether a rank of a layout holds its part of a checkpoint's tensors."""
    info = read_info(checkpoint)
    platform = parallel.start(PlatformConfig(device="cpu"), layout, seed=0)
    chunks = build_model(info.shape, platform, layout, seq_length=8)
    models.open(checkpoint).fill(chunks, platform)
    reader = WeightsReader(info.model_directory, info.shape)
    place = platform.tensor_rank, platform.tensor_size
    same = [
        torch.equal(bound.parameter, bound.rule.shard(reader.read(bound.rule.name), *place))
        for bound in bound_rules(chunks)
    ]
    parallel.stop()
    return len(same) > 3 and all(same)


def test_the_result_loads_in_the_layouts_that_are_named(off: Path, tool: Tool) -> None:
    _, output, _ = tool("extract", "--run", off)
    assert output.splitlines()[-5:] == [
        f"written to {off / 'extracted'}",
        "it loads in parallel layouts of",
        "tensor                       1, 2",
        "pipeline x virtual_pipeline  1, 2",
        "context, data                any",
    ]
    for layout in (
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(pipeline=2),
        ParallelConfig(tensor=2, pipeline=2),
    ):
        assert all(run_distributed(parts, layout.model_ranks, off / "extracted", layout))


def test_torchrun_extracts_the_same_and_speaks_once(off: Path, tool: Tool) -> None:
    """Two real processes, as in the command's help; takes about 15 seconds."""
    _, output, error = tool("extract", "--run", off)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    arguments = [TOOLS / "extract.py", "--run", off, "--out", off / "by-two"]
    found = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(TOOLS.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert found.stdout == output.replace("off/extracted", "off/by-two")
    assert [line for line in found.stderr.splitlines() if "MASKS" in line] == error.splitlines()
    names = [path.name for path in (off / "extracted" / "model").glob("__0_*")]
    for name in names:
        by_one, by_two = (off / out / "model" / name for out in ("extracted", "by-two"))
        assert by_one.read_bytes() == by_two.read_bytes()


def test_a_result_that_is_there_is_refused_on_any_number_of_processes(
    off: Path, tool: Tool
) -> None:
    tool("extract", "--run", off)
    status, _, error = tool("extract", "--run", off)
    assert status == 2
    assert error.endswith(
        f"error: {off / 'extracted'} exists. Remove it, or allow it with --overwrite\n"
    )
    assert tool("extract", "--run", off, "--overwrite")[0] == 0
