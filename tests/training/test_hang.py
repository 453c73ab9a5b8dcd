"""A rank that hangs or dies ends the whole run within the time-out, and is named with its step.

Real ranks, forked, that stop or end themselves (SIGSTOP, SIGKILL) in the middle of a step. All runs
of this file go on at once, since they mostly wait.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from megashear.config.schema import (
    EvaluationConfig,
    ParallelConfig,
    PlatformConfig,
    RunConfig,
    TrainerConfig,
)
from megashear.console import LOST, run
from megashear.errors import RankError
from megashear.platform import parallel
from megashear.training import trainer as trainer_module
from megashear.training.trainer import Trainer
from tests.support.distributed import _free_port, _on_rank
from tests.support.runs import GQA, records, run_config, write_domains

TIMEOUT = 5.0  # seconds
NOTICED = 0.1 * TIMEOUT  # at most, after the time-out
JUDGED = 0.5 * TIMEOUT
SLACK = 10.0  # of a busy machine
STEP = 3


def stop() -> None:
    time.sleep(0.3)  # what was marked just before is published meanwhile
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def hang_in_python() -> None:
    time.sleep(120)


def hang_first() -> None:
    """While the others do something before, so that they notice it when this one has ended."""
    time.sleep(120)


def fail() -> None:
    raise MemoryError("no memory is left")


def be_slow() -> None:
    time.sleep(0.6 * TIMEOUT)


RUNS: dict[str, tuple[int, int | None, Callable[[], None]]] = {
    "stopped": (3, 1, stop),
    "stopped with the store": (2, 0, stop),
    "killed": (3, 1, die),
    "killed with the store": (2, 0, die),
    "hangs": (2, 1, hang_in_python),
    "hangs first": (2, 1, hang_first),
    "hangs alone": (1, 0, hang_in_python),
    "fails": (2, 1, fail),
    "slow": (2, None, be_slow),
    "suspended": (2, None, stop),
}
"""Ranks of a run, the one of them (None: each) to which something happens in a step, and what."""


def on_rank(config: RunConfig, culprit: int | None, happens: Callable[[], None], out: Path) -> None:
    """What examples/pretrain_shear.py does after its imports, with what happens."""
    rank = int(os.environ["RANK"])
    sys.stderr = (out / f"{rank}.err").open("w")
    run_micro_batches = trainer_module.run_micro_batches

    def with_what_happens(models: Any, batches: Any, platform: Any, *others: Any) -> Any:
        slow, at_step = happens is be_slow, platform.heartbeat.now[1] == STEP
        if happens is hang_first and at_step and rank != culprit:
            time.sleep(0.8 * TIMEOUT)
        if culprit in (None, rank) and (slow or at_step):
            (out / f"{rank}.happens").touch()
            happens()
        return run_micro_batches(models, batches, platform, *others)

    trainer_module.run_micro_batches = with_what_happens

    def main() -> None:
        platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
        with platform.watched(config.platform.timeout_minutes):
            Trainer(config, platform).run()
        parallel.stop()

    run(main)


@dataclass
class Ranks:
    """The processes of a run and how they end."""

    processes: list[Any]
    out: Path
    ends: dict[int, float] = field(default_factory=dict)

    @classmethod
    def start(cls, config: RunConfig, name: str) -> Ranks:
        """Fork the ranks of a run of RUNS."""
        size, culprit, happens = RUNS[name]
        out = Path(config.run_dir).parent
        context = mp.start_processes(
            _on_rank,
            args=(on_rank, size, _free_port(), str(out), (config, culprit, happens, out)),
            nprocs=size,
            join=False,
            start_method="fork",
        )
        return cls(context.processes, out)

    def poll(self) -> None:
        """Note who has ended by now."""
        for rank, process in enumerate(self.processes):
            if process.exitcode is not None:
                self.ends.setdefault(rank, time.time())

    def resume_suspended(self) -> None:
        """Let all go on, TIMEOUT and more after all were stopped."""
        stops = [self.out / f"{rank}.happens" for rank in range(len(self.processes))]
        if all(f.exists() and time.time() - f.stat().st_mtime > 1.3 * TIMEOUT for f in stops):
            for process in set(self.processes) - {self.processes[rank] for rank in self.ends}:
                os.kill(process.pid, signal.SIGCONT)

    def seconds(self, rank: int, culprit: int) -> float:
        """From what happened to the end of a rank."""
        return self.ends[rank] - (self.out / f"{culprit}.happens").stat().st_mtime

    def said(self, rank: int) -> str:
        """What a rank wrote to Python's stderr, but for what so short a run is warned of."""
        lines = (self.out / f"{rank}.err").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("evaluations of "))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ranks]]:
    """All runs, ended but for the ranks that are stopped."""
    directory = tmp_path_factory.mktemp("hang")
    domains = write_domains(directory)
    started: dict[str, Ranks] = {}
    for name, (size, _, _) in RUNS.items():
        config = run_config(
            directory / name,
            domains,
            model=GQA,
            parallel=ParallelConfig(tensor=2 if size == 2 else 1),
            platform=PlatformConfig(device="cpu", timeout_minutes=TIMEOUT / 60),
            evaluation=EvaluationConfig(interval=4, sequences_per_domain=6),
            trainer=TrainerConfig(
                steps=4, global_batch_size=6, micro_batch_size=1, save_interval=4
            ),
        )
        (directory / name).mkdir()
        started[name] = Ranks.start(config, name)
    deadline = time.time() + 60
    try:
        while time.time() < deadline and any(
            rank not in ranks.ends and (rank != RUNS[name][1] or RUNS[name][2] is not stop)
            for name, ranks in started.items()
            for rank in range(len(ranks.processes))
        ):
            time.sleep(0.05)
            for ranks in started.values():
                ranks.poll()
            started["suspended"].resume_suspended()
        yield started
    finally:
        for ranks in started.values():
            for process in ranks.processes:
                process.kill()
                process.join()


