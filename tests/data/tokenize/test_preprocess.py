"""JSONL to Megatron token files, read back by Megatron and compared with sentencepiece itself."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megashear.data.fingerprint import Fingerprint
from megashear.data.tokenize import preprocess
from megashear.data.tokenize.preprocess import tokenize_files
from megashear.errors import DataError
from tests.support.make_tokenizer import (
    REPOSITORY,
    SHARED_DATA,
    make_tokenizer,
    real_texts,
    write_jsonl,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer")) / "tokenizer.model"


def expected_documents(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return [[1, *processor.encode(text), 2] for text in texts]


def documents(prefix: Path | str) -> list[list[int]]:
    """What Megatron reads, document by document."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    assert list(bounds) == list(range(len(dataset) + 1))  # one sequence a document
    return [dataset[i].tolist() for i in range(len(dataset))]


def left_behind(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_are_sentencepieces_in_order(
    tokenizer: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megashear.data.tokenize.jsonl.CHUNK_BYTES", 20_000)  # many chunks
    texts = [*real_texts(), "é\0🦙\u2028 x\n\n"]
    plain = write_jsonl(tmp_path / "a.jsonl", texts[:70])
    packed = tmp_path / "b.jsonl.gz"
    other = write_jsonl(tmp_path / "other", [{"text": t, "meta": {"n": 1}} for t in texts[70:]])
    packed.write_bytes(gzip.compress(other.read_bytes()))
    inputs = [str(plain), str(packed)]
    report = tokenize_files(inputs, tokenizer, tmp_path / "out" / "x.1", workers=workers)
    expected = expected_documents(tokenizer, texts)
    assert documents(tmp_path / "out" / "x.1") == expected
    ((prefix, output),) = report.outputs.items()
    assert (output.documents, output.tokens) == (len(texts), sum(map(len, expected)))
    assert left_behind(tmp_path / "out") == ["x.1.bin", "x.1.idx", "x.1.json"]
    assert IndexedDataset(prefix).index.dtype == np.uint16
    print_of = Fingerprint.read(prefix)
    assert (print_of.documents, print_of.tokens) == (output.documents, output.tokens)
    assert (print_of.vocab_size, print_of.bos_id, print_of.eos_id) == (500, 1, 2)


def test_number_of_workers_does_not_change_a_byte(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", real_texts() * 20)
    for workers in (1, 3):
        tokenize_files(
            [str(source)], tokenizer, tmp_path / f"w{workers}", workers=workers, valid_fraction=0.3
        )
    for suffix in ("_train.bin", "_train.idx", "_valid.bin", "_valid.idx", "_valid.json"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w3{suffix}").read_bytes()


def test_split_keeps_copies_together_and_loses_nothing(tokenizer: Path, tmp_path: Path) -> None:
    texts = real_texts()
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1] + texts)
    report = tokenize_files([str(source)], tokenizer, tmp_path / "x", valid_fraction=0.25)
    train, valid = (Counter(map(tuple, documents(tmp_path / f"x_{p}"))) for p in ("train", "valid"))
    assert not train.keys() & valid.keys()
    assert train + valid == Counter(map(tuple, expected_documents(tokenizer, texts * 3)))
    assert [prefix[-6:] for prefix in report.outputs] == ["_train", "_valid"]
    # 4.5 standard deviations of a fair draw of the distinct documents
    spread = 4.5 * (0.25 * 0.75 / len(set(texts))) ** 0.5
    assert abs(len(valid) / (len(train) + len(valid)) - 0.25) < spread


def test_split_is_the_same_in_every_run_and_file(tokenizer: Path, tmp_path: Path) -> None:
    """A document that comes again, in another file, run or domain, is on the same side."""
    texts = real_texts()
    sides: dict[str, list[set[tuple[int, ...]]]] = {"train": [], "valid": []}
    for name, part in {"a": texts[:60], "b": texts[30:], "c": texts[::-1]}.items():
        files = [
            str(write_jsonl(tmp_path / name / "1.jsonl", part[:20])),
            str(write_jsonl(tmp_path / name / "2.jsonl", part[20:])),
        ]
        tokenize_files(files, tokenizer, tmp_path / "out" / name, valid_fraction=0.3)
        for side, found in sides.items():
            found.append(set(map(tuple, documents(tmp_path / "out" / f"{name}_{side}"))))
    train, valid = (set().union(*found) for found in sides.values())
    assert not train & valid
    assert train == sides["train"][2] and valid == sides["valid"][2]  # c has all texts


def test_workers_need_no_torch(tokenizer: Path, tmp_path: Path) -> None:
    """Every process imports what this imports; torch alone takes seconds."""
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    code = (
        "import sys; from megashear.data.tokenize.preprocess import tokenize_files\n"
        f"tokenize_files([{str(source)!r}], {str(tokenizer)!r}, {str(tmp_path / 'x')!r})\n"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_empty_documents_are_skipped_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", "one", " \n\t", "two", ""])
    source.write_bytes(source.read_bytes() + b"\n  \n")  # empty lines are no documents
    report = tokenize_files([str(source)], tokenizer, tmp_path / "x")
    assert report.empty == 3
    assert documents(tmp_path / "x") == expected_documents(tokenizer, ["one", "two"])


def test_other_field(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"content": "abc", "text": 3}])
    tokenize_files([str(source)], tokenizer, tmp_path / "x", field="content")
    assert documents(tmp_path / "x") == expected_documents(tokenizer, ["abc"])


@pytest.mark.parametrize("workers", [1, 2])
def test_malformed_lines_are_reported_together(
    tokenizer: Path, tmp_path: Path, workers: int
) -> None:
    good = json.dumps({"text": "fine"})
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n".join([good, "{oops", "", good, '{"txt": "a"}']))
    second.write_text("\n".join([good, '{"text": 7}']))
    with pytest.raises(DataError) as caught:
        tokenize_files([str(first), str(second)], tokenizer, tmp_path / "out/x", workers=workers)
    message = str(caught.value)
    for place in (f"{first}:2: not JSON", f"{first}:5: no field 'text'", f"{second}:2: field"):
        assert place in message
    assert message.startswith(f"3 malformed lines; {tmp_path / 'out/x'} was not written:")
    assert left_behind(tmp_path / "out") == []


def test_many_malformed_lines_stop_at_twenty(tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("no json\n" * 500)
    with pytest.raises(DataError) as caught:
        tokenize_files([str(source)], tokenizer, tmp_path / "x")
    assert str(caught.value).count("\n") == 20
    assert "there may be more" in str(caught.value)


def test_damaged_gzip_after_good_lines_writes_nothing(tokenizer: Path, tmp_path: Path) -> None:
    whole = write_jsonl(tmp_path / "whole", [f"{i} {t}" for i in range(40) for t in real_texts()])
    cut = tmp_path / "a.jsonl.gz"
    cut.write_bytes(gzip.compress(whole.read_bytes())[:-1000])
    for workers in (1, 2):
        with pytest.raises(DataError, match="damaged gzip data after line"):
            tokenize_files([str(cut)], tokenizer, tmp_path / "out" / "x", workers=workers)
        assert left_behind(tmp_path / "out") == []


def test_existing_output_is_kept_unless_told(tokenizer: Path, tmp_path: Path) -> None:
    source = [str(write_jsonl(tmp_path / "a.jsonl", ["one"]))]
    tokenize_files(source, tokenizer, tmp_path / "out" / "x")
    before = (tmp_path / "out" / "x.bin").read_bytes()
    write_jsonl(tmp_path / "a.jsonl", ["two", "three"])
    with pytest.raises(DataError, match=r"existing files from .*overwrite"):
        tokenize_files(source, tokenizer, tmp_path / "out" / "x")
    assert (tmp_path / "out" / "x.bin").read_bytes() == before
    tokenize_files(source, tokenizer, tmp_path / "out" / "x", overwrite=True)
    assert documents(tmp_path / "out" / "x") == expected_documents(tokenizer, ["two", "three"])
    # One file of the three is enough to be in the way.
    (tmp_path / "y_valid.idx").touch()
    with pytest.raises(DataError, match=r"y_valid\.idx"):
        tokenize_files(source, tokenizer, tmp_path / "y", valid_fraction=0.5)


def test_failure_with_overwrite_keeps_the_old_files(tokenizer: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one"])
    tokenize_files([str(source)], tokenizer, tmp_path / "out" / "x")
    source.write_text("broken\n")
    with pytest.raises(DataError):
        tokenize_files([str(source)], tokenizer, tmp_path / "out" / "x", overwrite=True)
    assert documents(tmp_path / "out" / "x") == expected_documents(tokenizer, ["one"])
    assert left_behind(tmp_path / "out") == ["x.bin", "x.idx", "x.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"valid_fraction": 0.0}, "between 0 and 1"),
        ({"valid_fraction": 1.5}, "between 0 and 1"),
        ({"valid_fraction": float("nan")}, "between 0 and 1"),
        ({"workers": 0}, "must be 1 or more"),
        ({"output": "FOLDER"}, "without suffix"),
        ({"output": "FOLDER/new/"}, "without suffix"),
        ({"output": "FOLDER/x.bin"}, "without suffix"),
        ({"output": "FOLDER/a.jsonl/x"}, "cannot write"),
        ({"tokenizer": "FOLDER/none.model"}, "No such file"),
        ({"inputs": ["FOLDER/none*"]}, "no file matches"),
        ({"inputs": []}, "no input"),
        ({"valid_fraction": 1e-9}, "none of 1 documents is for .*x_valid"),
    ],
)
def test_wrong_arguments(
    tokenizer: Path, tmp_path: Path, arguments: dict[str, object], words: str
) -> None:
    folder = tmp_path / "folder"
    source = write_jsonl(folder / "a.jsonl", ["one"])
    given: dict[str, object] = {
        "inputs": [str(source)],
        "tokenizer": tokenizer,
        "output": f"{folder}/x",
    }
    for name, value in arguments.items():
        text = json.dumps(value).replace("FOLDER", str(folder))
        given[name] = json.loads(text)
    with pytest.raises(DataError, match=words):
        tokenize_files(**given)  # type: ignore[arg-type]
    assert left_behind(folder) == ["a.jsonl"]


def test_files_without_text_are_an_error(tokenizer: Path, tmp_path: Path) -> None:
    for content in ("", '{"text": "  "}\n'):
        source = tmp_path / "a.jsonl"
        source.write_text(content)
        with pytest.raises(DataError, match="holds no text"):
            tokenize_files([str(source)], tokenizer, tmp_path / "x")


def test_a_vocabulary_above_16_bits_is_written_in_32(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(70_000)} | {"<end>": 70_000}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    source = write_jsonl(tmp_path / "a.jsonl", ["w69999 w1", "w65535"])
    tokenize_files([str(source)], tmp_path, tmp_path / "x")
    assert documents(tmp_path / "x") == [[69_999, 1, 70_000], [65_535, 70_000]]
    assert Fingerprint.read(tmp_path / "x").bos_id is None


def test_small_input_needs_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert preprocess._default_workers(100_000) == 1
    assert preprocess._default_workers(10**12) == 64


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no {SHARED_DATA}")
def test_redpajama_with_llamas_tokenizer(tmp_path: Path) -> None:
    model = SHARED_DATA / "llama-tokenizer.model"
    pattern = str(SHARED_DATA / "redpajama-sample" / "wiki" / "*.jsonl")
    report = tokenize_files([pattern], model, tmp_path / "wiki", workers=1)
    texts = []
    for path in sorted((SHARED_DATA / "redpajama-sample" / "wiki").glob("*.jsonl")):
        texts += [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    kept = [text for text in texts if text.strip()]
    assert report.empty == len(texts) - len(kept)
    assert documents(tmp_path / "wiki") == expected_documents(model, kept)
    assert Fingerprint.read(tmp_path / "wiki").vocab_size == 32_000


def test_what_is_there_is_found_without_writing(tokenizer: Path, tmp_path: Path) -> None:
    """As in a folder of another user's; this process may be root, who can write anywhere."""
    source = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    first = tokenize_files([str(source)], tokenizer, tmp_path / "out/x")
    (tmp_path / "out").chmod(0o555)
    before = (tmp_path / "out").stat().st_mtime_ns
    again = tokenize_files([str(source)], tokenizer, tmp_path / "out/x")
    assert again.outputs == first.outputs and again.seconds == 0
    assert (tmp_path / "out").stat().st_mtime_ns == before
    (tmp_path / "out").chmod(0o755)
