"""A tiny chain for `megashear shear`: text, a random source, its tokenizer, and YAML files."""

from __future__ import annotations

from pathlib import Path

from tests.support.hf_models import save_llama
from tests.support.make_tokenizer import make_tokenizer, real_texts, write_jsonl

PRUNE = """\
stage: prune
run_dir: runs/prune
init_from: checkpoints/source
target: {{num_layers: 2, hidden_size: 24, num_attention_heads: 2, ffn_hidden_size: 32}}
pruning: {{sparsity_warmup_steps: 3}}
data:
  seq_length: 32
  domains:
    - {{name: a, train: data/a_train, valid: data/a_valid, weight: 0.7, reference_loss: 4.0}}
    - {{name: b, train: data/b_train, valid: data/b_valid, weight: 0.3, reference_loss: 4.0}}
{common}"""
CONTINUE = """\
stage: continue
run_dir: runs/continue
init_from: runs/prune/extracted
data: {{seq_length: 32, domains_from: runs/prune}}
{common}"""
COMMON = """\
evaluation: {interval: 3, sequences_per_domain: 4}
optimizer: {lr: 1.0e-3, warmup_steps: 2}
trainer: {steps: 6, global_batch_size: 4, micro_batch_size: 1, log_interval: 2, save_interval: 3}
platform: {device: cpu, timeout_minutes: 2}
"""
CHAIN = """\
work_dir: runs/chain
text: text/*.jsonl
tokens: data/{name}
valid_fraction: 0.2
source: models/source
prune_config: prune.yaml
continue_config: continue.yaml
export: models/sheared
"""


def write_chain(folder: Path, common: str = COMMON, processes: int = 1) -> Path:
    """Everything that a chain reads, below a folder; the chain's YAML file."""
    texts = real_texts()
    for index, name in enumerate(("a", "b")):
        write_jsonl(folder / "text" / f"{name}.jsonl", texts[index::2])
    save_llama(folder / "models" / "source", vocab_size=500)
    make_tokenizer(folder / "models" / "source")
    (folder / "prune.yaml").write_text(PRUNE.format(common=common))
    (folder / "continue.yaml").write_text(CONTINUE.format(common=common))
    chain = folder / "chain.yaml"
    chain.write_text(CHAIN + f"processes: {processes}\n")
    return chain
