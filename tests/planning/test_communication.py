"""The bytes that a plan says a rank sends, against those that real steps send."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megashear.config.schema import ModelShape, ParallelConfig, RunConfig, TargetShape
from megashear.hardware import GPUS
from megashear.planning.communication import COLLECTIVES, KINDS, MASK_GRADIENTS, TENSOR, transfers
from megashear.planning.setup import CPU, TRANSFORMER_ENGINE, setup_of
from megashear.planning.throughput import Cluster, step_time
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.planning.measured import OVERLAPPED, SEQUENCE, Case, config_of
from tests.planning.test_memory import SEVEN_B
from tests.support.collectives import counted
from tests.support.distributed import run_distributed

SMALL = ModelShape(4, 64, 4, 96, 128)
TARGET = TargetShape(num_layers=2, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64)
TIED = replace(SMALL, tied_embeddings=True)
QK_NORM = replace(SMALL, num_query_groups=2, qkv_bias=True, qk_norm=True)
DISTRIBUTED = {"distributed_optimizer": True}
FEW_NUMBERS = 256
"""Bytes of what a plan leaves out: counts of tokens, losses of domains, the gradients' norm."""
PADDING = 4 * 128 * 4
"""Bytes at the end of a bucket, which is made to divide by its ranks, and by 128."""


def case(ranks: int, shape: ModelShape = SMALL, *, prune: bool = False, **layout: object) -> Case:
    return Case(ranks, shape, "fp32", prune, 2, dict(layout), seq_length=32, target=TARGET)


CASES = {
    "tensor": case(2, prune=True, tensor=2),
    "tensor, q/k norms": case(2, QK_NORM, tensor=2),
    "sequence, recomputed": case(2, QK_NORM, **SEQUENCE, recompute="full"),
    "pipeline, tied, tensor": case(4, TIED, pipeline=2, tensor=2),
    "interleaved": case(2, pipeline=2, virtual_pipeline=2),
    "data": case(2, prune=True),
    "data, overlapped, tensor": case(4, prune=True, **OVERLAPPED, **SEQUENCE),
    "data, distributed, bf16": replace(case(4, prune=True, **DISTRIBUTED), precision="bf16"),
    "context, recomputed": case(2, QK_NORM, context=2, recompute="selective", **DISTRIBUTED),
}


def sent_in_a_step(config: RunConfig) -> dict[str, float]:
    """Bytes that this rank sends in the second step, by collective."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    trainer.train_step()
    with counted() as collectives:
        trainer.train_step()
    parallel.stop()
    sent: Counter[str] = Counter()
    for each in collectives:
        sent[each.kind] += each.sent  # type: ignore[assignment]
    return dict(sent)


@pytest.mark.parametrize("name", CASES)
def test_a_rank_sends_what_the_plan_says(name: str) -> None:
    """By collective, on the ranks of every stage; about 1.5 s a case."""
    of = CASES[name]
    with tempfile.TemporaryDirectory() as directory:
        config = config_of(Path(directory), of)
        found = run_distributed(sent_in_a_step, of.ranks, config)
    setup = setup_of(config, of.shape, of.ranks, CPU)
    for rank, sent in enumerate(found):
        stage = rank * config.parallel.pipeline // of.ranks
        for collective in COLLECTIVES:
            every = transfers(setup, stage)
            expected = sum(each.sent for each in every if each.collective == collective)
            slack = FEW_NUMBERS if collective == "all-reduce" else PADDING
            exact = collective == "send" or collective not in sent
            assert 0 <= sent.get(collective, 0) - expected <= (0 if exact else slack), collective


def test_the_masks_of_7b_are_one_sum_whatever_the_layout() -> None:
    """357,408 units (32 + 4096 + 32 x 32 + 32 x 11008), 4 bytes each, over all 8 GPUs."""
    masks = [each for each in transfers(SEVEN_B, 0) if each.kind == MASK_GRADIENTS]
    assert [(each.bytes, each.count, each.ranks) for each in masks] == [(4 * 357_408, 1, 8)]
    dense = replace(SEVEN_B, masked=False, masked_units=0)
    assert transfers(dense, 0) == [
        each for each in transfers(SEVEN_B, 0) if each.kind != MASK_GRADIENTS
    ]
    without = replace(SEVEN_B, parallel=ParallelConfig(tensor=4, sequence=True))
    assert [each.ranks for each in transfers(without, 0) if each.kind == MASK_GRADIENTS] == [4]


def test_sequence_parallelism_gathers_the_inputs_of_two_products_again() -> None:
    """Korthikanti et al. 2022, section 4.2.2: not kept, so gathered for the weights' gradients.

    Without it a layer has 4 all-reduces, each as much as a gather and a scatter; with it 2 more
    gathers.
    """
    plain = replace(SEVEN_B, parallel=ParallelConfig(tensor=4, pipeline=4), masked=False)
    split = replace(plain, parallel=replace(plain.parallel, sequence=True))
    hidden, layers, count = 2 * 4096 * 4096, 32 / 4, 16
    each = hidden * 3 / 4 * layers * count
    tensor = [sum(t.sent for t in transfers(s, 1) if t.kind == TENSOR) for s in (plain, split)]
    assert tensor[0] == 8 * each
    assert tensor[1] == 10 * each + 2 * 3 / 4 * 4 * 2 * layers * 4096  # the norms' gradients


def test_time_without_masks_and_communication_is_that_of_one_gpu() -> None:
    """What costs nothing there: every kind of communication, and the masks."""
    cluster = Cluster(next(gpu for gpu in GPUS if gpu.name == "h200-141gb"))
    one = replace(SEVEN_B, parallel=ParallelConfig(), data_size=1, masked=False)
    time = step_time(one, cluster)
    assert not any(getattr(time, kind) for kind in KINDS)
    masked = step_time(replace(one, masked=True), cluster)
    scaled = 32000 * 4096 + 32 * (4096 * 4096 + 4096 * 11008) + 65 * 4096
    seconds = (20 + 50) * scaled / 4.8e12 + (480 + 26 * 32) * 5e-6
    assert masked.masks == pytest.approx(seconds)
    assert masked.total == pytest.approx(time.total + seconds)
    assert one.backend == TRANSFORMER_ENGINE
