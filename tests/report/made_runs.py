"""Directories of runs at the paper's scale, as records.py has them, made by formulas and a seed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megashear.records import SCHEMA, pack
from tests.support.published import REFERENCES

SOURCE = {
    **{"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 32},
    **{"kv_channels": 128, "ffn_hidden_size": 11008, "vocab_size": 32000, "tied_embeddings": False},
}
TARGET = {
    **SOURCE,
    **{"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 16},
    "ffn_hidden_size": 5504,
}
SIZES = {
    "layer": (1, 32, 24),
    "hidden": (1, 4096, 2048),
    "head": (32, 32, 16),
    "intermediate": (32, 11008, 5504),
}
"""Of each mask: rows, units, units to keep."""


def make_run(
    directory: Path,
    stage: str,
    steps: int,
    names: tuple[str, ...] = tuple(REFERENCES["1.3B"]),
    every: int = 50,
) -> Path:
    """A run that was stopped by a signal halfway, and resumed an hour later; then complete."""
    directory.mkdir(parents=True)
    tokens = 131_072 if stage == "prune" else 1_048_576
    random = np.random.default_rng(steps)
    references = {name: 1.4 + 0.1 * number for number, name in enumerate(names)}
    weights = np.full(len(names), 1 / len(names))
    seconds, began = 8.9, 1_790_000_000.0
    records = [_start(stage, steps, tokens, 0, began)]
    now = began + 200
    for step in range(steps + 1):
        if step:
            now += seconds
            records.append(_step(random, stage, step, steps, tokens, now, references, weights))
        if step % every == 0:
            gaps = 0.3 + 2 / (1 + 20 * step / steps) + 0.05 * np.arange(len(names))
            losses = {n: references[n] + g for n, g in zip(names, gaps, strict=True)}
            weights = weights * np.exp(0.3 * (gaps - gaps.mean()) + random.normal(0, 0.05))
            weights = weights / weights.sum()
            records.append(
                _evaluation(step, losses, references, dict(zip(names, weights, strict=True)))
            )
            now += 40
        if step == steps // 2:
            records.append({"kind": "save", "step": step, "seconds": 30.0})
            records.append(_end(step, now + 30, "SIGUSR1"))
            now += 3630
            records.append(_start(stage, steps, tokens, step, now))
    records.append(_end(steps, now, "complete"))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (directory / "config.yaml").write_text(
        yaml.safe_dump({"stage": stage, "trainer": {"steps": steps}})
    )
    if stage == "prune":
        masks = {name: pack(_kept(random, *size)) for name, size in SIZES.items()}
        (directory / "masks.json").write_text(json.dumps({"masks": masks}))
    return directory


def _start(stage: str, steps: int, tokens: int, step: int, when: float) -> dict[str, Any]:
    return {
        **{"kind": "start", "schema": SCHEMA, "step": step, "time": _utc(when), "stage": stage},
        **{"steps": steps, "tokens_per_step": tokens},
        "source": SOURCE if stage == "prune" else TARGET,
        "target": TARGET if stage == "prune" else None,
        "parameters": 6_738_415_616 if stage == "prune" else 1_345_423_360,
        "target_parameters": 1_345_423_360 if stage == "prune" else None,
        "layout": {"tensor": 4, "pipeline": 1, "context": 1, "data": 2},
        **{"hosts": ["node1"], "device": "NVIDIA H100 80GB HBM3", "peak_flops": 989e12},
        **{"flops_per_token": 4.3e10, "precision": "bf16", "layers": "torch", "kernels": "torch"},
        "versions": {"python": "3.11.2", "megashear": "0.1.0", "torch": "2.13.0"},
        "job": "4711",
    }


def _step(
    random: np.random.Generator,
    *run: Any,
) -> dict[str, Any]:
    stage, step, steps, tokens, now, references, weights = run
    share = step / steps
    noise = random.normal(0, 0.08, len(references))
    losses = {
        name: reference + 0.3 + 2 / (1 + 20 * share) + float(wobble)
        for (name, reference), wobble in zip(references.items(), noise, strict=True)
        if random.random() < 0.9
    }
    record = {
        **{"kind": "step", "step": step, "time": now, "tokens": step * tokens},
        "loss": float(np.mean(list(losses.values()))) if losses else 2.0,
        "domain_losses": losses,
        "domain_weights": dict(zip(references, map(float, weights), strict=True)),
        "lr": 1e-4 * min(1, share * 10),
        "grad_norm": float(random.lognormal(0, 0.3)),
        **{"seconds": 8.9, "data_seconds": 0.1, "forward_backward_seconds": 8.0},
        "tokens_per_second": float(tokens / 8.9 * random.normal(1, 0.03)),
        "mfu": float(0.41 * random.normal(1, 0.03)),
        "memory_gib": 61.2,
    }
    if stage == "prune":
        warm = min(1.0, step / (0.2 * steps))
        target = {name: warm * (1 - keep / units) for name, (_, units, keep) in SIZES.items()}
        lag = {name: value * (1 - np.exp(-8 * share)) for name, value in target.items()}
        record |= {"target_sparsity": target, "sparsity": lag, "penalty": 0.3 * (1 - share)}
        rows = {name: [[share * 3.0], [share * 40.0]] for name in SIZES}
        record |= {"multipliers": rows, "mask_grad_norm": 0.1, "multiplier_grad_norm": 0.2}
    return record


def _evaluation(step: int, losses: Any, references: Any, weights: Any) -> dict[str, Any]:
    return {
        **{"kind": "evaluation", "step": step, "seconds": 40.0, "losses": losses},
        "references": references,
        "gaps": {name: losses[name] - references[name] for name in losses},
        "domain_weights": weights,
    }


def _end(step: int, when: float, reason: str) -> dict[str, Any]:
    return {"kind": "end", "step": step, "time": _utc(when), "reason": reason, "verdict": ""}


def _utc(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(when))


def _kept(random: np.random.Generator, rows: int, units: int, keep: int) -> list[list[int]]:
    """The right number of units of each row, nearer ones likelier to share their fate."""
    importance = random.normal(size=(rows, units)) + np.sin(np.arange(units) / units * 9)
    order = importance.argsort(axis=1).argsort(axis=1)
    return (order >= units - keep).astype(int).tolist()
