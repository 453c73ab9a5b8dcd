"""Rules of source and target: what does not fit is refused, with the sizes that would."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.config import validate
from megashear.config.schema import QUERY_HEAD, ModelShape, TargetShape
from tests.support.config_rules import GQA, MHA, PRUNE, change, found, only


def test_a_target_equal_to_the_source() -> None:
    only("target", "is the source's shape", target=TargetShape(32, 4096, 32, 11008))
    only("target", "is the source's shape", target=TargetShape(num_layers=32))


@pytest.mark.parametrize("name", validate.PRUNED_SIZES)
def test_a_target_larger_than_the_source(name: str) -> None:
    size = getattr(MHA, name)
    only(f"target.{name}", f"= {size + 8} is larger", str(size), **{f"target__{name}": size + 8})


@pytest.mark.parametrize(("heads", "use"), [(18, "16 or 20"), (3, "Use 4"), (31, "28 or 32")])
def test_target_heads_are_whole_query_groups(heads: int, use: str) -> None:
    only(
        "target.num_attention_heads",
        f"= {heads} is not a multiple of the source's 4 heads",
        use,
        source=GQA,
        target__num_attention_heads=heads,
    )


class TestHeadUnit:
    """A query head as the unit: each group keeps the same number, and there are several in one."""

    @pytest.mark.parametrize(("heads", "use"), [(18, "16 or 24"), (3, "Use 8"), (31, "24 or 32")])
    def test_target_heads_are_the_same_in_every_group(self, heads: int, use: str) -> None:
        only(
            "target.num_attention_heads",
            f"= {heads} is not a multiple of the source's 8 query groups, each of which keeps",
            use,
            source=GQA,
            pruning__head_unit=QUERY_HEAD,
            target__num_attention_heads=heads,
        )

    def test_groups_are_not_pruned(self) -> None:
        for heads in (8, 16, 24):
            changes = {"pruning__head_unit": QUERY_HEAD, "target__num_attention_heads": heads}
            assert found(source=GQA, **changes, parallel__tensor=8) == []

    @pytest.mark.parametrize("goal", [{}, {"target": None, "target_sparsity": 0.5}])
    def test_multi_head_attention_has_no_heads_to_choose_from(self, goal: dict[str, Any]) -> None:
        only(
            "pruning.head_unit",
            "= 'query_head', but no two heads of the source share a key and value",
            "Use 'query_group'",
            pruning__head_unit=QUERY_HEAD,
            **goal,
        )

    def test_without_a_known_source(self) -> None:
        assert found(source=None, pruning__head_unit=QUERY_HEAD) == []


class TestTensorParallel:
    """What tensor parallelism splits divides by its ranks; the advice does work."""

    def test_target_heads(self) -> None:
        only(
            "target.num_attention_heads",
            "= 20 is not divisible by parallel.tensor = 8. Use 1, 2 or 4, or change the target",
            target__num_attention_heads=20,
            parallel__tensor=8,
        )

    def test_target_query_groups(self) -> None:
        only(
            "target.num_attention_heads",
            "= 12 makes 3 query groups, which is not divisible by parallel.tensor = 2. Use 1,",
            source=GQA,
            target__num_attention_heads=12,
            parallel__tensor=2,
        )

    def test_target_without_a_known_source(self) -> None:
        only(
            "target.ffn_hidden_size",
            "= 5505",
            "Use 1, or",
            source=None,
            target__ffn_hidden_size=5505,
            parallel__tensor=2,
        )

    @pytest.mark.parametrize("name", ["num_query_groups", "ffn_hidden_size"])
    def test_source(self, name: str) -> None:
        # The stage has no target of its own, so that only the source is in the way.
        source = dataclasses.replace(GQA, **{name: 6})
        only("init_from", f"{name} = 6 is", "Use 1 or 2", source=source, target=None,
             target_sparsity=0.5, parallel__tensor=4)  # fmt: skip
        only("init_from", f"{name} = 6 is", "Use 1 or 2", source=source, target=None,
             stage="continue", parallel__tensor=4)  # fmt: skip

    @pytest.mark.parametrize("name", ["num_attention_heads", "ffn_hidden_size"])
    def test_model(self, name: str) -> None:
        sizes = {"hidden_size": 768, "num_attention_heads": 16, "num_query_groups": 16}
        model = dataclasses.replace(MHA, **sizes, kv_channels=48)
        model = dataclasses.replace(model, **{name: 6})
        if name == "num_attention_heads":
            model = dataclasses.replace(model, num_query_groups=6)
        only(
            f"model.{name}",
            "= 6 is not divisible by parallel.tensor = 4. Use 1 or 2, or change the model",
            stage="pretrain",
            model=model,
            target=None,
            init_from=None,
            source=None,
            parallel__tensor=4,
        )

    @given(
        heads=st.integers(1, 8).map(lambda n: 4 * n),
        ffn=st.integers(1, 40),
        tensor=st.integers(1, 16),
        source=st.sampled_from([MHA, GQA]),
    )
    def test_agrees_with_the_remainders(
        self, heads: int, ffn: int, tensor: int, source: ModelShape
    ) -> None:
        """Refused exactly if a remainder is not 0, and every tensor size advised is accepted."""
        arguments: dict[str, Any] = {
            "source": source,
            "target": TargetShape(num_attention_heads=heads, ffn_hidden_size=ffn),
        }
        groups = heads * source.num_query_groups // source.num_attention_heads
        sizes = [source.num_query_groups, source.ffn_hidden_size, groups, ffn]
        result = found(parallel__tensor=tensor, **arguments)
        assert bool(result) == any(size % tensor for size in sizes)
        for _, text in result:
            advice = text.partition("Use ")[2].partition(", or change")[0]
            for number in advice.replace(" or ", ", ").split(", "):
                assert found(parallel__tensor=int(number), **arguments) == []


def test_sequence_parallel() -> None:
    only("parallel.sequence", "parallel.tensor > 1", parallel__sequence=True)
    config = change(change(PRUNE, "parallel.tensor", 4), "parallel.sequence", True)
    assert found(config) == []
    only("data.seq_length", "= 4090", "4088 or 4092", config=config, data__seq_length=4090)
    assert found(data__seq_length=4090, parallel__tensor=4) == []


def test_seq_length_fits_the_model() -> None:
    only("data.seq_length", "= 4097", "max_position_embeddings = 4096", data__seq_length=4097)
    assert found(data__seq_length=4097, source=None) == []


@pytest.mark.parametrize(
    ("world_size", "tensor", "micro", "path", "words"),
    [
        (None, 1, 5, "trainer.global_batch_size", "micro_batch_size = 5. Use 30 or 35"),
        (3, 1, 4, "trainer.global_batch_size", "4 times 3 data-parallel ranks. Use 24 or 36"),
        (16, 1, 4, "trainer.global_batch_size", "4 times 16 data-parallel ranks. Use 64"),
        (
            6,
            4,
            4,
            "parallel.tensor",
            "does not divide the 6 processes of the run. Use 1, 2, 3 or 6",
        ),
    ],
)
def test_batches_and_ranks(
    world_size: int | None, tensor: int, micro: int, path: str, words: str
) -> None:
    only(path, words, world_size=world_size, parallel__tensor=tensor,
         trainer__micro_batch_size=micro)  # fmt: skip


def test_enough_ranks_for_the_batch() -> None:
    assert found(world_size=16, parallel__tensor=4, trainer__micro_batch_size=8) == []
