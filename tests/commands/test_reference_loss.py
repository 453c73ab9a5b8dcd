"""`megashear reference-loss` as its user meets it: what it writes is what a run takes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from megashear import cli
from megashear.checkpoint.info import CheckpointInfo
from megashear.config.loader import load_config
from megashear.config.schema import Domain
from megashear.errors import ConfigError, DataError
from megashear.reference.models import read_models
from tests.support.distributed import run_distributed
from tests.support.hf_models import save_llama
from tests.support.make_data import random_documents, write_tokens
from tests.support.published import LLAMA2_7B, LOSSES, PARAMETERS, REFERENCES

NAMES = ("7B", "13B", "70B")
TARGET = {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 5504}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the published losses, and a run that prunes a 7B model to 1.3B."""
    monkeypatch.chdir(tmp_path)
    models = [
        {"name": name, "parameters": PARAMETERS[name][1], "losses": losses_of(number)}
        for number, name in enumerate(NAMES)
    ]
    Path("models.yaml").write_text(yaml.safe_dump({"models": models}))
    Path("7b").mkdir()
    Path("7b/checkpoint.json").write_text(CheckpointInfo(LLAMA2_7B, "imported").to_json())
    domains = [asdict(Domain(n, f"{n}_train", f"{n}_valid", 1 / 7)) for n in LOSSES]
    Path("prune.yaml").write_text(
        yaml.safe_dump(
            {
                "stage": "prune",
                "run_dir": "prune",
                "init_from": "7b",
                "target": TARGET,
                "data": {"domains": domains},
            }
        )
    )
    return tmp_path


def losses_of(number: int) -> dict[str, float]:
    return {name: losses[number] for name, losses in LOSSES.items()}


def scaling(*arguments: str, models: str = "models.yaml") -> None:
    files = models.split()
    cli.execute(["reference-loss", "scaling", *files, "--domains", "prune.yaml", *arguments])


def references(file: str) -> dict[str, float]:
    return {
        d["name"]: round(d["reference_loss"], 4)
        for d in yaml.safe_load(Path(file).read_text())["domains"]
    }


