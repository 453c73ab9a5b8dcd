"""What came out of the demo: sizes, losses, masks, logits, words and times, as one page of text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megashear.console import table

TOLERANCE = 1e-4  # of the logits' scale, fp32
ON_TARGET = 0.02  # expected sparsity - target sparsity


def summarise(folder: Path, seconds: Mapping[str, float]) -> bool:
    """Print the summary and keep it in the folder; returns whether all is as it should be.

    Args:
        folder: of the demo.
        seconds: wall time of each task.
    """
    losses, sheared_wins = _losses(folder)
    masks, on_target = _masks(folder)
    logits, same = _logits(folder)
    parts = [
        ("Parameters", _parameters(folder)),
        ("Validation loss (nats per token)", losses),
        ("Masks at the end of pruning", masks),
        ("Logits, largest difference as a fraction of their scale", logits),
        ("The sheared model writes", _words(folder)),
        ("Wall time (s)", _times(seconds)),
        ("Where everything lies", _places(folder)),
    ]
    text = "\n\n".join(f"{title}\n{_indented(body)}" for title, body in parts)
    (folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    expected = {
        "the sheared model is better than the one from scratch": sheared_wins,
        "every mask is on its target": on_target,
        "masked, extracted and exported models have equal logits": same,
    }
    for claim, holds in expected.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    return all(expected.values())


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _parameters(folder: Path) -> str:
    from megashear.checkpoint.info import read_info
    from megashear.pruning.counting import parameter_count

    rows = []
    for name, path in (("source", "source"), ("sheared", "continue"), ("from scratch", "scratch")):
        info = read_info(folder / path)
        shape = info.shape
        sizes = (shape.num_layers, shape.hidden_size, shape.num_attention_heads)
        count = f"{parameter_count(shape):,}"
        rows.append((name, count, *sizes, shape.ffn_hidden_size, f"{info.tokens:,}"))
    header = ("model", "parameters", "layers", "hidden", "heads", "ffn", "tokens of its last stage")
    return table(rows, header)


def _records(folder: Path, run: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def _losses(folder: Path) -> tuple[str, bool]:
    """Per domain; after pruning means the extracted model, before it is trained on."""
    columns = {
        "source": _records(folder, "source", "evaluation")[-1]["losses"],
        "pruned": _records(folder, "continue", "evaluation")[0]["losses"],
        "continued": _records(folder, "continue", "evaluation")[-1]["losses"],
        "from scratch": _records(folder, "scratch", "evaluation")[-1]["losses"],
    }
    rows = [(name, *(f"{c[name]:.3f}" for c in columns.values())) for name in columns["source"]]
    means = {name: sum(c.values()) / len(c) for name, c in columns.items()}
    rows.append(("mean", *(f"{mean:.3f}" for mean in means.values())))
    gain = means["from scratch"] - means["continued"]
    tokens = [
        _records(folder, run, "step")[-1]["tokens"] for run in ("prune", "continue", "scratch")
    ]
    verdict = (
        f"The sheared model is {abs(gain):.3f} {'below' if gain > 0 else 'ABOVE'} the one from "
        f"scratch, at {tokens[0] + tokens[1]:,} (prune {tokens[0]:,} + continue {tokens[1]:,}) "
        f"and {tokens[2]:,} tokens"
    )
    return f"{table(rows, ('domain', *columns))}\n{verdict}", gain > 0


def _masks(folder: Path) -> tuple[str, bool]:
    from megashear.checkpoint import models

    pruned = models.open(folder / "prune").masks
    rows = []
    good = True
    for name, sparsity in pruned.masks.expected_sparsity().items():
        target = pruned.masks.target_sparsity[name]
        expected = float(sparsity.mean())
        good &= abs(expected - target) < ON_TARGET
        farthest = float((sparsity - target).abs().max())
        rows.append((name, f"{expected:.3f}", f"{target:.3f}", f"{farthest:.3f}"))
    header = ("mask", "expected sparsity", "target", "largest distance of a row")
    return table(rows, header) + ("\n" + pruned.off_target if pruned.off_target else ""), good


def _logits(folder: Path) -> tuple[str, bool]:
    import torch

    from megashear.checkpoint import models
    from megashear.checkpoint.compare import logits, logits_difference

    tokens = torch.randint(3, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
    pairs = [
        ("masked", "prune", "extracted", "prune/extracted"),
        ("extracted", "prune/extracted", "Hugging Face", "extracted-hf"),
        ("masked", "prune", "Hugging Face", "extracted-hf"),
        ("continued", "continue", "Hugging Face", "sheared-hf"),
    ]
    found = {
        path: logits(models.open(folder / path), tokens)
        for pair in pairs
        for path in (pair[1], pair[3])
    }
    rows, good = [], True
    for name_a, a, name_b, b in pairs:
        difference = logits_difference(found[a], found[b])
        good &= difference.within(TOLERANCE)
        agreement = f"{difference.top1_agreement:.1%}"
        rows.append((f"{name_a} / {name_b}", f"{difference.relative:.1e}", agreement))
    return table(rows, ("models", "difference", "same likeliest token")), good


def _words(folder: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = str(folder / "sheared-hf")
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)
    lines = []
    for prompt in ("def __init__(self", "The function returns", "#include <"):
        tokens = tokenizer(prompt, return_tensors="pt")
        written = model.generate(
            input_ids=tokens["input_ids"], max_new_tokens=24, do_sample=True, top_k=20,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        lines.append(repr(tokenizer.decode(written[0], skip_special_tokens=True)))
    return "\n".join(lines)


def _times(seconds: Mapping[str, float]) -> str:
    rows = [(name, f"{value:.0f}") for name, value in seconds.items()]
    return table([*rows, ("all tasks", f"{sum(seconds.values()):.0f}")])


def _places(folder: Path) -> str:
    rows = [
        ("sheared model (Hugging Face)", "sheared-hf"),
        ("sheared model (Megatron)", "continue/checkpoints"),
        ("pruned, not yet continued", "prune/extracted"),
        ("records of the runs", "source, prune, continue, scratch: metrics.jsonl"),
        ("text, tokenizer, tokens", "text, tokenizer, data"),
        ("this page", "summary.txt"),
    ]
    return f"{folder}\n{table(rows)}"
