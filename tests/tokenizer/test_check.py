"""Whether an export's tokenizer is, for transformers, the one that the text was tokenized with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megashear.tokenizer.check import difference_from_transformers
from tests.support.make_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def as_model(folder: Path, to: Path, model_type: str) -> Path:
    shutil.copytree(folder, to)
    config = {"model_type": model_type, "vocab_size": 500, "transformers_version": "5.0.0"}
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_tokenizer_that_transformers_takes_as_it_is(
    model_type: str, folder: Path, tmp_path: Path
) -> None:
    assert difference_from_transformers(as_model(folder, tmp_path / "model", model_type)) == ""


def test_a_tokenizer_that_transformers_replaces(folder: Path, tmp_path: Path) -> None:
    said = difference_from_transformers(as_model(folder, tmp_path / "model", "qwen2"))
    assert "AutoTokenizer (Qwen2Tokenizer) reads 'Hello world, 12345' as" in said
