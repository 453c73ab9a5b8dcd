"""Hundreds of damaged and hostile inputs: one clear refusal, or exactly what the files say.

Nothing appears beside the input, and nothing in it is run.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megashear.checkpoint import models
from megashear.checkpoint.checksums import FILE, checksum
from megashear.checkpoint.dense import export_huggingface, import_huggingface
from megashear.checkpoint.hf.mapping import to_hf
from megashear.checkpoint.info import INFO, read_info
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.errors import CheckpointError
from tests.checkpoint import hostile
from tests.checkpoint.hostile import BIN, WEIGHTS, Case, read_header
from tests.support.hf_models import random_llama

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
CASES = list(hostile.cases())
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(scope="module")
def directories() -> Iterator[Path]:
    """A model in one file, in two, and as .bin; in memory where the machine has a place for it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        model = random_llama(**SIZES, num_key_value_heads=2, head_dim=4)
        model.save_pretrained(Path(name) / "single")
        model.save_pretrained(Path(name) / "sharded", max_shard_size="12KB")
        shutil.copytree(Path(name) / "single", Path(name) / "bin")
        torch.save(load_file(Path(name) / "bin" / WEIGHTS), Path(name) / "bin" / BIN)
        (Path(name) / "bin" / WEIGHTS).unlink()
        yield Path(name)


@pytest.fixture(scope="module")
def imported(directories: Path) -> Path:
    """The checkpoint that the directory in one file becomes."""
    import_huggingface(directories / "single", directories / "imported")
    return directories / "imported"


@pytest.fixture
def place(directories: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory, which is the working directory too."""
    with tempfile.TemporaryDirectory(dir=directories) as name:
        monkeypatch.chdir(name)
        yield Path(name)


def everything(directory: Path) -> dict[str, bytes]:
    """All files below a directory, hidden ones too."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in directory.rglob("*")}


def refusal(work: Callable[[], object], place: Path) -> str | None:
    """What it was refused with, if it was; then nothing has changed."""
    before = everything(place)
    try:
        work()
    except CheckpointError as error:
        assert everything(place) == before
        return str(error)
    return None


def stated(directory: Path) -> dict[str, Tensor]:
    """The weights as the files have them; of safetensors, read without the library."""
    if (directory / BIN).is_file():
        held: dict[str, Tensor] = torch.load(directory / BIN, weights_only=True)
        return held
    tensors = {}
    for file in directory.glob("*.safetensors"):
        header, data = read_header(file)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(data[start:end]), dtype=DTYPES[entry["dtype"]])
            tensors[name] = flat.view(entry["shape"])
    return tensors


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused_in_one_sentence_or_imported_as_it_is(
    case: Case, directories: Path, place: Path
) -> None:
    source, out = place / "source", place / "out"
    shutil.copytree(directories / case.kind, source)
    case.damage(source)
    message = refusal(lambda: import_huggingface(source, out), place)
    if message is not None:
        assert str(source) in message
        assert all(text in message for text in case.said), message
        assert len(message) < 10_000
        assert "weights_only" not in message  # nobody is advised to switch the guard off
        assert all(line.isprintable() for line in message.split("\n"))
        return
    assert case.harmless, "imported"
    weights = stated(source)
    shape = read_info(out).shape
    for name, tensor in WeightsReader(out / "model", shape).items():
        for hf_name, part in to_hf(shape, name, tensor):
            assert torch.equal(part, weights[hf_name]), hf_name
    assert {path.name for path in place.iterdir()} == {"source", "out"}


# Places that cannot be written


@pytest.fixture(params=["import", "export"])
def convert(request: pytest.FixtureRequest, directories: Path, imported: Path) -> Any:
    """Either way of a good model to a place."""
    if request.param == "import":
        return lambda out, **options: import_huggingface(directories / "single", out, **options)
    return lambda out, **options: export_huggingface(models.open(imported), out, **options)


