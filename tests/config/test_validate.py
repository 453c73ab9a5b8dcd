"""Every rule between fields: what breaks it is refused, named with its value and a way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megashear.config import validate
from megashear.config.schema import (
    QUERY_HEAD,
    DataConfig,
    Domain,
    ModelShape,
    OptimizerConfig,
    PruningConfig,
    RunConfig,
    TargetShape,
    TrainerConfig,
)
from megashear.config.validate import CHOICES, problems

MHA = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32000
)
GQA = dataclasses.replace(MHA, num_query_groups=8)

PRUNE = RunConfig(
    "prune",
    "runs/prune",
    init_from="source",
    target=TargetShape(24, 2048, 16, 5504),
    data=DataConfig(
        domains=(
            Domain("cc", "cc_train", "cc_valid", 0.75, 1.9643),
            Domain("wiki", "wiki_train", "wiki_valid", 0.25, 1.759),
        )
    ),
)


def change(config: Any, path: str, value: Any) -> Any:
    """A copy of the configuration with one field set; a number in the path is a list's item."""
    name, _, rest = path.partition(".")
    if isinstance(config, tuple):
        index = int(name)
        return (*config[:index], change(config[index], rest, value), *config[index + 1 :])
    new = change(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: new})


def found(
    config: RunConfig = PRUNE,
    source: ModelShape | None = MHA,
    world_size: int | None = None,
    *,
    check_files: bool = False,
    **changes: Any,
) -> list[tuple[str, str]]:
    """What is wrong after changes, given as `trainer__steps=3`."""
    for path, value in changes.items():
        config = change(config, path.replace("__", "."), value)
    return problems(config, source, world_size, check_files=check_files)


def only(expected_path: str, *words: str, **arguments: Any) -> None:
    """Assert that exactly one thing is wrong, and that its message has the words."""
    result = found(**arguments)
    assert [path for path, _ in result] == [expected_path], result
    assert all(word in result[0][1] for word in words), result[0][1]


@pytest.mark.parametrize("world_size", [None, 1, 2, 8])
def test_the_published_recipe_passes(world_size: int | None) -> None:
    assert found(world_size=world_size) == []
    grouped = TargetShape(24, 2048, 16, 5504)
    assert found(source=GQA, target=grouped, world_size=world_size) == []


def test_a_target_equal_to_the_source() -> None:
    only("target", "is the source's shape", target=TargetShape(32, 4096, 32, 11008))
    only("target", "is the source's shape", target=TargetShape(num_layers=32))


@pytest.mark.parametrize("name", validate.SIZES)
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

    @pytest.mark.parametrize("name", ["num_query_groups", "ffn_hidden_size", "vocab_size"])
    def test_source(self, name: str) -> None:
        # The stage has no target of its own, so that only the source is in the way.
        source = dataclasses.replace(GQA, **{name: 6})
        only("init_from", f"{name} = 6 is", "Use 1 or 2", source=source, target=None,
             target_sparsity=0.5, parallel__tensor=4)  # fmt: skip
        only("init_from", f"{name} = 6 is", "Use 1 or 2", source=source, target=None,
             stage="continue", parallel__tensor=4)  # fmt: skip

    @pytest.mark.parametrize("name", ["num_attention_heads", "ffn_hidden_size", "vocab_size"])
    def test_model(self, name: str) -> None:
        sizes = {"hidden_size": 768, "num_attention_heads": 24, "num_query_groups": 24}
        model = dataclasses.replace(MHA, **sizes, kv_channels=32)
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
        sizes = [source.num_query_groups, source.ffn_hidden_size, source.vocab_size, groups, ffn]
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


@pytest.mark.parametrize("path", ["optimizer__warmup_steps", "pruning__sparsity_warmup_steps"])
def test_warm_ups_end_within_the_run(path: str) -> None:
    assert found(**{path: 3200}) == []
    only(path.replace("__", "."), "= 3201 is more than trainer.steps = 3200", **{path: 3201})


def test_the_sparsity_warm_up_is_of_no_concern_elsewhere() -> None:
    only("optimizer.warmup_steps", "= 320", stage="continue", target=None, trainer__steps=100)


