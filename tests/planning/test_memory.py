"""The memory model against what ranks really allocate, and against sums done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megashear.config.schema import ModelShape, ParallelConfig
from megashear.hardware import BLOCK_ELEMENTS
from megashear.planning.memory import ERROR, peak_memory, stage_memory
from megashear.planning.setup import TRANSFORMER_ENGINE, Setup
from tests.planning.measured import CASES, GQA, OVERLAPPED, SEQUENCE, TIED, Case, measure

LLAMA_2_7B = ModelShape(32, 4096, 32, 11008, 32000)
SEVEN_B = Setup(
    shape=LLAMA_2_7B,
    parallel=ParallelConfig(
        tensor=4, sequence=True, distributed_optimizer=True, overlap_param_gather=True
    ),
    data_size=2,
    seq_length=4096,
    micro_batch_size=1,
    micro_batches=16,
    masked=True,
    masked_units=357_408,
    backend=TRANSFORMER_ENGINE,
    precision="bf16",
)

MEASURED = {
    "pipeline": CASES["fp32, pipeline 2"],
    "overlapped": Case(2, GQA, prune=True, layout={**OVERLAPPED, "recompute": "selective"}),
    "bf16": Case(  # short, since some CPUs are slow at it
        2,
        TIED,
        "bf16",
        prune=True,
        seq_length=64,
        global_batch_size=2,
        layout={**SEQUENCE, "recompute": "full"},
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_rank_takes_what_the_model_says(name: str) -> None:
    """The peak, and each part that can be told apart; about 3 s a case."""
    for found, model in measure(MEASURED[name]):
        assert model.total == pytest.approx(found["peak"], rel=ERROR)
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(model, part) == pytest.approx(found[part], rel=1e-3), part
        activations = model.activations + model.logits
        assert activations == pytest.approx(found["activations"], rel=0.1)
        if MEASURED[name].layout.get("overlap_param_gather"):  # owners have uneven shares
            assert 0 < found["masks"] < 2 * model.masks
        else:
            assert model.masks == pytest.approx(found["masks"], rel=0.1)


def test_states_of_a_7b_model_are_divided_by_the_layout() -> None:
    """6 bytes of weight and gradient a parameter, 12 of the optimizer; of masks what they need."""
    memory = peak_memory(SEVEN_B)
    replicated = 65 * 4096  # norms, on every tensor rank
    parameters = (6_738_415_616 - replicated) / 4 + replicated
    assert memory.weights + memory.gradients == 6 * parameters
    assert memory.optimizer == 12 * parameters / 2
    units = 32 + 4096 + 32 * 32 + 32 * 11008
    assert memory.masks == pytest.approx(4 * BLOCK_ELEMENTS["cuda"] + 48 * units)
    in_fp32 = peak_memory(replace(SEVEN_B, precision="fp32"))  # without copies in the optimizer
    scaled = 32000 * 4096 + 32 * (4096 * 4096 + 4096 * 11008)  # embedding, and the ways out
    put_aside = 4 * (scaled / 4 + replicated) / 2
    assert in_fp32.masks == pytest.approx(memory.masks + put_aside)


def test_activations_are_those_of_korthikanti_but_for_scores_and_masks_of_dropout() -> None:
    """Flash attention, no dropout, gated: 4 d + (3 q + 3 k) + 3 m elements a token and layer.

    Korthikanti et al. 2022, table 2, of tensor and sequence parallelism: everything divides by t.
    """
    one = replace(SEVEN_B, parallel=ParallelConfig(tensor=4, sequence=True, pipeline=2))
    d, m, tokens = 4096, 11008, 4096
    layer = 2 * tokens * (4 * d + 6 * d + 3 * m) / 4 + tokens * 4 * 32 / 4
    memory = stage_memory(one, 0)  # two micro-batches in flight, of 16 layers each
    at_work = 2 * tokens * (d / 4 + d + 2 * m / 4)
    assert memory.activations == pytest.approx(2 * 16 * layer + at_work)
    assert memory.logits == 0
    last = stage_memory(one, 1)
    assert last.logits > 0 and last.activations == pytest.approx(16 * layer)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weights", {"parallel": ParallelConfig(tensor=8, sequence=True)}),
        ("optimizer", {"data_size": 4}),
        ("activations", {"parallel": replace(SEVEN_B.parallel, recompute="full")}),
        ("activations", {"micro_batch_size": 1, "seq_length": 2048}),
        ("logits", {"parallel": ParallelConfig(tensor=8, sequence=True)}),
    ],
)
def test_a_part_shrinks_by_what_it_is_split_by(name: str, change: dict[str, object]) -> None:
    assert getattr(peak_memory(replace(SEVEN_B, **change)), name) < getattr(  # type: ignore[arg-type]
        peak_memory(SEVEN_B), name
    )
