#!/usr/bin/env bash
# ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# CTranslate2 lists "llama3" among its RoPE scalings, and its converter takes such a model without a
# warning. The factor is lost on the way: the engine computes the logits of the same weights without
# any scaling. LLaMA-3.1 and 3.2 shapes are affected.
#
# Seen (factor 8, 512 tokens): differs from the model by 9.7, from the unscaled model by 9e-05
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet transformers==5.23.0 ctranslate2==4.8.5
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import ctranslate2
import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build(rope):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **rope},
    )
    return LlamaForCausalLM(config).eval()


llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
model = build({**llama3, "original_max_position_embeddings": 8192})
unscaled = build({"rope_type": "default"})
words = models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(words), unk_token="t0", bos_token="t1", eos_token="t2"
)
model.save_pretrained("model")
tokenizer.save_pretrained("model")
TransformersConverter("model").convert("model.ct2")
engine = ctranslate2.Generator("model.ct2", device="cpu", compute_type="float32")
ids = torch.randint(3, 128, (1, 512))
logits = torch.from_numpy(np.array(engine.forward_batch(ids.tolist()))).float()
with torch.no_grad():
    from_model = (logits - model(ids).logits).abs().max().item()
    from_unscaled = (logits - unscaled(ids).logits).abs().max().item()
print(f"differs from the model by {from_model:.1e}, from the unscaled model by {from_unscaled:.1e}")
assert from_unscaled < 1e-3 and from_model > 0.1
PY
echo "seen again"
