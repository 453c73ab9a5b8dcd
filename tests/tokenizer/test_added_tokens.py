"""Tokenizers of finetunes: a base model's tokenizer.model, and added tokens beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megashear.errors import DataError
from megashear.tokenizer.convert import save_for_transformers
from megashear.tokenizer.load import load_tokenizer
from tests.support.make_tokenizer import make_tokenizer

SIZE = 500
CHAT = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
BASE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
CHATML = {
    **BASE,
    "tokenizer_class": "LlamaTokenizer",
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "[PAD]"},
    "chat_template": CHAT,
    "model_max_length": 2048,
    "add_bos_token": False,
    "added_tokens_decoder": {
        "500": {"content": "<|im_end|>", "special": True, "normalized": False},
        "501": {"content": "<|im_start|>", "special": False, "normalized": False},
        "502": {"content": "[PAD]", "special": True, "normalized": False},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("base"))


def finetune(base: Path, folder: Path, config: dict[str, Any], added: dict[str, int]) -> Path:
    """A directory with tokenizer.model and the settings beside it, and no tokenizer.json."""
    folder.mkdir()
    shutil.copy(base / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def test_documents_end_with_the_eos_that_the_directory_names(base: Path, tmp_path: Path) -> None:
    files = {"<|im_end|>": 500, "<|im_start|>": 501}
    named = {**BASE, "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(finetune(base, tmp_path / "a", named, files))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (500, 1, 502)
    plain = load_tokenizer(base)
    texts = ["plain text", "it says <|im_end|> and </s> in a text"]
    assert tokenizer.encode(texts[:1]) == plain.encode(texts[:1])
    assert not {1, 2, 500} & set(tokenizer.encode(texts)[1])  # names of special tokens are text
    assert tokenizer.sha256 != plain.sha256


def test_tokenizer_json_counts_where_the_two_files_differ(base: Path, tmp_path: Path) -> None:
    files = {"<|im_end|>": 500}
    named = {**BASE, "eos_token": "<|im_end|>"}
    folder = finetune(base, tmp_path / "a", named, files)
    save_for_transformers(folder / "tokenizer.model", folder)
    forms = [folder, folder / "tokenizer.model", folder / "tokenizer.json"]
    assert [load_tokenizer(form).eos_id for form in forms] == [500] * 3


def test_an_export_keeps_all_that_the_source_states(base: Path, tmp_path: Path) -> None:
    source = finetune(base, tmp_path / "source", CHATML, {})
    save_for_transformers(source / "tokenizer.model", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "one <|im_start|>two [PAD]<|im_end|> three"
    found = theirs(text)["input_ids"]
    assert found[0] != 1  # add_bos_token: false
    assert [number for number in found if number >= SIZE] == [501, 502, 500]
    assert (len(theirs), theirs.eos_token_id, theirs.pad_token) == (503, 500, "[PAD]")
    assert (theirs.chat_template, theirs.model_max_length) == (CHAT, 2048)
    ours = load_tokenizer(tmp_path / "out")
    assert (ours.eos_id, ours.bos_id) == (500, None)
    assert ours.encode(["one two"])[0] == theirs("one two")["input_ids"]


def test_ids_with_a_gap_are_refused(base: Path, tmp_path: Path) -> None:
    folder = finetune(base, tmp_path / "a", BASE, {"<|im_end|>": 510})
    with pytest.raises(DataError, match=r"added_tokens\.json: '<\|im_end\|>' has the id 510"):
        load_tokenizer(folder)


def test_a_contradiction_about_bos_is_reported(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_id == 1  # what the template of tokenizer.json does
    assert "against add_bos_token = false" in tokenizer.note
    assert load_tokenizer(base).note == ""
