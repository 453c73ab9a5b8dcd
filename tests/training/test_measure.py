"""`megashear evaluate`: what a run logged, what transformers computes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

from megashear import cli
from megashear.checkpoint import models
from megashear.checkpoint.dense import export_huggingface, extract_checkpoint
from megashear.config.loader import domains_to_yaml, load_domains
from megashear.config.schema import Domain, RunConfig
from megashear.data.dataset import build_valid_datasets
from megashear.data.fingerprint import Fingerprint
from megashear.errors import ConfigError, DataError
from megashear.platform import parallel
from megashear.pruning.counting import parameter_count
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.hf_models import load_llama, save_llama
from tests.support.make_data import random_documents, write_tokens
from tests.support.runs import GQA, prune_options, records, run_config, write_domains, write_source


def train(config: RunConfig) -> None:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    Trainer(config, platform).run()
    parallel.stop()


def prune(config: RunConfig) -> None:
    """A short pruning run, extracted and exported."""
    train(config)
    run = Path(config.run_dir)
    extract_checkpoint(models.open(run), run / "extracted")
    export_huggingface(models.open(run / "extracted"), run / "hf", dtype="float32", tokenizer=None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("measure")
    run_distributed(write_source, 1, directory)
    config = run_config(
        directory,
        write_domains(directory),
        init_from=str(directory / "source"),
        **prune_options(GQA),
    )
    config = replace(config, trainer=replace(config.trainer, micro_batch_size=2))
    run_distributed(prune, 1, config)
    return Path(config.run_dir)


def execute(*arguments: str) -> None:
    cli.execute(arguments)


def evaluate(ranks: int, *arguments: object) -> list[dict[str, Any]]:
    """The records that the command writes."""
    file = Path(str(arguments[0])).parent / "evaluated.json"
    command = [*map(str, arguments), "--overwrite"]
    run_distributed(execute, ranks, "evaluate", *command, "--json", str(file))
    records: list[dict[str, Any]] = json.loads(file.read_text())["models"]
    return records


def last_evaluation(run: Path) -> dict[str, Any]:
    return records(run, "evaluation")[-1]


def loss_of_transformers(directory: Path, domain: Domain, sequences: int) -> float:
    """Its own loss over the sequences that a run of 16-token sequences validates on."""
    config = run_config(directory, (domain,)).data
    text = build_valid_datasets(config, 2**16)[domain.name]
    count = min(sequences, text.samples_per_epoch)
    tokens = torch.stack([torch.from_numpy(text[k]).long() for k in range(count)])
    with torch.no_grad():
        logits = load_llama(directory)(tokens[:, :-1]).logits.double()
    return float(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("layout", [(1,), (2, "--tensor", 2), (3, "--pipeline", 3)])
def test_a_checkpoint_has_the_losses_that_its_run_logged(layout: Any, run: Path) -> None:
    """Domains, lengths and masks are those of the run; the layout and micro-batches are free."""
    ranks, *options = layout
    logged = last_evaluation(run)
    model = run if options else run / "checkpoints" / "step-00000006"
    (found,) = evaluate(ranks, model, *options, "--micro-batch-size", 3)
    assert found["losses"] == pytest.approx(logged["losses"], rel=1e-6)
    assert found["tokens"] == {"first": 4 * 16, "second": 4 * 16}
    assert found["name"].endswith("step-00000006 (prune, step 6, current masks)")


def test_a_run_in_bf16_is_measured_in_bf16(run: Path) -> None:
    """The platform is the run's as well, unless an option says otherwise."""
    config = load_domains(run)
    trainer = replace(config.trainer, steps=2, save_interval=2)
    pruning = replace(config.pruning, sparsity_warmup_steps=1)
    platform = replace(config.platform, precision="bf16")
    config = replace(config, trainer=trainer, pruning=pruning, platform=platform)
    config = replace(config, run_dir=str(run.parent / "bf16"))
    run_distributed(train, 1, config)
    expected = last_evaluation(run.parent / "bf16")["losses"]
    (found,) = evaluate(1, run.parent / "bf16")
    assert found["losses"] == pytest.approx(expected, rel=1e-7)
    (found,) = evaluate(1, run.parent / "bf16", "--precision", "fp32", "--device", "cpu")
    assert found["losses"] == pytest.approx(expected, rel=1e-2)
    assert found["losses"] != pytest.approx(expected, rel=1e-5)


def test_target_extracted_and_exported_are_one_and_what_transformers_finds(run: Path) -> None:
    domains = tuple(Domain(**d) for d in yaml.safe_load((run / "domains.yaml").read_text()))
    paths = run, run / "extracted", run / "hf"
    options = "--domains", run, "--masks", "target", "--sequences", 9
    masked, extracted, exported = evaluate(1, *paths, *options)
    shape = models.open(run).masks.masks.target
    assert shape is not None
    for found in (masked, extracted, exported):
        assert found["parameters"] == parameter_count(shape)
        for domain in domains:
            expected = loss_of_transformers(run / "hf", domain, 9)
            assert found["losses"][domain.name] == pytest.approx(expected, rel=1e-5)
    for name, loss in last_evaluation(run)["losses"].items():
        assert abs(masked["losses"][name] - loss) > 1e-4  # other masks, other sequences


