"""What came out of the example: losses by megashear and by transformers, and what models write.

Reads `losses.json` of `megashear evaluate` and the Hugging Face directories named, in that order,
the source first. Ends with status 1 where the two do not agree. To be run in the example's folder.

    python ../examples/smollm2/summary.py source pruned-hf sheared-hf
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from megashear.config.loader import load_config
from megashear.console import FAILED, run, table

if TYPE_CHECKING:
    from megashear.data.dataset import DomainDataset

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4  # nats per token
PROMPTS = (
    "The function returns",
    "The history of the city begins",
    "Water is important because",
    "If you want to learn a language,",
)
WRITTEN = 40  # tokens after each prompt


def load(directory: str) -> PreTrainedModel:
    """A model in fp32; transformers has to find every weight and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def loss(model: PreTrainedModel, dataset: DomainDataset, sequences: int) -> float:
    """Mean loss over the first sequences of a domain, by transformers alone."""
    count = min(sequences, dataset.samples_per_epoch)
    texts = [torch.from_numpy(dataset[number]).long()[None] for number in range(count)]
    return sum(float(model(text, labels=text).loss) for text in texts) / count


@torch.no_grad()
def write(model: PreTrainedModel, judge: PreTrainedModel, prompt: Tensor) -> tuple[Tensor, float]:
    """What the model writes after a prompt [1, s], drawn of its 20 likeliest tokens each time.

    Returns:
        prompt and continuation; what the continuation costs the judge (nats per token).
    """
    torch.manual_seed(0)
    text = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=20, temperature=0.7,
        min_new_tokens=WRITTEN, max_new_tokens=WRITTEN, pad_token_id=0,
    )  # fmt: skip
    labels = text.clone()
    labels[:, : prompt.shape[1]] = -100  # not counted
    return text[0], float(judge(text, labels=labels).loss)


def compare_losses(models: dict[str, PreTrainedModel]) -> tuple[str, bool]:
    """A table of losses by transformers; whether megashear's are the same."""
    from megashear.data.dataset import build_valid_datasets

    records = json.loads(Path("losses.json").read_text())["models"]
    data = load_config(HERE / "prune.yaml", check_files=False).data
    data = replace(data, seq_length=records[0]["seq_length"])
    vocabulary = min(model.config.vocab_size for model in models.values())
    datasets = build_valid_datasets(data, vocabulary)
    rows, differences = [], []
    for (name, model), record in zip(models.items(), records, strict=True):
        sequences = record["sequences_per_domain"]
        losses = {domain: loss(model, text, sequences) for domain, text in datasets.items()}
        differences += [abs(losses[domain] - record["losses"][domain]) for domain in losses]
        found = (f"{each:.4f}" for each in losses.values())
        rows.append((name, f"{record['parameters']:,}", *found))
    worst = max(differences)
    text = f"megashear's losses differ from these of transformers by at most {worst:.1e}"
    return f"{table(rows, ('model', 'parameters', *datasets))}\n{text}", worst < TOLERANCE


def writings(models: dict[str, PreTrainedModel]) -> str:
    """What every model writes, and how the first one finds it."""
    source, judge = next(iter(models.items()))
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    parts = []
    for name, model in models.items():
        written = [write(model, judge, prompt) for prompt in prompts]
        mean = sum(cost for _, cost in written) / len(written)
        texts = "\n".join(f"  {tokenizer.decode(text)!r}" for text, _ in written)
        parts.append(f"{name} writes, at {mean:.2f} nats per token by {source}:\n{texts}")
    return "\n\n".join(parts)


def main() -> int:
    """Compare, let the models write, keep and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="Hugging Face directories, the source first")
    names = parser.parse_args().models
    logging.disable_progress_bar()
    models = {name: load(name) for name in names}
    losses, same = compare_losses(models)
    text = f"{losses}\n\n{writings(models)}"
    Path("summary.txt").write_text(text + "\n")
    print(text)
    return 0 if same else FAILED


if __name__ == "__main__":
    run(main)
