"""Saving beside training: the same files as when the run waits, and nothing half-written counts."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megashear.checkpoint import runs
from megashear.checkpoint.checksums import damage
from megashear.checkpoint.info import read_info
from megashear.checkpoint.torch_dist import background
from megashear.config.schema import ParallelConfig, RunConfig
from megashear.errors import CheckpointError
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, run_config, write_domains, write_source


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Six steps of pruning on two ranks, saved every second step, beside training."""
    run_distributed(write_source, 1, tmp_path)
    config = run_config(
        tmp_path,
        write_domains(tmp_path),
        stage="prune",
        init_from=str(tmp_path / "source"),
        target=TARGETS[GQA],
        parallel=ParallelConfig(distributed_optimizer=True),
    )
    trainer = replace(config.trainer, save_interval=2, keep_checkpoints=3, async_save=True)
    return replace(config, trainer=trainer)


def train(config: RunConfig) -> list[str]:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    told: list[str] = []
    trainer.log.say = told.append  # type: ignore[method-assign]
    trainer.run()
    parallel.stop()
    return told


def checkpoint(config: RunConfig, step: int) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step-{step:08d}"


def test_the_files_are_those_of_a_save_that_is_waited_for(config: RunConfig) -> None:
    waited = replace(config.trainer, async_save=False)
    waiting = replace(config, run_dir=config.run_dir + "-waiting", trainer=waited)
    for each in (config, waiting):
        told = run_distributed(train, 2, each)[0]
        saved = [text for text in told if text.startswith("saved ")]
        assert saved == [f"saved {checkpoint(each, step)}" for step in (2, 4, 6)]
        assert read_info(each.run_dir).step == 6
    for step in (2, 4, 6):
        ours, theirs = (
            json.loads((checkpoint(each, step) / "checksums.json").read_text())
            for each in (config, waiting)
        )
        assert damage(checkpoint(config, step)) == []
        assert ours.keys() == theirs.keys()
        tensors = [name for name in ours if name.endswith((".distcp", ".safetensors"))]
        for name in tensors:
            assert ours[name] == theirs[name], name
        for part in ("model", "optimizer"):  # which both data-parallel ranks have, or have half of
            shares = [
                sum(ours[name]["bytes"] for name in tensors if name.startswith(f"{part}/__{rank}_"))
                for rank in (0, 1)
            ]
            assert min(shares) > 0.4 * sum(shares), (part, shares)


def gated(config: RunConfig, directory: Path) -> list[tuple[int, list[str]]]:
    """A run whose first save cannot be written before step 4 has been trained.

    Returns what checkpoints there are after each step.
    """
    gate, write = directory / "gate", background._write

    def write_behind_the_gate(*arguments: Any) -> None:
        deadline = time.monotonic() + 60
        while not gate.exists():
            assert time.monotonic() < deadline, "the run waited for the save"
            time.sleep(0.01)
        write(*arguments)

    background._write = write_behind_the_gate
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    step, found = trainer.train_step, []

    def step_and_look() -> None:
        step()
        names = sorted(path.name for path in trainer.checkpoints.directory.glob("*"))
        found.append((trainer.step, names))
        if trainer.step == 4 and platform.rank == 0:
            gate.touch()

    trainer.train_step = step_and_look  # type: ignore[method-assign]
    trainer.run()
    parallel.stop()
    return found


def test_training_goes_on_while_it_writes_and_nothing_has_its_name_before(
    config: RunConfig, tmp_path: Path
) -> None:
    config = replace(config, trainer=replace(config.trainer, save_interval=3))
    config = replace(config, trainer=replace(config.trainer, steps=8))
    for found in run_distributed(gated, 2, config, tmp_path):
        seen = dict(found)
        assert seen[4] == [".step-00000003.partial"]  # and training was at step 4
    assert [damage(checkpoint(config, step)) for step in (3, 6, 8)] == [[], [], []]
    info = read_info(checkpoint(config, 3))
    assert info.step == 3
    again = replace(config, trainer=replace(config.trainer, async_save=False))
    again = replace(again, run_dir=config.run_dir + "-waiting")
    run_distributed(train, 2, again)
    for name in ("model/__0_0.distcp", "optimizer/__1_0.distcp", "masks.safetensors"):
        ours, theirs = (
            json.loads((checkpoint(each, 3) / "checksums.json").read_text())[name]
            for each in (config, again)
        )
        assert ours == theirs, name  # the state of step 3, though written after step 4