def test_scaling_gives_a_run_the_references_for_its_target(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scaling("--out", "references.yaml")
    assert references("references.yaml") == REFERENCES["1.3B"]
    out = capsys.readouterr().out
    assert "residuals of 0 do not show" in out
    assert "target: 1,345,423,360 parameters, 5.0 times fewer than the smallest model" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert lines["cc"].endswith("1.9643  unphysical: E = -2.8 is negative")
    assert lines["wiki"].endswith("+0.0000 +0.0000 +0.0000     1.7590")
    flag = "unphysical: E = -2.8 is negative"
    text = Path("references.yaml").read_text()
    assert text.splitlines()[2] == f"# warning: cc: {flag}"
    flags = [law["flag"] for law in yaml.safe_load(text)["laws"].values()]
    assert flags == [flag, "", "", "", "", "", ""]
    drawn = captions("references.html")
    assert drawn[0] == "cc (unphysical): 1.9643 at 1.35B"
    assert [caption.split(":")[0] for caption in drawn[1:]] == list(LOSSES)[1:]

    run = yaml.safe_load(Path("prune.yaml").read_text())
    expected = run["data"].pop("domains")
    run["data"]["domains_from"] = "references.yaml"
    Path("next.yaml").write_text(yaml.safe_dump(run))
    domains = load_config(Path("next.yaml"), check_files=False).data.domains
    assert {d.name: round(d.reference_loss or 0, 4) for d in domains} == REFERENCES["1.3B"]
    assert [(d.name, d.train, d.valid, d.weight) for d in domains] == [
        (d["name"], d["train"], d["valid"], d["weight"]) for d in expected
    ]


def test_targets_are_a_number_or_sizes_or_a_sparsity() -> None:
    scaling("--out", "a.yaml", "--parameters", "2.70156032e9")
    assert references("a.yaml") == REFERENCES["2.7B"]
    shape = {k: v for k, v in asdict(PARAMETERS["2.7B"][0]).items() if v}
    Path("sizes.yaml").write_text(yaml.safe_dump(shape))
    scaling("--out", "b.yaml", "--target", "sizes.yaml", models="a.yaml")
    assert references("b.yaml") == REFERENCES["2.7B"]
    run = yaml.safe_load(Path("prune.yaml").read_text())
    del run["target"]
    sparsity = 1 - PARAMETERS["1.3B"][1] / PARAMETERS["7B"][1]
    Path("sparse.yaml").write_text(yaml.safe_dump({**run, "target_sparsity": sparsity}))
    scaling("--out", "c.yaml", "--target", "sparse.yaml")
    assert references("c.yaml") == REFERENCES["1.3B"]


def test_losses_that_do_not_fit_are_said_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Two models of one size leave residuals: three sizes alone do not make a fit exact."""
    tree = yaml.safe_load(Path("models.yaml").read_text())
    again = {**tree["models"][0], "losses": {n: v + 0.1 for n, v in losses_of(0).items()}}
    tree["models"].append(again)
    tree["models"][2]["losses"]["wiki"] = 1.45  # above 13B
    Path("models.yaml").write_text(yaml.safe_dump(tree))
    scaling("--out", "a.yaml")
    out = capsys.readouterr().out
    assert "say nothing" not in out
    assert out.count("does not fit: residuals of up to 0.050") == len(LOSSES)
    flagged = [caption.split(":")[0] for caption in captions("a.html")]
    assert flagged == [f"{name} (does not fit)" for name in LOSSES]
    text = Path("a.yaml").read_text()
    rise = "does not fit: the loss rises from 13,015,864,320 to 68,976,648,192 parameters"
    assert f"# warning: wiki: {rise}; does not fit: res" in text
    assert yaml.safe_load(text)["laws"]["wiki"]["flag"].startswith(rise)


def test_without_the_source_the_size_of_the_target_can_be_given() -> None:
    Path("7b/checkpoint.json").unlink()
    with pytest.raises(DataError, match=r"7b: is neither(.|\n)* --parameters N"):
        scaling("--out", "a.yaml")


def test_a_fourth_model_leaves_residuals(capsys: pytest.CaptureFixture[str]) -> None:
    losses = {name: round(loss + 0.01, 4) for name, loss in REFERENCES["2.7B"].items()}
    record = {"name": "2.7B", "parameters": PARAMETERS["2.7B"][1], "losses": losses}
    Path("more.json").write_text(json.dumps({"models": [record]}))
    size = str(PARAMETERS["1.3B"][1])
    scaling("--out", "a.yaml", "--parameters", size, models="models.yaml more.json")
    out = capsys.readouterr().out
    assert "residuals say nothing" not in out
    row = next(line for line in out.splitlines() if line.startswith("wiki")).split()
    assert len(row) == 4 + 4 + 1
    assert 0 < max(abs(float(residual)) for residual in row[4:8]) < 0.01


def test_too_few_models_or_domains_write_nothing() -> None:
    tree = yaml.safe_load(Path("models.yaml").read_text())
    Path("two.yaml").write_text(yaml.safe_dump({"models": tree["models"][:2]}))
    with pytest.raises(DataError, match="2 sizes of models are fewer than the 3 parameters"):
        scaling("--out", "references.yaml", models="two.yaml")
    del tree["models"][1]["losses"]["wiki"], tree["models"][2]["losses"]["c4"]
    Path("lacking.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as refused:
        scaling("--out", "references.yaml", models="lacking.yaml")
    assert [path for path, _ in refused.value.problems] == [
        "lacking.yaml: models[1].losses.wiki",
        "lacking.yaml: models[2].losses.c4",
    ]
    assert not Path("references.yaml").exists()


def test_an_existing_result_is_kept_unless_it_may_be_replaced() -> None:
    Path("references.yaml").write_text("mine")
    with pytest.raises(DataError, match=r"references\.yaml: there already"):
        scaling("--out", "references.yaml")
    assert Path("references.yaml").read_text() == "mine"
    Path("references.html").write_text("mine")
    with pytest.raises(DataError) as refused:
        scaling("--out", "references")
    assert [line.split(": ")[1] for line in str(refused.value).splitlines()] == [
        "is read by a run as a .yaml file. Name it so",
        "there already. Replace by --overwrite",
    ]
    scaling("--out", "references.yaml", "--overwrite")
    assert references("references.yaml") == REFERENCES["1.3B"]


def captions(page: str) -> list[str]:
    """What stands over each figure of a page."""
    return re.findall("<figcaption>(.*?)</figcaption>", Path(page).read_text())


def execute(*arguments: str) -> None:
    cli.execute(arguments)


def test_what_source_measures_is_what_evaluate_measures_and_what_scaling_reads(
    directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = []
    for name in ("cc", "wiki"):
        text = write_tokens(directory / name, random_documents(400, 96, seed=len(name)), 96)
        records.append(Domain(name, "train", text, 0.5))
    Path("domains.yaml").write_text(yaml.safe_dump([asdict(record) for record in records]))
    where = ["--domains", "domains.yaml", "--seq-length", "16"]
    measured: list[dict[str, Any]] = []
    for seed, layers in enumerate((1, 2, 3)):
        save_llama(directory / f"hf{layers}", seed=seed, num_hidden_layers=layers)
        command = ["reference-loss", "source", f"hf{layers}", *where, "--out", f"{layers}.yaml"]
        run_distributed(execute, 1, *command)
        measured.append(yaml.safe_load(Path(f"{layers}.yaml").read_text()))
        losses = measured[-1]["models"][0]["losses"]
        said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        assert f'aria-label="Loss of each domain. {said}"' in Path(f"{layers}.html").read_text()
    assert "these are the sequences of an evaluation in a run" in capfd.readouterr().out
    models = [f"hf{layers}" for layers in (1, 2, 3)]
    run_distributed(execute, 1, "evaluate", *models, *where, "--json", "all.json")
    evaluated = json.loads(Path("all.json").read_text())["models"]
    for tree, record in zip(measured, evaluated, strict=True):
        assert tree["models"] == [record]
        assert [domain["weight"] for domain in tree["domains"]] == [0.5, 0.5]
        found = {domain["name"]: domain["reference_loss"] for domain in tree["domains"]}
        assert found == pytest.approx(record["losses"], abs=1e-6)
    assert len({record["parameters"] for record in evaluated}) == 3

    read = read_models([Path(f"{layers}.yaml") for layers in (1, 2, 3)], ["cc", "wiki"])
    assert [(model.parameters, model.losses) for model in read] == [
        (record["parameters"], record["losses"]) for record in evaluated
    ]
