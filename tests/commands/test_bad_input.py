"""What a user sees of bad input: every problem, once, without a traceback, and nothing written.

Processes of examples/pretrain_shear.py, all at once.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.support.forks import Forked
from tests.support.hf_models import save_llama
from tests.support.make_data import random_documents, write_tokens

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pretrain_shear.py"

MANY: dict[str, Any] = {
    "stage": "prune",
    "run_dir": "run-many",
    "init_from": "model",
    "target": {"num_layers": 9, "num_attention_heads": 2, "ffn_hidden_size": 40},
    "prunning": {"mask_lr": 0.5},
    "data": {
        "seq_length": 17,
        "rule": "papers",
        "domains": [
            {"name": "a", "train": "a_train", "valid": "nowhere", "weight": 0.7},
            {"name": "b", "train": "a_train.bin", "valid": "a_valid", "wieght": 0.28},
        ],
    },
    "trainer": {"steps": "many", "global_batch_size": 6, "micro_batch_size": 4},
    "parallel": {"tensor": 5, "sequence": True},
    "platform": {"device": "cpu", "layers": "transformer_engine"},
}
EXPECTED = {
    "prunning": "unknown option. Did you mean 'pruning'?",
    "target.num_layers": "= 9 is larger than the source's 3. Use at most 3",
    "target.num_attention_heads": "= 2 is not divisible by parallel.tensor = 5",
    "init_from": "is a model whose num_attention_heads = 4 is not divisible by parallel.tensor = 5",
    "data.rule": "= 'papers'",
    "data.seq_length": "= 17 is not divisible by 5, which parallel.tensor = 5 with sequence needs",
    "data.domains": "weights sum to 0.98; they must sum to 1",
    "data.domains[0].valid": "= 'nowhere': no file nowhere.bin or nowhere.idx",
    "data.domains[1].train": "Leave out the suffix",
    "data.domains[1].wieght": "unknown option. Did you mean 'weight'?",
    "trainer.steps": "= 'many': expected a whole number",
    "trainer.log_interval": "= 0 must be >= 1",  # by an override
    "parallel.tensor": "= 5 does not divide the 1 processes of the run",
    "platform.layers": "Transformer Engine needs platform.device = 'cuda'",
    "optimizer.lr": "= {'x': 1}: expected a number",  # by an override
}


def small(**changes: Any) -> dict[str, Any]:
    """A run that would work."""
    domain = {"name": "a", "train": "a_train", "valid": "a_valid", "weight": 1.0}
    return {
        "stage": "continue",
        "init_from": "model",
        "data": {"seq_length": 16, "rule": "constant", "domains": [domain]},
        "evaluation": {"sequences_per_domain": 2},
        "optimizer": {"warmup_steps": 1},
        "trainer": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2},
        "platform": {"device": "cpu"},
        **changes,
    }


@dataclass
class Ended:
    """How a process ended."""

    status: int
    output: str
    error: str


def make_files(folder: Path) -> None:
    """A model, the same without a tensor, tokens, and tokens that the model does not have."""
    save_llama(folder / "model")
    save_llama(folder / "incomplete")
    file = folder / "incomplete" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    for part in ("train", "valid"):
        write_tokens(folder / f"a_{part}", random_documents(400, 96, seed=1), 96)
        write_tokens(folder / f"beyond_{part}", random_documents(400, 120, seed=2), 120)
    beyond = {"name": "b", "train": "beyond_train", "valid": "a_valid", "weight": 1.0}
    configs = {
        "many": MANY,
        "incomplete": small(run_dir="run-incomplete", init_from="incomplete"),
        "beyond": small(run_dir="run-beyond", data={**small()["data"], "domains": [beyond]}),
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    (folder / "broken.yaml").write_text("stage: prune\n  run_dir: [x\n")


COMMANDS: dict[str, tuple[str, ...]] = {
    "many": ("--config", "many.yaml", "trainer.log_interval=0", "optimizer.lr.x=1"),
    "incomplete": ("--config", "incomplete.yaml"),
    "beyond": ("--config", "beyond.yaml"),
    "flag": ("--config", "many.yaml", "--steps", "5"),
    "none": (),
    "path": ("--config", "nowhere.yaml"),
    "broken": ("--config", "broken.yaml"),
    "second process": ("--config", "broken.yaml"),
}
REAL = ("many", "incomplete")
"""In an interpreter of their own, which imports all; the others in a fork of this one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_files(folder)
    return folder


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, Ended]:
    unset = dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}

    def script(name: str) -> None:
        sys.argv = [str(SCRIPT), *COMMANDS[name]]
        if name in REAL:
            os.execv(sys.executable, [sys.executable, *sys.argv])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    processes = {
        name: Forked(
            partial(script, name),
            folder,
            PYTHONDONTWRITEBYTECODE="1",
            PYTHONPATH=str(ROOT),
            **(launched if name == "second process" else unset),
        )
        for name in COMMANDS
    }
    return {name: Ended(*process.end(timeout=120)) for name, process in processes.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_input_ends_with_status_2_and_no_traceback(name: str, ended: Any) -> None:
    assert ended[name].status == 2
    assert "Traceback" not in ended[name].error
    assert "Warning" not in ended[name].error


def test_all_problems_of_a_configuration_are_said_at_once(ended: Any, folder: Path) -> None:
    title, *lines = ended["many"].error.splitlines()
    found = [tuple(line.split(maxsplit=1)) for line in lines]
    for path, text in EXPECTED.items():
        assert any(path == field and text in said for field, said in found), (path, lines)
    assert title == f"error: many.yaml: {len(lines)} problems"
    assert not ended["many"].output
    assert not (folder / "run-many").exists()


def test_a_model_without_a_tensor_names_it(ended: Any, folder: Path) -> None:
    error = ended["incomplete"].error
    assert "\nerror: " in error  # after a warning: nothing is known of the tokenizer
    assert "incomplete" in error and "model.layers.1.mlp.up_proj.weight" in error
    assert not list((folder / "run-incomplete").glob("checkpoints/*"))


def test_tokens_that_the_model_does_not_have_name_the_file(ended: Any) -> None:
    error = ended["beyond"].error
    assert "error: beyond_train.bin holds token id 1" in error
    assert "the vocabulary ends at 95" in error


def test_command_lines_that_are_wrong_show_the_usage(ended: Any) -> None:
    assert "unrecognized arguments: --steps" in ended["flag"].error
    assert "a run's YAML file is required" in ended["none"].error
    for name in ("flag", "none"):
        assert ended[name].error.startswith("usage: megashear train")


def test_files_that_cannot_be_read_are_named(ended: Any) -> None:
    assert ended["path"].error == "error: nowhere.yaml: 1 problem\n  (file)  does not exist\n"
    assert ended["broken"].error.startswith("error: broken.yaml: 1 problem\n  (file)  is not YAML:")
    assert "line 2" in ended["broken"].error


def test_one_process_of_a_machine_speaks_for_all(ended: Any) -> None:
    assert ended["second process"].error == ended["second process"].output == ""
