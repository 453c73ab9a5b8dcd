"""Small runs for tests: token files, configurations, and the first steps of a trainer on a rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from megashear.checkpoint.dense import write_model
from megashear.checkpoint.info import CheckpointInfo
from megashear.config.schema import (
    QUERY_GROUP,
    QUERY_HEAD,
    DataConfig,
    Domain,
    EvaluationConfig,
    ModelShape,
    OptimizerConfig,
    ParallelConfig,
    PlatformConfig,
    PruningConfig,
    RunConfig,
    TargetShape,
    TrainerConfig,
)
from megashear.pruning.masks import Masks, resolve_target
from megashear.records import METRICS
from tests.support.make_data import random_documents, write_tokens
from tests.support.reference_llama import random_weights

MHA = ModelShape(
    num_layers=3, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, vocab_size=64
)
GQA = ModelShape(
    num_layers=3,
    hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    ffn_hidden_size=48,
    vocab_size=64,
)
QWEN = replace(GQA, qkv_bias=True, qk_norm=True)
BIASES = replace(GQA, qkv_bias=True, proj_bias=True, mlp_bias=True)
GQA_QUERY_HEAD = replace(GQA, num_attention_heads=12)  # three heads in a group, to keep two
TARGETS = {
    shape: TargetShape(num_layers=2, hidden_size=24, num_attention_heads=heads, ffn_hidden_size=32)
    for shape, heads in ((MHA, 2), (GQA, 4), (GQA_QUERY_HEAD, 8))
}


def prune_options(shape: ModelShape) -> dict[str, Any]:
    """What makes a run one that prunes a shape, which has the heads of one of these."""
    (plain,) = (s for s in TARGETS if s.num_attention_heads == shape.num_attention_heads)
    head_unit = QUERY_HEAD if plain is GQA_QUERY_HEAD else QUERY_GROUP
    return {
        "stage": "prune",
        "target": TARGETS[plain],
        "pruning": PruningConfig(sparsity_warmup_steps=3, head_unit=head_unit),
    }


def masks_of(shape: ModelShape) -> Masks:
    """The masks that such a run begins with."""
    options = prune_options(shape)
    head_unit = options["pruning"].head_unit
    return Masks(shape, resolve_target(shape, options["target"], head_unit), head_unit)


GENERATION = {"config.json": {"eos_token_id": 2}, "generation_config.json": {"top_p": 0.9}}
"""What the source says of special tokens and generation."""


def write_source(directory: Path, shape: ModelShape = GQA) -> None:
    """A checkpoint `source` with random weights; to be called in a process of its own."""
    info = CheckpointInfo(shape=shape, stage="imported", generation=GENERATION)
    write_model(directory / "source", info, random_weights(shape, seed=0).items())


def write_domains(directory: Path, vocab: int = 64) -> tuple[Domain, ...]:
    """Two domains of random tokens, training and validation."""
    domains = []
    for seed, (name, weight) in enumerate((("first", 0.7), ("second", 0.3))):
        files = {}
        for part, tokens in (("train", 6000), ("valid", 600)):
            documents = random_documents(tokens, vocab, seed=2 * seed + (part == "valid"))
            files[part] = write_tokens(directory / f"{name}_{part}", documents, vocab)
        domains.append(Domain(name, files["train"], files["valid"], weight, reference_loss=4.0))
    return tuple(domains)


def run_config(directory: Path, domains: tuple[Domain, ...], **changes: Any) -> RunConfig:
    """A short run in fp32 on the CPU: 6 steps of 4 sequences of 16 tokens, unless changed.

    adam_eps is above the rounding of the gradients, which Adam would else blow up to whole steps.
    """
    settings: dict[str, Any] = {
        "stage": "pretrain",
        "run_dir": str(directory / "run"),
        "data": DataConfig(seq_length=16, domains=domains),
        "evaluation": EvaluationConfig(interval=3, sequences_per_domain=4),
        "optimizer": OptimizerConfig(lr=1e-3, warmup_steps=2, adam_eps=1e-6),
        "trainer": TrainerConfig(
            steps=6, global_batch_size=4, micro_batch_size=1, log_interval=2, save_interval=3
        ),
        "parallel": ParallelConfig(),
        "platform": PlatformConfig(device="cpu", precision="fp32", timeout_minutes=2),
        "pruning": PruningConfig(sparsity_warmup_steps=3),
    }
    return RunConfig(**{**settings, **changes})


BY_CLOCK = (
    *("time", "seconds", "data_seconds", "forward_backward_seconds"),
    *("tokens_per_second", "mfu", "memory_gib"),
)
"""Fields of records that no two runs have alike."""


def records(run_dir: str | Path, *kinds: str) -> list[dict[str, Any]]:
    """Records of a run without what a clock measured: its steps and evaluations, unless told."""
    lines = map(json.loads, (Path(run_dir) / METRICS).read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in BY_CLOCK}
        for line in lines
        if line["kind"] in (kinds or ("step", "evaluation"))
    ]
