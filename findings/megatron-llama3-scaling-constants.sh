#!/usr/bin/env bash
# megatron-core 0.16.1, transformers 5.23.0, torch 2.13.0, Python 3.11.
#
# GPTModel takes rope_scaling=True and rope_scaling_factor for "llama3" scaling, and nothing else.
# The other three numbers of config.json are constants there: low_freq_factor 1, high_freq_factor 4,
# original_max_position_embeddings 8192. A model with other numbers trains and evaluates with wrong
# frequencies, and no setting can say otherwise. LLaMA-3.1 and 3.2 (factors 8 and 32) are right.
#
# Seen (largest relative difference of 64 frequencies from transformers'):
#   factor 8: 0, factor 32: 0, original length 4096: 2.0, high_freq_factor 2: 0.57
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet transformers==5.23.0 megatron-core==0.16.1
venv/bin/python -W ignore - <<'PY'
import inspect

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

arguments = [n for n in inspect.signature(GPTModel.__init__).parameters if n.startswith("rope_")]
print("GPTModel takes", arguments)
assert arguments == ["rope_scaling", "rope_scaling_factor"]
differences = []
for factor, high, length in ((8.0, 4.0, 8192), (32.0, 4.0, 8192), (8.0, 4.0, 4096), (8.0, 2.0, 8192)):
    config = LlamaConfig(
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        },
    )
    right, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    rotary = RotaryEmbedding(
        128,
        rotary_percent=1.0,
        rotary_base=500000,
        rope_scaling=True,
        rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )
    differences.append((rotary.inv_freq / right - 1).abs().max().item())
    print(f"factor {factor}, high {high}, original length {length}: {differences[-1]:.2g}")
assert max(differences[:2]) < 1e-5 and min(differences[2:]) > 0.1
PY
echo "seen again"
