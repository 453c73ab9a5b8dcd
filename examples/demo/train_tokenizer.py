"""Train the demo's tokenizer: sentencepiece as LLaMA uses it, and its twin for `transformers`.

Writes `tokenizer.model`, and `tokenizer.json` with `tokenizer_config.json`, with which
`AutoTokenizer.from_pretrained(DIR)` gives the same ids.

    python examples/demo/train_tokenizer.py --input 'demo-run/text/*.jsonl' --out demo-run/tokenizer
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megashear import console
from megashear.data.tokenize.jsonl import find_inputs, read_chunks, text_of
from megashear.errors import DataError
from megashear.tokenizer.convert import save_for_transformers
from megashear.tokenizer.files import SENTENCEPIECE

SAMPLE_BYTES = 2_000_000
LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
"""LLaMA's settings. A newline ends a training sentence, so it stays the byte <0x0A>, as there."""


def sample(files: Sequence[Path], size: int) -> Iterator[str]:
    """Texts spread evenly over all files, about `size` bytes of them."""
    every = max(1, round(sum(file.stat().st_size for file in files) / size))
    for file in files:
        lines = (line for chunk in read_chunks([file]) for line in chunk.lines)
        for number, line in enumerate(lines):
            if number % every == 0 and line.strip():
                try:
                    yield text_of(line, "text")
                except ValueError as error:
                    raise DataError(f"{file}:{number + 1}: {error}") from error


def train(files: Sequence[Path], out: Path, vocab_size: int) -> None:
    """Train on a sample of the files and write the tokenizer's files to `out`.

    Raises:
        DataError: a malformed line, or too little text for such a vocabulary.
    """
    # Beforehand, since an exception within sentencepiece's iteration ends the process.
    sentences = [line for text in sample(files, SAMPLE_BYTES) for line in text.split("\n") if line]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
            **LLAMA,
        )
    except RuntimeError as error:
        raise DataError(
            f"cannot train {vocab_size:,} pieces on {len(sentences):,} lines: {error}. Give more "
            "text, or a smaller --vocab-size (above 300)"
        ) from error
    out.mkdir(parents=True, exist_ok=True)
    partial = out / f"{SENTENCEPIECE}.partial"
    partial.write_bytes(model.getvalue())
    os.replace(partial, out / SENTENCEPIECE)
    save_for_transformers(out / SENTENCEPIECE, out)


def main() -> None:
    """Train, and say where the result lies."""
    parser = argparse.ArgumentParser(description="Train a tokenizer with LLaMA's settings.")
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files or quoted patterns")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.model")
    parser.add_argument("--vocab-size", type=int, default=2048, help="pieces (default 2048)")
    args = parser.parse_args()
    train(find_inputs(args.input), args.out, args.vocab_size)
    print(f"{args.vocab_size:,} pieces in {args.out / SENTENCEPIECE}")


if __name__ == "__main__":
    console.run(main)
