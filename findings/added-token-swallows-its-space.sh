#!/usr/bin/env bash
# tokenizers 0.23.3, Python 3.11.
#
# A token that is added as a plain string, add_tokens(["<tool>"]), is "normalized". In a LLaMA-2 type
# tokenizer.json (normalizer: put a "▁" in front, replace spaces by "▁") the token's own text is
# normalized too and becomes "▁<tool>". It is then found only at the start of the text or after a
# space, and takes that space with it. Inside a word, or after a newline, as chat templates have
# it, it falls into pieces. AddedToken("<tool>", normalized=False) is found everywhere.
#
# Seen:
#   plain string      'a <tool> b' -> '▁a' '▁<tool>' '▁' 'b'; 'a<tool>b' -> '▁a' '<' 'too' 'l' '>' 'b'
#   normalized=False  both hold the token '<tool>'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet tokenizers==0.23.3
venv/bin/python - <<'PY'
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers


def llama2_type():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>"], initial_alphabet=list("<>abolt\n")
    )
    tokenizer.train_from_iterator(["a tool to look at all of a boat"] * 20, trainer)
    return tokenizer


texts = ("<tool>", "a <tool> b", "a<tool>b", "\n<tool>")
hits = {}
for name, token in (
    ("plain string", "<tool>"),
    ("normalized=False", AddedToken("<tool>", normalized=False)),
):
    tokenizer = llama2_type()
    tokenizer.add_tokens([token])
    number = tokenizer.token_to_id("<tool>")
    for text in texts:
        encoding = tokenizer.encode(text)
        hits[name, text] = number in encoding.ids
        print(f"{name:16} {text!r:13} {encoding.tokens}")
assert [hits["plain string", text] for text in texts] == [True, True, False, False], hits
assert all(hits["normalized=False", text] for text in texts), hits
print("plain string: found at the start and after a space; normalized=False: everywhere")
PY
echo "seen again"
