#!/usr/bin/env bash
# ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# CTranslate2's converter does not read head_dim of a LLaMA config.json; the engine takes hidden
# size / heads. A LLaMA whose heads have another width (hidden size or heads pruned, or narrow by
# design) converts without a word, and its logits are wrong. The same weights saved as a Mistral
# (no sliding window) are right, whose loader does read head_dim.
#
# Seen (hidden 64, 4 heads of 32, logits up to 3.0): llama differs by 0.91, mistral by 2e-06
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
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast

words = models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(words), unk_token="t0", bos_token="t1", eos_token="t2"
)
shape = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    initializer_range=0.1,
)
torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
mistral = MistralForCausalLM(MistralConfig(**shape, sliding_window=None)).eval()
mistral.load_state_dict(llama.state_dict())
ids = torch.randint(3, 128, (1, 32))
with torch.no_grad():
    right = llama(ids).logits
    assert torch.allclose(mistral(ids).logits, right, atol=1e-5)

differences = {}
for name, model in (("llama", llama), ("mistral", mistral)):
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    TransformersConverter(name).convert(f"{name}.ct2")
    engine = ctranslate2.Generator(f"{name}.ct2", device="cpu", compute_type="float32")
    logits = torch.from_numpy(np.array(engine.forward_batch(ids.tolist()))).float()
    differences[name] = (logits - right).abs().max().item()
    print(f"{name}: differs by {differences[name]:.1e}; logits up to {right.abs().max():.1f}")
assert differences["mistral"] < 1e-4 and differences["llama"] > 0.1, differences
PY
echo "seen again"
