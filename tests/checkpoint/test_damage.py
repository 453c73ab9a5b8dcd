"""Damaged checkpoints: each file that is cut, lost or changed is named.

The run goes on from the newest whole checkpoint; with none it does not begin again unasked.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megashear.checkpoint import models
from megashear.checkpoint.checksums import damage, verify
from megashear.checkpoint.dense import export_huggingface
from megashear.config.schema import ParallelConfig, RunConfig
from megashear.errors import CheckpointError, PlatformError, ShearError
from megashear.platform import parallel
from megashear.training.run_log import RunLog
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, records, run_config, write_domains, write_source


def train(config: RunConfig, steps: int | None) -> dict[str, Any]:
    """Where a run began, or why it did not; it trains to the end, or some steps without saving."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    try:
        trainer = Trainer(config, platform)
        began = trainer.step
        if steps is None:
            trainer.run()
        else:
            for _ in range(steps):
                trainer.train_step()
        trainer.loader.close()
        return {"began": began, **trainer.objective.state()}
    except ShearError as error:
        return {"error": str(error)}
    finally:
        parallel.stop()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A run of six steps with checkpoints at 2, 4 and 6, and its end; two ranks wrote it."""
    directory = tmp_path_factory.mktemp("finished")
    run_distributed(write_source, 1, directory)
    config = run_config(
        directory,
        write_domains(directory),
        stage="prune",
        init_from=str(directory / "source"),
        target=TARGETS[GQA],
        parallel=ParallelConfig(tensor=2),
    )
    trainer = replace(config.trainer, save_interval=2, keep_checkpoints=3)
    config = replace(config, trainer=trainer)
    return config, run_distributed(train, 2, config, None)[0]


@pytest.fixture
def run(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> RunConfig:
    """A copy of that run, to be damaged."""
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    return replace(config, run_dir=str(tmp_path / "run"))


def checkpoint(config: RunConfig, step: int) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"


def steps_recorded(config: RunConfig) -> list[int]:
    return [record["step"] for record in records(config.run_dir, "step")]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    """One bit, anywhere."""
    content = bytearray(file.read_bytes())
    content[random.Random(file.name).randrange(len(content))] ^= 8
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "bytes instead of"),
    "gone": (Path.unlink, "missing"),
    "flipped": (flip, "its content has changed"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_to_any_file_is_named(run: RunConfig, what: str) -> None:
    """All at once: by the number of damaged files none is overlooked."""
    directory = checkpoint(run, 6)
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    names = {str(file.relative_to(directory)) for file in files} - {"checksums.json"}
    assert {"checkpoint.json", "masks.safetensors", "model/.metadata"} < names
    assert {"random/rank-00000.safetensors", "random/rank-00001.safetensors"} < names
    assert damage(directory) == []
    make, said = DAMAGE[what]
    for name in names:
        make(directory / name)
    lines = dict(line.split(": ", 1) for line in damage(directory))
    assert lines.keys() == names
    assert all(said in line for line in lines.values())


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("model/__1_0.distcp", "flipped"),
        ("optimizer/.metadata", "cut"),
        ("masks.safetensors", "gone"),
        ("checkpoint.json", "flipped"),
        ("checksums.json", "gone"),
        ("checksums.json", "cut"),
    ],
)
def test_the_run_goes_on_from_the_newest_whole_one_and_says_so(
    file: str,
    what: str,
    run: RunConfig,
    finished: tuple[RunConfig, dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    DAMAGE[what][0](checkpoint(run, 6) / file)
    found = run_distributed(train, 2, run, 1)
    assert [rank["began"] for rank in found] == [4, 4]
    told = capfd.readouterr().err
    assert f"{checkpoint(run, 6)}: damaged:\n  {file}: " in told
    assert f"Resuming from the newest undamaged checkpoint, {checkpoint(run, 4)}" in told
    assert steps_recorded(run) == [1, 2, 3, 4, 5]
    assert checkpoint(run, 6).is_dir()  # left, to be looked at
    found = run_distributed(train, 2, run, None)
    assert [rank["began"] for rank in found] == [4, 4]
    assert steps_recorded(run) == [1, 2, 3, 4, 5, 6]
    assert damage(checkpoint(run, 6)) == []  # replaced
    for name, value in finished[1].items():
        assert name == "began" or torch.equal(found[0][name], value), name


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{}", "1", '["masks.safetensors"]', '{"masks.safetensors": {"bytes": "x"}}'),
        '{"model/../../../dev/zero": {"bytes": 0, "sha256": ""}}',
        '{"/dev/zero": {"bytes": 0, "sha256": ""}}',
    ],
)
def test_checksums_of_another_shape_are_damage(content: str, run: RunConfig) -> None:
    (checkpoint(run, 6) / "checksums.json").write_text(content)
    (line,) = damage(checkpoint(run, 6))
    assert line.startswith("checksums.json: damaged: ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "checksums.json").write_text('{"pipe": {"bytes": 0, "sha256": ""}}')
    assert damage(tmp_path) == ["pipe: not an ordinary file"]


def test_records_of_another_shape_are_dropped_and_a_full_disk_is_named(tmp_path: Path) -> None:
    """Starts and ends stay, also of steps that are done again."""
    good = [
        '{"kind": "step", "step": 1}',
        '{"kind": "end", "step": 4}',
        '{"kind": "start", "step": 4}',
    ]
    bad = ["[1]", "1", '{"stfp": 1}', '{"step": "1"}', '{"kind": "save", "step": 3}', '{"step": ']
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join([good[0], *bad[:3], *good[1:], *bad[3:]]))
    log = RunLog(run_config(tmp_path.parent, (), run_dir=str(tmp_path)), True, 2)
    assert file.read_text().splitlines() == good
    file.unlink()
    file.symlink_to("/dev/full")
    with pytest.raises(PlatformError, match=r"metrics.jsonl cannot be written: .*No space left"):
        log.record({"kind": "step", "step": 3})


@pytest.mark.parametrize("content", [None, b"", b"step-00000099\n", b"\xff\xfe\x00"])
def test_without_a_good_latest_the_run_goes_on_from_the_newest_whole_one(
    content: bytes | None, run: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    latest = checkpoint(run, 6).with_name("latest")
    latest.unlink()
    if content is not None:
        latest.write_bytes(content)
    cut(checkpoint(run, 6) / "model" / ".metadata")
    assert run_distributed(train, 2, run, 0)[0]["began"] == 4
    told = capfd.readouterr().err
    assert f"{latest}: " in told
    assert "model/.metadata: " in told


def test_with_no_whole_checkpoint_a_run_does_not_begin_again(run: RunConfig) -> None:
    for step in (2, 4, 6):
        flip(checkpoint(run, step) / "model" / "__0_0.distcp")
    before = (Path(run.run_dir) / "metrics.jsonl").read_bytes()
    for found in run_distributed(train, 2, run, 0):
        for step in (2, 4, 6):
            assert f"{checkpoint(run, step)}: damaged:\n  model/__0_0.distcp" in found["error"]
        assert "No checkpoint in" in found["error"]
        assert f"remove {run.run_dir} to begin the run again" in found["error"]
    shutil.rmtree(checkpoint(run, 6).parent)
    checkpoint(run, 6).parent.mkdir()
    checkpoint(run, 6).with_name("latest").write_text("step-00000006\n")
    for found in run_distributed(train, 2, run, 0):
        assert "names step-00000006, which is not there" in found["error"]
    assert (Path(run.run_dir) / "metrics.jsonl").read_bytes() == before


def test_with_its_checkpoints_gone_a_run_does_not_begin_again(run: RunConfig) -> None:
    """A disk that is not mounted, say; its records stay as they were."""
    shutil.rmtree(Path(run.run_dir) / "checkpoints")
    before = steps_recorded(run)
    for found in run_distributed(train, 2, run, None):
        assert "checkpoints is gone, and the run has saved there" in found["error"]
    assert steps_recorded(run) == before


def test_a_checkpoint_that_a_run_replaced_while_it_was_read_is_not_called_damaged(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no longer there.*keep_checkpoints"):
        verify(tmp_path / "gone")


def test_damage_before_the_directory_took_its_name_is_no_matter(run: RunConfig) -> None:
    """Killed while it saved step 8, and between the rename of step 6 and `latest`."""
    checkpoint(run, 6).with_name("latest").write_text("step-00000004\n")
    checkpoint(run, 8).with_name(".step-00000008.partial").mkdir()
    assert run_distributed(train, 2, run, 0)[0]["began"] == 4


def test_what_is_left_of_the_last_save_is_removed_when_the_run_is_started_again(
    run: RunConfig,
) -> None:
    """Killed after `latest` was moved, before the checkpoint that is not kept was removed."""
    shutil.copytree(checkpoint(run, 2), checkpoint(run, 1))
    checkpoint(run, 0).with_name(".step-00000000.partial").mkdir()
    assert run_distributed(train, 2, run, None)[0]["began"] == 6
    names = sorted(path.name for path in checkpoint(run, 6).parent.iterdir())
    assert names == ["latest", "step-00000002", "step-00000004", "step-00000006"]


def test_tools_and_later_stages_name_the_damage(run: RunConfig, tmp_path: Path) -> None:
    flip(checkpoint(run, 6) / "masks.safetensors")
    with pytest.raises(CheckpointError, match=r"damaged:\n  masks.safetensors: its content"):
        _ = models.open(run.run_dir).masks
    run_distributed(write_source, 1, tmp_path)
    flip(tmp_path / "source" / "model" / "__0_1.distcp")
    for message in run_distributed(refusals, 2, tmp_path / "source", run, tmp_path):
        assert message.count("source: damaged:\n  model/__0_1.distcp: its content") == 1, message
    with pytest.raises(CheckpointError, match=r"model/__0_1.distcp: its content"):
        export_huggingface(models.open(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refusals(source: Path, config: RunConfig, directory: Path) -> str:
    """Why a run from a damaged source does not begin."""
    config = replace(config, init_from=str(source), run_dir=str(directory / "new"))
    return str(train(config, 0)["error"])
