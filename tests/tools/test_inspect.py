"""tools/checkpoint/inspect.py, and that its name does no harm to what runs beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megashear.checkpoint.dense import write_model
from megashear.checkpoint.info import CheckpointInfo, Record, read_info
from megashear.commands.inspect import EPILOG
from megashear.config.schema import RotaryScaling
from tests.support.hf_models import save_llama
from tests.support.reference_llama import random_weights
from tests.support.runs import GQA, masks_of
from tests.tools.conftest import TOOLS, Tool
from tests.tools.test_convert import lines
from tests.tools.test_extract import decided, write_run


def test_keys_of_json_are_those_that_help_names(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "hf")
    tool("import", "--hf", tmp_path / "hf", "--out", tmp_path / "megatron")
    described = EPILOG.split("Keys of --json:")[1].split("example")[0]
    columns = re.findall(r"^  (\w[\w, ]*?)(?:  |$)", described, re.MULTILINE)
    promised = {name for column in columns for name in column.split(", ")}
    promised.add("tokens_of_all_stages")
    for path in ("hf", "megatron"):
        status, output, _ = tool("inspect", tmp_path / path, "--json")
        assert status == 0
        assert json.loads(output).keys() == promised


def test_features_of_a_model_are_shown_and_told(tmp_path: Path, tool: Tool) -> None:
    shape = dataclasses.replace(
        GQA,
        tied_embeddings=True,
        qkv_bias=True,
        qk_norm=True,
        rotary_scaling=RotaryScaling("llama3", 8.0, 8192),
        sliding_window=32,
        family="qwen3",
    )
    losses = {"cc": 2.5, "book": 3.25}
    history = (
        Record("huggingface", "/models/large", dataclasses.replace(shape, num_layers=6)),
        Record("prune", "/runs/prune", shape, 10, 1000, losses),
    )
    info = CheckpointInfo(shape, "continue", 20, 4000, history=history, progress={"losses": losses})
    write_model(tmp_path / "model", info, random_weights(shape, seed=0).items())
    status, output, _ = tool("inspect", tmp_path / "model")
    assert status == 0
    shown = lines(output)
    expected = {
        "stage": "continue",
        "tokens": "4,000",
        "tokens of all stages": "5,000",
        "dtypes of weights": "float32",
        "family": "qwen3",
        "embeddings": "tied",
        "bias": "query/key/value",
        "query/key norms": "one for all heads",
        "rotary scaling": "llama3, factor 8",
        "sliding window": "32 tokens",
        "tensor": "1, 2, 4",
        "pipeline x virtual_pipeline": "1, 3",
        "book": "3.2500",
    }
    assert {name: shown.get(name) for name in expected} == expected
    assert re.search(r"^prune +10 +1,000 +[\d,]+ +`/runs/prune`$", output, re.MULTILINE)
    found = json.loads(tool("inspect", tmp_path / "model", "--json")[1])
    assert found["shape"] == dataclasses.asdict(shape)
    assert found["losses"] == losses
    assert [record["shape"]["num_layers"] for record in found["history"]] == [6, 3]
    assert read_info(tmp_path / "model").history == history


def test_masks_of_a_run_are_those_that_extraction_reports(tmp_path: Path, tool: Tool) -> None:
    run = write_run(tmp_path / "run", decided(masks_of(dataclasses.replace(GQA, num_layers=4))))
    report = "\n".join(tool("extract", "--run", run)[1].splitlines()[:5])
    assert report in tool("inspect", run)[1]
    found = json.loads(tool("inspect", run, "--json")[1])
    assert found["target"]["ffn_hidden_size"] == 32
    assert found["masks"][2] == {
        "mask": "head",
        "rows": 4,
        "expected_sparsity": pytest.approx([0.4775, 0.4775], abs=1e-3),
        "target": 0.5,
        "kept": [2, 2],
        "units": 4,
        "off_target": False,
    }
    assert json.loads(tool("inspect", run / "extracted", "--json")[1])["history"][0]["stage"] == (
        "prune"
    )


def test_what_is_no_model_is_one_message(tmp_path: Path, tool: Tool) -> None:
    status, output, error = tool("inspect", tmp_path)
    assert (status, output) == (2, "")
    assert error.startswith(f"error: {tmp_path}: is neither a checkpoint nor a run with one")


def test_a_checkpoint_from_before_there_was_a_history_is_read(tmp_path: Path, tool: Tool) -> None:
    write_model(
        tmp_path / "model", CheckpointInfo(GQA, "extracted", 5, 80), random_weights(GQA, 0).items()
    )
    file = tmp_path / "model" / "checkpoint.json"
    fields = json.loads(file.read_text())
    del fields["history"]
    fields["origin"] = {"pruned": "/runs/prune", "init_from": "/models/large"}
    file.write_text(json.dumps(fields))
    found = json.loads(tool("inspect", tmp_path / "model", "--json")[1])
    stages = [(record["stage"], record["path"], record["shape"]) for record in found["history"]]
    assert stages == [("init_from", "/models/large", None), ("pruned", "/runs/prune", None)]
    assert found["tokens_of_all_stages"] == 80
    assert tool("inspect", tmp_path / "model")[0] == 0


@pytest.mark.slow  # 15 s: three processes at once, which import torch, Megatron-Core, transformers
def test_scripts_work_beside_one_that_is_named_as_a_standard_module(tmp_path: Path) -> None:
    """The other two are run by tests of Ctrl-C and torchrun."""
    save_llama(tmp_path / "hf")
    write_model(tmp_path / "model", CheckpointInfo(GQA, "imported"), random_weights(GQA, 0).items())
    commands = {
        "inspect.py": ("hf",),
        "megatron_to_hf.py": ("--checkpoint", "model", "--out", "out"),
        "verify.py": ("hf", "hf", "--tokens", "20"),
    }
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parents[1])}
    processes = {
        name: subprocess.Popen(
            [sys.executable, TOOLS / name, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in commands.items()
    }
    output = {name: process.communicate(timeout=200) for name, process in processes.items()}
    for name, process in processes.items():
        assert process.returncode == 0, output[name][1]
    assert lines(output["inspect.py"][0])["stage"] == "huggingface"
    assert (tmp_path / "out" / "config.json").is_file()
    assert "within the tolerance" in output["verify.py"][0]
