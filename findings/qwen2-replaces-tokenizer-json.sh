#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3, torch 2.13.0, Python 3.11.
#
# Under model_type qwen2, AutoTokenizer keeps only the vocabulary and merges of tokenizer.json. It
# replaces the normalizer and the pre-tokenizer by Qwen2's own, even where tokenizer_config.json
# says `"tokenizer_class": "PreTrainedTokenizerFast"`. Under llama, mistral and qwen3 the same three
# files give the ids of tokenizer.json. Nothing is logged. A Qwen2-shaped model with another
# tokenizer (a vocabulary transplant, a DeepSeek distillation, a model trained from scratch)
# therefore reads other ids than it was trained on.
#
# Seen: llama, mistral, qwen3 [54, 49, 53] as tokenizer.json; qwen2 [30, 52, 26, 15, 11, 3, 4, 5, 6, 7, 8]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
venv/bin/pip install --quiet transformers==5.23.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

text = "Hello world, 12345"
tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
tokenizer.decoder = decoders.Metaspace()
trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"])
tokenizer.train_from_iterator(["Hello world, a tokenizer reads 12345 words"] * 50, trainer)
expected = tokenizer.encode(text).ids

same = {}
for model_type in ("llama", "mistral", "qwen3", "qwen2"):
    path = Path(model_type)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    loaded = AutoTokenizer.from_pretrained(path)
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    same[model_type] = ids == expected
    print(f"{model_type:8} {type(loaded).__name__:18} {ids} {'same' if ids == expected else 'other'}")
print("tokenizer.json itself      ", expected)
assert same == {"llama": True, "mistral": True, "qwen3": True, "qwen2": False}, same
PY
echo "seen again"
