"""Run an exported model in CTranslate2, an engine of its own in C++, and hold it to transformers.

The converter comes with CTranslate2 (pip install ctranslate2) and reads the directory as it is.

    python examples/smollm2/other_engine.py --hf models/sheared --out models/sheared-ct2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from megashear import console

TOLERANCE = 3e-4  # of the logits' scale: rounding of two engines in fp32 over 30 layers


class Converter(TransformersConverter):
    """CTranslate2's own, told the size of heads.

    Its loader of LLaMA takes a head to have hidden_size / num_attention_heads channels; the engine
    knows others too, as its loaders of Mistral and Qwen3 say.
    """

    def _load(self) -> Any:
        spec = super()._load()
        config = AutoConfig.from_pretrained(self._model_name_or_path)
        for layer in spec.decoder.layer if config.model_type == "llama" else ():
            vars(layer.self_attention)["head_dim"] = np.dtype("int32").type(config.head_dim)
        return spec


def engine_logits(converter: TransformersConverter, out: Path, tokens: Tensor) -> Tensor:
    """Logits [b, s, vocab] of tokens [b, s] in fp32, of the model converted to `out`."""
    converter.convert(str(out), quantization="float32", force=True)
    threads = {"inter_threads": 1, "intra_threads": torch.get_num_threads()}
    generator = ctranslate2.Generator(str(out), compute_type="float32", **threads)
    return torch.from_numpy(np.array(generator.forward_batch(tokens.tolist())))


def main() -> int:
    """Convert, run both on a text, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face directory to read")
    parser.add_argument("--out", type=Path, required=True, help="CTranslate2 model to write")
    args = parser.parse_args()

    from megashear.checkpoint import models
    from megashear.checkpoint.compare import hf_logits, logits_difference

    # Text, since after some random tokens fp32 is 0.3% off float64 in transformers itself.
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(args.hf)(text, return_tensors="pt")["input_ids"]
    tokens = ids[0, :256].view(4, 64)
    converted = engine_logits(Converter(str(args.hf)), args.out, tokens)
    found = logits_difference(hf_logits(models.open_huggingface(args.hf), tokens), converted)
    agreement = f"the same likeliest token after {found.top1_agreement:.0%} of tokens"
    print(f"CTranslate2 {ctranslate2.__version__} against transformers: logits differ by "
          f"{found.relative:.1e} of their scale, {agreement}")  # fmt: skip
    return 0 if found.within(TOLERANCE) else console.FAILED


if __name__ == "__main__":
    console.run(main)
