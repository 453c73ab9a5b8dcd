"""Weights as torch_dist checkpoints: any layout, whole or refused, and nothing in them is run."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import package_info
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megashear.checkpoint.torch_dist import background
from megashear.checkpoint.torch_dist.metadata import check_metadata
from megashear.checkpoint.torch_dist.optimizer import optimizer_state
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.checkpoint.torch_dist.state import fill_from_reader, load, sharded_weights
from megashear.checkpoint.torch_dist.stream import processes, write_weights
from megashear.config.schema import ModelShape, OptimizerConfig, ParallelConfig, PlatformConfig
from megashear.errors import CheckpointError
from megashear.model.build import build_model
from megashear.platform import parallel
from megashear.pruning.table import param_rules
from megashear.training.optimizer import WeightOptimizer
from tests.support.distributed import run_distributed
from tests.support.reference_llama import random_weights
from tests.support.runs import GQA

SHAPE = replace(GQA, tied_embeddings=True)
EMBEDDING = "embedding.word_embeddings.weight"


def write(directory: Path, shape: ModelShape) -> None:
    with processes():
        write_weights(directory, shape, random_weights(shape, seed=0).items())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written") / "model"
    run_distributed(write, 1, directory, SHAPE)
    return directory


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    shutil.copytree(written, tmp_path / "model")
    return tmp_path / "model"


def save_model(source: Path, out: Path, shape: ModelShape, tensor: int) -> None:
    """A model in some layout: filled from one checkpoint, saved as another."""
    layout = ParallelConfig(tensor=tensor)
    platform = parallel.start(PlatformConfig(device="cpu"), layout, seed=0)
    (model,) = build_model(shape, platform, layout, seq_length=8)
    model.load_state_dict(load(sharded_weights([model]), source), strict=False)
    background.save(sharded_weights([model]), out)
    parallel.stop()


def refusals(directory: Path, tensor: int = 1) -> list[str]:
    """Why a checkpoint is refused: loaded into a model of a run, and read tensor by tensor."""
    layout = ParallelConfig(tensor=tensor)
    platform = parallel.start(PlatformConfig(device="cpu"), layout, seed=0)
    (model,) = build_model(SHAPE, platform, layout, seq_length=8)
    messages = []
    for attempt in (
        lambda: load(sharded_weights([model]), directory),
        lambda: list(WeightsReader(directory, SHAPE).items()),
    ):
        try:
            attempt()
            messages.append("")
        except CheckpointError as error:
            messages.append(str(error))
    parallel.stop()
    return messages


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 2), (2, 1)], ids=["one", "tp2", "dp2"])
@pytest.mark.parametrize(
    "shape", [GQA, replace(SHAPE, vocab_size=61)], ids=["untied", "tied, padded under tp2"]
)
def test_what_any_layout_saves_is_read_as_it_was_written(
    shape: ModelShape, ranks: int, tensor: int, tmp_path: Path
) -> None:
    run_distributed(write, 1, tmp_path / "source", shape)
    run_distributed(save_model, ranks, tmp_path / "source", tmp_path / "out", shape, tensor)
    expected = random_weights(shape, seed=0)
    for directory in (tmp_path / "source", tmp_path / "out"):
        found = dict(WeightsReader(directory, shape).items())
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


MEGATRON_LM = {
    "stacked": (replace(GQA, vocab_size=128), {}),
    "apart": (replace(GQA, vocab_size=128), {"non_homogeneous_layers": True}),
    "apart-tied": (replace(SHAPE, vocab_size=66), {"non_homogeneous_layers": True}),
}


def save_as_megatron_lm(source: Path, out: Path, shape: ModelShape, metadata: Any) -> None:
    """As its training script does: the padded model with its `_extra_state`, and an optimizer."""
    layout = ParallelConfig(tensor=2)
    platform = parallel.start(PlatformConfig(device="cpu"), layout, seed=0)
    chunks = build_model(shape, platform, layout, seq_length=8)
    fill_from_reader(chunks, WeightsReader(source, shape).read, platform)
    state = chunks[0].sharded_state_dict(metadata=metadata or None)
    assert any(name.endswith("_extra_state") for name in state)
    moments = optimizer_state(
        sharded_weights(chunks), WeightOptimizer(chunks, OptimizerConfig(), layout, 2).megatron
    )
    background.save({"model": state, "optimizer": moments}, out)
    parallel.stop()


@pytest.mark.parametrize("case", MEGATRON_LM)
def test_megatron_lms_own_checkpoint_is_read_up_to_the_vocabulary(
    case: str, tmp_path: Path
) -> None:
    shape, metadata = MEGATRON_LM[case]
    run_distributed(write, 1, tmp_path / "source", shape)
    run_distributed(save_as_megatron_lm, 2, tmp_path / "source", tmp_path / "out", shape, metadata)
    keys = check_metadata(tmp_path / "out").state_dict_metadata
    assert ("decoder.layers.1.mlp.linear_fc2.weight" in keys) == bool(metadata)
    assert f"optimizer.state.exp_avg.{EMBEDDING}" in keys
    for vocabulary in (shape.vocab_size, 65, 5):
        reader = WeightsReader(tmp_path / "out", replace(shape, vocab_size=vocabulary))
        found = dict(reader.items())
        for rule in param_rules(shape):
            expected = random_weights(shape, seed=0)[rule.name]
            if rule.axes[0].vocabulary:
                expected = expected[:vocabulary]
            assert torch.equal(found[rule.name], expected), rule.name


OTHERS = {
    "larger vocabulary": ({"vocab_size": 65}, [EMBEDDING]),
    "fewer layers": ({"num_layers": 2}, ["decoder.layers.2."]),
    "no more bias": ({"qkv_bias": False}, ["linear_qkv.bias"]),
    "no more head": ({"tied_embeddings": True}, ["output_layer.weight"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_in_a_checkpoint_is_left_out_silently(what: str, tmp_path: Path) -> None:
    shape = replace(GQA, qkv_bias=True)
    run_distributed(write, 1, tmp_path / "model", shape)
    changes, names = OTHERS[what]
    with pytest.raises(CheckpointError) as refused:
        WeightsReader(tmp_path / "model", replace(shape, **changes))
    lines = str(refused.value).splitlines()[1:]
    expected = [
        rule.name for rule in param_rules(shape) if any(name in rule.name for name in names)
    ]
    if what == "larger vocabulary":
        expected += ["output_layer.weight"]
    assert sorted(line.split(":")[0].strip() for line in lines) == sorted(expected)


def test_a_tensor_with_a_hole_is_refused(copy: Path) -> None:
    """Memory that nothing was read into would be taken for weights."""
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop(1)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = WeightsReader(copy, SHAPE)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.linear_fc2.weight: .* 0 of"):
        dict(reader.items())


def test_a_file_of_another_directory_is_not_the_checkpoints(copy: Path) -> None:
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        outside = "../" + place.relative_path
        metadata.storage_data[index] = replace(place, relative_path=outside)
        shutil.copy(copy / place.relative_path, copy / outside)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"missing or cut short: .*\.\./__0_1\.distcp"):
        WeightsReader(copy, SHAPE)


def test_a_checkpoint_of_another_shape_names_every_tensor(written: Path) -> None:
    other = replace(SHAPE, num_layers=4, ffn_hidden_size=40, tied_embeddings=False)
    with pytest.raises(CheckpointError) as refused:
        WeightsReader(written, other)
    lines = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    mlp = [f"decoder.layers.{n}.mlp.linear_{f}.weight" for n in range(4) for f in ("fc1", "fc2")]
    last = [name for name in random_weights(other, 0) if name.startswith("decoder.layers.3.")]
    assert sorted(lines) == sorted({*mlp, *last, "output_layer.weight"})


@pytest.mark.parametrize("stored", [61, 66])
def test_a_run_takes_no_model_of_another_vocabulary(stored: int, tmp_path: Path) -> None:
    """Megatron-Core would cut it or fill it with zeros."""
    run_distributed(write, 1, tmp_path / "model", replace(SHAPE, vocab_size=stored))
    loaded, read = run_distributed(refusals, 1, tmp_path / "model")[0]
    assert f"loaded (torch.Size([{stored}, 32])) and expected ((64, 32))" in loaded
    assert bool(read) == (stored < 64)


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return damage


def overwrite_tensors(directory: Path) -> None:
    """The right length, the wrong content."""
    for file in directory.glob("*.distcp"):
        file.write_bytes(b"\xff" * file.stat().st_size)


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "metadata cut": (cut(".metadata", 0.5), ".metadata: damaged", ".metadata: damaged"),
    "metadata empty": (cut(".metadata", 0), ".metadata: damaged", ".metadata: damaged"),
    "metadata gone": (lambda d: (d / ".metadata").unlink(), "no .metadata", "no .metadata"),
    "tensors cut": (cut("__0_1.distcp", 0.9), "short: __0_1.distcp", "short: __0_1.distcp"),
    "tensors gone": (
        lambda d: (d / "__0_1.distcp").unlink(),
        "missing or cut short: __0_1.distcp",
        "missing or cut short: __0_1.distcp",
    ),
    "tensors overwritten": (overwrite_tensors, "cannot be loaded", f"cannot read {EMBEDDING}"),
    "common cut": (cut("common.pt", 0.5), "cannot be loaded", ""),
    "description cut": (cut("metadata.json", 0.5), "cannot be loaded", ""),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_an_error_that_names_it_on_every_rank(what: str, copy: Path) -> None:
    damage, of_load, of_reader = DAMAGE[what]
    if what == "common cut" and not (copy / "common.pt").exists():
        pytest.skip("megatron-core 0.19 has no such file: it is among the tensors")
    damage(copy)
    for loaded, read in run_distributed(refusals, 2, copy, 2):
        assert str(copy) in loaded
        assert of_load in loaded
        assert of_reader in read
        assert bool(read) == bool(of_reader)


def naming(module: str, name: str) -> bytes:
    """A pickle that holds `module.name`."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93."