@pytest.mark.parametrize("path", CHOICES)
def test_choices(path: str) -> None:
    options = CHOICES[path]
    only(path, f"= '{options[-1]}x' is no choice", f"Did you mean '{options[-1]}'", options[0],
         **{path.replace(".", "__"): options[-1] + "x"})  # fmt: skip


@pytest.mark.parametrize(
    ("path", "bad", "good"),
    [
        ("target.num_layers", [0, -1], [1]),
        ("target.hidden_size", [0], [2]),
        ("pruning.sparsity_warmup_steps", [-1], [0]),
        ("pruning.mask_lr", [0.0, -1.0], [1e-9, 10.0]),
        ("pruning.multiplier_lr", [0.0], [1e-9]),
        ("pruning.clip_grad", [0.0], [0.1]),
        ("data.eta", [-0.1], [0.0, 5.0]),
        ("data.smoothing", [-0.1, 1.1], [0.0, 1.0]),
        ("data.seed", [-1], [0]),
        ("data.num_workers", [-1], [0]),
        ("data.seq_length", [0], [1]),
        ("evaluation.interval", [0], [1]),
        ("evaluation.sequences_per_domain", [0, -3], [1]),
        ("optimizer.lr", [0.0], [1e-9]),
        ("optimizer.min_lr_ratio", [-0.1, 1.1], [0.0, 1.0]),
        ("optimizer.warmup_steps", [-1], [0]),
        ("optimizer.adam_beta1", [-0.1, 1.0], [0.0, 0.999]),
        ("optimizer.adam_beta2", [-0.1, 1.0], [0.0, 0.999]),
        ("optimizer.adam_eps", [0.0], [1e-12]),
        ("optimizer.weight_decay", [-1.0], [0.0]),
        ("optimizer.clip_grad", [0.0], [1.0]),
        ("trainer.global_batch_size", [0], [4]),
        ("trainer.micro_batch_size", [0], [1]),
        ("trainer.log_interval", [0], [1]),
        ("trainer.save_interval", [0], [1]),
        ("trainer.keep_checkpoints", [0], [1]),
        ("trainer.seed", [-1], [0]),
        ("parallel.tensor", [0, -2], [1]),
        ("platform.timeout_minutes", [0.0], [0.1]),
    ],
)
def test_numbers_have_bounds(path: str, bad: list[Any], good: list[Any]) -> None:
    for value in bad:
        only(path, f"= {value} must be", **{path.replace(".", "__"): value})
    for value in good:
        assert found(**{path.replace(".", "__"): value}) == []


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 1.5])
def test_target_sparsity_is_a_share(share: float) -> None:
    only("target_sparsity", f"= {share} must be", target=None, target_sparsity=share)
    assert found(target=None, target_sparsity=0.5) == []


def test_every_number_has_a_bound() -> None:
    """Of a number that is new in the schema, too, -1 never gets through."""

    def numbers(value: Any, path: str) -> Iterator[str]:
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                yield from numbers(inner, f"{path}{field.name}.")
            elif type(inner) in (int, float):
                yield path + field.name

    full = dataclasses.replace(PRUNE, model=MHA, target_sparsity=0.5)
    assert {"trainer.steps", "model.vocab_size", "target_sparsity"} < set(numbers(full, ""))
    for path in numbers(full, ""):
        result = found(full, **{path.replace(".", "__"): -1})
        assert any(path == where and "must be >" in text for where, text in result), path


