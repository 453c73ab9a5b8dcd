"""What is exported runs in an engine that is neither Megatron nor transformers: CTranslate2.

Its converter reads the directory and its own C++ code computes: an exported shape is an ordinary
one. Left out is what it does not support (dynamic, yarn), ignores or refuses (sliding windows), and
`llama3`, which it computes less exactly: 0.5% off, of what transformers saved too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from megashear.checkpoint import models
from megashear.checkpoint.dense import export_huggingface, import_huggingface
from tests.support.hf_models import SIZES, VARIANTS, save_llama, tokens_of
from tests.support.make_tokenizer import example

pytest.importorskip("ctranslate2")
engine = example("smollm2/other_engine")

VARIANTS_THERE = (
    *("multi_head", "wide_heads", "tied", "linear", "biases"),
    *("mistral_v3", "qwen2", "qwen3"),
)


class Converter(engine.Converter):  # type: ignore[name-defined]
    """The example's, for directories without a tokenizer."""

    def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerFast:
        words = {f"word{number}": number for number in range(SIZES["vocab_size"])}
        tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
        names = {f"{name}_token": f"word{n}" for n, name in enumerate(("unk", "bos", "eos"))}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("variant", VARIANTS_THERE)
def test_exported_models_compute_the_same_there(variant: str, tmp_path: Path) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    model = save_llama(source, **VARIANTS[variant])
    import_huggingface(source, checkpoint)
    export_huggingface(models.open(checkpoint), out)
    tokens = tokens_of(model)
    with torch.no_grad():
        expected = model(tokens).logits
    found = engine.engine_logits(Converter(str(out)), tmp_path / "engine", tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
