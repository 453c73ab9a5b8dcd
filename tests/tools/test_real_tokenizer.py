"""Tokenizers that were published go through import, `megashear tokenize` and export.

The package mistral-common carries them (Apache-2.0): two of LLaMA's kind, and others that must be
refused clearly. Its files are read where they lie; it is not imported.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from megashear import cli
from megashear.errors import DataError
from megashear.tokenizer.convert import save_for_transformers
from megashear.tokenizer.load import load_tokenizer
from tests.support.hf_models import save_llama
from tests.support.make_tokenizer import real_texts, write_jsonl
from tests.tools.conftest import Tool

SPEC = importlib.util.find_spec("mistral_common")
if SPEC is None or not SPEC.submodule_search_locations:
    pytest.skip("mistral-common is not installed", allow_module_level=True)
FOLDER = Path(SPEC.submodule_search_locations[0]) / "data"
LIKE_LLAMA = {"tokenizer.model.v1": 32000, "mistral_instruct_tokenizer_240216.model.v2": 32768}
"""Files, and the sizes of their vocabularies."""
TEXTS = [
    *real_texts()[:50],
    *(
        "  two  spaces ",
        "\t\ttab\n\n",
        "0123 4.5",
        "[INST] <0x0A>",
        "déjà vu, 日本語 🦙\u2028",
    ),
]


@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_ids_are_sentencepieces_all_the_way(name: str, tmp_path: Path, tool: Tool) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    save_llama(source, vocab_size=LIKE_LLAMA[name], num_hidden_layers=1)
    shutil.copyfile(FOLDER / name, source / "tokenizer.model")  # as LLaMA was published
    processor = SentencePieceProcessor(model_file=str(FOLDER / name))
    expected = [processor.encode(text) for text in TEXTS]

    assert tool("import", "--hf", source, "--out", checkpoint)[0] == 0
    text, tokens = write_jsonl(tmp_path / "text.jsonl", TEXTS), tmp_path / "tokens"
    arguments = ("--input", text, "--output", tokens, "--tokenizer", source, "--workers", "1")
    assert not cli.execute(["tokenize", *map(str, arguments)])
    assert [document.tolist() for document in IndexedDataset(str(tokens))] == [
        [processor.bos_id(), *ids, processor.eos_id()] for ids in expected
    ]

    assert tool("export", "--checkpoint", checkpoint, "--out", out)[0] == 0
    exported = AutoTokenizer.from_pretrained(out)
    for text, ids in zip(TEXTS, expected, strict=True):
        assert exported(text)["input_ids"] == [processor.bos_id(), *ids]
        assert exported.decode(ids) == processor.decode(ids)
    assert len(exported) == processor.get_piece_size() == LIKE_LLAMA[name]
    special = {"bos_token_id": 1, "eos_token_id": 2}
    assert special == {key: getattr(exported, key) for key in special}
    for file in ("config.json", "generation_config.json"):
        assert special.items() <= json.loads((out / file).read_text()).items(), file
    assert (out / "tokenizer.model").read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(
    "name", [f"mistral_instruct_tokenizer_{v}" for v in ("240323.model.v3", "241114.model.v7")]
)
def test_pieces_that_cut_a_text_are_not_llamas(name: str, tmp_path: Path) -> None:
    """[REFERENCE_DOC_1] in a text is one piece there: no tokenizer.json here would do that."""
    with pytest.raises(DataError, match="not trained with LLaMA's settings"):
        save_for_transformers(FOLDER / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_tekken_is_not_taken_for_a_tokenizer_json(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} is not a Hugging Face tokenizer.json"):
        load_tokenizer(FOLDER / name)
