#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6, Python 3.11 (no torch needed).
#
# Whether a LLaMA-type tokenizer puts <s> before a text is said twice in published models: by
# add_bos_token in tokenizer_config.json and by the post-processor of tokenizer.json. transformers 4
# obeys the key (true where it is missing) and rewrites the post-processor. transformers 5 obeys
# the post-processor alone: `"add_bos_token": true` puts no <s>, and false does not take it away. The
# same files give other documents for training, and other scores in evaluation.
#
# Seen (first token is <s>):
#   add_bos_token  post-processor  4.57.6  5.23.0
#   missing        none            True    False
#   true           none            True    False
#   false          puts <s>        False   True
#   true           puts <s>        True    True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv five
python3 -m venv four
five/bin/pip install --quiet transformers==5.23.0
four/bin/pip install --quiet transformers==4.57.6
cat > first.py <<'PY'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import AutoTokenizer

trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"])
path = Path("tokenizer")
path.mkdir(exist_ok=True)
(path / "config.json").write_text('{"model_type": "llama"}')
for key in (None, True, False):
    for template in (False, True):
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.train_from_iterator(["the words of the text"] * 20, trainer)
        if template:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
            )
        tokenizer.save(str(path / "tokenizer.json"))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        names["tokenizer_class"] = "LlamaTokenizerFast"
        if key is not None:
            names["add_bos_token"] = key
        (path / "tokenizer_config.json").write_text(json.dumps(names))
        ids = AutoTokenizer.from_pretrained(path)("the text")["input_ids"]
        print(f"key={key} template={template} bos={ids[0] == 1}")
PY
export HF_HUB_OFFLINE=1
four/bin/python first.py 2>/dev/null | tee four.txt
echo "--- 5.23.0"
five/bin/python first.py 2>/dev/null | tee five.txt
count() { grep -c "$1" "$2" || true; }
# 4 obeys the key: false is the only way to have none. 5 obeys the template.
[ "$(count 'key=False .*bos=False' four.txt)" = 2 ] && [ "$(count 'bos=True' four.txt)" = 4 ]
[ "$(count 'template=True bos=True' five.txt)" = 3 ] && [ "$(count 'bos=True' five.txt)" = 3 ]
echo "seen again"
