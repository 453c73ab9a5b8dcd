"""What the documents show: commands run, YAML files are right, links lead somewhere.

The commands run as they stand, in the order of the documents, in a folder that looks as they
presume, but for sizes: a tiny model stands where LLaMA-2-7B would.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from megashear import cli
from megashear.checkpoint import models
from megashear.config.loader import load_config
from megashear.config.schema import ParallelConfig
from tests.support.distributed import run_distributed
from tests.support.hf_models import save_llama
from tests.support.make_tokenizer import REPOSITORY as ROOT
from tests.support.make_tokenizer import make_tokenizer, real_texts
from tests.tools import test_megatron_lm as megatron_lm

DOCUMENTS = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("walkthrough", "data", "checkpoints", "cluster", "metrics")
    ),
    *(ROOT / "docs" / f"{name}.md" for name in ("numerics", "configuration")),
    ROOT / "examples" / "smollm2" / "README.md",
    ROOT / "CONTRIBUTING.md",
]
"""Pages whose commands a reader types. The log's commands belong to the commits that it names."""
LINKED = sorted({*DOCUMENTS, *(ROOT / "docs").glob("*.md")})
NAMING = [file for file in LINKED if file.name != "log.md"]
PROGRAMS = {"megashear", "python", "torchrun", "make", "pip", "bash", "export", "apt-get"}
SLURM = {"srun", "sbatch", "scancel", "scontrol", "squeue", "salloc"}

ELSEWHERE = (
    *("make ", "pip install -e ."),  # .ci/run, and what it calls
    "megashear shear chain.yaml",  # tests/commands/test_shear.py
    "python examples/smollm2/run.py",  # tests/examples/test_smollm2.py
    *("examples/slurm/submit.sh", "sbatch", "scancel --signal=INT"),  # tests/slurm
)
"""What commands begin with that are not run here, and where they are."""

SMALLER = {
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--source models/llama2-7b --size": "--source 7b --size",  # the shape that it has
}
TINY: dict[str, dict[str, Any]] = {
    "target": {
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
    },
    "pruning": {"sparsity_warmup_steps": 2},
    "evaluation": {"interval": 2, "sequences_per_domain": 2},
    "optimizer": {"warmup_steps": 2},
    "trainer": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1},
    "parallel": {"tensor": 2},
    "platform": {"device": "cpu", "timeout_minutes": 2},
}


def blocks(document: Path) -> Iterator[list[str]]:
    """The indented blocks of a document, their lines without the indent."""
    text = document.read_text(encoding="utf-8")
    for block in re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.MULTILINE):
        yield [line[4:] for line in block.splitlines()]


def commands(document: Path) -> list[str]:
    """What a document tells its reader to type."""
    found = []
    for block in blocks(document):
        text = "\n".join(block).replace("\\\n", " ")
        for line in text.splitlines():
            words = line.split()
            if words and (words[0] in PROGRAMS | SLURM or (ROOT / words[0]).is_file()):
                found.append(" ".join(shlex.split(line, comments=True, posix=False)))
    return found


def yaml_files(document: Path) -> dict[str, dict[str, Any]]:
    """The YAML files that a document shows, by the names it gives them."""
    text = document.read_text(encoding="utf-8")
    shown = re.findall(r"`(\w+\.yaml)`[^`]*:\n\n((?:    .*\n)+)", text)
    return {name: yaml.safe_load(re.sub("^    ", "", block, flags=re.M)) for name, block in shown}