TEXTS = {"big": 300, "small": 65}
"""Tokens of two domains."""


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file of domains of text in the vocabulary of a Hugging Face model."""
    directory = tmp_path_factory.mktemp("domains")
    files = {
        name: write_tokens(directory / name, random_documents(tokens, 96, seed=tokens), 96)
        for name, tokens in TEXTS.items()
    }
    file = directory / "domains.yaml"
    records = [
        Domain(n, f, f, 0.5, r) for (n, f), r in zip(files.items(), (4.5, None), strict=True)
    ]
    file.write_text(domains_to_yaml(records))
    return file


def test_a_hugging_face_model_has_the_loss_that_transformers_finds(
    domains: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_llama(tmp_path / "hf", num_key_value_heads=2)
    arguments = tmp_path / "hf", "--domains", domains, "--seq-length", 16
    (found,) = evaluate(2, *arguments, "--sequences", 10, "--tensor", 2)
    big, small = (Domain(**d) for d in yaml.safe_load(domains.read_text()))
    expected = [loss_of_transformers(tmp_path / "hf", domain, 10) for domain in (big, small)]
    assert list(found["losses"].values()) == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == {"big": 160, "small": 64}
    rows = [line.split() for line in capfd.readouterr().out.splitlines()[-4:-2]]
    loss, other = expected
    perplexities = [f"{torch.tensor(value).exp():.4g}" for value in expected]
    gap = f"{loss - 4.5:+.4f}"
    assert rows[0] == ["big", "160", f"{loss:.4f}", perplexities[0], "4.5000", gap]
    assert rows[1] == ["small", "64", f"{other:.4f}", perplexities[1], "-", "-"]


def test_everything_wrong_with_models_and_options_is_said_at_once(
    domains: Path, tmp_path: Path
) -> None:
    save_llama(tmp_path / "hf")
    command = ["evaluate", f"{tmp_path}/gone", f"{tmp_path}/hf", "--domains", str(domains)]
    with pytest.raises(ConfigError) as refused:
        cli.execute([*command, "--seq-length", "128", "--tensor", "5"])
    found = dict(refused.value.problems)
    assert "does not exist" in found[f"{tmp_path}/gone"]
    assert "not divisible by parallel.tensor = 5" in found[f"{tmp_path}/hf"]
    assert "more than the model's max_position_embeddings = 64" in found["data.seq_length"]
    assert "does not divide the 1 processes" in found["parallel.tensor"]


def test_text_of_a_larger_vocabulary_is_refused_by_its_ids(domains: Path, tmp_path: Path) -> None:
    """Not by the tokenizer's size: it may have entries (a pad token) that no text holds."""
    save_llama(tmp_path / "hf", vocab_size=80)
    options = ["--domains", str(domains), "--seq-length", "16"]
    command = ["evaluate", f"{tmp_path}/hf", *options]
    with pytest.raises(DataError, match=r"big\.bin holds token id \d+, but the vocabulary ends"):
        run_in_this_process(command)
    save_llama(tmp_path / "larger", vocab_size=96)
    for name, tokens in TEXTS.items():
        documents = random_documents(tokens, 96, seed=tokens)
        counts, highest = (len(documents), tokens), max(map(max, documents))
        fingerprint = Fingerprint("0", 100, None, 0, *counts, highest_id=highest)
        domains.with_name(f"{name}.json").write_text(json.dumps(asdict(fingerprint)))
    with pytest.raises(DataError) as refused:
        cli.execute(["evaluate", f"{tmp_path}/larger", *command[1:]])
    assert str(refused.value).count("but the vocabulary ends at 79") == 2
    (found,) = evaluate(1, tmp_path / "larger", *options)
    assert found["tokens"]["small"] == 64


def run_in_this_process(command: list[str]) -> None:
    try:
        cli.execute(command)
    finally:
        parallel.stop()


def test_validation_files_that_are_missing_are_named_all_at_once(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    names = ("one", "two")
    records = [Domain(name, "train", f"{tmp_path}/{name}", 0.5) for name in names]
    (tmp_path / "domains.yaml").write_text(domains_to_yaml(records))
    command = ["evaluate", f"{tmp_path}/hf", "--domains", f"{tmp_path}/domains.yaml"]
    with pytest.raises(DataError) as refused:
        cli.execute([*command, "--seq-length", "16"])
    assert all(f"{tmp_path}/{name}.bin and" in str(refused.value) for name in names)


def test_without_domains_the_model_has_to_be_a_run(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"hf: .*\n.* no run directory.* as --domains"):
        cli.execute(["evaluate", f"{tmp_path}/hf"])


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "losses.json").write_text("mine")
    for file, text in {
        "losses.json": "there already. Replace by --overwrite",
        "gone/losses.json": "no such directory",
        ".": "is a directory",
    }.items():
        with pytest.raises(DataError, match=text):
            cli.execute(["evaluate", "no model", "--json", str(tmp_path / file)])


@pytest.mark.parametrize("number", ["inf", "nan", "1.9", "0", "-1", "many"])
def test_numbers_are_whole(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.execute(["evaluate", "no model", f"--tensor={number}"])
    assert "argument --tensor: invalid positive value" in capsys.readouterr().err
