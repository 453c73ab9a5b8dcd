"""A pruning run whose ranks are killed again and again ends as the one that nobody disturbed.

SIGKILL to one rank or to all: at the single operations on files by which a checkpoint comes into
force, and, in a test that takes minutes, at any moment that a seed draws. After each the run is
started again.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from megashear.config.schema import EvaluationConfig, ParallelConfig, RunConfig, TrainerConfig
from megashear.platform import parallel, watchdog
from megashear.training.trainer import Trainer
from tests.support.distributed import _free_port, _on_rank, run_distributed
from tests.support.runs import GQA, prune_options, records, run_config, write_domains, write_source

RUNS = {
    "tp2": (ParallelConfig(tensor=2), False),
    "dp2-distributed-async": (ParallelConfig(distributed_optimizer=True), True),
}
"""Layout of two ranks, and whether saves go on beside the training."""
SEED = 7
STEPS, INTERVAL = 12, 2  # of the run; between saves
CHANGES = {"os.rename": 1, "os.mkdir": 0, "os.remove": 0, "shutil.rmtree": 0, "open": 0}
"""Operations on files that Python reports, and which of their arguments is the path."""


@dataclass(frozen=True)
class Fault:
    """SIGKILL when a rank comes to a moment for the n-th time, or some seconds later.

    Attributes:
        moment: as in `Moments`.
        rank: which comes to it.
        kills_all: whether all are killed, or this one.
    """

    moment: str
    occurrence: int
    seconds: float
    rank: int
    kills_all: bool


class Moments:
    """Where a rank is: `begin`, what it marks, and each change of a file before it is made."""

    def __init__(self, run_dir: str, fault: Fault | None, halted: Path) -> None:
        self.passed = Counter[str]()
        self._run_dir, self._fault, self._halted = run_dir, fault, halted
        self._process = os.getpid()
        sys.addaudithook(self._on_event)
        self.come("begin")

    def come(self, moment: str) -> None:
        """Note a moment; at the fault's, stop until the test kills."""
        self.passed[moment] += 1
        fault = self._fault
        if fault and (moment, self.passed[moment]) == (fault.moment, fault.occurrence):
            if fault.seconds:
                threading.Timer(fault.seconds, self._halt).start()
            else:
                self._halt()

    def _halt(self) -> None:
        self._halted.touch()
        os.kill(self._process, signal.SIGSTOP)

    def _on_event(self, event: str, arguments: Any) -> None:
        if event not in CHANGES or os.getpid() != self._process:
            return
        path = str(arguments[CHANGES[event]])
        reads = event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if path.startswith(self._run_dir) and not reads:
            name = re.sub(r"\d+", "N", path.removeprefix(self._run_dir))
            self.come(f"{event} {name}")


def attempt(config: RunConfig, fault: Fault | None, halted: Path) -> dict[str, Any]:
    """On a rank: start or go on with the run. What it comes to, if it comes to its end."""
    watchdog._JUDGE = 0.5  # who was killed is known here
    rank = int(os.environ["RANK"])
    sys.stdout = sys.stderr = (halted.parent / f"{rank}.out").open("w")
    moments = Moments(config.run_dir, fault if fault and fault.rank == rank else None, halted)
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    mark = platform.heartbeat.mark

    def mark_and_come(doing: str | None = None, step: int | None = None) -> None:
        mark(doing, step)
        if doing:
            moments.come(f"mark {doing}")

    platform.heartbeat.mark = mark_and_come  # type: ignore[method-assign]
    with platform.watched(config.platform.timeout_minutes):
        trainer = Trainer(config, platform)
        trainer.run()
    optimizer = trainer.optimizer.megatron
    found = {
        "weights": [p.detach() for c in trainer.optimizer.chunks for p in c.parameters()],
        "moments of Adam": [
            value
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
            for group in part.optimizer.param_groups
            for parameter in group["params"]
            for key, value in sorted(part.optimizer.state[parameter].items())
            if key != "step"
        ],
        "masks": trainer.objective.state(),
        "passed": dict(moments.passed),
    }
    parallel.stop()
    return found


def run_once(config: RunConfig, fault: Fault | None, out: Path) -> list[dict[str, Any]] | None:
    """Start the run on two ranks. What each comes to, or None where the fault struck before."""
    out.mkdir()
    halted = out / "halted"
    context = mp.start_processes(
        _on_rank,
        args=(attempt, 2, _free_port(), str(out), (config, fault, halted)),
        nprocs=2,
        join=False,
        start_method="fork",
    )
    ranks = context.processes
    deadline = time.time() + 120
    try:
        while not halted.exists() and any(rank.is_alive() for rank in ranks):
            assert time.time() < deadline, "the run hangs"
            time.sleep(0.005)
        if not halted.exists():
            while not context.join():  # raises what a rank raised
                pass
            return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert fault
        for rank in ranks if fault.kills_all else [ranks[fault.rank]]:
            rank.kill()
        for rank in ranks:
            rank.join(30)
            latest = Path(config.run_dir) / "checkpoints" / "latest"
            complete = latest.is_file() and latest.read_text() == f"step-{STEPS:08d}\n"
            # After the last save there is nothing that ranks do together.
            assert rank.exitcode or complete, f"a rank goes on alone after {fault}"
        return None
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def aimed_faults(passed: dict[str, int]) -> list[Fault]:
    """A fault at every rename of a save, and at two other operations on files.

    Args:
        passed: moments of rank 0 in an undisturbed run, with how often it came to them.
    """
    draw = random.Random(SEED)
    often = frequent(passed)
    renames = [moment for moment in often if moment.startswith("os.rename")]
    others = [moment for moment in often if " /" in moment and moment not in renames]
    assert len(renames) >= 2
    aimed = renames + draw.sample(others, min(2, len(others)))
    return [Fault(moment, 1, 0.0, 0, kills_all=draw.random() < 0.5) for moment in aimed]