def shrink(tree: dict[str, Any]) -> dict[str, Any]:
    """A run's options with sizes for a minute on a CPU; what else it says stays."""
    small = {name: {**tree.get(name, {}), **values} for name, values in TINY.items()}
    if tree["stage"] != "prune":
        small = {name: value for name, value in small.items() if name not in ("target", "pruning")}
    return {**tree, **small, "data": {**tree["data"], "seq_length": 16}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the documents presume."""
    world = tmp_path_factory.mktemp("world")
    for name in ("examples", "tools"):
        (world / name).symlink_to(ROOT / name)
    (world / "text").mkdir()
    for index, name in enumerate(("cc", "wiki")):
        texts = [f"{copy}: {text}" for text in real_texts()[index::2] for copy in range(5)]
        with gzip.open(world / "text" / f"{name}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    save_llama(world / "models" / "llama2-7b", vocab_size=500)
    make_tokenizer(world / "models" / "llama2-7b")
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008}
    config = LlamaConfig(**sizes, num_hidden_layers=32, vocab_size=32000)
    config.save_pretrained(world / "7b")
    for name, tree in yaml_files(ROOT / "docs" / "walkthrough.md").items():
        small = shrink(tree) if "stage" in tree else tree
        (world / name).write_text(yaml.safe_dump(small))
    for name, size in (("7b", 7e9), ("13b", 13e9), ("70b", 70e9)):
        losses = dict.fromkeys(("cc", "wiki"), 1.5 + (1000000000.0 / size) ** 0.3)
        measured = {"name": name, "parameters": size, "losses": losses}
        (world / f"{name}.yaml").write_text(yaml.safe_dump({"models": [measured]}))
    save_llama(world / "other", num_key_value_heads=2)
    iteration, layout = world / "megatron-lm" / "iter_0000100", ParallelConfig(tensor=2)
    run_distributed(megatron_lm.save, 2, world / "other", iteration, layout)
    megatron_lm.write_shape(world / "shape.yaml", models.open_huggingface(world / "other").shape)
    return world


def perform(world: Path, program: str, words: list[str]) -> int:
    """A command in this process, a fork, as the shell would call it."""
    os.chdir(world)
    sys.argv = [program, *words]
    try:
        if program == "megashear":
            return cli.execute(words) or 0
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run(world: Path, command: str) -> None:
    """A command of a document."""
    for size, smaller in SMALLER.items():
        command = command.replace(size, smaller)
    program, *words = shlex.split(command)
    processes = 1
    if program == "torchrun":
        flag, count, *words = [word for word in words if word != "--"]
        assert flag == "--nproc-per-node"
        processes, program = int(count), "python"
    if words[0] == "launch":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", program, *words]
        subprocess.run(line, cwd=world, env=environment, check=True, timeout=200)
        return
    if program == "python":
        program, *words = words
    assert set(run_distributed(perform, processes, world, program, words)) == {0}


def shown() -> list[tuple[Path, str]]:
    return [(file, command) for file in DOCUMENTS for command in dict.fromkeys(commands(file))]


def is_elsewhere(command: str) -> bool:
    return command.startswith(ELSEWHERE)


def test_the_documents_show_commands() -> None:
    assert len(commands(ROOT / "README.md")) > 6
    assert len(commands(ROOT / "docs" / "walkthrough.md")) > 12
    assert len(shown()) > 30


@pytest.mark.slow  # 90 s: the walkthrough and more
def test_every_command_runs(world: Path) -> None:
    here = dict.fromkeys(command for _, command in shown() if not is_elsewhere(command))
    assert len(here) >= 20
    for command in here:
        print(f"$ {command}", flush=True)
        run(world, command)
    report = (world / "report.html").read_text(encoding="utf-8")
    assert "continue" in report
    assert (world / "models" / "sheared-1.3b" / "config.json").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_configuration_is_right(document: Path, tmp_path: Path) -> None:
    """As it stands, for 8 processes; its files need not be there."""
    for name, tree in yaml_files(document).items():
        if "stage" in tree:
            (tmp_path / name).write_text(yaml.safe_dump(tree))
            load_config(tmp_path / name, check_files=False, world_size=8)


@pytest.mark.parametrize("document", LINKED, ids=lambda file: file.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_the_program_of_the_library_page_runs() -> None:
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    program = re.sub("^    ", "", program, flags=re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "the small model has 2 layers" in done.stdout


def test_the_picture_has_the_numbers_of_the_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| model | parameters |")[1].split("\n\n")[0]
    picture = (ROOT / "docs" / "demo.svg").read_text(encoding="utf-8")
    losses = re.findall(r"\d\.\d{3}", table)
    assert len(losses) == 4
    assert all(loss in picture and loss in readme.split("(docs/demo.svg)")[0] for loss in losses)


@pytest.mark.parametrize("document", NAMING, ids=lambda file: file.name)
def test_every_file_that_a_page_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|sh|svg|txt|yaml))\b", text):
        assert (ROOT / path).exists() or (ROOT / "megashear" / path).exists(), path
