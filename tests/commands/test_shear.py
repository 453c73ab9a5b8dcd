"""`megashear shear`: what it checks beforehand, what it runs, and what it does not do again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megashear import cli
from megashear.commands.shear import TASKS
from megashear.errors import ConfigError, ShearError
from tests.support.chains import write_chain
from tests.support.make_tokenizer import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a chain that has not begun."""
    write_chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def test_it_prints_the_commands_in_order(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.execute(["shear", "chain.yaml", "--print"])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(TASKS)
    assert lines[2][1:6] == ["-m", "megashear", "launch", "--nproc-per-node", "1"]
    cli.execute(["shear", "chain.yaml", "--print", "--stage", "extract"])
    (extract,) = capsys.readouterr().out.splitlines()
    assert shlex.split(extract) == lines[3]
    assert not (chain / "runs").exists()


def test_a_source_that_is_read_as_it_is_needs_no_conversion(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(chain / "prune.yaml", "checkpoints/source", "models/source")
    change(chain / "chain.yaml", "text: text/*.jsonl\n", "")
    cli.execute(["shear", "chain.yaml", "--print"])
    assert len(capsys.readouterr().out.splitlines()) == len(TASKS) - 2


def test_all_that_is_wrong_is_said_before_anything_runs(chain: Path) -> None:
    change(chain / "chain.yaml", "models/source", "models/absent")
    change(chain / "chain.yaml", "text/*.jsonl", "texts/*.jsonl")
    change(chain / "chain.yaml", "valid_fraction: 0.2", "valid_fraction: 20")
    change(chain / "chain.yaml", "export: models/sheared", "export: runs/prune")
    change(chain / "prune.yaml", "data/a_train", "tokens/a_train")
    change(chain / "prune.yaml", "steps: 6", "stepz: 6")
    change(chain / "continue.yaml", "runs/prune/extracted", "runs/prune")
    with pytest.raises(ConfigError) as error:
        cli.execute(["shear", "chain.yaml"])
    assert {path for path, _ in error.value.problems} == {
        *("source", "text", "valid_fraction", "prune_config: trainer.stepz")
    }
    change(chain / "chain.yaml", "work_dir:", "work_dirs:")
    with pytest.raises(ConfigError) as error:
        cli.execute(["shear", "chain.yaml"])
    assert len(error.value.problems) == 5
    change(chain / "chain.yaml", "work_dirs:", "work_dir:")
    change(chain / "prune.yaml", "stepz: 6", "steps: 6")
    with pytest.raises(ConfigError) as error:
        cli.execute(["shear", "chain.yaml"])
    found = dict(error.value.problems)
    assert found.keys() == {
        *("source", "text", "valid_fraction", "continue_config: init_from"),
        *("export", "prune_config: data.domains[0].train"),
    }
    assert found["continue_config: init_from"].endswith("Use runs/prune/extracted")


@pytest.mark.parametrize("place", ["models/source", "checkpoints/source", "runs/../data"])
def test_nothing_is_written_over_what_another_stage_needs(chain: Path, place: str) -> None:
    change(chain / "chain.yaml", "export: models/sheared", f"export: {place}")
    with pytest.raises(ConfigError, match=f"export  = '{place}' is .* too"):
        cli.execute(["shear", "chain.yaml", "--print", "--stage", "export"])


def test_the_target_is_held_against_the_source_before_hours_of_work(chain: Path) -> None:
    change(chain / "prune.yaml", "num_layers: 2", "num_layers: 5")
    with pytest.raises(ConfigError, match=r"prune_config: target.num_layers.*5"):
        cli.execute(["shear", "chain.yaml"])
    change(chain / "prune.yaml", "num_layers: 5", "num_layers: 2")
    change(chain / "continue.yaml", "platform:", "parallel: {pipeline: 4}\nplatform:")
    change(chain / "chain.yaml", "processes: 1", "processes: 4")
    with pytest.raises(ConfigError, match=r"continue_config: parallel.pipeline  = 4"):
        cli.execute(["shear", "chain.yaml"])


@pytest.mark.long  # 60 to 190 s: eight tasks, most of it importing torch
def test_the_whole_way_interrupted_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chain(tmp_path)
    command = (sys.executable, "-m", "megashear", "shear", "chain.yaml")
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "prune" / "metrics.jsonl"
    while process.poll() is None and not metrics.is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to it alone: it passes it on
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    assert "stopped by SIGTERM" in shown

    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there already" in done.stdout  # the tokens
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in steps if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "sheared")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 24)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    losses = json.loads((tmp_path / "runs" / "continue" / "losses.json").read_text())
    assert "models/sheared" in json.dumps(losses)
    assert "</html>" in (tmp_path / "runs" / "continue" / "report.html").read_text()

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert done_before(capsys) == 7  # tokenize sees for itself
    change(tmp_path / "prune.yaml", "lr: 1.0e-3", "lr: 2.0e-3")
    with pytest.raises(ShearError) as refused:
        cli.execute(["shear", "chain.yaml"])
    told = str(refused.value)
    assert "runs/prune/checkpoints (task prune): optimizer.lr was 0.001, is 0.002" in told
    assert "models/sheared (task export): what it was made of has changed" in told
    change(tmp_path / "prune.yaml", "lr: 2.0e-3", "lr: 1.0e-3")
    change(tmp_path / "prune.yaml", "log_interval: 2", "log_interval: 1")  # which is free
    assert done_before(capsys) == 7  # tokenize sees for itself


def done_before(capsys: pytest.CaptureFixture[str]) -> int:
    """Stages that a further run finds done."""
    cli.execute(["shear", "chain.yaml"])
    return capsys.readouterr().out.count("done before")
