"""Target shapes: the paper's own come out, and whatever comes out may be pruned to."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.checkpoint.hf.config import shape_from_hf_config
from megashear.config.schema import (
    QUERY_HEAD,
    ModelShape,
    ParallelConfig,
    PruningConfig,
)
from megashear.planning.targets import KNOWN, Goal, Known, kv_bytes, propose, weight_bytes, why_none
from megashear.pruning.counting import parameter_count
from tests.checkpoint.hf import test_released_configs as released
from tests.support.config_rules import PRUNE, found

LLAMA_2_7B = ModelShape(32, 4096, 32, 11008, 32000)
LLAMA_3_8B = ModelShape(
    32, 4096, 32, 14336, 128256, num_query_groups=8, max_position_embeddings=8192
)
SMOLLM2 = ModelShape(30, 576, 9, 1536, 49152, num_query_groups=3, tied_embeddings=True)
QWEN_3_8B = ModelShape(
    *(36, 4096, 32, 12288, 151936, 8, 128),
    max_position_embeddings=40960,
    qk_norm=True,
    family="qwen3",
)


@pytest.mark.parametrize(
    ("size", "parameters", "shape", "tensor"),
    [
        (2.7e9, 2_701_560_320, (32, 2560, 20, 6912), 4),
        (1.3e9, 1_345_423_360, (24, 2048, 16, 5504), 8),
        (370e6, 373_867_520, (24, 1024, 8, 2816), 8),
    ],
)
def test_of_the_papers_sizes_the_papers_shapes_come_first(
    size: float, parameters: int, shape: tuple[int, ...], tensor: int
) -> None:
    """They were chosen by hand, after Pythia and INCITE; no shape of theirs is in the table."""
    for wanted in (size, parameters):
        first, *_ = propose(LLAMA_2_7B, Goal("size", wanted))
        assert tuple(vars(first.target).values()) == shape
        assert (first.parameters, max(first.tensor)) == (parameters, tensor)


@pytest.mark.parametrize("source", [LLAMA_2_7B, LLAMA_3_8B, QWEN_3_8B])
@pytest.mark.parametrize("size", [0.37e9, 1.3e9, 2.7e9])
def test_proposals_are_choices(source: ModelShape, size: float) -> None:
    """No two differ by a layer or two alone; pipeline stages divide every depth."""
    shapes = [proposal.shape for proposal in propose(source, Goal("size", size))]
    assert len(shapes) == 6
    assert all(shape.num_layers % 2 == 0 for shape in shapes)
    for one, other in combinations(shapes, 2):
        depth, width = one.num_layers / other.num_layers, one.hidden_size / other.hidden_size
        assert max(depth, 1 / depth, width, 1 / width) >= 1.1


@pytest.mark.parametrize(
    ("goal", "tensor", "option", "words"),
    [
        (Goal("size", 7e9), 8, "size", "more than the source has, 6,738,415,616"),
        (Goal("size", 70e9, kv_bytes=65536), 8, "size", "more than the source has"),
        (Goal("size", 50e6), 8, "tensor", "shapes from 81,603,200 to 6,738,415,616"),
        (Goal("size", 5e6), 1, "size", "no usual shape"),
        (Goal("size", 1.3e9, kv_bytes=20e3), 8, "kv-cache", "usual shapes need 128 KiB"),
        (Goal("size", 1e9), 7, "tensor", "divides by 1, 2, 4, 8, 16 or 32"),
    ],
)
def test_what_leaves_nothing_is_named(goal: Goal, tensor: int, option: str, words: str) -> None:
    assert propose(LLAMA_2_7B, goal, tensor) == []
    found = why_none(LLAMA_2_7B, goal, tensor)
    assert found[0] == option and words in found[1]


def test_of_a_toy_nothing_is_proposed_and_nothing_fails() -> None:
    toy = ModelShape(3, 32, 4, 96, 256)
    assert propose(toy, goal := Goal("size", parameter_count(toy) / 2)) == []
    assert why_none(toy, goal, 1)[0] == "size"


@settings(deadline=None, max_examples=10)
@given(
    source=st.sampled_from((LLAMA_2_7B, LLAMA_3_8B, SMOLLM2, QWEN_3_8B)),
    share=st.floats(0.08, 0.8),
    kind=st.sampled_from(("size", "memory", "kv-cache")),
    precision=st.sampled_from(("bf16", "int4")),
    tensor=st.sampled_from((1, 2, 3, 4, 8)),
)
def test_whatever_is_proposed_may_be_pruned_to_and_is_of_the_size(
    source: ModelShape, share: float, kind: str, precision: str, tensor: int
) -> None:
    of_source = {
        "size": parameter_count(source),
        "memory": parameter_count(source) * (2 if precision == "bf16" else 0.6),
        "kv-cache": kv_bytes(source),
    }
    wanted = share * of_source[kind]
    for proposal in propose(source, Goal(kind, wanted, precision), tensor):
        shape, target = proposal.shape, proposal.target
        assert parameter_count(shape) == proposal.parameters
        if kind == "size":
            assert abs(proposal.parameters / wanted - 1) <= 0.04
        elif kind == "memory":
            assert 0.94 * wanted <= weight_bytes(shape, precision) <= wanted
        else:
            assert 0.75 * wanted <= kv_bytes(shape) <= wanted
        assert shape.kv_channels == source.kv_channels
        assert shape.hidden_size % shape.num_attention_heads == 0  # as transformers wants
        assert shape.hidden_size % 64 == 0
        config = replace(
            PRUNE,
            target=target,
            pruning=PruningConfig(head_unit=proposal.head_unit),
            parallel=ParallelConfig(tensor=tensor),
            data=replace(PRUNE.data, seq_length=64),
        )
        assert found(config, source) == []
        # What is left runs in the same layout: its own rules, as the next stage has them.
        next_stage = replace(config, stage="continue", target=None, pruning=PruningConfig())
        assert found(next_stage, shape) == []


def test_memory_is_that_of_weights_and_scales() -> None:
    """bf16: two bytes each. 4 bits: with a 16-bit scale for 128, but for embedding and head."""
    proposal = propose(LLAMA_2_7B, Goal("memory", 2**30, "int4"), tensor=4)[0]
    shape = proposal.shape
    assert weight_bytes(shape, "bf16") == 2 * proposal.parameters
    outer = 2 * 32000 * shape.hidden_size + shape.hidden_size
    layers = (proposal.parameters - outer) * (0.5 + 2 / 128)
    assert weight_bytes(shape, "int4") == pytest.approx(2 * outer + layers)


def test_keys_and_values_limit_a_size() -> None:
    """Fewer groups, or fewer layers, of the same size."""
    free = propose(LLAMA_2_7B, Goal("size", 1.3e9), tensor=4)
    assert min(kv_bytes(proposal.shape) for proposal in free) > 100_000
    limited = propose(LLAMA_2_7B, Goal("size", 1.3e9, kv_bytes=100_000), tensor=4)
    assert limited and all(kv_bytes(proposal.shape) <= 100_000 for proposal in limited)


def test_query_heads_are_proposed_where_groups_cannot_be_fewer() -> None:
    """8 groups on 8 tensor-parallel ranks."""
    proposals = propose(LLAMA_3_8B, Goal("size", 3.2e9), tensor=8)
    assert {proposal.shape.num_query_groups for proposal in proposals} == {8}
    assert QUERY_HEAD in {proposal.head_unit for proposal in proposals}
    assert proposals[0].nearest.name == "Llama-3.2-3B"


def test_the_same_is_proposed_each_time() -> None:
    goal = Goal("size", 2e9)
    assert propose(LLAMA_3_8B, goal, 4) == propose(LLAMA_3_8B, goal, 4)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama-3.2-1B", released.LLAMA_3_2_1B),
        ("SmolLM2-135M", released.SMOLLM2_135M),
        ("Qwen2.5-0.5B", released.QWEN_2_5_0_5B),
    ],
)
def test_known_shapes_are_those_of_released_models(name: str, config: dict[str, object]) -> None:
    """Where the configuration of the release is at hand."""
    shape = shape_from_hf_config(config)
    width = shape.num_attention_heads * shape.kv_channels
    billions = round(parameter_count(shape) / 1e9, 3)
    expected = Known(
        *(name, pytest.approx(billions, abs=1e-3), shape.num_layers, shape.hidden_size),
        *(width, shape.ffn_hidden_size),
    )
    assert next(known for known in KNOWN if known.name == name) == expected
