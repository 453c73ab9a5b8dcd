"""How many validation sequences a loss needs, and how few its gap to another model's loss needs.

Measures both models on every validation sequence of each domain, then draws sequences at random:
standard deviation of (a) the loss of MODEL, (b) its difference from the loss of REFERENCE on the
same sequences. The gap that moves domain weights is (b) where the references were measured on the
run's own validation sets (`megashear reference-loss source`).

Example, on the models of `python examples/demo/run.py`, in its folder:
  python benchmarks/evaluation_noise.py sheared-hf source-hf --domains prune --seq-length 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from megashear.console import run, table

SUBSETS = (4, 8, 16, 32, 64)
BLOCK = 32
"""Sequences of which logits are held at a time."""


def main() -> None:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="checkpoint, run or Hugging Face directory")
    add("reference", metavar="REFERENCE", type=Path, help="another, related to it")
    add("--domains", type=Path, required=True, help="as of `megashear evaluate`")
    add("--seq-length", type=int, required=True)
    add("--sequences", type=int, default=500, help="of a domain, at most (default: 500)")
    args = parser.parse_args()

    from megashear.checkpoint import models
    from megashear.config.loader import load_domains
    from megashear.config.schema import DataConfig
    from megashear.data.dataset import build_valid_datasets

    domains = load_domains(args.domains).data.domains
    data = DataConfig(seq_length=args.seq_length, domains=domains)
    rng = np.random.default_rng(0)
    rows = []
    for name, text in build_valid_datasets(data, models.open(args.model).shape.vocab_size).items():
        count = min(args.sequences, text.samples_per_epoch)
        sequences = np.stack([text[k] for k in range(count)])
        loss, reference = (sequence_losses(m, sequences) for m in (args.model, args.reference))
        for what, values in (("loss", loss), ("difference", loss - reference)):
            spread = [
                values[rng.integers(count, size=(4000, size))].mean(1).std() for size in SUBSETS
            ]
            figures = (f"{figure:.4f}" for figure in (values.mean(), *spread))
            rows.append((name, str(count), what, *figures))
    sizes = [f"n = {size}" for size in SUBSETS]
    print(table(rows, ("domain", "sequences", "of", "mean", *sizes)))


def sequence_losses(model: Path, sequences: np.ndarray) -> np.ndarray:
    """Mean loss of each sequence [n, s + 1] (nats per token), float64 [n]."""
    import torch
    from torch.nn import functional

    from megashear.checkpoint import models
    from megashear.checkpoint.compare import logits

    opened, losses = models.open(model), []
    for block in torch.from_numpy(sequences).long().split(BLOCK):
        found = logits(opened, block[:, :-1]).transpose(1, 2)
        losses.append(functional.cross_entropy(found, block[:, 1:], reduction="none").mean(1))
    return torch.cat(losses).double().numpy()


if __name__ == "__main__":
    run(main)
