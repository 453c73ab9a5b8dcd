"""What is exported runs in an engine that is neither Megatron nor transformers: CTranslate2.

Its converter reads the directory and its own C++ code computes: an exported shape is an ordinary
one. Left out is what it does not support (dynamic, yarn), ignores or refuses (sliding windows), and
`llama3`, which it computes less exactly: 0.5% off, of what transformers saved too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from megashear.checkpoint.convert import export_huggingface, import_huggingface
from tests.hf_models import SIZES, VARIANTS, save_llama, tokens_of

VARIANTS_THERE = (
    *("multi_head", "wide_heads", "tied", "linear", "biases"),
    *("mistral_v3", "qwen2", "qwen3"),
)

ctranslate2 = pytest.importorskip("ctranslate2")
from ctranslate2.converters import TransformersConverter  # noqa: E402


class Converter(TransformersConverter):
    """CTranslate2's own, given the size of heads and a tokenizer.

    Its loader of LLaMA takes heads for hidden_size / num_attention_heads channels wide, though the
    engine itself knows others (as its loaders of Mistral and Qwen3 say).
    """

    def _load(self) -> Any:
        spec = super()._load()
        config = AutoConfig.from_pretrained(self._model_name_or_path)
        for layer in spec.decoder.layer if config.model_type == "llama" else ():
            vars(layer.self_attention)["head_dim"] = np.dtype("int32").type(config.head_dim)
        return spec

    def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerFast:
        words = {f"word{number}": number for number in range(SIZES["vocab_size"])}
        tokenizer = Tokenizer(WordLevel(words, unk_token="word0"))
        names = {f"{name}_token": f"word{n}" for n, name in enumerate(("unk", "bos", "eos"))}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def engine_logits(directory: Path, scratch: Path, tokens: Tensor) -> Tensor:
    """Logits of CTranslate2 in fp32."""
    Converter(str(directory)).convert(str(scratch), quantization="float32")
    generator = ctranslate2.Generator(
        str(scratch), compute_type="float32", inter_threads=1, intra_threads=1
    )
    return torch.from_numpy(np.array(generator.forward_batch(tokens.tolist())))


@pytest.mark.parametrize("variant", VARIANTS_THERE)
def test_exported_models_compute_the_same_there(variant: str, tmp_path: Path) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    model = save_llama(source, **VARIANTS[variant])
    export_huggingface(import_huggingface(source, checkpoint), out)
    tokens = tokens_of(model)
    with torch.no_grad():
        expected = model(tokens).logits
    found = engine_logits(out, tmp_path / "engine", tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
