"""Models of every family and variant: into Megatron, through every layout, and out again.

transformers makes them, computes what they should, and judges what comes back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megashear.checkpoint import models
from megashear.checkpoint.compare import megatron_logits
from megashear.checkpoint.dense import export_huggingface, import_huggingface
from megashear.checkpoint.info import read_info
from megashear.checkpoint.torch_dist import background
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.checkpoint.torch_dist.state import sharded_weights
from megashear.config.schema import ParallelConfig, PlatformConfig
from megashear.model.build import build_model
from megashear.platform import parallel
from tests.support.distributed import run_distributed
from tests.support.hf_models import VARIANTS, assert_same_tensors, load_llama, save_llama

LAYOUTS = {"tensor": ParallelConfig(tensor=2), "pipeline": ParallelConfig(pipeline=2)}
TOKENS = torch.randint(95, (2, 17), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(17)[None]
SIZES = {"num_hidden_layers": 2, "vocab_size": 95}  # which two tensor-parallel ranks must pad


def convert(directory: Path) -> dict[str, Tensor]:
    """Import and export every variant; the logits of Megatron's models."""
    logits = {}
    for name in VARIANTS:
        import_huggingface(directory / name / "source", directory / name / "imported")
        logits[name] = megatron_logits(models.open(directory / name / "imported"), TOKENS)
        export_huggingface(
            models.open(directory / name / "imported"), directory / name / "exported"
        )
    return logits


def save_again(directory: Path, layout: str) -> dict[str, dict[str, Any]]:
    """Load every variant in a layout and save it as a run does.

    Returns:
        This rank's logits, and the tensors that are not what the source has.
    """
    config = PlatformConfig(device="cpu", precision="fp32")
    platform = parallel.start(config, LAYOUTS[layout], seed=0)
    found: dict[str, dict[str, Any]] = {"logits": {}, "wrong": {}}
    for name in VARIANTS:
        imported, saved = directory / name / "imported", directory / name / layout
        shape = read_info(imported).shape
        chunks = build_model(shape, platform, LAYOUTS[layout], TOKENS.shape[1])
        models.open(imported).fill(chunks, platform)
        background.save(sharded_weights(chunks), saved)
        again, source = (
            WeightsReader(saved, shape),
            models.open(directory / name / "source"),
        )
        found["wrong"][name] = [
            key for key, tensor in again.items() if not torch.equal(tensor, source.read(key))
        ]
        if layout == "tensor":
            with torch.no_grad():
                rows = [chunks[0](row[None], POSITIONS, None) for row in TOKENS]
            found["logits"][name] = torch.cat(rows)
    parallel.stop()
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    for name, changes in VARIANTS.items():
        save_llama(directory / name / "source", **{**SIZES, **changes})
    return directory


@pytest.fixture(scope="module")
def logits(directory: Path) -> dict[str, Tensor]:
    """Of Megatron's models on one process; all are imported and exported."""
    found: dict[str, Tensor] = run_distributed(convert, 1, directory)[0]
    return found


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, directory: Path, logits: dict[str, Tensor]) -> list[Any]:
    """What two ranks found in a layout."""
    return run_distributed(save_again, 2, directory, request.param)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_exported_tensors_are_those_of_transformers(
    variant: str, directory: Path, logits: dict[str, Tensor]
) -> None:
    model = load_llama(directory / variant / "source")
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert (logits[variant] - expected).abs().max() < 1e-4 * expected.std()
    assert_same_tensors(model, load_llama(directory / variant / "exported"))


def test_any_layout_loads_and_saves_the_same(ranks: list[Any], logits: dict[str, Tensor]) -> None:
    for rank in ranks:
        assert rank["wrong"] == {name: [] for name in VARIANTS}
    for name in ranks[0]["logits"]:
        parts = torch.cat([rank["logits"][name] for rank in ranks], dim=-1)
        expected = logits[name]
        difference = (parts[..., : expected.shape[-1]] - expected).abs().max()
        assert difference < 1e-4 * expected.std(), name
