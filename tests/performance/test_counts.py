"""What pruning adds to a step, counted: the same on any machine, whatever its load.

One trainer of each kind takes real steps; operators, collectives, waits of the host and bytes that
autograd keeps are counted in steps after the first two, which make states and caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch

from megashear.config.schema import (
    ModelShape,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainerConfig,
)
from megashear.pruning.table import mask_sizes
from megashear.training.trainer import Trainer
from tests.performance.counting import Operators, host_waits, saved_bytes
from tests.performance.steps import half, trainers
from tests.support.collectives import counted
from tests.support.distributed import run_distributed
from tests.support.runs import run_config, write_domains

OVERLAPPED = dict.fromkeys(
    ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), True
)
MAX_CALLS = 1000
"""Operators of a step: at 5 us for the start of a kernel, 5 ms of a step that takes seconds."""
MAX_LISTED = 5 * 6
"""Tensors of a layer in the lists of those operators: five passes over each of its parameters."""
Counts = dict[str, dict[str, Any]]
"""Of each kind of step, what was counted."""


@dataclass(frozen=True)
class Case:
    """A run to count."""

    ranks: int = 1
    layers: int = 2
    micro_batches: int = 1
    precision: str = "fp32"
    layout: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        return ModelShape(self.layers, 32, 4, 48, 64)


TENSOR = {"tensor": 2, "sequence": True}
CASES = {
    "one": Case(),
    "deep": Case(layers=8),
    "micro-batches": Case(micro_batches=4),
    "bf16": Case(layers=8, precision="bf16"),
    "tp2-sp": Case(2, layout=TENSOR),
    "tp2-sp-dp2-overlapped": Case(4, micro_batches=2, layout=TENSOR | OVERLAPPED),
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Counts]]:
    """What the ranks of a case count."""

    @cache
    def found(name: str) -> list[Counts]:
        case, directory = CASES[name], tmp_path_factory.mktemp(name)
        parallel = ParallelConfig(**case.layout)
        sequences = case.micro_batches * case.ranks // parallel.model_ranks
        config = run_config(
            directory,
            write_domains(directory),
            stage="prune",
            model=case.shape,
            target=half(case.shape),
            optimizer=OptimizerConfig(warmup_steps=2, clip_grad=1e-3),  # clips at every step
            trainer=TrainerConfig(steps=100, global_batch_size=sequences, micro_batch_size=1),
            parallel=parallel,
        )
        config = replace(config, platform=replace(config.platform, precision=case.precision))
        return run_distributed(count, case.ranks, config)

    return found


def count(config: RunConfig) -> Counts:
    """What this rank counts."""
    with trainers(config) as made:
        return {kind: count_steps(trainer) for kind, trainer in made.items()}


def count_steps(trainer: Trainer) -> dict[str, Any]:
    """Of four steps of a kind, each for one thing."""
    for _ in range(2):
        trainer.train_step()
    with Operators() as operators:
        trainer.train_step()
    with host_waits() as waits:
        trainer.train_step()
    with counted() as collectives:
        trainer.train_step()
    sent = Counter(f"{c.kind} of {c.size}: {c.bytes}" for c in collectives if c.size > 1)
    return {
        "operators": dict(operators.calls),
        "listed": operators.listed,
        "waits": dict(+waits),
        "collectives": dict(sent),
        "saved": saved_bytes(trainer),
    }


def more(counts: Counts, what: str) -> dict[str, int]:
    """What the pruning step has more of than the dense one, by kind; less is negative."""
    difference = Counter[str](counts["prune"][what])
    difference.subtract(counts["dense"][what])
    return {name: number for name, number in difference.items() if number}


def calls(counts: Counts) -> int:
    """Operators that the pruning step calls more often."""
    return sum(more(counts, "operators").values())


def test_operators_do_not_grow_with_layers_or_micro_batches(counts: Any) -> None:
    (one,), (deep,), (long,) = map(counts, ("one", "deep", "micro-batches"))
    of_steps = [sum(found["dense"]["operators"].values()) for found in (one, deep, long)]
    assert min(of_steps[1:]) > 2.5 * of_steps[0]  # the dense step's do
    assert more(one, "operators") == more(deep, "operators") == more(long, "operators")
    (bf16,) = counts("bf16")
    assert max(calls(one), calls(bf16)) < MAX_CALLS
    of_layers = [found["prune"]["listed"] - found["dense"]["listed"] for found in (one, deep)]
    assert (of_layers[1] - of_layers[0]) / 6 <= MAX_LISTED


@pytest.mark.parametrize("case", ["tp2-sp", "tp2-sp-dp2-overlapped"])
def test_operators_on_several_ranks_are_no_more(case: str, counts: Any) -> None:
    """Except for views: a rank takes its shard of the scales, which starts no kernel."""
    (one,) = counts("one")
    for found in counts(case):
        assert calls(found) <= calls(one) + 8


@pytest.mark.parametrize("case", ["tp2-sp", "tp2-sp-dp2-overlapped"])
def test_ranks_say_nothing_more_to_each_other_than_mask_gradients(case: str, counts: Any) -> None:
    """One all-reduce of a float32 for each unit, over all ranks that have a part of them."""
    units = sum(rows * size for rows, size in mask_sizes(CASES[case].shape).values())
    for found in counts(case):
        assert found["dense"]["collectives"]
        assert more(found, "collectives") == {f"all-reduce of {CASES[case].ranks}: {4 * units}": 1}


@pytest.mark.parametrize("case", CASES)
def test_the_host_waits_no_more_often(case: str, counts: Any) -> None:
    """Nor with more micro-batches, or more layers."""
    for found in counts(case):
        waits = found["prune"]["waits"]
        assert waits == found["dense"]["waits"]
        assert waits["ToHost.read"] == 1
        if CASES[case].ranks == 1:
            assert waits == counts("one")[0]["dense"]["waits"]


@pytest.mark.parametrize("case", CASES)
def test_autograd_keeps_the_same_bytes(case: str, counts: Any) -> None:
    for found in counts(case):
        assert found["prune"]["saved"] == found["dense"]["saved"] > 10_000


def test_what_is_counted_would_be_seen() -> None:
    """A wait, an operator, a storage more."""
    numbers = torch.ones(3)
    with host_waits() as waits:
        assert float(numbers.sum()) == 3
        on_host = numbers.cpu()
        assert on_host.tolist() == [1, 1, 1] and (on_host[0] + 1).item()  # is there already
        assert numbers.numpy().sum() == 3
        if numbers[0] > 0:
            numbers.nonzero()
    assert +waits == {"_local_scalar_dense": 2, "cpu": 1, "numpy": 1, "nonzero": 1}
    with Operators() as operators:
        torch._foreach_mul_([numbers, numbers], 2.0)
    assert operators.calls == {"_foreach_mul_.Scalar": 1}
