"""Checkpoints of Megatron-LM's own training, through the commands; a YAML file says the shape."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from megashear.checkpoint import models
from megashear.checkpoint.torch_dist import background
from megashear.checkpoint.torch_dist.metadata import place_on_disk
from megashear.config.schema import ModelShape, ParallelConfig, PlatformConfig
from megashear.platform import parallel
from tests.support.distributed import run_distributed
from tests.support.hf_models import save_llama
from tests.tools.conftest import Tool
from tests.tools.test_convert import lines

PADDED = 128  # what Megatron-LM makes of the 96 tokens of the model


def save(source: Path, out: Path, layout: ParallelConfig) -> None:
    """What Megatron-LM's training saves of a model with these weights, on one of its ranks."""
    platform = parallel.start(PlatformConfig(device="cpu"), layout, seed=0)
    reader = models.open(source)
    shape = reader.shape
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        ffn_hidden_size=shape.ffn_hidden_size,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=functional.silu,
        add_bias_linear=False,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type="rope",
    )
    fill(model, reader)
    sharded = model.sharded_state_dict()
    moments: dict[str, Any] = model.sharded_state_dict(prefix="optimizer.state.exp_avg.")
    rank, size = platform.rank, platform.world_size
    state = {
        "args": argparse.Namespace(num_layers=3, padded_vocab_size=PADDED),
        "checkpoint_version": 3.0,
        "iteration": 100,
        "model": sharded,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4}]},
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 100},
        "rng_state": ShardedObject("rng_state", [{"random": (3, 4)}], (size,), (rank,)),
    }
    background.save(state, out)
    parallel.stop()


@torch.no_grad()
def fill(model: GPTModel, reader: models.Model) -> None:
    """Each shard by what Megatron-Core says of its place; padding is no zeros."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in reader.weights.items():
        if len(tensor) == reader.shape.vocab_size:
            tensor = functional.pad(tensor, (0, 0, 0, PADDED - len(tensor)), value=7.0)
        key, layer = place_on_disk(name)
        parts.setdefault(key, []).append(tensor[None] if layer else tensor)
    whole = {key: torch.cat(tensors) for key, tensors in parts.items()}
    state = model.sharded_state_dict()
    apply_factories(state)
    for shard in nested_values(state):
        if isinstance(shard, ShardedTensor):
            shard.data.copy_(whole[shard.key][shard.global_slice()].view_as(shard.data))


LAYOUTS = {
    "tp2": (ParallelConfig(tensor=2), False),
    "pp2": (ParallelConfig(pipeline=2), True),
}


def write_shape(file: Path, shape: ModelShape, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump({**dataclasses.asdict(shape), **changes}))
    return file


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_exported_as_what_it_is(layout: str, tmp_path: Path, tool: Tool) -> None:
    parallel_config, tied = LAYOUTS[layout]
    source, saved = tmp_path / "source", tmp_path / "saved"
    save_llama(source, num_key_value_heads=2, num_hidden_layers=4, tie_word_embeddings=tied)
    saved.mkdir()
    (saved / "latest_checkpointed_iteration.txt").write_text("100")
    iteration = saved / "iter_0000100"
    run_distributed(save, 2, source, iteration, parallel_config)
    shape = models.open_huggingface(source).shape
    yaml_file = write_shape(tmp_path / "shape.yaml", shape)
    for number, path in enumerate((saved, iteration)):
        out = tmp_path / f"out-{number}"
        arguments = ("--checkpoint", path, "--out", out, "--shape", yaml_file)
        status, _, error = tool("export", *arguments)
        assert status == 0, error
        before, after = (load_file(each / "model.safetensors") for each in (source, out))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert f"| megatron-lm | 100 | 0 | {lines_of(out)} | `{iteration}` |" in card(out)
    for a, b in ((source, saved), (iteration, out)):
        status, output, _ = tool("verify", a, b, "--tokens", 50, "--shape", yaml_file)
        assert status == 0, output
    status, output, _ = tool("inspect", saved, "--shape", yaml_file)
    assert status == 0
    assert (lines(output)["stage"], lines(output)["step"]) == ("megatron-lm", "100")


def lines_of(directory: Path) -> str:
    """The number of parameters, as the card has it."""
    tensors = load_file(directory / "model.safetensors")
    return f"{sum(tensor.numel() for tensor in tensors.values()):,}"


def card(directory: Path) -> str:
    return (directory / "README.md").read_text()


def test_a_shape_that_is_missing_wrong_or_too_much_is_told(tmp_path: Path, tool: Tool) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    save_llama(source)
    run_distributed(save, 1, source, tmp_path / "iter_0000100", ParallelConfig())
    tool("import", "--hf", source, "--out", tmp_path / "own")
    shape = models.open_huggingface(source).shape
    right = write_shape(tmp_path / "right.yaml", shape)
    other = write_shape(tmp_path / "other.yaml", shape, ffn_hidden_size=40)
    wrong = write_shape(tmp_path / "wrong.yaml", shape, num_layers=0, num_attention_heads=3)
    for path, options, message in (
        ("iter_0000100", (), "does not state its shape. Give its sizes with --shape"),
        ("iter_0000100", ("--shape", other), "mlp.linear_fc1.weight: (96, 32), expected (80, 32)"),
        ("iter_0000100", ("--shape", wrong), "num_layers"),
        ("iter_0000100", ("--shape", tmp_path / "no.yaml"), "does not exist"),
        ("own", ("--shape", right), "states its shape itself. Leave --shape out"),
        (".", ("--shape", right), "no torch_dist checkpoint of Megatron-LM"),
    ):
        arguments = ("--checkpoint", tmp_path / path, "--out", out, *options)
        status, _, error = tool("export", *arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert message in error
        assert not out.exists()
