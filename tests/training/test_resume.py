"""A run that is stopped and started again ends as if it had never stopped, bit for bit."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import sys
import termios
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megashear.config.schema import (
    QUERY_HEAD,
    Domain,
    LogConfig,
    ParallelConfig,
    RunConfig,
    TargetShape,
)
from megashear.errors import CheckpointError, DataError
from megashear.model.build import bound_rules
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, TARGETS, records, run_config, write_domains, write_source


def prune_run(directory: Path, **changes: Any) -> RunConfig:
    """A pruning run of six steps that saves at 3 and 6, on two tensor-parallel processes."""
    domains = [replace(domain, first_sample=11) for domain in write_domains(directory)]
    config = run_config(
        directory,
        tuple(domains),
        stage="prune",
        init_from=str(directory / "source"),
        target=TARGETS[GQA],
        parallel=ParallelConfig(tensor=2),
    )
    return replace(config, **changes)


def train(config: RunConfig, stop_at: int | None) -> dict[str, Any]:
    """Run to the end, or die after a step without saving; weights and objective's state."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    began = trainer.step
    if stop_at is not None:
        step = trainer.train_step

        def step_or_die() -> None:
            if trainer.step == stop_at:
                raise MemoryError("as if the process died")
            step()

        trainer.train_step = step_or_die  # type: ignore[method-assign]
    try:
        trainer.run()
    except MemoryError:
        time.sleep(0.5)  # the other rank is still in the collective before the step
        return {"began": began}
    finally:
        trainer.loader.close()
        parallel.stop()
    bound = bound_rules(trainer.optimizer.chunks)
    weights = {b.rule.name: b.parameter.detach().clone() for b in bound}
    return {"began": began, "weights": weights, **trainer.objective.state()}


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    whole = prune_run(tmp_path, run_dir=str(tmp_path / "whole"))
    broken = prune_run(tmp_path, run_dir=str(tmp_path / "broken"))
    expected = run_distributed(train, 2, whole, None)
    assert run_distributed(train, 2, broken, 5)[0]["began"] == 0
    found = run_distributed(train, 2, broken, None)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("began") == 3
        assert theirs.pop("began") == 0
        weights, expected_weights = ours.pop("weights"), theirs.pop("weights")
        for name, value in expected_weights.items():
            assert torch.equal(weights[name], value), name
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name
    assert records(broken.run_dir) == records(whole.run_dir)
    assert [record["step"] for record in records(broken.run_dir, "step")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(broken.run_dir, "start")] == [0, 3]
    masks = [(Path(run.run_dir) / "masks.json").read_text() for run in (broken, whole)]
    assert masks[0] == masks[1]


def test_complete_run_does_nothing_when_started_again(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path, parallel=ParallelConfig())
    run_distributed(train, 1, config, None)
    before = (Path(config.run_dir) / "metrics.jsonl").read_text()
    assert run_distributed(train, 1, config, None)[0]["began"] == 6
    assert (Path(config.run_dir) / "metrics.jsonl").read_text() == before


def refused(config: RunConfig) -> str:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    try:
        Trainer(config, platform)
    except (CheckpointError, DataError) as error:
        return str(error)
    finally:
        parallel.stop()
    return ""


