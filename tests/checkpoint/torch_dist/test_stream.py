"""Models written tensor by tensor: what Megatron-Core itself would write, with little memory."""

from __future__ import annotations

import ctypes
import filecmp
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megashear.checkpoint.dense import write_model
from megashear.checkpoint.info import CheckpointInfo
from megashear.checkpoint.torch_dist import background, stream
from megashear.checkpoint.torch_dist.metadata import check_metadata
from megashear.checkpoint.torch_dist.reader import WeightsReader
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.pruning.table import param_rules
from tests.support.distributed import run_distributed
from tests.support.reference_llama import random_weights
from tests.support.runs import GQA

TIED = replace(GQA, tied_embeddings=True)
EMBEDDING = "embedding.word_embeddings.weight"
Weights = Iterable[tuple[str, Tensor]]


def weights_of(shape: ModelShape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in random_weights(shape, seed=0).items()}


def save_by_megatron(directory: Path, shape: ModelShape, dtype: torch.dtype) -> None:
    """All tensors at once, through Megatron-Core's own writer."""
    state = {}
    for rule in param_rules(shape):
        tensor, key, offsets = weights_of(shape, dtype)[rule.name], rule.name, []
        if rule.layer is not None:
            key = rule.name.replace(f".{rule.layer}.", ".", 1)
            offsets = [(0, rule.layer, shape.num_layers)]
        state[rule.name] = ShardedTensor.from_rank_offsets(
            key, tensor, *offsets, prepend_axis_num=len(offsets)
        )
    with stream.processes():
        background.save(state, directory)


def write(directory: Path, shape: ModelShape, dtype: torch.dtype) -> None:
    """This process's share of the same tensors."""
    with stream.processes():
        mine = stream.tensors_of_rank(shape)
        weights = [(name, t) for name, t in weights_of(shape, dtype).items() if name in mine]
        stream.write_weights(directory, shape, weights)


def plain(directory: Path) -> dict[str, Tensor]:
    """What Megatron-Core reads from a checkpoint without being told what is in it."""
    with stream.processes():
        return dist_checkpointing.load_plain_tensors(str(directory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [GQA, TIED], ids=["untied", "tied"])
def test_megatron_reads_the_same_from_it_as_from_its_own(
    shape: ModelShape, dtype: torch.dtype, tmp_path: Path
) -> None:
    run_distributed(save_by_megatron, 1, tmp_path / "own", shape, dtype)
    run_distributed(write, 1, tmp_path / "ours", shape, dtype)
    own, ours = (check_metadata(tmp_path / name) for name in ("own", "ours"))
    assert {**ours.state_dict_metadata} == {**own.state_dict_metadata}
    assert ours.storage_data.keys() == own.storage_data.keys()
    assert ours.planner_data == own.planner_data
    expected, found = (run_distributed(plain, 1, tmp_path / name)[0] for name in ("own", "ours"))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == dtype
        assert torch.equal(found[name], tensor), name
    beside = [{f.name for f in (tmp_path / name).iterdir()} for name in ("own", "ours")]
    assert beside[0] ^ beside[1] <= {"__0_0.distcp", "__0_1.distcp"}
    assert (tmp_path / "own" / "metadata.json").read_bytes() == (
        tmp_path / "ours" / "metadata.json"
    ).read_bytes()


def test_files_are_of_bounded_size_and_the_same_from_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "FILE_NUMEL", 4096)
    for ranks in (1, 2, 3, 5):
        run_distributed(write, ranks, tmp_path / str(ranks), GQA, torch.float32)
    names = sorted(path.name for path in (tmp_path / "1").glob("__0_*.distcp"))
    assert len(names) > 5
    largest = max(tensor.numel() for tensor in weights_of(GQA).values())
    assert all(f.stat().st_size < 4 * max(4096, largest) + 10_000 for f in tmp_path.rglob("__0_*"))
    one = check_metadata(tmp_path / "1")
    for ranks in (2, 3, 5):
        same, different, missing = filecmp.cmpfiles(
            tmp_path / "1", tmp_path / str(ranks), names, shallow=False
        )
        assert (sorted(same), different, missing) == (names, [], [])
        other = check_metadata(tmp_path / str(ranks))
        assert list(other.state_dict_metadata.items()) == list(one.state_dict_metadata.items())
        assert other.storage_data == one.storage_data
    read = dict(WeightsReader(tmp_path / "5", GQA).items())
    assert all(torch.equal(read[name], tensor) for name, tensor in weights_of(GQA).items())