class TestStages:
    """Which of model, init_from, target and target_sparsity a stage takes."""

    PRETRAIN = dataclasses.replace(PRUNE, stage="pretrain", model=MHA, target=None, init_from=None)
    CONTINUE = dataclasses.replace(PRUNE, stage="continue", target=None)

    def test_as_they_should_be(self) -> None:
        assert found(self.PRETRAIN, None) == []
        assert found(self.CONTINUE) == []

    def test_pretrain(self) -> None:
        only("model", "is missing", config=self.PRETRAIN, source=None, model=None)
        only("init_from", "Leave it out", config=self.PRETRAIN, source=None, init_from="x")
        only("target", "does not prune", config=self.PRETRAIN, source=None, target=PRUNE.target)
        only("target_sparsity", "not prune", config=self.PRETRAIN, source=None, target_sparsity=0.5)

    def test_continue(self) -> None:
        only("init_from", "is missing", config=self.CONTINUE, source=None, init_from=None)
        only("target", "does not prune", config=self.CONTINUE, target=PRUNE.target)
        only("model", "reads the shape at init_from", config=self.CONTINUE, model=MHA)

    def test_prune(self) -> None:
        only("init_from", "is missing", source=None, init_from=None)
        only("target", "either", "give one", target=None)
        only("target", "either", "leave one out", target_sparsity=0.5)
        only("target", "names no size", "num_layers, hidden_size", target=TargetShape())

    @pytest.mark.parametrize(
        ("changes", "path", "words"),
        [
            ({"num_query_groups": 5}, "model.num_query_groups", "Use 1, 2, 4, 8, 16 or 32"),
            ({"hidden_size": 4100}, "model.hidden_size", "Use 4096 or 4128"),
            ({"kv_channels": 127}, "model.kv_channels", "odd"),
            ({"vocab_size": 0}, "model.vocab_size", "must be >= 1"),
            ({"num_layers": -1}, "model.num_layers", "must be >= 1"),
            ({"rotary_base": 0.0}, "model.rotary_base", "must be > 0"),
            ({"layernorm_epsilon": 0.0}, "model.layernorm_epsilon", "must be > 0"),
        ],
    )
    def test_model_fits_together(self, changes: dict[str, Any], path: str, words: str) -> None:
        model = dataclasses.replace(MHA, **changes)
        only(path, words, config=self.PRETRAIN, source=None, model=model)

    @pytest.mark.parametrize("heads", [0, -4, 5000])
    def test_absurd_heads_do_not_break_the_checks(self, heads: int) -> None:
        model = ModelShape(2, 64, heads, 128, 512)
        assert found(self.PRETRAIN, None, model=model, parallel__tensor=2)


class TestDomains:
    """Names, weights, references and files of the domains."""

    def test_none(self) -> None:
        only("data.domains", "is empty", data__domains=())
        assert found(data__domains=(), data__domains_from="earlier") == []

    def test_weights_sum_to_one(self) -> None:
        only("data.domains", "sum to 0.98; they must sum to 1", data__domains__1__weight=0.23)
        assert found(data__domains__1__weight=0.2505) == []
        only("data.domains", "sum to 1.002", data__domains__1__weight=0.252)

    def test_bounds_of_weights(self) -> None:
        bounds = {"data__domains__0__min_weight": 0.5, "data__domains__0__max_weight": 0.75}
        assert found(**bounds, data__domains__1__max_weight=0.25) == []
        for low, high in ((-0.1, 1.0), (0.8, 0.7), (0.0, 1.1)):
            only("data.domains[1].min_weight", f"= {low:g} and max_weight = {high:g}", "0 <=",
                 data__domains__1__min_weight=low, data__domains__1__max_weight=high)  # fmt: skip
        only("data.domains[1].weight", "= 0.25 is not between min_weight = 0.3",
             data__domains__1__min_weight=0.3)  # fmt: skip

    def test_bounds_that_no_weights_keep_to(self) -> None:
        config = change(PRUNE, "data.domains.0.min_weight", 0.75)
        config = change(config, "data.domains.0.max_weight", 0.75)
        only("data.domains", "max_weight sums to 0.9995", config=config,
             data__domains__1__weight=0.2495, data__domains__1__max_weight=0.2495)  # fmt: skip
        only("data.domains", "min_weight sums to 1.0005", config=config,
             data__domains__1__weight=0.2505, data__domains__1__min_weight=0.2505)  # fmt: skip

    def test_attention_within_documents_under_context_parallelism(self) -> None:
        options = {"data__reset_attention_mask": True, "parallel__context": 2}
        only("data.reset_attention_mask", "parallel.context = 2", "platform.layers = 'torch'",
             **options)  # fmt: skip
        assert found(**options, platform__layers="torch") == []
        assert found(data__reset_attention_mask=True) == []

    def test_weights_are_not_negative(self) -> None:
        config = change(PRUNE, "data.domains.0.weight", 1.25)
        only("data.domains[1].weight", "= -0.25 is negative", config=config,
             data__domains__1__weight=-0.25)  # fmt: skip

    def test_names_differ(self) -> None:
        only("data.domains", "2 domains are named 'cc'", data__domains__1__name="cc")

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "é", "cc\n"])
    def test_names_can_name_files(self, name: str) -> None:
        only("data.domains[0].name", "letters, digits", data__domains__0__name=name)

    @pytest.mark.parametrize("rule", ["paper", "reference_code"])
    def test_references(self, rule: str) -> None:
        config = change(PRUNE, "data.domains.0.reference_loss", None)
        only("data.domains", "no reference_loss for cc, ", rule, "nats per token",
             config=config, data__rule=rule)  # fmt: skip
        only("data.domains", "for cc, wiki, ", config=config, data__rule=rule,
             data__domains__1__reference_loss=None)  # fmt: skip
        assert found(config, data__rule="constant") == []

    def test_a_reference_is_positive(self) -> None:
        only("data.domains[1].reference_loss", "> 0", data__domains__1__reference_loss=0.0)


