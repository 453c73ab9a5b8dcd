"""A run saved in one layout goes on in another: the same data, the same losses.

Each row of CASES trains three steps in one layout, saves, and goes on for two steps in the other,
whose losses are compared with those of one process that did all five: to 1e-5 in fp32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megashear.checkpoint.torch_dist.optimizer import rectangles
from megashear.config.schema import ModelShape, ParallelConfig, RunConfig
from megashear.model.build import bound_rules
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, MHA, prune_options, run_config, write_domains, write_source

SHAPES = {
    "mha": replace(MHA, num_layers=4),
    "gqa-tied": replace(GQA, num_layers=4, tied_embeddings=True),
    "vocabulary-61": replace(MHA, num_layers=4, vocab_size=61),
    "vocabulary-61-tied": replace(GQA, num_layers=4, vocab_size=61, tied_embeddings=True),
    "six-heads": ModelShape(4, 36, 6, 48, vocab_size=61),
    "six-heads-tied": ModelShape(4, 36, 6, 48, vocab_size=61, tied_embeddings=True),
}
LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2-distopt": (2, {"distributed_optimizer": True}),
    "dp4-distopt": (4, {"distributed_optimizer": True}),
    "tp2-sp": (2, {"tensor": 2, "sequence": True}),
    "tp2-dp2-distopt": (4, {"tensor": 2, "distributed_optimizer": True}),
    "tp3": (3, {"tensor": 3}),
    "tp3-dp2-distopt": (6, {"tensor": 3, "distributed_optimizer": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "cp2-distopt": (2, {"context": 2, "distributed_optimizer": True}),
    "tp2-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-vpp2-dp2-distopt-overlap": (
        4,
        {
            **{"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": True},
            **{"overlap_grad_reduce": True, "overlap_param_gather": True},
        },
    ),
    "tp2-sp-pp2-dp2-distopt": (
        8,
        {"tensor": 2, "sequence": True, "pipeline": 2, "distributed_optimizer": True},
    ),
}
PAIRS = [
    ("tp2-sp", "pp2-vpp2"),
    ("pp2-vpp2", "tp2-sp"),
    ("dp2", "dp2-distopt"),
    ("dp2-distopt", "one"),
    ("cp2-distopt", "tp2-pp2"),
    ("tp2-pp2", "dp4-distopt"),
    ("dp4-distopt", "pp2"),
    ("pp2-vpp2-dp2-distopt-overlap", "cp2"),
    ("tp2-sp-pp2-dp2-distopt", "pp2-vpp2-dp2-distopt-overlap"),
    ("pp2", "tp2-sp-pp2-dp2-distopt"),
]
CASES = [
    *((("prune", "continue")[n % 2], ("mha", "gqa-tied")[n // 2 % 2], *pair)
      for n, pair in enumerate(PAIRS)),
    ("prune", "vocabulary-61-tied", "tp2-sp-pp2-dp2-distopt", "one"),
    ("prune", "vocabulary-61", "pp2", "tp2-dp2-distopt"),
    ("continue", "six-heads-tied", "tp3", "tp2-pp2"),
    ("continue", "six-heads", "tp3-dp2-distopt", "pp2"),
    ("continue", "six-heads-tied", "tp2-dp2-distopt", "tp3-dp2-distopt"),
]  # fmt: skip
SAME = {
    "dp2-distopt": "gqa-tied",
    "pp2-vpp2-dp2-distopt-overlap": "gqa-tied",
    "cp2-distopt": "gqa-tied",
    "tp2-pp2": "vocabulary-61-tied",
    "tp2-dp2-distopt": "vocabulary-61",
}


def steps(config: RunConfig, until: int) -> dict[str, Any]:
    """A rank's losses and samples up to a step, where it saves, and its state then."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    found: dict[str, Any] = {"losses": [], "tokens": []}
    log_record, next_step = trainer.log.record, trainer.loader.next_step

    def note_loss(record: Any) -> None:
        if record["kind"] == "step":
            found["losses"].append(record["loss"])
        log_record(record)

    def note_tokens() -> Any:
        batches = next_step()
        found["tokens"].append(torch.cat([batch["tokens"] for batch in batches]))
        return batches

    trainer.log.record = note_loss  # type: ignore[method-assign]
    trainer.loader.next_step = note_tokens  # type: ignore[method-assign]
    while trainer.step < until:
        trainer.train_step()
    trainer.save()
    trainer.checkpoints.finish()
    bound = bound_rules(trainer.optimizer.chunks)
    found["weights"] = {b.rule.name: b.parameter.detach().clone() for b in bound}
    found["objective"] = trainer.objective.state()
    found["data"] = platform.data_rank
    trainer.loader.close()
    parallel.stop()
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(configuration, what one process computes in five steps), once for each case."""
    made: dict[tuple[str, str, str], tuple[RunConfig, dict[str, Any]]] = {}

    def get(stage: str, shape: str, precision: str = "fp32") -> tuple[RunConfig, dict[str, Any]]:
        case = (stage, shape, precision)
        if case not in made:
            directory = tmp_path_factory.mktemp("-".join(case))
            run_distributed(write_source, 1, directory, SHAPES[shape])
            config = run_config(
                directory,
                write_domains(directory, SHAPES[shape].vocab_size),
                init_from=str(directory / "source"),
                **(prune_options(SHAPES[shape]) if stage == "prune" else {"stage": stage}),
            )
            config = replace(config, platform=replace(config.platform, precision=precision))
            made[case] = (config, run_distributed(steps, 1, config, 5)[0])
        return made[case]

    return get


def broken(
    config: RunConfig, directory: Path, first: str, second: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What ranks compute in steps 1 to 3 in one layout, and in 4 and 5 in another."""
    config = replace(config, run_dir=str(directory / "run"))
    parts = []
    for name, until in ((first, 3), (second, 5)):
        world_size, layout = LAYOUTS[name]
        config = replace(config, parallel=ParallelConfig(**layout))
        parts.append(run_distributed(steps, world_size, config, until))
    return parts[0], parts[1]