def removing(config: RunConfig) -> list[list[str]]:
    """What is there when a save is complete beside training, and when it has been waited for."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    gate, remove, found = threading.Event(), runs._remove, []

    def remove_behind_the_gate(*directories: Path) -> None:
        assert gate.wait(60), "the run waited for the removal"
        remove(*directories)

    def look() -> None:
        platform.largest(0)  # the other rank is no further
        found.append(sorted(path.name for path in trainer.checkpoints.directory.glob("*")))

    trainer.train_step()
    trainer.save()
    trainer._finish_save()
    trainer.train_step()
    trainer.save()
    runs._remove = remove_behind_the_gate
    while trainer.checkpoints.poll() is None:
        time.sleep(0.01)
    look()
    gate.set()
    trainer.checkpoints.finish()
    look()
    parallel.stop()
    return found


def test_what_is_kept_no_longer_is_removed_beside_training(config: RunConfig) -> None:
    config = replace(config, trainer=replace(config.trainer, keep_checkpoints=1))
    beside, waited = run_distributed(removing, 2, config)[0]
    assert beside == [".step-00000001.partial", "latest", "step-00000002"]
    assert waited == ["latest", "step-00000002"]


def failing(config: RunConfig, how: str) -> tuple[str, int]:
    """What a run says whose rank 1 cannot write its tensors at step 2; and the step it got to."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    write = background._write

    def write_in_vain(*arguments: Any) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        write(*arguments)

    if platform.rank == 1:
        background._write = write_in_vain
    try:
        trainer.run()
    except CheckpointError as error:
        return str(error), trainer.step
    finally:
        trainer.loader.close()
        parallel.stop()
    return "", trainer.step


@pytest.mark.parametrize(
    ("how", "said"), [("full", "File too large"), ("killed", "ended with status -9")]
)
def test_a_write_that_fails_is_an_error_of_the_run_on_all_ranks(
    how: str, said: str, config: RunConfig
) -> None:
    for message, step in run_distributed(failing, 2, config, how):
        assert ".step-00000002.partial: cannot be written: " in message
        assert said in message
        assert 2 <= step <= 4
    assert list((Path(config.run_dir) / "checkpoints").iterdir()) == []


def leave(config: RunConfig) -> None:
    """A run that ends while its writer has more to tell than a pipe holds."""
    signal.alarm(30)
    write = background._write

    def write_and_tell_much(jobs: Any, sender: Any, receiver: Any) -> None:
        write(jobs, sender, receiver)
        sender.send(bytes(2**20))

    background._write = write_and_tell_much
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    trainer.save()
    LEFT.append(trainer)  # as the traceback of an error holds it
    parallel.stop()


LEFT: list[Trainer] = []


def test_a_run_that_ends_by_an_error_does_not_wait_for_its_writer(config: RunConfig) -> None:
    run_distributed(leave, 2, config)
    run = Path(config.run_dir) / "checkpoints"
    assert [path.name for path in run.iterdir()] == [".step-00000000.partial"]


def stop_by_signal(config: RunConfig) -> tuple[int, list[str]]:
    """A run that gets a signal in step 2, at whose end it saves."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    step = trainer.train_step

    def step_with_signal() -> None:
        if trainer.step == 1 and platform.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        step()

    trainer.train_step = step_with_signal  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        trainer.run()
    parallel.stop()
    return trainer.step, sorted(path.name for path in trainer.checkpoints.directory.iterdir())


def test_a_run_that_is_ended_by_a_signal_waits_for_its_save(config: RunConfig) -> None:
    for found in run_distributed(stop_by_signal, 2, config):
        assert found == (2, ["latest", "step-00000002"])


def draws(config: RunConfig, until: int) -> list[Any]:
    """What each random generator of a rank gives next after a step, where it saves."""
    from megatron.core import tensor_parallel

    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    while trainer.step < until:
        trainer.train_step()
        random.random(), np.random.normal(), torch.rand(platform.rank + 1)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            torch.rand(1)
    if until > 0:
        trainer.save()
        trainer.checkpoints.finish()
    trainer.loader.close()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(1).item()
    found = [random.random(), np.random.normal(), torch.rand(1).item(), tracked]
    parallel.stop()
    return found


def test_random_states_go_on_in_the_same_layout_and_are_seeded_in_another(
    config: RunConfig,
) -> None:
    saved = run_distributed(draws, 2, config, 2)
    resumed = run_distributed(draws, 2, config, 0)
    assert resumed == saved
    assert saved[0][:2] != saved[1][:2]  # Python's and numpy's differ between ranks
    other = replace(config, parallel=ParallelConfig(tensor=2))
    reseeded = run_distributed(draws, 2, other, 0)
    assert reseeded == run_distributed(draws, 2, other, 0)
    assert all(ours != theirs for ours, theirs in zip(reseeded, saved, strict=True))


def draws_saved_on_a_gpu(config: RunConfig, until: int) -> list[Any]:
    """Return what `draws` does, where a GPU's generator has a state too."""
    original = runs.random_states

    def with_gpu(device: torch.device) -> Any:
        tensors, plain = original(device)
        return {**tensors, "cuda": tensors["torch"][:16].clone()}, plain

    runs.random_states = with_gpu
    return draws(config, until)


def test_random_states_of_a_gpu_are_not_restored_on_a_cpu(config: RunConfig) -> None:
    (saved,) = run_distributed(draws_saved_on_a_gpu, 1, config, 2)
    (resumed,) = run_distributed(draws, 1, config, 0)
    assert all(ours != theirs for ours, theirs in zip(resumed, saved, strict=True))
