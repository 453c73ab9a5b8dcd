"""The paper's recipe on real text of its seven domains, as it ships, but for sizes and steps.

Text by `megashear tokenize` with LLaMA's tokenizer, a tiny model of that vocabulary where the
recipe looks for LLaMA-2-7B, then both YAML files and the extraction between them, by the scripts
that a user calls, on two processes. Third-party text: skipped where it is absent.
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest

from megashear import cli
from megashear.checkpoint import models
from megashear.config.loader import load_config
from megashear.config.schema import Domain
from tests.support.distributed import run_distributed
from tests.support.hf_models import save_llama
from tests.support.make_tokenizer import REPOSITORY, SHARED_DATA, write_jsonl
from tests.support.runs import records

pytestmark = [
    pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no RedPajama sample at {SHARED_DATA}"),
    pytest.mark.slow,  # 30 s: text, two runs, an extraction
]

RECIPE = Path("examples/configs/llama2-7b-to-1.3b")
RUNS = "runs/llama2-7b-to-1.3b"
FOLDERS = {"c4": "c4-rp"}
"""Where the sample's name for a domain is another."""
LETTERS, PASSAGE = 60_000, 2_000
STEPS, INTERVAL = 8, 4
SMALL = (
    *("data.seq_length=64", f"evaluation.interval={INTERVAL}", "evaluation.sequences_per_domain=4"),
    *("optimizer.lr=1e-3", "optimizer.warmup_steps=2", f"trainer.steps={STEPS}"),
    *("trainer.global_batch_size=16", "trainer.log_interval=4", f"trainer.save_interval={STEPS}"),
)
TARGET = (
    *("target.num_layers=2", "target.hidden_size=32", "target.num_attention_heads=2"),
    *("target.ffn_hidden_size=64", "pruning.sparsity_warmup_steps=4"),
)


def recipe_domains() -> tuple[Domain, ...]:
    return load_config(REPOSITORY / RECIPE / "prune.yaml", check_files=False).data.domains


def passages(domain: str) -> list[str]:
    """The beginning of a domain's text, cut: of few long documents none might be held out."""
    folder = SHARED_DATA / "redpajama-sample" / FOLDERS.get(domain, domain)
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.open()]
    text = "\n\n".join(json.loads(line)["text"] for line in lines)[:LETTERS]
    return [text[at : at + PASSAGE] for at in range(0, len(text), PASSAGE)]


def call(folder: Path, *words: str) -> None:
    """A command in a folder, as the shell would call it."""
    os.chdir(folder)
    assert not cli.execute(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipe was run, with every path as it stands there."""
    folder = tmp_path_factory.mktemp("recipe")
    for domain in recipe_domains():
        write_jsonl(folder / "text" / f"{domain.name}.jsonl", passages(domain.name))
    tokenizer = str(SHARED_DATA / "llama-tokenizer.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert not cli.execute(
            ["tokenize", "--input", "text/*.jsonl", "--output", "data/{name}",
             "--tokenizer", tokenizer, "--valid-fraction", "0.2"]
        )  # fmt: skip
    sizes = {"vocab_size": 32000, "hidden_size": 48, "intermediate_size": 96}
    save_llama(folder / "models" / "llama2-7b", **sizes)
    train = ("train", "--config")
    prune, onwards = (str(REPOSITORY / RECIPE / f"{stage}.yaml") for stage in ("prune", "continue"))
    run_distributed(call, 2, folder, *train, prune, *SMALL, *TARGET)
    extract = ("extract", "--run", "runs/llama2-7b-to-1.3b/prune")
    run_distributed(call, 1, folder, *extract)
    run_distributed(call, 2, folder, *train, onwards, *SMALL)
    return folder


def moved(weights: dict[str, float], losses: dict[str, float]) -> dict[str, float]:
    """The paper's algorithm 1, with its smoothing, by hand."""
    grown = {
        domain.name: weights[domain.name]
        * math.exp(max(losses[domain.name] - (domain.reference_loss or 0.0), 0.0))
        for domain in recipe_domains()
    }
    total = sum(grown.values())
    return {name: (1 - 1e-4) * weight / total + 1e-4 / 7 for name, weight in grown.items()}


def test_every_domain_has_losses_and_its_weight_moves_by_the_rule(folder: Path) -> None:
    start = {domain.name: domain.weight for domain in recipe_domains()}
    assert len(start) == 7
    evaluations = [
        *records(folder / RUNS / "prune", "evaluation"),
        *records(folder / RUNS / "continue", "evaluation"),
    ]
    assert [record["step"] for record in evaluations] == 2 * list(range(0, STEPS + 1, INTERVAL))
    for record in evaluations:
        assert record["losses"].keys() == start.keys()
        assert all(2 < loss < 20 for loss in record["losses"].values())
    before = start
    for record in evaluations:
        last_of_stage = record["step"] == STEPS
        expected = before if last_of_stage else moved(before, record["losses"])
        assert record["domain_weights"] == pytest.approx(expected, rel=1e-9)
        before = record["domain_weights"]
    assert len({tuple(record["domain_weights"].values()) for record in evaluations}) == 4


def test_training_takes_the_domains_by_their_weights(folder: Path) -> None:
    """The domains of the largest weights in every interval; the loss goes down in both stages."""
    for stage in ("prune", "continue"):
        steps = records(folder / RUNS / stage, "step")
        evaluations = records(folder / RUNS / stage, "evaluation")
        for number, (first, _) in enumerate(pairwise(evaluations)):
            taken = steps[number * INTERVAL : (number + 1) * INTERVAL]
            seen = {name for record in taken for name in record["domain_losses"]}
            expected = {n for n, w in first["domain_weights"].items() if w * INTERVAL * 16 >= 2}
            assert expected <= seen
    trained = records(folder / RUNS / "continue", "evaluation")
    assert sum(trained[-1]["losses"].values()) < sum(trained[0]["losses"].values())


def test_the_result_has_the_target_shape(folder: Path) -> None:
    run = folder / "runs" / "llama2-7b-to-1.3b"
    for path in (run / "prune" / "extracted", run / "continue"):
        shape = models.open(path).shape
        sizes = (shape.num_layers, shape.hidden_size, shape.num_attention_heads)
        assert (*sizes, shape.ffn_hidden_size, shape.vocab_size) == (2, 32, 2, 64, 32000)