class TestFiles:
    """Files and directories that have to be there before anything starts."""

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "source").mkdir()
        for domain in PRUNE.data.domains:
            for prefix in (domain.train, domain.valid):
                Path(f"{prefix}.bin").touch()
                Path(f"{prefix}.idx").touch()

    def test_all_there(self) -> None:
        assert found(check_files=True) == []

    def test_data(self) -> None:
        Path("cc_valid.idx").unlink()
        only(
            "data.domains[0].valid", "no file cc_valid.idx", "megashear tokenize", check_files=True
        )
        Path("cc_valid.bin").unlink()
        only("data.domains[0].valid", "no file cc_valid.bin or cc_valid.idx", check_files=True)
        assert found(check_files=False) == []

    def test_data_with_its_suffix(self) -> None:
        only("data.domains[1].train", "Leave the suffix away", check_files=True,
             data__domains__1__train="wiki_train.bin")  # fmt: skip

    def test_checkpoint_and_tokenizer(self) -> None:
        only("init_from", "= 'absent' does not exist", check_files=True, init_from="absent")
        only("data.tokenizer", "does not exist", check_files=True, data__tokenizer="absent")

    def test_run_dir(self) -> None:
        only("run_dir", "is a file", check_files=True, run_dir="cc_train.bin")
        only("run_dir", "is empty", check_files=True, run_dir="")


class TestPackages:
    """Optional parts asked for by name."""

    CASES = (
        ("layers", "transformer_engine", "transformer_engine", "megashear[te]"),
        ("kernels", "apex", "amp_C", "from its sources"),
    )

    @pytest.mark.parametrize(("name", "choice", "module", "words"), CASES)
    @pytest.mark.parametrize("installed", [False, True])
    def test_have_to_be_installed(
        self,
        name: str,
        choice: str,
        module: str,
        words: str,
        installed: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        known = {module} if installed else set()
        monkeypatch.setattr(validate, "find_spec", lambda name: name if name in known else None)
        arguments = {f"platform__{name}": choice}
        if installed:
            assert found(**arguments) == []
        else:
            only(f"platform.{name}", "is not installed", words, **arguments)
        only(f"platform.{name}", "needs platform.device = 'cuda'", platform__device="cpu",
             **arguments)  # fmt: skip
        assert found(platform__device="cpu") == []

    @pytest.mark.parametrize("known", [(), ("nvidia",), ("nvidia", "nvidia.dali")])
    def test_dali_has_to_be_installed(
        self, known: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`nvidia` alone is there with torch; without it the finder raises."""

        def find_spec(name: str) -> str | None:
            if name == "nvidia.dali" and "nvidia" not in known:
                raise ModuleNotFoundError(name)
            return name if name in known else None

        monkeypatch.setattr(validate, "find_spec", find_spec)
        if "nvidia.dali" in known:
            assert found(platform__loader="dali", platform__device="cpu") == []
        else:
            only("platform.loader", "not installed", "megashear[dali]", "megashear[dali-cuda12]",
                 platform__loader="dali")  # fmt: skip


def test_a_run_in_python_is_checked_like_one_from_a_file() -> None:
    """`problems` needs no loader: several rules broken in a config built in Python."""
    config = dataclasses.replace(
        PRUNE,
        pruning=PruningConfig(multipliers="each"),
        optimizer=OptimizerConfig(lr=-1.0),
        trainer=TrainerConfig(steps=0),
    )
    paths = [path for path, _ in found(config)]
    assert set(paths) >= {"pruning.multipliers", "optimizer.lr", "trainer.steps"}
