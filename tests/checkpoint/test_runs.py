"""Checkpoints of runs: any layout goes on from them, the newest are kept, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.checkpoint import models
from megashear.checkpoint.info import find, read_info
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.config.schema import ParallelConfig, RunConfig
from megashear.errors import CheckpointError
from megashear.model.build import bound_rules
from megashear.platform import parallel
from megashear.pruning.table import param_rules
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, run_config, write_domains, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    run_distributed(write_source, 1, directory)
    return directory / "source"


def pruning(directory: Path, source: Path, **trainer: Any) -> RunConfig:
    config = run_config(
        directory,
        write_domains(directory),
        stage="prune",
        init_from=str(source),
        target=TARGETS[GQA],
    )
    return replace(config, trainer=replace(config.trainer, **trainer))


def start(config: RunConfig) -> Trainer:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    return Trainer(config, platform)


def state(config: RunConfig, steps: int) -> dict[str, Any]:
    """A rank's weights, their moments, and the objective, `steps` after the run's checkpoint."""
    trainer = start(config)
    for _ in range(steps):
        trainer.train_step()
    if steps:
        trainer.save()
    bound = list(bound_rules(trainer.optimizer.chunks))
    moments = trainer.optimizer.megatron.optimizer.state
    found = {
        "place": (trainer.platform.tensor_rank, trainer.platform.tensor_size),
        "step": trainer.step,
        "weights": {b.rule.name: b.parameter.detach().clone() for b in bound},
        "moments": {b.rule.name: moments[b.parameter]["exp_avg_sq"].clone() for b in bound},
        "objective": trainer.objective.state(),
    }
    parallel.stop()
    return found


def test_a_run_on_tp_2_goes_on_in_any_layout(tmp_path: Path, source: Path) -> None:
    config = pruning(tmp_path, source)
    saved = run_distributed(state, 2, replace(config, parallel=ParallelConfig(tensor=2)), 2)
    rules = {rule.name: rule for rule in param_rules(GQA)}
    reader = WeightsReader(read_info(tmp_path / "run").model_directory, GQA)
    layouts = {"one": (1, 1), "dp2": (2, 1), "tp2": (2, 2), "tp4": (4, 4)}
    loaded = {
        name: run_distributed(
            state, ranks, replace(config, parallel=ParallelConfig(tensor=tensor)), 0
        )
        for name, (ranks, tensor) in layouts.items()
    }
    (whole,) = loaded["one"]
    for name, read in reader.items():
        assert torch.equal(whole["weights"][name], read), name
    for found in (*saved, *(rank for ranks in loaded.values() for rank in ranks)):
        assert found["step"] == 2
        for kind in ("weights", "moments"):
            for name, tensor in whole[kind].items():
                shard = rules[name].shard(tensor, *found["place"])
                assert torch.equal(found[kind][name], shard), (kind, name)
        assert_equal(found["objective"], whole["objective"])
    assert all(moment.any() for moment in whole["moments"].values())


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert "log_alpha.layer" in ours
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def train(config: RunConfig) -> None:
    trainer = start(config)
    try:
        trainer.run()
    finally:
        parallel.stop()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept_and_latest_names_the_last(
    keep: int, tmp_path: Path, source: Path
) -> None:
    config = pruning(tmp_path, source, steps=5, save_interval=2, keep_checkpoints=keep)
    run_distributed(train, 1, config)
    newest = ["step-00000004", "step-00000005"][-keep:]
    assert names(tmp_path / "run") == ["latest", *newest]
    assert read_info(tmp_path / "run").step == 5
    assert read_info(tmp_path / "run").tokens == 5 * 4 * 16
    first = tmp_path / "run" / "checkpoints" / newest[0]
    assert find(first) == first
    assert read_info(first).step == int(newest[0][-8:])


def test_what_a_crash_leaves_is_ignored_then_removed(tmp_path: Path, source: Path) -> None:
    """Killed while it saves on a signal (step 3), or before `latest` is moved (step 4)."""
    config = pruning(tmp_path, source, steps=6, save_interval=2, keep_checkpoints=1)
    run_distributed(state, 1, config, 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".step-00000003.partial" / "model").mkdir(parents=True)
    (checkpoints / ".step-00000003.partial" / "model" / "__0_0.distcp").write_bytes(b"half")
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000004")
    assert read_info(tmp_path / "run").step == 2
    assert run_distributed(state, 1, config, 1)[0]["step"] == 3
    assert read_info(tmp_path / "run").step == 3  # not removed in favour of the left-over step 4
    assert not (checkpoints / ".step-00000003.partial").exists()
    (checkpoints / ".step-00000001.partial").mkdir()
    run_distributed(train, 1, config)
    assert names(tmp_path / "run") == ["latest", "step-00000006"]


def save_with(config: RunConfig, ranks: list[int], limit: int) -> str:
    """What a save says when some ranks can write files of `limit` bytes at most."""
    trainer = start(config)
    trainer.train_step()
    if trainer.platform.rank in ranks:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        trainer.save()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        parallel.stop()
    return ""


@pytest.mark.parametrize(
    ("rank", "limit", "file"),
    [
        (0, 5_000, "masks.safetensors: "),
        (1, 7_000, "rank-00001.safetensors: "),
        (1, 40_000, ""),  # its tensors: Megatron-Core's writer does not name them
    ],
)
def test_what_one_rank_cannot_write_is_one_error_on_all(
    rank: int, limit: int, file: str, tmp_path: Path, source: Path
) -> None:
    config = replace(pruning(tmp_path, source), parallel=ParallelConfig(tensor=2))
    run_distributed(state, 2, config, 2)
    messages = run_distributed(save_with, 2, config, [rank], limit)
    assert all(".step-00000003.partial: cannot be written: " in message for message in messages)
    assert all(file in message and "File too large" in message for message in messages)
    assert f"process {rank} of 2 failed: " in messages[1 - rank]
    assert names(tmp_path / "run") == ["latest", "step-00000002"]
    assert run_distributed(state, 2, config, 1)[0]["step"] == 3
    assert names(tmp_path / "run") == ["latest", "step-00000002", "step-00000003"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MB of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a file system")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def fill_and_save(config: RunConfig, disk: Path, free: list[int]) -> list[tuple[str, list[str]]]:
    """For each number of bytes left on the disk: what a save says, and what is there then."""
    trainer = start(config)
    filler, found = disk / "filler", []
    trainer.train_step()
    for left in free:
        if trainer.platform.rank == 0:
            available = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(max(0, available - left)))
        trainer.platform.largest(0)
        message = ""
        try:
            trainer.save()
        except CheckpointError as error:
            message = str(error)
        if trainer.platform.rank == 0:
            filler.unlink()
        found.append((message, names(disk)))
        trainer.platform.largest(0)
    parallel.stop()
    return found


def test_a_full_disk_at_any_moment_costs_no_checkpoint(
    small_disk: Path, tmp_path: Path, source: Path
) -> None:
    config = replace(pruning(tmp_path, source), parallel=ParallelConfig(tensor=2))
    run_distributed(state, 2, config, 2)
    saved = tmp_path / "run" / "checkpoints" / "step-00000002"
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in saved.rglob("*"))
    shutil.copytree(tmp_path / "run" / "checkpoints", small_disk / "checkpoints")
    free = [0, 8_192, 40_960, size // 2, *range(size - 49_152, size, 8_192)]
    config = replace(config, run_dir=str(small_disk))
    ranks = run_distributed(fill_and_save, 2, config, small_disk, free)
    for messages in zip(*([message for message, _ in found] for found in ranks), strict=True):
        assert len({bool(message) for message in messages}) == 1, messages
    outcomes = ranks[0]
    assert [bool(message) for message, _ in outcomes].count(True) >= len(free) - 2, outcomes
    for message, there in outcomes:
        assert "No space left on device" in message or not message
        assert "step-00000002" in there
        assert not any(name.endswith(".partial") for name in there), (message, there)
    assert run_distributed(state, 2, config, 0)[0]["step"] in (2, 3)


def described(directory: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((directory / "checkpoint.json").read_text())
    return fields


def test_paths_without_a_checkpoint_say_what_to_give(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, what in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "is neither a checkpoint nor a run with one"),
        (source / "checkpoint.json", "is neither a checkpoint nor a run with one"),
    ):
        with pytest.raises(CheckpointError) as error:
            read_info(path)
        assert str(error.value).startswith(f"{path}: {what}. Give a checkpoint directory")
    run = tmp_path / "run" / "checkpoints"
    run.mkdir(parents=True)
    for content in (b"step-00000007\n", b"\xff\xfe\x00"):
        (run / "latest").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"latest names .* which is no checkpoint"):
            read_info(tmp_path / "run")


WRONG_FIELDS: list[dict[str, Any]] = [
    {"step": "x"},
    {"step": -1},
    {"tokens": None},
    {"stage": 3},
    {"stage": "sheared"},
    {"tokenizer": ["a"]},
    {"progress": []},
    {"progress": {"losses": {"prose": "x"}}},
    {"versions": [1]},
    {"history": [{"stage": "imported", "path": "p", "steps": "x"}]},
    {"history": [{"stage": "imported", "path": "p", "losses": {"prose": []}}]},
]


def test_fields_of_other_types_are_all_named(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "checkpoint.json"
    wrong: dict[str, Any] = {
        **{"step": "x", "tokens": None, "progress": [], "versions": [1], "stage": 3},
        **{"tokenizer": ["a"], "generation": 5, "shape": {"num_layers": 3}, "target": 4},
        "history": [{"stage": "prune", "path": "p", "steps": "x", "losses": 4}],
    }
    good = described(tmp_path / "model")
    file.write_text(json.dumps({**good, **wrong}))
    with pytest.raises(CheckpointError, match="damaged") as error:
        read_info(tmp_path / "model")
    named = ("shape.hidden_size", "history[0].steps", "history[0].losses", *(wrong.keys()))
    assert all(name in str(error.value) for name in named), error.value
    for change in (
        {"stage": "megatron-lm"},  # whose checksums nobody asks for
        {"stage": "\x1b[2J"},
        {"step": -1},
        {"progress": {"losses": {"d": "x"}}},
        {"progress": {"losses": 5}},
        {"history": [{"stage": "prune", "path": "p", "losses": {"d": "x"}}]},
        {"history": [{"stage": "prune", "path": "p", "shape": {**good["shape"], "num_layers": 0}}]},
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError, match="damaged") as error:
            read_info(tmp_path / "model")
        assert "\x1b" not in str(error.value)
    diverged = {"progress": {"losses": {"d": float("nan")}}}
    file.write_text(json.dumps({**good, **diverged}))
    assert read_info(tmp_path / "model").records[-1].losses.keys() == {"d"}
    del good["generation"]  # as it was written before there was one
    file.write_text(json.dumps(good))
    assert read_info(tmp_path / "model").generation == {}


@pytest.mark.parametrize("number", ["9" * 400, "../../x", "-3", "\u0663", "", "3.0"])
def test_a_number_of_an_iteration_that_is_none(number: str, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(number)
    (tmp_path / "shape.yaml").write_text(
        "{num_layers: 1, hidden_size: 8, num_attention_heads: 2, ffn_hidden_size: 8, vocab_size: 9}"
    )
    with pytest.raises(CheckpointError, match=r"iteration\.txt: must be the number") as error:
        read_info(tmp_path, tmp_path / "shape.yaml")
    assert len(str(error.value)) < 500


def test_a_damaged_description_is_an_error_that_names_it(tmp_path: Path, source: Path) -> None:
    shutil.copytree(source, tmp_path / "model")
    file = tmp_path / "model" / "checkpoint.json"
    good = described(tmp_path / "model")
    assert models.open(tmp_path / "model").shape == GQA
    without = {key: value for key, value in good.items() if key != "stage"}
    for content in (
        file.read_text()[:-10],
        "",
        "[1, 2]",
        "null",
        json.dumps(without),
        json.dumps({**good, "shape": {"num_layers": 3}}),
        json.dumps({**good, "unknown": 1}),
        json.dumps({key: value for key, value in good.items() if key != "format"}),
        *(json.dumps({**good, **wrong}) for wrong in WRONG_FIELDS),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match="damaged") as error:
            read_info(tmp_path / "model")
        assert str(file) in str(error.value)
    file.write_text(json.dumps({**good, "format": 2}))
    with pytest.raises(CheckpointError, match=r"json: written by another version of megashear"):
        read_info(tmp_path / "model")