@pytest.mark.parametrize("limit", [300, 900, 2500, 6000, 12000])  # bytes
def test_a_disk_that_takes_no_more(convert: Any, limit: int, place: Path) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))  # a write beyond it fails
    try:
        message = refusal(lambda: convert(place / "out"), place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert message is not None
    assert "out" in message
    assert "cannot be written" in message


@pytest.mark.parametrize(
    "out", ["/proc/out", "/sys/out", "file", "file/out", "full", "link", "x" * 300]
)
def test_places_that_are_no_place(convert: Any, out: str, place: Path) -> None:
    (place / "file").touch()
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").touch()
    (place / "link").symlink_to("full")
    message = refusal(lambda: convert(place / out, overwrite=out == "full"), place)
    assert message is not None
    assert Path(out).name.replace("link", "full") in message


# Megatron checkpoints


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[Random(file.name).randrange(len(content))] ^= 16
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped": _flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    **{how: lambda file, how=how: hostile.replace(file, how) for how in hostile.INSTEAD},
}


def reseal(directory: Path) -> None:
    """Checksums of what is there now, as whoever changes a checkpoint on purpose writes them."""
    files = [p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != FILE]
    sums = {str(file.relative_to(directory)): checksum(file) for file in files}
    (directory / FILE).write_text(json.dumps(sums))


def export_of_damaged(imported: Path, place: Path, damage: Callable[[Path], Any]) -> str | None:
    """How the export of a copy is refused after the damage; `place` is empty after it."""
    copy = place / "checkpoint"
    shutil.copytree(imported, copy)
    damage(copy)
    message = refusal(lambda: export_huggingface(models.open(copy), place / "out"), place)
    assert message is None or str(copy) in message
    for directory in place.iterdir():
        shutil.rmtree(directory)
    return message


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_of_a_checkpoint(how: str, imported: Path, place: Path) -> None:
    names = [str(p.relative_to(imported)) for p in imported.rglob("*") if p.is_file()]
    assert {INFO, FILE, "model/.metadata"} < set(names)
    for name in names:
        assert export_of_damaged(imported, place, lambda copy, n=name: DAMAGE[how](copy / n)), name


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_that_checksums_vouch_for(how: str, imported: Path, place: Path) -> None:
    """Then a weight may be another number; whatever else it is, it is refused."""
    for name in [file.name for file in (imported / "model").iterdir()]:

        def damage(copy: Path, name: str = name) -> None:
            DAMAGE[how](copy / "model" / name)
            reseal(copy)

        if not export_of_damaged(imported, place, damage) and how != "flipped":
            assert name not in (".metadata", "__0_1.distcp")  # what the weights are read from


def _list_also(name: str, sums: Any) -> Callable[[Path], Any]:
    """Adds a line to the checksums."""

    def damage(copy: Path) -> None:
        if name == "model/pipe":
            os.mkfifo(copy / name)
        listed = json.loads((copy / FILE).read_text())
        (copy / FILE).write_text(json.dumps({**listed, name: sums}))

    return damage


@pytest.mark.parametrize(
    "name", ["model/../../../dev/zero", "model/pipe", "model/\0", "model//a", "model/\ud800"]
)
def test_checksums_of_what_is_no_file_of_a_checkpoint(
    name: str, imported: Path, place: Path
) -> None:
    sums = {"bytes": 0, "sha256": ""}
    message = export_of_damaged(imported, place, _list_also(name, sums))
    assert message is not None
    assert "is no file of" in message or "not an ordinary file" in message


@pytest.mark.parametrize("sums", [None, [], {"bytes": "x", "sha256": ""}, {"bytes": 1}, 4])
def test_checksums_that_are_none(sums: Any, imported: Path, place: Path) -> None:
    message = export_of_damaged(imported, place, _list_also("model/a", sums))
    assert message is not None
    assert "checksums.json: damaged" in message


WRONG: tuple[Any, ...] = (None, "4", [4], {"a": 4}, 3.5, -4, 0, 7, 2**40, float("nan"))
FIELDS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("ffn_hidden_size", "vocab_size", "tied_embeddings", "qkv_bias", "family", "rotary_scaling"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_checkpoint_that_lies_about_its_shape(field: str, imported: Path, place: Path) -> None:
    whole = json.loads((imported / INFO).read_text())
    for value in WRONG:

        def damage(copy: Path, value: Any = value) -> None:
            lie = {**whole, "shape": {**whole["shape"], field: value}}
            (copy / INFO).write_text(json.dumps(lie))
            reseal(copy)

        if not export_of_damaged(imported, place, damage):  # it may be as good: a size not given,
            padded = (field, value) == ("vocab_size", 7)  # or a vocabulary of which more is stored
            assert value in (None, 0) or padded, value
