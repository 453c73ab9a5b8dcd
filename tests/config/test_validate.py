"""Every rule between fields: what breaks it is refused, named with its value and a way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megashear.config import validate
from megashear.config.schema import (
    ModelShape,
    OptimizerConfig,
    PruningConfig,
    RotaryScaling,
    TargetShape,
    TrainerConfig,
)
from megashear.config.validate import CHOICES
from tests.support.config_rules import GQA, MHA, PRUNE, found, only


@pytest.mark.parametrize("world_size", [None, 1, 2, 8])
def test_the_published_recipe_passes(world_size: int | None) -> None:
    assert found(world_size=world_size) == []
    grouped = TargetShape(24, 2048, 16, 5504)
    assert found(source=GQA, target=grouped, world_size=world_size) == []


@pytest.mark.parametrize("path", ["optimizer__warmup_steps", "pruning__sparsity_warmup_steps"])
def test_warm_ups_end_within_the_run(path: str) -> None:
    assert found(**{path: 3200}) == []
    only(path.replace("__", "."), "= 3201 is more than trainer.steps = 3200", **{path: 3201})


def test_the_sparsity_warm_up_is_of_no_concern_elsewhere() -> None:
    only("optimizer.warmup_steps", "= 320", stage="continue", target=None, trainer__steps=100)


@pytest.mark.parametrize("path", [path for path in CHOICES if not path.startswith("model.")])
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
            ({"proj_bias": True}, "model.proj_bias", "= true needs model.qkv_bias = true"),
            ({"sliding_window": 0}, "model.sliding_window", "must be >= 1"),
            ({"family": "qwen"}, "model.family", "Use llama, mistral, qwen2 or qwen3"),
        ],
    )
    def test_model_fits_together(self, changes: dict[str, Any], path: str, words: str) -> None:
        model = dataclasses.replace(MHA, **changes)
        only(path, words, config=self.PRETRAIN, source=None, model=model)

    @pytest.mark.parametrize(
        ("scaling", "name", "words"),
        [
            (RotaryScaling("ntk", 2.0), "rope_type", "Use linear, dynamic, llama3 or yarn"),
            (RotaryScaling("linear", 0.0), "factor", "must be > 0"),
            (RotaryScaling("dynamic", 0.5), "factor", "must be >= 1"),
            (RotaryScaling("llama3", 8.0, 4096), "original_max_position_embeddings", "8192 only"),
            (RotaryScaling("yarn", 8.0), "original_max_position_embeddings", "is missing: yarn"),
            (RotaryScaling("yarn", 8.0, 4096, beta_fast=0.0), "beta_fast", "must be > 0"),
            (
                RotaryScaling("yarn", 1.0, 4096, attention_factor=1.5),
                "attention_factor",
                "= 1.5 needs a factor above 1",
            ),
        ],
    )
    def test_rotary_scaling(self, scaling: RotaryScaling, name: str, words: str) -> None:
        model = dataclasses.replace(MHA, rotary_scaling=scaling)
        path = f"model.rotary_scaling.{name}"
        only(path, words, config=self.PRETRAIN, source=None, model=model)

    def test_variants_that_fit(self) -> None:
        for scaling in (
            RotaryScaling("linear", 2.0),
            RotaryScaling("llama3", 32.0, 8192),
            RotaryScaling("yarn", 8.0, 4096, attention_factor=1.5),
        ):
            model = dataclasses.replace(
                MHA,
                rotary_scaling=scaling,
                sliding_window=512,
                family="mistral",
                qkv_bias=True,
                proj_bias=True,
            )
            assert found(self.PRETRAIN, None, model=model) == []

    @pytest.mark.parametrize("heads", [0, -4, 5000])
    def test_absurd_heads_do_not_break_the_checks(self, heads: int) -> None:
        model = ModelShape(2, 64, heads, 128, 512)
        assert found(self.PRETRAIN, None, model=model, parallel__tensor=2)


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
        only("data.domains[1].train", "Leave out the suffix", check_files=True,
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