def drawn_faults(passed: dict[str, int]) -> list[Fault]:
    """Ten faults at any moment: in a save, in whatever a rank marks, and in a start."""
    draw = random.Random(SEED)
    marks = [moment for moment in frequent(passed) if moment.startswith("mark ")]
    faults = []
    for when in (
        *[("mark save", draw.choice([1, 2]), draw.uniform(0.0, 0.4)) for _ in range(4)],
        *[(draw.choice(marks), draw.choice([1, 2]), draw.uniform(0.0, 0.1)) for _ in range(4)],
        *[("begin", 1, draw.uniform(0.1, 2.0)) for _ in range(2)],
    ):  # a rank alone waits for long until its group is there
        kills_all = when[0] == "begin" or draw.random() < 0.5
        faults.append(Fault(*when, draw.randrange(2), kills_all))
    return draw.sample(faults, len(faults))


def frequent(passed: dict[str, int]) -> list[str]:
    """Moments of every save, not only of the first of a run."""
    return [moment for moment, times in passed.items() if times >= STEPS // INTERVAL - 1]


@pytest.mark.parametrize(
    "choose", [aimed_faults, pytest.param(drawn_faults, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("name", RUNS)
def test_killed_run_ends_as_an_undisturbed_one(
    name: str, choose: Callable[[dict[str, int]], list[Fault]], tmp_path: Path
) -> None:
    layout, async_save = RUNS[name]
    run_distributed(write_source, 1, tmp_path)
    config = run_config(
        tmp_path,
        write_domains(tmp_path),
        run_dir=str(tmp_path / "undisturbed"),
        init_from=str(tmp_path / "source"),
        parallel=layout,
        evaluation=EvaluationConfig(interval=4, sequences_per_domain=4),
        trainer=TrainerConfig(
            steps=STEPS,
            global_batch_size=4,
            micro_batch_size=1,
            save_interval=INTERVAL,
            keep_checkpoints=2,
            async_save=async_save,
        ),
        **prune_options(GQA),
    )
    expected = run_once(config, None, tmp_path / "out")
    assert expected is not None
    faults = choose(expected[0]["passed"])
    number, missed = 0, []
    while faults:  # a run that comes to its end leaves the rest of them to another
        number += 1
        disturbed = replace(config, run_dir=str(tmp_path / f"disturbed-{number}"))
        struck: list[Fault] = []
        out = tmp_path / f"out-{number}-{len(struck)}"
        while faults and run_once(disturbed, faults[0], out) is None:
            struck.append(faults.pop(0))
            out = tmp_path / f"out-{number}-{len(struck)}"
        run_once(disturbed, None, tmp_path / f"out-{number}-end")
        # Started once more, it has what its last checkpoint holds.
        found = run_once(disturbed, None, tmp_path / f"out-{number}-after")
        print(f"run {number}:", *struck, sep="\n  ")  # shown if what follows fails
        assert found is not None
        if not struck:
            missed.append(faults.pop(0))  # its time came after the end of the run
        assert_same_state(found, expected)
        assert_same_files(Path(disturbed.run_dir), Path(config.run_dir))
    assert len(missed) < 3, missed


def assert_same_state(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """On every rank, bit for bit."""
    for ours, theirs in zip(found, expected, strict=True):
        for kind in ("weights", "moments of Adam"):
            for a, b in zip(ours[kind], theirs[kind], strict=True):
                assert torch.equal(a, b), kind
        assert ours["masks"].keys() == theirs["masks"].keys()
        for name, value in theirs["masks"].items():
            assert torch.equal(ours["masks"][name], value), name


def assert_same_files(found: Path, expected: Path) -> None:
    """The same record without a step lost or repeated, the same domains, and no left-overs."""
    assert records(found) == records(expected)
    assert [record["step"] for record in records(found, "step")] == list(range(1, STEPS + 1))
    assert (found / "masks.json").read_text() == (expected / "masks.json").read_text()
    assert (found / "domains.yaml").read_text() == (expected / "domains.yaml").read_text()
    left, usual = ({path.name for path in run.glob("**/*")} for run in (found, expected))
    assert left == usual


def signalled_while_ranks_agree(config: RunConfig) -> list[int]:
    """A run that gets SIGTERM after the collective that says whether any rank did."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    sum_with = trainer.signals.sum_with

    def sum_and_signal(totals: Tensor) -> tuple[Tensor, Tensor]:
        sums = sum_with(totals)
        if trainer.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums

    trainer.signals.sum_with = sum_and_signal  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        trainer.run()
    parallel.stop()
    assert isinstance(ended.value.code, int)
    return [ended.value.code, trainer.step]


def test_signal_that_comes_while_ranks_agree_is_not_lost(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_domains(tmp_path), model=GQA)
    assert run_distributed(signalled_while_ranks_agree, 1, config) == [[128 + signal.SIGTERM, 2]]
