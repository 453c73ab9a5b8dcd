#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3, Python 3.11 (no torch needed).
#
# Where config.json says model_type mistral and no transformers_version (converters often leave it
# out), AutoTokenizer warns that any tokenizer.json of more than 100,000 tokens has "an incorrect
# regex pattern" and advises fix_mistral_regex=True. It does not look at the pattern: a right LLaMA-3
# type tokenizer is warned about as well. Following the advice replaces its pattern by
# Mistral's, and the ids change. With transformers_version 5.0.0 or later there is no warning.
#
# Seen: by default: warning, ids right; fix_mistral_regex=True: ids WRONG;
#       with transformers_version 5.23.0: no warning, ids right
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import io
import json
import logging
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level]
)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=byte_level.alphabet())
tokenizer.train_from_iterator(["the year 2023, the 12345 words of the world's books"] * 50, trainer)
written = json.loads(tokenizer.to_str())
vocabulary = written["model"]["vocab"]
for number in range(len(vocabulary), 128000):  # as many as LLaMA-3 has
    vocabulary[f"filler{number}"] = number
path = Path("tokenizer")
path.mkdir()
(path / "tokenizer.json").write_text(json.dumps(written))
(path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
text = "12345 words of the year 2023"
expected = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text).ids

seen = []
for config, flags in (
    ({}, {}),
    ({}, {"fix_mistral_regex": True}),
    ({"transformers_version": "5.23.0"}, {}),
):
    (path / "config.json").write_text(json.dumps({"model_type": "mistral", **config}))
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("transformers").addHandler(handler)
    ids = AutoTokenizer.from_pretrained(path, **flags)(text)["input_ids"]
    logging.getLogger("transformers").removeHandler(handler)
    warned = "incorrect regex pattern" in log.getvalue()
    seen.append((warned, ids == expected))
    print(config, flags, "warning" if warned else "no warning", "ids right" if ids == expected else "ids WRONG")
assert seen == [(True, True), (False, False), (False, True)], seen
PY
echo "seen again"
