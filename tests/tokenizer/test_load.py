"""Tokenizers: both formats against their libraries, and sentencepiece against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from megashear.data.fingerprint import Fingerprint
from megashear.data.tokenize.preprocess import tokenize_files
from megashear.errors import DataError
from megashear.tokenizer.convert import save_for_transformers
from megashear.tokenizer.load import load_tokenizer
from tests.support.make_tokenizer import SHARED_DATA, make_tokenizer, real_texts, write_jsonl

AWKWARD = [
    "",
    " ",
    "  a",
    "a  ",
    "\n",
    "\t\tx",
    "\0",
    "é\u2028ü",
    "日本語 🦙🦙",
    "0123 4.5",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_sentencepiece_file_and_folder(
    folder: Path, processor: sentencepiece.SentencePieceProcessor
) -> None:
    for path in (folder, folder / "tokenizer.model", str(folder)):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (500, 1, 2)
        texts = real_texts() + AWKWARD
        assert tokenizer.encode(texts) == [processor.encode(text) for text in texts]


def test_transformers_gives_sentencepieces_ids(
    folder: Path, processor: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    # As exported: a LLaMA's config.json beside the tokenizer's files.
    exported = tmp_path / "exported"
    shutil.copytree(folder, exported)
    LlamaConfig(vocab_size=500).save_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for text in real_texts() + AWKWARD:
        ids = processor.encode(text)
        assert tokenizer(text)["input_ids"] == [1, *ids]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == processor.decode(ids)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 500)


@pytest.fixture(scope="module")
def json_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer without its sentencepiece model."""
    alone = tmp_path_factory.mktemp("json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, alone)
    return alone


@given(text=st.text(st.sampled_from(" \n\t_=ae1ée🦙<>/s.-#") | st.characters(codec="utf-8")))
def test_both_formats_give_the_same_ids(folder: Path, json_alone: Path, text: str) -> None:
    ours = load_tokenizer(folder / "tokenizer.model").encode([text])
    assert load_tokenizer(json_alone).encode([text]) == ours


def test_names_of_special_tokens_in_text_are_text(folder: Path, json_alone: Path) -> None:
    for path in (folder, json_alone):
        (ids,) = load_tokenizer(path).encode(["<s>a</s> b<unk>"])
        assert not {0, 1, 2} & set(ids)


def test_hash_follows_the_content(folder: Path, json_alone: Path, tmp_path: Path) -> None:
    other = tmp_path / "renamed.model"
    shutil.copy(folder / "tokenizer.model", other)
    assert load_tokenizer(other).sha256 == load_tokenizer(folder).sha256
    assert load_tokenizer(other).sha256 != load_tokenizer(json_alone).sha256


def test_every_form_of_a_tokenizer_is_one(folder: Path) -> None:
    forms = (folder, folder / "tokenizer.model", folder / "tokenizer.json")
    found = [load_tokenizer(form) for form in forms]
    assert len({(t.sha256, t.bos_id, t.eos_id, t.vocab_size) for t in found}) == 1


def test_hugging_face_tokenizer_without_bos(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.add_special_tokens(["<|end|>"])
    model.enable_truncation(2)
    model.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<|end|>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (4, None, 3)
    assert tokenizer.encode(["a b a b"]) == [[1, 2, 1, 2]]
    config.unlink()
    with pytest.raises(DataError, match="must name a token of the vocabulary as eos_token"):
        load_tokenizer(tmp_path)


def write_family(family: str, folder: Path, llama: Path) -> Path:
    """A small tokenizer of a family, as transformers' own class of it saves it."""
    if family == "llama":
        shutil.copytree(llama, folder)
        return folder
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    begin, end = "<|begin_of_text|>", "<|endoftext|>"
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=alphabet,
        special_tokens=[begin, end],
        show_progress=False,
    )
    model.train_from_iterator(real_texts(), trainer)
    trained = json.loads(model.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    if family == "gpt2":  # its bos is its eos, and is not put before a text
        saved = GPT2Tokenizer(trained["vocab"], merges, bos_token=end, eos_token=end)
    elif family == "qwen":
        saved = Qwen2Tokenizer(trained["vocab"], merges, eos_token=end)
    else:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, model.token_to_id(begin))]
        )
        saved = PreTrainedTokenizerFast(tokenizer_object=model, bos_token=begin, eos_token=end)
    saved.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "begins"), [("llama", True), ("gpt2", False), ("qwen", False), ("llama3", True)]
)
def test_documents_begin_as_transformers_begins_a_text(
    folder: Path, tmp_path: Path, family: str, begins: bool
) -> None:
    """And end with the eos, which no family puts there by itself."""
    saved = write_family(family, tmp_path / family, folder)
    theirs = AutoTokenizer.from_pretrained(saved)
    texts = [text for text in real_texts() + AWKWARD if text]
    source = write_jsonl(tmp_path / "a.jsonl", [text for text in texts if text.strip()])
    tokenize_files([str(source)], saved, tmp_path / "x")
    made = IndexedDataset(str(tmp_path / "x"))
    expected = [theirs(text)["input_ids"] for text in texts if text.strip()]
    assert [made[i].tolist() for i in range(len(made))] == [
        [*ids, theirs.eos_token_id] for ids in expected
    ]
    assert all((ids[0] == theirs.bos_token_id) == begins for ids in expected)
    bos_id = theirs.bos_token_id if begins else None
    assert load_tokenizer(saved).bos_id == Fingerprint.read(tmp_path / "x").bos_id == bos_id


def test_sentencepiece_without_bos_where_its_configuration_says_so(
    folder: Path, tmp_path: Path
) -> None:
    """As Baichuan's."""
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).bos_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.model", b"", "not a sentencepiece model"),
        ("x.model", b"version https://git-lfs.github.com/spec/v1\n", "not a sentencepiece model"),
        ("x.json", b"{}", "not a Hugging Face tokenizer.json"),
        ("x.json", b"\xff", "not a Hugging Face tokenizer.json"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.model: No such file"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_models_unlike_llama_are_refused(tmp_path: Path) -> None:
    models: dict[str, dict[str, Any]] = {
        "unigram": {"model_type": "unigram", "byte_fallback": True},
        "normalised": {"model_type": "bpe", "byte_fallback": True},  # nmt_nfkc, spaces squeezed
        "no_bos": {"model_type": "bpe", "bos_id": -1},
    }
    for name, settings in models.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(real_texts()).split("\n")),
            model_prefix=str(tmp_path / name),
            vocab_size=500,
            minloglevel=2,
            **settings,
        )
        with pytest.raises(DataError, match="LLaMA's settings"):
            save_for_transformers(tmp_path / f"{name}.model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}")
def test_llamas_own_tokenizer_converts_exactly(tmp_path: Path) -> None:
    model = SHARED_DATA / "llama-tokenizer.model"
    save_for_transformers(model, tmp_path)
    texts = []
    for path in sorted(SHARED_DATA.glob("redpajama-sample/*/*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        texts += [json.loads(line)["text"][:20_000] for line in lines[:40]]
    assert len(texts) > 200
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(texts)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == expected
    ours = load_tokenizer(model)
    assert theirs("a")["input_ids"] == [ours.bos_id, *ours.encode(["a"])[0]]
    assert theirs.eos_token_id == ours.eos_id == 2