def others(name: str) -> list[int]:
    size, culprit, _ = RUNS[name]
    return [rank for rank in range(size) if rank != culprit]


def last(name: str) -> str:
    """The step at which the others heard a rank last: what went down with the store is not read."""
    return "[0-3]" if "store" in name else str(STEP)


@pytest.mark.parametrize("name", ["stopped", "stopped with the store"])
def test_stopped_rank_ends_the_others_within_the_time_out(
    runs: dict[str, Ranks], name: str
) -> None:
    ranks, culprit = runs[name], RUNS[name][1]
    assert culprit is not None
    assert ranks.processes[culprit].exitcode is None
    for rank in others(name):
        assert ranks.processes[rank].exitcode == LOST
        assert TIMEOUT < ranks.seconds(rank, culprit) < TIMEOUT + NOTICED + JUDGED + SLACK
        first = ranks.said(rank).splitlines()[0]
        assert re.match(rf"error: step {STEP}: no progress for \d s \(platform.timeout_", first)
        assert re.search(
            rf": rank {culprit} \(.+\) last heard \d+ s ago at step {last(name)} in", first
        )


@pytest.mark.parametrize("name", ["killed", "killed with the store"])
def test_killed_rank_ends_the_others_at_once(runs: dict[str, Ranks], name: str) -> None:
    ranks, culprit = runs[name], RUNS[name][1]
    assert culprit is not None
    assert ranks.processes[culprit].exitcode == -signal.SIGKILL
    for rank in others(name):
        assert ranks.processes[rank].exitcode == LOST
        assert ranks.seconds(rank, culprit) < JUDGED + SLACK
        first = ranks.said(rank).splitlines()[0]
        assert first.startswith(f"error: step {STEP}: a process of the run is lost: rank {culprit}")
        assert re.search(rf" last heard \d+ s ago at step {last(name)} in", first)


def test_first_rank_of_a_machine_says_where_all_are_and_the_others_one_line(
    runs: dict[str, Ranks],
) -> None:
    _, *places, last_line = runs["stopped"].said(0).splitlines()
    place = rf"  ranks? ([\d, ]+) \(.+\) at step {STEP} in micro-batches for \d+ s, "
    found = [re.match(place, line) for line in places]  # one line where both wait at one place
    assert [match and match[1] for match in found] in (["0, 2"], ["0", "2"])
    assert last_line == "Start the run again: it goes on from its newest checkpoint"
    assert len(runs["stopped"].said(2).splitlines()) == 1


def test_rank_that_hangs_while_the_others_wait_for_it_is_named_by_all(
    runs: dict[str, Ranks],
) -> None:
    for rank in (0, 1):
        assert runs["hangs"].processes[rank].exitcode == LOST
        assert runs["hangs"].seconds(rank, 1) < TIMEOUT + NOTICED + JUDGED + SLACK
        assert re.search(
            rf": rank 1 \(.+\) at step {STEP} in micro-batches for \d+ s, hang_in_python \(",
            runs["hangs"].said(rank).splitlines()[0],
        )
    assert "all_reduce" in runs["hangs"].said(0).splitlines()[1]


def test_rank_that_hangs_is_named_by_those_that_notice_after_it_has_ended(
    runs: dict[str, Ranks],
) -> None:
    assert runs["hangs first"].processes[0].exitcode == LOST
    assert runs["hangs first"].ends[1] < runs["hangs first"].ends[0]
    first = runs["hangs first"].said(0).splitlines()[0]
    assert re.search(
        rf": rank 1 \(.+\) at step {STEP} in micro-batches for \d+ s, hang_first", first
    )


def test_run_of_one_process_that_hangs_ends(runs: dict[str, Ranks]) -> None:
    assert runs["hangs alone"].processes[0].exitcode == LOST
    assert "rank 0" in runs["hangs alone"].said(0)
    assert "hang_in_python (test_hang.py" in runs["hangs alone"].said(0)


def test_error_of_one_rank_is_named_by_the_others(runs: dict[str, Ranks]) -> None:
    assert runs["fails"].processes[0].exitcode == LOST
    assert "ended at step 3 in micro-batches: MemoryError: no memory is left" in runs["fails"].said(
        0
    )


def come_alone() -> str:
    """Rank 0 of 2, without the other."""
    parallel.GRACE_MINUTES = 0.0
    with pytest.raises(RankError) as error:
        parallel.start(PlatformConfig(device="cpu", timeout_minutes=0.02), ParallelConfig(), seed=0)
    return str(error.value)


def test_rank_that_never_comes_is_an_error(tmp_path: Path) -> None:
    arguments = (come_alone, 2, _free_port(), str(tmp_path), ())
    mp.start_processes(_on_rank, args=arguments, nprocs=1, start_method="fork")
    message = torch.load(tmp_path / "0.pt", weights_only=True)
    assert message.startswith("rank 0: the 2 processes did not come together: Timed out")
    assert "1/2 clients joined" in message


@pytest.mark.parametrize("name", ["slow", "suspended"])
def test_slow_or_suspended_run_goes_on_to_its_end(runs: dict[str, Ranks], name: str) -> None:
    for rank, process in enumerate(runs[name].processes):
        assert process.exitcode == 0
        assert runs[name].said(rank) == ""
    steps = [record["step"] for record in records(runs[name].out / "run", "step")]
    assert steps == [1, 2, 3, 4]
