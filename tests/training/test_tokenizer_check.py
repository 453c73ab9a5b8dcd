"""Token files of another tokenizer than the model's are refused before a run trains."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from megashear.data.fingerprint import Fingerprint
from megashear.errors import DataError
from megashear.tokenizer.load import load_tokenizer
from megashear.training.tokenizer_check import check_tokenizer
from tests.support.make_tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and the fingerprint `x` of token files that it made."""
    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    known = load_tokenizer(folder)
    made = Fingerprint(known.sha256, known.vocab_size, known.bos_id, known.eos_id, 1, 10)
    (folder / "x.json").write_text(json.dumps(asdict(made)))
    return folder


def test_the_models_own_tokenizer_passes_in_silence(folder: Path) -> None:
    eos = {"config.json": {"eos_token_id": load_tokenizer(folder).eos_id}}
    assert check_tokenizer([f"{folder}/x"], str(folder), eos) == []


def test_another_tokenizer_is_refused_unless_it_is_meant(folder: Path, tmp_path: Path) -> None:
    other = str(make_tokenizer(tmp_path, 400))
    with pytest.raises(DataError, match=r"data\.other_tokenizer: true") as error:
        check_tokenizer([f"{folder}/x"], other, {})
    assert f"{folder}/x" in str(error.value) and other in str(error.value)
    assert check_tokenizer([f"{folder}/x"], other, {}, other_tokenizer=True) == []


def test_what_is_not_known_is_reported(folder: Path) -> None:
    (model,) = check_tokenizer([f"{folder}/x"], f"{folder}/gone", {})
    assert model.startswith("nothing is known of the model's tokenizer") and "gone" in model
    (files,) = check_tokenizer([f"{folder}/y", f"{folder}/z"], str(folder), {})
    assert f"{folder}/y (and 1 more)" in files


def test_another_eos_is_reported(folder: Path) -> None:
    eos = load_tokenizer(folder).eos_id
    both = {"generation_config.json": {"eos_token_id": [7, eos]}}
    assert check_tokenizer([f"{folder}/x"], str(folder), both) == []
    (text,) = check_tokenizer([f"{folder}/x"], str(folder), {"config.json": {"eos_token_id": 7}})
    assert f"end with token {eos}" in text and "7" in text
