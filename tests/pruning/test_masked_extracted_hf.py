"""One model in three forms: masked in a pruning run, extracted, and exported to Hugging Face.

Their logits must be equal with masks that are far from saturated and a whole layer off; a known
mistake (folding the output head a second time, as published code does) must be seen.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megashear.checkpoint import models
from megashear.checkpoint.dense import extract_checkpoint
from megashear.checkpoint.hf.writer import write_huggingface
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.config.schema import ModelShape, ParallelConfig, RotaryScaling
from megashear.model.build import build_model
from megashear.platform import parallel
from megashear.pruning.table import HIDDEN
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import (
    BIASES,
    GQA,
    GQA_QUERY_HEAD,
    MHA,
    QWEN,
    prune_options,
    run_config,
    write_domains,
    write_source,
)

SHAPES = {
    "mha": MHA,
    "gqa": GQA,
    "mha-tied": replace(MHA, tied_embeddings=True),
    "query-head": GQA_QUERY_HEAD,
    "biases": replace(BIASES, rotary_scaling=RotaryScaling("linear", 2.0)),
    "mistral": replace(GQA, sliding_window=5, family="mistral"),
    "qwen2-tied": replace(GQA, qkv_bias=True, tied_embeddings=True, family="qwen2"),
    "qwen3": replace(QWEN, proj_bias=True, family="qwen3"),
}
TOKENS = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.arange(16).expand(2, -1)


def prune_and_save(directory: Path, shape: ModelShape) -> Tensor:
    """Save a pruning run with masks spread over (0, 1); returns the masked model's logits."""
    config = run_config(
        directory,
        write_domains(directory),
        init_from=str(directory / "source"),
        **prune_options(shape),
    )
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for log_alpha in trainer.objective.masks.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator))
    trainer.save()
    z = trainer.objective.masks.deterministic("target")
    values = torch.cat([mask[mask > 0] for mask in z.values()])
    assert values.min() < 0.4  # far from saturated
    assert values.max() < 0.999
    with torch.no_grad(), trainer.objective.masked_weights.masked(z):
        logits = trainer.optimizer.models[0](TOKENS, POSITIONS, None)
    parallel.stop()
    return logits


def extract_and_export(directory: Path) -> dict[str, Tensor]:
    """Extract the run and export it, rightly and with the head folded twice; all their logits."""
    from transformers import AutoModelForCausalLM

    pruned = models.open(directory / "run")
    dense = extract_checkpoint(pruned, directory / "extracted")
    with parallel.single_process() as platform:
        (model,) = chunks = build_model(dense.shape, platform, ParallelConfig(), seq_length=16)
        models.open(dense.directory).fill(chunks, platform)
        with torch.no_grad():
            logits = {"extracted": model(TOKENS, POSITIONS, None)}
    weights = dict(WeightsReader(dense.model_directory, dense.shape).items())
    wrong = dict(weights)
    head = (
        "output_layer.weight"
        if "output_layer.weight" in weights
        else ("embedding.word_embeddings.weight")
    )
    z_hidden = pruned.masks.z[HIDDEN][0]
    wrong[head] = weights[head] * z_hidden[z_hidden > 0]
    for name, tensors in (("hf", weights), ("wrong", wrong)):
        write_huggingface(directory / name, dense.shape, tensors.items())
        hf = AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32)
        with torch.no_grad():
            logits[name] = hf(TOKENS).logits
    return logits


@pytest.mark.parametrize("shape_name", SHAPES)
def test_masked_extracted_and_exported_models_are_one(shape_name: str, tmp_path: Path) -> None:
    shape = SHAPES[shape_name]
    run_distributed(write_source, 1, tmp_path, shape)
    masked = run_distributed(prune_and_save, 1, tmp_path, shape)[0]
    others = run_distributed(extract_and_export, 1, tmp_path)[0]
    scale = masked.abs().max()
    assert (others["extracted"] - masked).abs().max() < 1e-4 * scale
    assert (others["hf"] - masked).abs().max() < 1e-4 * scale
    assert (others["wrong"] - masked).abs().max() > 1e-2 * scale
