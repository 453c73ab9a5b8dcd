"""Rules of parallel layouts: what does not fit is refused early, with the numbers that would."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megashear.config.loader import load_config
from megashear.config.schema import RotaryScaling
from megashear.errors import ConfigError
from tests.support.config_rules import MHA, found, only


@pytest.mark.parametrize(
    ("path", "words", "options"),
    [
        (
            "parallel.pipeline",
            "= 5 does not divide the model's 32 layers. Use 1, 2, 4, 8, 16 or 32",
            {"pipeline": 5},
        ),
        (
            "parallel.pipeline",
            "= 4 times virtual_pipeline = 3 does not divide the model's 32 layers. Use 1, 2, 4, 8, "
            "16 or 32 for their product",
            {"pipeline": 4, "virtual_pipeline": 3},
        ),
        (
            "parallel.virtual_pipeline",
            "= 2 needs parallel.pipeline > 1, and it is 1",
            {"virtual_pipeline": 2},
        ),
        (
            "data.seq_length",
            "= 4096 is not divisible by 6, which parallel.context = 3 needs. Use 4092 or 4098",
            {"context": 3},
        ),
        (
            "parallel.overlap_param_gather",
            "= true needs parallel.distributed_optimizer and parallel.overlap_grad_reduce too",
            {"overlap_param_gather": True},
        ),
        (
            "parallel.overlap_param_gather",
            "= true needs parallel.overlap_grad_reduce too",
            {"overlap_param_gather": True, "distributed_optimizer": True},
        ),
        (
            "parallel.recompute",
            "'some' is no choice. Use none, selective or full",
            {"recompute": "some"},
        ),
        ("parallel.context", "= 0", {"context": 0}),
        ("parallel.pipeline", "= -1", {"pipeline": -1}),
    ],
)
def test_layout_that_does_not_fit(path: str, words: str, options: dict[str, Any]) -> None:
    only(path, words, **{f"parallel__{name}": value for name, value in options.items()})


def test_sequence_shared_by_context_and_tensor_ranks() -> None:
    """2 blocks for each context rank, and each rank's part divides over the tensor ranks."""
    layout = {"parallel__context": 2, "parallel__tensor": 8, "parallel__sequence": True}
    only(
        "data.seq_length",
        "= 40 is not divisible by 16, which parallel.context = 2 and parallel.tensor = 8 with "
        "sequence needs. Use 32 or 48",
        data__seq_length=40,
        **layout,
    )
    for length in (32, 48):
        assert found(data__seq_length=length, **layout) == []


def test_models_under_context_parallelism() -> None:
    """Positions of yarn are shared out as a sequence is; Transformer Engine knows no windows."""
    yarn = dataclasses.replace(MHA, rotary_scaling=RotaryScaling("yarn", 4.0, 2050))
    words = "= 2: the 2050 original positions of the model's yarn embeddings are not divisible by 4"
    only("parallel.context", words, source=yarn, parallel__context=2)
    assert found(source=yarn) == []
    window = {"source": dataclasses.replace(MHA, sliding_window=2048), "parallel__context": 2}
    words = "longer than the model's sliding window = 2048"
    only("parallel.context", "= 2 needs platform.layers = 'torch'", words, **window)
    assert found(**window, platform__layers="torch") == []
    assert found(**window, data__seq_length=2048) == []


@pytest.mark.parametrize(
    ("ranks", "options", "path", "words"),
    [
        (12, {"tensor": 2, "pipeline": 4}, "parallel",
         ": tensor 2 times pipeline 4 does not divide the 12 processes of the run. Use 1, 2, 3, 4, "
         "6 or 12 for the product, or start other processes"),
        (6, {"context": 4}, "parallel.context", "= 4 does not divide the 6 processes"),
        (16, {"pipeline": 2, "virtual_pipeline": 2}, "trainer.global_batch_size",
         "= 32 is not divisible by trainer.micro_batch_size = 4 times 8 data-parallel ranks times "
         "2 interleaved stages. Use 64"),
    ],
)  # fmt: skip
def test_layout_against_processes_and_batch(
    ranks: int, options: dict[str, Any], path: str, words: str
) -> None:
    changes = {f"parallel__{name}": value for name, value in options.items()}
    only(path, words, world_size=ranks, **changes)


def test_layouts_that_fit() -> None:
    for ranks, options in (
        (8, {"tensor": 2, "sequence": True, "pipeline": 2}),
        (16, {"tensor": 2, "pipeline": 4, "virtual_pipeline": 4, "context": 2}),
        (8, {"pipeline": 8, "recompute": "full"}),
        (4, {"distributed_optimizer": True, "overlap_grad_reduce": True}),
    ):
        changes = {f"parallel__{name}": value for name, value in options.items()}
        assert found(world_size=ranks, **changes) == []


def test_uneven_layers_are_refused_before_anything_starts(tmp_path: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"stage: pretrain\nrun_dir: {tmp_path}/run\n"
        "model: {num_layers: 6, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 48,"
        " vocab_size: 64}\ndata: {seq_length: 16, rule: constant, domains:"
        " [{name: a, train: a, valid: a, weight: 1}]}\n"
    )
    with pytest.raises(ConfigError, match=r"parallel.pipeline += 4 .* 6 layers. Use 1, 2, 3 or 6"):
        load_config(file, ["parallel.pipeline=4"])