def test_all_that_does_not_fit_is_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    weights = weights_of(TIED)
    weights["decoder.layers.7.mlp.linear_fc2.weight"] = weights.pop(EMBEDDING)
    weights["output_layer.weight"] = torch.zeros(64, 32)  # tied: there is none
    weights["decoder.final_layernorm.weight"] = torch.zeros(31)
    proj = "decoder.layers.2.self_attention.linear_proj.weight"
    weights[proj] = weights[proj].bfloat16()
    with pytest.raises(CheckpointError) as refused:
        write_model(tmp_path / "model", CheckpointInfo(TIED, "imported"), weights.items())
    assert sorted(str(refused.value).splitlines()[1:]) == [
        "  decoder.final_layernorm.weight (31,) is unexpected or of the wrong shape",
        "  decoder.final_layernorm.weight is missing",
        "  decoder.layers.2.self_attention.linear_proj.weight is torch.bfloat16, layers before it "
        "are torch.float32",
        "  decoder.layers.7.mlp.linear_fc2.weight (64, 32) is unexpected or of the wrong shape",
        f"  {EMBEDDING} is missing",
        "  output_layer.weight (64, 32) is unexpected or of the wrong shape",
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_view_is_written_without_the_storage_behind_it(tmp_path: Path) -> None:
    whole = {name: torch.cat([tensor] * 50) for name, tensor in weights_of(GQA).items()}
    views = {name: tensor[: len(tensor) // 50] for name, tensor in whole.items()}
    views[EMBEDDING] = weights_of(GQA)[EMBEDDING].t().contiguous().t()
    info = CheckpointInfo(GQA, "imported")
    write_model(tmp_path / "model", info, views.items())
    write_model(tmp_path / "plain", info, weights_of(GQA).items())
    file = Path("model") / "__0_1.distcp"
    assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def failing(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Tensors of which the second cannot be read."""
    for number, item in enumerate(weights):
        if number == 1:
            raise CheckpointError("/source/__3_0.distcp: damaged")
        yield item


def on_a_small_disk(weights: Weights) -> Weights:
    """Tensors for which there is no room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))
    return weights


def write_with_one_bad(
    directory: Path, rank: int, spoil: Callable[[Weights], Weights], overwrite: bool = False
) -> tuple[str, int, int]:
    """What this process says when the weights of one come to nothing; how many it had made.

    The third is how many it was to make.
    """
    stream.FILE_NUMEL = 2048
    made: list[str] = []
    try:
        with stream.processes():
            mine = stream.tensors_of_rank(GQA)
            weights: Weights = ((name, note(made, name)) for name in mine)
            if torch.distributed.get_rank() == rank:
                weights = spoil(weights)
            info = CheckpointInfo(GQA, "imported")
            write_model(directory, info, weights, overwrite=overwrite)
    except CheckpointError as error:
        return str(error), len(made), len(mine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return "", len(made), len(mine)


def note(made: list[str], name: str) -> Tensor:
    made.append(name)
    return weights_of(GQA)[name]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "reason"), [(failing, "__3_0.distcp: damaged"), (on_a_small_disk, "File too large")]
)
def test_what_fails_on_one_process_ends_all_and_leaves_nothing(
    rank: int, spoil: Callable[[Weights], Weights], reason: str, tmp_path: Path
) -> None:
    said = run_distributed(write_with_one_bad, 3, tmp_path / "model", rank, spoil)
    for number, (text, made, of) in enumerate(said):
        assert reason in text
        assert 1 <= made < of / 2  # the others do not go on to their end
        assert (f"process {rank} of 3 failed: CheckpointError: " in text) == (number != rank)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_told_by_all(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    said = run_distributed(write_with_one_bad, 2, tmp_path / "model", 2, failing, True)
    assert "is not overwritten: it holds no checkpoint.json" in said[0][0]
    assert said[1][0] == f"process 0 of 2 failed: CheckpointError: {said[0][0]}"
    assert [made for _, made, _ in said] == [0, 0]
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


BIG = ModelShape(
    num_layers=12, hidden_size=512, num_attention_heads=8, ffn_hidden_size=2048, vocab_size=4096
)
"""218 MB in fp32; no tensor has more than 8.4 MB."""


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of memory that a function needs, at most, beyond what was taken before."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: freed tensors go back at once, as large ones do
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is taken now
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peaks(directory: Path) -> tuple[int, int, int]:
    """Of writing a big model as it comes, of reading it, and of holding all of it first."""
    info = CheckpointInfo(BIG, "imported")

    def made() -> Weights:
        return ((rule.name, torch.randn(rule.shape())) for rule in param_rules(BIG))

    def write_all(weights: Weights) -> None:
        write_model(directory, info, weights, overwrite=True)

    with stream.processes():
        write_all(made())  # what is imported or set up once
        reader = WeightsReader(directory / "model", BIG)
        return (
            peak_of(lambda: write_all(made())),
            peak_of(lambda: [None for _ in reader.items()]),
            peak_of(lambda: write_all(list(made()))),
        )


def test_a_model_is_written_and_read_with_memory_for_a_few_tensors(tmp_path: Path) -> None:
    tensor = 4 * max(torch.Size(rule.shape()).numel() for rule in param_rules(BIG))
    model = 4 * sum(torch.Size(rule.shape()).numel() for rule in param_rules(BIG))
    writing, reading, holding = run_distributed(peaks, 1, tmp_path / "model")[0]
    assert holding > 0.8 * model > 20 * tensor  # it can be measured
    assert writing < 4 * tensor  # one is held; the heap gives some back late
    assert reading < 6 * tensor  # the tensor, and a piece of it as it is stored
