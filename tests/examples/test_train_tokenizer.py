"""The demo's tokenizer: LLaMA's settings, seen in what it does to text."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from megashear.errors import DataError
from tests.support.make_tokenizer import example, make_tokenizer, write_jsonl

train_tokenizer = example("demo/train_tokenizer")


def test_pieces_are_llamas(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer", vocab_size=600)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert processor.get_piece_size() == 600
    assert [processor.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert processor.pad_id() == -1
    # Digits one by one; spaces kept; newline a byte; what was never seen becomes bytes.
    assert processor.encode("12", out_type=str)[-2:] == ["1", "2"]
    assert processor.decode(processor.encode("  a   b \n c ")) == "  a   b \n c "
    assert "<0x0A>" in processor.encode("a\nb", out_type=str)
    assert processor.encode("🦙", out_type=str)[-4:] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]
    names = sorted(path.name for path in folder.iterdir() if path.name != "source.jsonl")
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]


def test_sample_is_spread_over_all_files(tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", [f"{n} {i:05d}" for i in range(2000)]) for n in "ab"
    ]
    texts = list(train_tokenizer.sample(files, sum(f.stat().st_size for f in files) // 10))
    assert len(texts) == 400
    assert texts[0] == "a 00000" and texts[-1] == "b 01990"


def test_problems_are_errors_not_a_dead_process(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"no": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no field 'text'"):
        train_tokenizer.train([bad], tmp_path / "out", 500)
    small = write_jsonl(tmp_path / "small.jsonl", ["hardly any text"])
    with pytest.raises(DataError, match="Give more text, or a smaller --vocab-size"):
        train_tokenizer.train([small], tmp_path / "out", 500)
    assert not (tmp_path / "out").exists()