def with_option(config: RunConfig, path: str, value: Any) -> RunConfig:
    section, _, name = path.rpartition(".")
    if not section:
        return replace(config, **{name: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def retokenized(domain: Domain, part: str, seed: int) -> None:
    """Replace a domain's `train` or `valid` file by other tokens of the same number and lengths."""
    file = Path(f"{getattr(domain, part)}.bin")
    tokens = np.fromfile(file, dtype=np.uint16)
    np.random.default_rng(seed).shuffle(tokens)
    tokens.tofile(file)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_other_tokens_under_the_same_name_are_refused(tmp_path: Path, part: str) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path, parallel=ParallelConfig())
    run_distributed(train, 1, config, 3)
    changed = config.data.domains[1]
    retokenized(changed, part, 7)
    (text,) = run_distributed(refused, 1, config)
    assert f"domain {changed.name}: {getattr(changed, part)} ({part})" in text
    assert text.count("domain ") == 1 and "new run_dir" in text


def test_the_same_tokens_at_another_path_go_on(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path, parallel=ParallelConfig())
    run_distributed(train, 1, config, 3)
    (tmp_path / "moved").mkdir()
    domains = []
    for domain in config.data.domains:
        paths = {part: Path(getattr(domain, part)) for part in ("train", "valid")}
        for part, prefix in paths.items():
            for suffix in (".bin", ".idx"):
                Path(f"{prefix}{suffix}").rename(tmp_path / "moved" / f"{prefix.name}{suffix}")
            paths[part] = tmp_path / "moved" / prefix.name
        domains.append(replace(domain, **{part: str(path) for part, path in paths.items()}))
    moved = replace(config, data=replace(config.data, domains=tuple(domains)))
    assert run_distributed(train, 1, moved, None)[0]["began"] == 3


MATTERS = {
    "data.seed": 5,
    "data.seq_length": 8,
    "evaluation.interval": 2,
    "optimizer.lr": 1.0,
    "platform.precision": "bf16",
    "pruning.head_unit": QUERY_HEAD,
    "trainer.global_batch_size": 8,
    "trainer.seed": 5,
    "trainer.steps": 8,
}
FREE = {
    "data.num_workers": 1,
    "log": LogConfig(tensorboard=True),
    "parallel": ParallelConfig(distributed_optimizer=True, recompute="full"),
    "platform.precision": "auto",  # which is what it was on this machine
    "platform.timeout_minutes": 3.0,
    "trainer.async_save": True,
    "trainer.keep_checkpoints": 5,
    "trainer.log_interval": 1,
    "trainer.micro_batch_size": 2,
    "trainer.save_interval": 1,
}


def test_run_of_another_configuration_is_refused_with_the_differences(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path, parallel=ParallelConfig())
    run_distributed(train, 1, config, 4)
    other = with_option(config, "target", TargetShape(num_layers=1))
    first = replace(config.data.domains[0], weight=0.6)
    data = replace(config.data, domains=(first, *config.data.domains[1:]))
    other = replace(other, data=data)
    for path, value in {**FREE, **MATTERS}.items():
        other = with_option(other, path, value)
    message = run_distributed(refused, 1, other)[0]
    named = {line.strip().split(": ")[0] for line in message.splitlines()[1:-1]}
    targets = {f"target.{size}" for size in ("hidden_size", "num_attention_heads", "num_layers")}
    targets.add("target.ffn_hidden_size")
    assert named == {*MATTERS, *targets, "data.domains.0.weight"}
    assert "  trainer.seed: 1234 in the run, 5 now" in message
    for path, value in FREE.items():
        config = with_option(config, path, value)
    assert run_distributed(refused, 1, config) == [""]


def stop_by_signal(config: RunConfig, number: int) -> dict[str, Any]:
    """A run that gets a signal in its second step, on rank 0 alone."""
    return stop_by(config, lambda: os.kill(os.getpid(), number))


def stop_by(config: RunConfig, happens: Callable[[], None]) -> dict[str, Any]:
    """Start a run to whose rank 0 something happens in its second step."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    step = trainer.train_step

    def step_with_signal() -> None:
        if trainer.step == 1 and platform.rank == 0:
            happens()
        step()

    trainer.train_step = step_with_signal  # type: ignore[method-assign]
    status = None
    try:
        trainer.run()
    except SystemExit as ended:
        status = ended.code
    finally:
        parallel.stop()
    return {"status": status, "step": trainer.step}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_to_one_rank_saves_on_all_and_the_run_goes_on(tmp_path: Path, number: int) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path)
    for found in run_distributed(stop_by_signal, 2, config, number):
        assert found == {"status": 128 + number, "step": 2}
    assert records(config.run_dir, "end") == [
        {"kind": "end", "step": 2, "reason": signal.Signals(number).name, "verdict": ""}
    ]
    assert run_distributed(train, 2, config, None)[0]["began"] == 2
    ends = [(record["step"], record["reason"]) for record in records(config.run_dir, "end")]
    assert ends == [(2, signal.Signals(number).name), (6, "complete")]


def lose_terminal(config: RunConfig, ignored: bool) -> dict[str, Any]:
    """A run on a terminal that is gone in its second step, as of an ssh that breaks."""
    if ignored:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    terminal, mine = pty.openpty()
    os.setsid()
    fcntl.ioctl(mine, termios.TIOCSCTTY, 0)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(mine, stream.fileno())
    os.close(mine)
    return stop_by(config, lambda: os.close(terminal))


def test_a_lost_terminal_ends_the_run_with_a_save_unless_its_signal_is_ignored(
    tmp_path: Path,
) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path, parallel=ParallelConfig())
    assert run_distributed(lose_terminal, 1, config, False) == [{"status": 129, "step": 2}]
    assert run_distributed(train, 1, config, None)[0]["began"] == 2
    config = replace(config, run_dir=str(tmp_path / "nohup"))
    assert run_distributed(lose_terminal, 1, config, True) == [{"status": None, "step": 6}]


def poisoned(config: RunConfig, what: str) -> str:
    """A run whose weights, or gradients, become NaN after its checkpoint at step 3."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    step = trainer.train_step

    def step_poisoned() -> None:
        if trainer.step == 4 and what == "weights":
            with torch.no_grad():
                parameter.fill_(float("nan"))
        step()

    def backward_poisoned(number: int) -> None:
        if number == 5:  # whose end is a save
            parameter.main_grad.view(-1)[0] = float("inf")  # type: ignore[attr-defined]
        backward(number)

    parameter = next(iter(trainer.optimizer.chunks[0].parameters()))
    backward = trainer.objective.backward
    if what == "gradients":
        trainer.objective.backward = backward_poisoned  # type: ignore[method-assign]

    trainer.train_step = step_poisoned  # type: ignore[method-assign]
    try:
        trainer.run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        trainer.loader.close()
        parallel.stop()
    return ""


@pytest.mark.parametrize(
    ("what", "step", "wrong"), [("weights", 5, "loss is nan"), ("gradients", 6, "grad_norm is inf")]
)
def test_what_is_not_finite_names_step_domains_and_last_good_checkpoint(
    what: str, step: int, wrong: str, tmp_path: Path
) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    config = prune_run(tmp_path)
    for message in run_distributed(poisoned, 2, config, what):
        assert message.startswith(f"TrainingError: step {step}: {wrong}")
        assert "Sequences of its batch by domain: first" in message
        assert "checkpoints/step-00000003" in message
    assert run_distributed(train, 2, config, None)[0]["began"] == 3
