"""Reading a run: every kind of mistake is found in one pass, and named with its way out."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.config.loader import (
    DOMAINS_FILE,
    domains_to_yaml,
    from_yaml,
    load_config,
    load_domains,
    load_target,
    to_yaml,
)
from megashear.config.schema import (
    DataConfig,
    Domain,
    EvaluationConfig,
    ModelShape,
    OptimizerConfig,
    RunConfig,
    TargetShape,
)
from megashear.errors import CheckpointError, ConfigError

SOURCE = ModelShape(
    num_layers=4, hidden_size=64, num_attention_heads=8, ffn_hidden_size=128, vocab_size=512
)

PRUNE = """
stage: prune
run_dir: runs/prune
init_from: source
target: {num_layers: 2, hidden_size: 32, num_attention_heads: 4, ffn_hidden_size: 64}
pruning: {sparsity_warmup_steps: 20}
data:
  seq_length: 128
  domains:
    - {name: cc, train: cc_train, valid: cc_valid, weight: 0.75, reference_loss: 1.9643}
    - {name: wiki, train: wiki_train, valid: wiki_valid, weight: 0.25, reference_loss: 1.7590}
optimizer: {lr: 1e-4, warmup_steps: 10}
trainer: {steps: 100}
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the data files and the checkpoint that PRUNE names."""
    monkeypatch.chdir(tmp_path)
    for name in ("cc", "wiki"):
        for suffix in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
            (tmp_path / f"{name}_{suffix}").touch()
    (tmp_path / "source").mkdir()
    return tmp_path


def load(text: str, *overrides: str, **options: Any) -> RunConfig:
    """The run that a YAML text describes."""
    Path("run.yaml").write_text(text, encoding="utf-8")
    options.setdefault("source_shape", lambda _: SOURCE)
    return load_config(Path("run.yaml"), overrides, **options)


def problems(text: str, *overrides: str, **options: Any) -> dict[str, str]:
    """Path -> message of all that is wrong; no path twice."""
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides, **options)
    found = dict(caught.value.problems)
    assert len(found) == len(caught.value.problems), caught.value
    return found


def test_a_right_file_is_read() -> None:
    config = load(PRUNE, world_size=2)
    assert config.target == TargetShape(2, 32, 4, 64)
    assert config.optimizer == OptimizerConfig(lr=1e-4, warmup_steps=10)
    assert config.data.domains[1] == Domain("wiki", "wiki_train", "wiki_valid", 0.25, 1.759)
    assert config.model is None
    assert config.trainer.global_batch_size == 32


def test_the_message_is_the_one_that_the_style_shows() -> None:
    text = PRUNE.replace("weight: 0.25", "wieght: 0.23").replace("heads: 4", "heads: 6")
    with pytest.raises(ConfigError) as caught:
        load(text, "parallel.tensor=4")
    assert str(caught.value) == (
        "run.yaml: 3 problems\n"
        "  data.domains[1].wieght      unknown option. Did you mean 'weight'?\n"
        "  target.num_attention_heads  = 6 is not divisible by parallel.tensor = 4. "
        "Use 1 or 2, or change the target\n"
        "  data.domains                weights sum to 0.98; they must sum to 1"
    )


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("trainer.stepz=5", "trainer.stepz", ["unknown option", "'steps'"]),
        ("trainr.steps=5", "trainr", ["unknown option", "'trainer'"]),
        ("seq_length=5", "seq_length", ["unknown option", "'data.seq_length'"]),
        ("trainer.lr=1", "trainer.lr", ["unknown option", "'optimizer.lr'"]),
        ("data.qqqqqq=5", "data.qqqqqq", ["unknown option", "seq_length, rule"]),
        ("trainer.steps=many", "trainer.steps", ["= 'many'", "a whole number"]),
        ("trainer.steps=1.5", "trainer.steps", ["= 1.5", "a whole number"]),
        ("trainer.steps=true", "trainer.steps", ["= true", "a whole number"]),
        ("trainer.steps=", "trainer.steps", ["= null", "a whole number"]),
        ("optimizer.lr=fast", "optimizer.lr", ["= 'fast'", "a number"]),
        ("optimizer.lr=.nan", "optimizer.lr", ["= nan", "a number"]),
        ("optimizer.lr=1e999", "optimizer.lr", ["= inf", "a number"]),
        ("optimizer.lr=false", "optimizer.lr", ["= false", "a number"]),
        ("parallel.sequence=1", "parallel.sequence", ["= 1", "true or false"]),
        ("data.domains.0.name=no", "data.domains[0].name", ["= false", "text", "quotes"]),
        ("data.domains.0.train=3", "data.domains[0].train", ["= 3", "text", "quotes"]),
        ("data.domains={a: 1}", "data.domains", ["{'a': 1}", "a list"]),
        ("data.domains.0=cc", "data.domains[0]", ["= 'cc'", "a mapping"]),
        ("trainer=[]", "trainer", ["= []", "a mapping"]),
        ("target=3", "target", ["= 3", "a mapping"]),
    ],
)
def test_one_wrong_value_makes_one_problem(override: str, path: str, words: list[str]) -> None:
    """Nothing that only follows from the wrong value is reported with it."""
    found = problems(PRUNE, override)
    assert list(found) == [path]
    assert all(word in found[path] for word in words), found


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.steps", ["key.sub=value"]),
        ("=3", ["key.sub=value"]),
        ("data.domains.2.weight=0.5", ["data.domains has 2 items", "'2'"]),
        ("data.domains.cc.weight=0.5", ["data.domains has 2 items", "'cc'"]),
        ("data.seq_length.x=5", ["data.seq_length = 128 has no options"]),
        ("trainer.steps=[1", ["not YAML"]),
        ("trainer.steps=2024-13-01", ["month must be in 1..12"]),
    ],
)
def test_an_override_that_fits_nowhere(override: str, words: list[str]) -> None:
    found = problems(PRUNE, override)
    assert list(found) == [override]
    assert all(word in found[override] for word in words), found


def test_overrides_change_what_the_file_says() -> None:
    config = load(
        PRUNE,
        "trainer.steps=200",
        "optimizer.lr=3e-5",
        "data.domains.0.weight=0.5",
        "data.domains[1].weight=0.5",
        "evaluation.interval=7",
        "target.num_layers=",
        "run_dir=a=b",
    )
    assert (config.trainer.steps, config.optimizer.lr, config.evaluation.interval) == (200, 3e-5, 7)
    assert [domain.weight for domain in config.data.domains] == [0.5, 0.5]
    assert config.target == TargetShape(None, 32, 4, 64)
    assert config.run_dir == "a=b"


def test_an_override_does_not_reach_through_an_alias() -> None:
    tree = yaml.safe_load(PRUNE)
    tree["data"]["domains"] = [dict(tree["data"]["domains"][0], weight=0.5)] * 2
    text = yaml.safe_dump(tree)
    assert "*id001" in text
    config = load(text, "data.domains.1.name=other")
    assert [domain.name for domain in config.data.domains] == ["cc", "other"]


def test_missing_fields_are_named() -> None:
    assert list(problems("")) == ["stage", "run_dir", "data.domains"]
    found = problems(PRUNE.replace("weight: 0.25, ", ""))
    assert found == {"data.domains[1].weight": "is missing: expected a number"}
    pretrain = "stage: pretrain\nrun_dir: r\nmodel: {num_layers: 2, hidden_size: x}"
    found = problems(pretrain, "data.rule=constant")
    missing = {"num_attention_heads", "ffn_hidden_size", "vocab_size"}
    assert missing == {path.removeprefix("model.") for path in found if "missing" in found[path]}
    assert set(found) == {f"model.{name}" for name in missing} | {
        "model.hidden_size",
        "data.domains",
    }


def test_problems_of_every_kind_come_together() -> None:
    text = PRUNE.replace("lr: 1e-4", "lr: high").replace("cc_valid", "absent")
    text = text.replace("num_layers: 2", "num_layers: 9")
    found = problems(text, "evaluation.intervall=3", "parallel.sequence=true", "oops")
    assert set(found) == {
        "oops",
        "evaluation.intervall",
        "optimizer.lr",
        "data.domains[0].valid",
        "target.num_layers",
        "parallel.sequence",
    }


def test_a_key_given_twice() -> None:
    found = problems(PRUNE + "trainer: {steps: 3, steps: 4}\n")
    assert found == {
        "trainer": "is given twice, in lines 13 and 14. Leave one out",
        "trainer.steps": "is given twice, in lines 14 and 14. Leave one out",
        "optimizer.warmup_steps": "= 10 is more than trainer.steps = 4. Use at most 4",
        "pruning.sparsity_warmup_steps": "= 20 is more than trainer.steps = 4. Use at most 4",
    }
    assert "data.domains[0].name" in problems(PRUNE.replace("{name: cc,", "{name: a, name: cc,"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"stage: [", "is not YAML"),
        (b"stage: \xff\xfe", "cannot be read"),
        (b"a: 1\n\x00", "is not YAML"),
        (b"a: 2024-13-01", "cannot be read: month must be in"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
        (b"- a\n- b", "expected a mapping"),
        (b"just text", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_configuration(content: bytes, words: str) -> None:
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(Path("bad.yaml"), ["trainer.steps=3"])
    assert [path for path, _ in caught.value.problems] == ["(file)"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(Path("absent.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_aliases_that_hold_themselves_are_refused() -> None:
    assert problems("&a [*a]") == {"(file)": "= [[...]]: expected a mapping of options"}


def test_an_empty_section_is_its_defaults() -> None:
    assert load(PRUNE + "evaluation:\n  # interval: 5\n").evaluation == RunConfig("", "").evaluation


def test_to_yaml_is_read_back_equal() -> None:
    config = load(PRUNE, "data.domains.0.name=null", "data.domains[0].name='no'")
    again = load(to_yaml(config))
    assert again == config
    assert config.data.domains[0].name == "no"


_number = st.floats(min_value=1e-12, max_value=0.999).map(float)
_text = st.text(min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(lr=_number, eta=_number, eps=_number, run_dir=_text, name=_text, tokenizer=_text)
def test_to_yaml_keeps_any_value(
    lr: float, eta: float, eps: float, run_dir: str, name: str, tokenizer: str
) -> None:
    """Awkward floats and texts (1e-05, 'yes', '1_0', ': ') survive."""
    config = dataclasses.replace(
        RunConfig("continue", run_dir, init_from=name), optimizer=OptimizerConfig(lr, adam_eps=eps)
    )
    data = dataclasses.replace(config.data, eta=eta, tokenizer=tokenizer, domains_from=name)
    config = dataclasses.replace(config, data=data)
    text = to_yaml(config)
    assert yaml.safe_load(text)["optimizer"]["lr"] == lr
    assert load(text, check_files=False, source_shape=None) == config


class TestDomainsFrom:
    """`data.domains_from`: the domains, references and final weights of an earlier run."""

    TEXT = "stage: continue\nrun_dir: r\ninit_from: source\ndata: {domains_from: earlier}\n"
    DOMAINS = (
        Domain("cc", "cc_train", "cc_valid", 0.1 + 0.2, 1.5),
        Domain("wiki", "wiki_train", "wiki_valid", 0.7, 1.25),
    )

    def write(self, text: str) -> None:
        Path("earlier").mkdir()
        Path("earlier", DOMAINS_FILE).write_text(text, encoding="utf-8")

    def test_takes_them(self) -> None:
        self.write(domains_to_yaml(self.DOMAINS))
        config = load(self.TEXT)
        assert config.data.domains == self.DOMAINS
        assert config.data.domains_from is None
        assert load(to_yaml(config)) == config

    @pytest.mark.parametrize("head", ["", "domains:\n"])
    def test_takes_a_file_of_domains(self, head: str) -> None:
        """A list of them, or what `megashear reference-loss` writes."""
        text = head + domains_to_yaml(self.DOMAINS) + ("models: []\n" if head else "")
        Path("references.yaml").write_text(text, encoding="utf-8")
        text = self.TEXT.replace("earlier", "references.yaml")
        assert load(text).data.domains == self.DOMAINS
        found = problems(text.replace("references", "gone"))
        assert "no file gone.yaml. Name a run directory" in found["data.domains_from"]

    def test_domains_in_a_file_are_checked_like_those_of_a_run(self) -> None:
        Path("references.yaml").write_text("domains: {cc: 1.5}\n", encoding="utf-8")
        found = problems(self.TEXT.replace("earlier", "references.yaml"))
        assert found["references.yaml"] == "= {'cc': 1.5}: expected a list"
        Path("references.yaml").write_text("models: []\n", encoding="utf-8")
        found = problems(self.TEXT.replace("earlier", "references.yaml"))
        assert found["references.yaml"] == "has no list `domains`"

    def test_says_where_the_file_would_come_from(self) -> None:
        found = problems(self.TEXT)
        assert list(found) == ["data.domains_from"]
        assert f"earlier/{DOMAINS_FILE}" in found["data.domains_from"]
        assert load(self.TEXT, check_files=False).data.domains_from == "earlier"

    def test_refuses_domains_as_well(self) -> None:
        self.write(domains_to_yaml(self.DOMAINS))
        found = problems(PRUNE, "data.domains_from=earlier")
        assert list(found) == ["data.domains_from"]

    def test_checks_the_records_as_its_own(self) -> None:
        self.write(
            "- {name: cc, train: t, valid: cc_valid, weight: 0.5, reference_loss: 1.0}\n- {}\n"
        )
        found = problems(self.TEXT)
        path = f"earlier/{DOMAINS_FILE}"
        assert set(found) == {
            *(f"{path}[1].{name}" for name in ("name", "train", "valid", "weight")),
            "data.domains[0].train",
        }


def test_an_unreadable_checkpoint_is_one_of_the_problems() -> None:
    def refuse(path: str) -> ModelShape:
        raise CheckpointError(f"{path} holds no model")

    found = problems(PRUNE, "trainer.steps=0", source_shape=refuse)
    assert found["init_from"] == "= 'source': source holds no model"
    assert "trainer.steps" in found


def test_the_checkpoint_is_not_read_where_there_is_none() -> None:
    def fail(path: str) -> ModelShape:
        raise AssertionError(path)

    assert problems(PRUNE, "init_from=absent", source_shape=fail) == {
        "init_from": "= 'absent' does not exist"
    }


def test_every_option_of_the_schema_can_be_written() -> None:
    """Each leaf of the schema is reached by an override, and its type is one the loader knows."""
    config = load(PRUNE)

    def leaves(value: Any, path: str) -> list[tuple[str, Any]]:
        if dataclasses.is_dataclass(value):
            return [
                leaf
                for field in dataclasses.fields(value)
                for leaf in leaves(getattr(value, field.name), f"{path}{field.name}.")
            ]
        return [(path[:-1], value)]

    for path, value in leaves(config, ""):
        if path == "data.domains":
            continue
        text = yaml.safe_dump(value).removesuffix("...\n")
        assert load(PRUNE, f"{path}={text}") == config, path


def test_a_configuration_from_before_an_option_is_read_with_its_default() -> None:
    config = load(PRUNE)
    text = to_yaml(config)
    assert from_yaml(text) == config
    older = text.replace("  head_unit: query_group\n", "").replace("  context: 1\n", "")
    assert len(older.splitlines()) == len(text.splitlines()) - 2
    assert from_yaml(older) == config


def test_a_configuration_with_an_option_of_before_is_read_without_it() -> None:
    """Not as the option whose name is nearest; that is for what a user writes."""
    config = load(PRUNE)
    older = to_yaml(config).replace("  sequences_per_domain: 32\n", "  batches_per_domain: 16\n")
    assert "batches_per_domain" in older
    assert from_yaml(older) == config


def test_the_configuration_needs_neither_torch_nor_megatron() -> None:
    """A wrong file is refused before anything heavy is imported."""
    package = Path(__file__).parents[2] / "megashear" / "config"
    for file in package.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", [])]
            module = getattr(node, "module", None) or ""
            assert not {"torch", "megatron", "numpy"} & {n.split(".")[0] for n in [*names, module]}


class TestLoadDomains:
    """What validation takes of a run's YAML, a run directory or a file of domains."""

    def test_of_a_run_that_is_not_complete(self) -> None:
        """Neither model, files nor references have to be there."""
        text = PRUNE.replace(", reference_loss: 1.9643", "").replace("cc_valid", "gone")
        Path("run.yaml").write_text(text.replace("init_from: source", "init_from: gone"))
        config = load_domains(Path("run.yaml"))
        assert [(d.valid, d.reference_loss) for d in config.data.domains] == [
            ("gone", None),
            ("wiki_valid", 1.759),
        ]
        assert config.data.seq_length == 128

    def test_of_a_run_directory_with_the_weights_that_it_began_with(self) -> None:
        config = load(PRUNE)
        newest = [dataclasses.replace(domain, weight=0.5) for domain in config.data.domains]
        Path("earlier").mkdir()
        Path("earlier", "config.yaml").write_text(to_yaml(config))
        Path("earlier", DOMAINS_FILE).write_text(domains_to_yaml(newest))
        assert load_domains(Path("earlier")) == config
        with pytest.raises(ConfigError, match="no run directory"):
            load_domains(Path("."))

    def test_of_domains_alone_the_rest_is_as_a_run_has_it(self) -> None:
        Path("domains.yaml").write_text(domains_to_yaml(TestDomainsFrom.DOMAINS))
        config = load_domains(Path("domains.yaml"))
        assert config.data == DataConfig(domains=TestDomainsFrom.DOMAINS)
        assert config.evaluation == EvaluationConfig()

    def test_all_problems_of_the_file_are_named(self) -> None:
        Path("domains.yaml").write_text("- {name: cc, train: a, valid: b}\n- {weight: x}\n")
        with pytest.raises(ConfigError) as refused:
            load_domains(Path("domains.yaml"))
        paths = [path for path, _ in refused.value.problems]
        assert set(paths) >= {"domains[0].weight", "domains[1].name", "domains[1].weight"}


class TestLoadTarget:
    """The target of a run, or the sizes of a model."""

    def test_of_a_run(self) -> None:
        Path("run.yaml").write_text(PRUNE, encoding="utf-8")
        found = load_target(Path("run.yaml"))
        assert isinstance(found, RunConfig) and found.target == load(PRUNE).target

    def test_of_sizes(self) -> None:
        text = yaml.safe_dump(dataclasses.asdict(SOURCE))
        Path("sizes.yaml").write_text(text, encoding="utf-8")
        assert load_target(Path("sizes.yaml")) == SOURCE
        Path("sizes.yaml").write_text(text.replace("hidden_size: 64", "hidden_size: x"))
        with pytest.raises(ConfigError, match=r"hidden_size .* expected a whole number"):
            load_target(Path("sizes.yaml"))

    def test_is_missed_where_there_is_none(self) -> None:
        Path("domains.yaml").write_text(domains_to_yaml(TestDomainsFrom.DOMAINS))
        with pytest.raises(ConfigError, match="names no target"):
            load_target(Path("domains.yaml"))