FOREIGN = {
    "an unknown class": ("collections", "Counter"),
    "through torch": ("torch.distributed.checkpoint.filesystem", "os.getcwd"),
    "a function of torch": ("torch", "numel"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_table_of_contents_is_refused(what: str, copy: Path) -> None:
    module, name = FOREIGN[what]
    (copy / ".metadata").write_bytes(naming(module, name))
    for message in run_distributed(refusals, 1, copy)[0]:
        assert f"refused: reading it would run {module}.{name}" in message


class Unknown:
    """A class that no checkpoint holds."""


def test_objects_in_the_place_of_tensors_are_refused(copy: Path) -> None:
    """Torch unpickles without a check what the table of contents calls an object."""
    put_foreign_object(copy, EMBEDDING)
    loaded, read = run_distributed(refusals, 1, copy)[0]
    assert f"holds pickled objects instead of tensors as {EMBEDDING}" in loaded
    assert f"{EMBEDDING}: missing, expected (64, 32)" in read


def put_foreign_object(directory: Path, name: str) -> None:
    """Put a pickled object where a checkpoint holds `name`."""
    file = io.BytesIO()
    torch.save([Unknown()], file)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    entry = BytesStorageMetadata()
    if name in metadata.state_dict_metadata:  # of a tensor: passes Megatron's check of shapes
        entry.size = getattr(metadata.state_dict_metadata[name], "size", None)
    metadata.state_dict_metadata[name] = entry
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        del metadata.storage_data[index]
    some = next(iter(metadata.storage_data.values()))
    with (directory / some.relative_path).open("ab") as stream:
        info = replace(some, offset=stream.tell(), length=len(file.getvalue()))
        stream.write(file.getvalue())
    metadata.storage_data[MetadataIndex(name)] = info
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_foreign_common_state_among_the_tensors_is_refused(copy: Path) -> None:
    """Where megatron-core 0.19 keeps it; 0.16 misses its file."""
    put_foreign_object(copy, "common_state/shard_0_1")
    (copy / "common.pt").unlink(missing_ok=True)
    loaded, read = run_distributed(refusals, 1, copy)[0]
    assert "cannot be loaded" in loaded
    assert ("written by a newer Megatron-Core" in loaded) == (package_info.MINOR < 19)
    assert read == ""  # tensor by tensor, as the tools do, both releases read it


def test_a_foreign_common_file_is_refused(copy: Path) -> None:
    torch.save({"state": Unknown()}, copy / "common.pt")
    assert "cannot be loaded" in run_distributed(refusals, 1, copy)[0][0]
