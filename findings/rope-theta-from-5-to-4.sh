#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6, torch 2.13.0, Python 3.11.
#
# transformers 5 writes the base of the rotary embedding as config.json's rope_parameters.rope_theta
# and no longer as the top-level rope_theta. transformers 4 does not know rope_parameters: it loads
# the directory without a warning and computes with its default base of 10,000. A LLaMA-3 or Qwen
# shape (base 500,000 or 1,000,000) that is saved by 5 is another model in 4, and in every tool
# that still depends on 4. Both are right where config.json has both forms.
#
# Seen (base 500,000; logits up to 10.2):
#   transformers 4.57.6 read base 10000.0, logits differ by 14.8
#   with a top-level rope_theta as well: base 500000.0, logits differ by 0.0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet transformers==5.23.0
venv/bin/pip install --quiet --target four transformers==4.57.6
export HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    initializer_range=0.3,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained("model")
with torch.no_grad():
    torch.save(model(torch.arange(3, 128)[None]).logits, "logits.pt")
PY
PYTHONPATH=four venv/bin/python - <<'PY'
import json

import torch
import transformers

right = torch.load("logits.pt")


def compare(note):
    model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
    with torch.no_grad():
        difference = (model(torch.arange(3, 128)[None]).logits - right).abs().max().item()
    base = model.config.rope_theta
    print(f"{note}: base {base}, logits differ by {difference:.1f} (largest {right.abs().max():.1f})")
    return base, difference


base, difference = compare(f"transformers {transformers.__version__}")
assert base == 10000.0 and difference > 1
with open("model/config.json") as file:
    config = json.load(file)
config["rope_theta"] = config["rope_parameters"]["rope_theta"]
with open("model/config.json", "w") as file:
    json.dump(config, file)
base, difference = compare("with a top-level rope_theta as well")
assert base == 500000.0 and difference < 1e-3
PY
echo "seen again"