def samples(ranks: list[dict[str, Any]], step: int) -> list[list[int]]:
    """The sequences of a step over all data-parallel ranks, sorted."""
    shares = {rank["data"]: rank["tokens"][step] for rank in ranks}
    return sorted(torch.cat(list(shares.values())).tolist())


@pytest.mark.parametrize(("stage", "shape", "first", "second"), CASES)
def test_another_layout_goes_on_with_the_same_data_and_losses(
    stage: str, shape: str, first: str, second: str, tmp_path: Path, unbroken: Any
) -> None:
    config, expected = unbroken(stage, shape)
    _, ranks = broken(config, tmp_path, first, second)
    for step in range(2):
        assert samples(ranks, step) == samples([expected], 3 + step)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected["losses"][3:], rel=1e-5)
        for name, value in rank["objective"].items():
            close(value, expected["objective"][name], name)


def close(ours: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().clamp_min(1e-12)
    assert (ours - expected).abs().max() <= 2e-5 * scale, what  # as gradients in test_layouts


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in SAME), *((name, "bf16") for name in list(SAME)[:2])],
)
def test_the_same_layout_goes_on_bit_for_bit(
    name: str, precision: str, tmp_path: Path, unbroken: Any
) -> None:
    config, _ = unbroken("prune", SAME[name], precision)
    world_size, layout = LAYOUTS[name]
    config = replace(config, parallel=ParallelConfig(**layout))
    whole_run = replace(config, run_dir=str(tmp_path / "whole"))
    whole = run_distributed(steps, world_size, whole_run, 5)
    _, second = broken(config, tmp_path, name, name)
    for ours, theirs in zip(second, whole, strict=True):
        assert ours["losses"] == theirs["losses"][3:]
        for part in ("weights", "objective"):
            assert ours[part].keys() == theirs[part].keys()
            for key, value in theirs[part].items():
                assert torch.equal(ours[part][key], value), key


def test_bf16_goes_on_with_its_fp32_weights_in_another_layout(
    tmp_path: Path, unbroken: Any
) -> None:
    """Were they made anew from the bf16 weights, the next steps would differ by their rounding."""
    config, expected = unbroken("continue", "mha", "bf16")
    for pair in (("one", "dp2-distopt"), ("dp2-distopt", "pp2")):
        _, second = broken(config, tmp_path / "-".join(pair), *pair)
        for rank in second:
            assert rank["losses"] == pytest.approx(expected["losses"][3:], rel=2e-3)


@given(st.data())
def test_rectangles_cover_a_run_of_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    shape = data.draw(st.sampled_from([shape, shape[:1]]))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    begin = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(begin, whole.numel()))
    blocks = list(rectangles(shape, begin, end))
    found = [
        whole[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))].flatten()
        for offset, size in blocks
    ]
    assert torch.cat([whole.flatten()[:0], *found]).tolist() == list(range(begin, end))
    assert len(blocks) <= 3
