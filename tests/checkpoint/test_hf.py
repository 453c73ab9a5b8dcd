"""Hugging Face directories, read and written, with transformers as the judge of both."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megashear.checkpoint.hf import HuggingFaceReader, write_huggingface
from megashear.config.schema import ModelShape
from megashear.errors import CheckpointError
from megashear.pruning.table import table
from tests.hf_models import VARIANTS, random_llama, save_llama, tokens_of
from tests.reference_llama import forward, random_weights

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=40,
    max_position_embeddings=64,
)
FOURTH = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small grouped-query model in one safetensors file."""
    save_llama(tmp_path / "model", num_key_value_heads=2)
    return tmp_path / "model"


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file)


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceReader(directory).check()
    return str(caught.value)


def load(directory: Path) -> LlamaForCausalLM:
    """The model in transformers, which must find every weight and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model, LlamaForCausalLM)
    return model.eval()


def assert_same_tensors(model: LlamaForCausalLM, other: LlamaForCausalLM) -> None:
    expected, found = model.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


# Reading


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_the_weights_read_equal_transformers(tmp_path: Path, variant: str) -> None:
    model = save_llama(tmp_path / "model", **VARIANTS[variant])
    reader = HuggingFaceReader(tmp_path / "model")
    reader.check()
    tokens = tokens_of(model)
    with torch.no_grad():
        expected = model(tokens).logits
        logits = forward(reader.shape, dict(reader.items()), tokens)
    assert (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 5000])
def test_import_and_export_give_identical_tensors(
    tmp_path: Path, variant: str, max_shard_bytes: int
) -> None:
    model = save_llama(tmp_path / "model", **VARIANTS[variant])
    reader = HuggingFaceReader(tmp_path / "model")
    out = tmp_path / "out"
    write_huggingface(out, reader.shape, reader.items(), max_shard_bytes=max_shard_bytes)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (max_shard_bytes == 5000)
    assert_same_tensors(model, load(out))
    assert HuggingFaceReader(out).shape == reader.shape


def test_sharded_by_transformers(tmp_path: Path) -> None:
    model = random_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    reader = HuggingFaceReader(tmp_path / "model")
    write_huggingface(tmp_path / "out", reader.shape, reader.items())
    assert_same_tensors(model, load(tmp_path / "out"))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(model: Path, sharded: bool) -> None:
    expected = load(model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (model / "model.safetensors").unlink()
    if sharded:
        parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
        weight_map = {name: f"pytorch_model-{i}.bin" for i in range(2) for name in parts[i]}
        for i, part in enumerate(parts):
            torch.save(part, model / f"pytorch_model-{i}.bin")
        index = model / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(tensors, model / "pytorch_model.bin")
    reader = HuggingFaceReader(model)
    write_huggingface(model / "out", reader.shape, reader.items())
    assert_same_tensors(expected, load(model / "out"))


def test_bin_file_that_would_run_code_does_not(model: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, model / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read" in refusal(model)
    with (model / "pytorch_model.bin").open("wb") as stream:
        pickle.dump(Hostile(), stream)
    message = refusal(model)
    assert "pytorch_model.bin cannot be read" in message
    assert "weights_only" not in message  # nobody is advised to switch the guard off
    assert not (tmp_path / "executed").exists()


def test_half_precision_is_kept_or_cast(tmp_path: Path) -> None:
    random_llama().bfloat16().save_pretrained(tmp_path / "model")
    reader = HuggingFaceReader(tmp_path / "model")
    assert {tensor.dtype for _, tensor in reader.items()} == {torch.bfloat16}
    write_huggingface(tmp_path / "kept", reader.shape, reader.items())
    write_huggingface(tmp_path / "cast", reader.shape, reader.items(), dtype="float32")
    assert load(tmp_path / "kept").dtype == torch.bfloat16
    assert load(tmp_path / "cast").dtype == torch.float32


# What is refused when reading


def test_every_misfit_is_named_at_once(model: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"], tensors[FOURTH]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["lm_head.weight"] = torch.zeros(96, 32, dtype=torch.int8)

    change_tensors(model, change)
    message = refusal(model)
    assert message.startswith(f"{model}: 6 problems\n")
    assert "model.norm.weight is missing" in message
    assert f"{FOURTH} is missing" in message
    assert (
        "up_proj.weight is [47, 32] in model.safetensors, but config.json says [48, 32]" in message
    )
    assert "model.layers.3.input_layernorm.weight in model.safetensors is unexpected" in message
    assert "q_proj.bias in model.safetensors is unexpected" in message
    assert "lm_head.weight in model.safetensors has type I8" in message


def test_a_config_that_lies_is_told_by_the_tensors(model: Path) -> None:
    change_config(model, num_hidden_layers=2)
    assert "model.layers.2.input_layernorm.weight in model.safetensors is unexpected" in refusal(
        model
    )
    change_config(model, num_hidden_layers=4)
    assert "model.layers.3.input_layernorm.weight is missing" in refusal(model)
    change_config(model, num_hidden_layers=1_000_000)
    assert "num_hidden_layers = 1000000 in config.json" in refusal(model)
    change_config(model, num_hidden_layers=3, num_key_value_heads=4)
    assert "k_proj.weight is [16, 32]" in refusal(model)


def test_reading_checks_first(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop(FOURTH))
    with pytest.raises(CheckpointError, match=f"{FOURTH} is missing"):
        HuggingFaceReader(model).read("decoder.final_layernorm.weight")


def test_tied_head_may_be_there_but_not_differ(tmp_path: Path) -> None:
    model = save_llama(tmp_path, tie_word_embeddings=True)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    HuggingFaceReader(tmp_path).check()
    change_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1e-3))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path)
    save_llama(tmp_path, tie_word_embeddings=True)
    change_config(tmp_path, tie_word_embeddings=False)
    assert "lm_head.weight is missing" in refusal(tmp_path)
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(model: Path, value: float) -> None:
    change_tensors(model, lambda tensors: tensors[FOURTH][3].fill_(value))
    with pytest.raises(CheckpointError, match=f"{FOURTH} holds values that are not finite"):
        list(HuggingFaceReader(model).items())


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_truncated_file(model: Path, share: float) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    assert "model.safetensors cannot be read" in refusal(model)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_flipped_bits_are_refused_or_do_no_harm(model: Path, name: str) -> None:
    if name.endswith(".bin"):
        torch.save(load_file(model / "model.safetensors"), model / name)
        (model / "model.safetensors").unlink()
    whole = (model / name).read_bytes()
    random = Random(0)
    refusals = []
    for _ in range(80):
        damaged = bytearray(whole)
        for _ in range(3):
            position = random.randrange(min(len(whole), 4000))  # where the descriptions lie
            damaged[position] ^= 1 << random.randrange(8)
        (model / name).write_bytes(damaged)
        try:
            for _, tensor in HuggingFaceReader(model).items():
                assert torch.isfinite(tensor).all()
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 40
    assert all(str(model) in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", None, "cannot be read: No such file"),
        ("config.json", "{", "not JSON"),
        ("config.json", "[1]", "must be a mapping"),
        ("config.json", "[" * 100_000, "not JSON"),
        ("config.json", "\udcff", "not JSON"),
        ("model.safetensors", None, "no weights"),
    ],
)
def test_missing_or_damaged_files(model: Path, file: str, text: str | None, reason: str) -> None:
    (model / file).unlink()
    if text is not None:
        (model / file).write_bytes(text.encode(errors="surrogateescape"))
    message = refusal(model)
    assert reason in message
    assert str(model) in message


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files, with their index."""
    random_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def change_index(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        3,
        "x.bin",
    ],
)
def test_index_may_name_only_files_beside_it(sharded: Path, name: Any) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "outside.safetensors")
    change_index(sharded, lambda weight_map: weight_map.update({FOURTH: name}))
    message = refusal(sharded)
    assert f"{FOURTH} is said to be in {name!r}" in message


def test_index_against_its_files(sharded: Path) -> None:
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    lost = sorted(load_file(sharded / files[-1]))

    def change(weight_map: dict[str, str]) -> None:
        weight_map["model.layers.9.ghost.weight"] = files[0]
        del weight_map[sorted(load_file(sharded / files[0]))[0]]

    change_index(sharded, change)
    (sharded / files[-1]).unlink()
    message = refusal(sharded)
    assert f"{files[-1]} is missing" in message
    assert f"model.layers.9.ghost.weight is not in {files[0]}, where the index has it" in message
    assert f"is in {files[0]}, but the index does not say so" in message
    assert all(f"{name} is missing" in message for name in lost)


def test_index_without_a_map(sharded: Path) -> None:
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (sharded / "model.safetensors.index.json").write_text(text)
        assert "must have a mapping weight_map" in refusal(sharded)


def test_links_into_a_cache_are_followed(model: Path, tmp_path: Path) -> None:
    blob = (model / "model.safetensors").rename(tmp_path / "blob")
    (model / "model.safetensors").symlink_to(blob)
    HuggingFaceReader(model).check()


# Writing


def weights(**changes: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in random_weights(SHAPE, 0).items():
        changed = changes.get(name.replace(".", "_"), tensor)
        if changed is not None:
            yield name, changed


def test_result_is_an_ordinary_directory(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    write_huggingface(out, SHAPE, weights(), card="# mine\n")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    assert (out / "README.md").read_text() == "# mine\n"
    config = load(out).config
    assert config.bos_token_id is config.eos_token_id is None  # and not LLaMA's
    (tmp_path / "ordinary").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (*out.iterdir(), tmp_path / "ordinary")}
    assert len(modes) == 1  # others may read it where they may read what this user writes
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(tmp_path.joinpath("a").stat().st_mode)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    write_huggingface(tmp_path / "out", SHAPE, weights(), max_shard_bytes=6000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(file)
        held |= dict.fromkeys(tensors, file.name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 6000
    assert index["weight_map"] == held
    total = 4 * sum(tensor.numel() for _, tensor in weights())
    assert index["metadata"]["total_size"] == total
    load(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_final_layernorm_weight": None}, "missing: decoder.final_layernorm.weight"),
        (
            {"decoder_final_layernorm_weight": torch.ones(17)},
            "final_layernorm.weight.*another shape",
        ),
        ({"output_layer_weight": torch.full((40, 16), float("nan"))}, "output_layer.*not finite"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_huggingface(tmp_path / "out", SHAPE, weights(**changes))
    assert not list(tmp_path.iterdir())


def test_values_too_large_for_the_type_are_refused(tmp_path: Path) -> None:
    changes = {"output_layer_weight": torch.full((40, 16), 1e5)}
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        write_huggingface(tmp_path / "out", SHAPE, weights(**changes), dtype="float16")


def test_unexpected_weight_and_weight_given_twice(tmp_path: Path) -> None:
    names = [row.name for row in table(SHAPE)]
    for name in ("decoder.layers.2.mlp.linear_fc2.weight", names[0]):
        stream = [*weights(), (name, torch.ones(40, 16))]
        with pytest.raises(CheckpointError, match="is unexpected"):
            write_huggingface(tmp_path / "out", SHAPE, stream)
        assert not list(tmp_path.iterdir())


def test_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_huggingface(out, SHAPE, weights())
    before = (out / "model.safetensors").read_bytes()

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield next(weights())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_huggingface(out, SHAPE, interrupted(), overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_output_is_replaced_only_when_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_huggingface(out, SHAPE, weights())  # an empty directory is no output
    with pytest.raises(CheckpointError, match="exists"):
        write_huggingface(out, SHAPE, weights())
    write_huggingface(out, SHAPE, weights(), dtype="bfloat16", overwrite=True)
    assert load(out).dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_a_model_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        write_huggingface(tmp_path, SHAPE, weights(), overwrite=True)
    (tmp_path / "config.json").touch()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"holds directories \(checkpoints\)"):
        write_huggingface(tmp_path, SHAPE, weights(), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        write_huggingface(tmp_path / "file", SHAPE, weights(), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_huggingface(tmp_path / "file" / "out", SHAPE, weights())


def test_disk_that_takes_no_more(tmp_path: Path) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, former[1]))  # a write beyond it fails
    try:
        with pytest.raises(CheckpointError, match="out: cannot be written"):
            write_huggingface(tmp_path / "out", SHAPE, weights())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert not list(tmp_path.iterdir())


# Tokenizers


def sentencepiece_model(directory: Path) -> Path:
    directory.mkdir()
    text = [f"line {i} of the text, and {i * i} more words to learn from" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return directory / "tokenizer.model"


def test_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    model = sentencepiece_model(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer" / "unrelated.txt").touch()
    for given in (model, model.parent):
        write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=given, overwrite=True)
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
        assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
        assert not (tmp_path / "out" / "unrelated.txt").exists()
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    renamed = model.rename(tmp_path / "mine.model")
    write_huggingface(tmp_path / "other", SHAPE, weights(), tokenizer=renamed)
    assert (tmp_path / "other" / "tokenizer.model").read_bytes() == renamed.read_bytes()


def test_special_tokens_of_the_source_model_are_kept(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    change_config(model, bos_token_id=5, eos_token_id=[6, 7])
    write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=model)
    loaded = load(tmp_path / "out")
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (5, [6, 7])
    assert loaded.generation_config.eos_token_id == [6, 7]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (5, [6, 7])


def test_tokenizer_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("no model")
    for tokenizer, message in (("nowhere", "no tokenizer"), ("tokenizer.model", "sentencepiece")):
        with pytest.raises(CheckpointError, match=message):
            write_huggingface(tmp_path / "out", SHAPE, weights(), tokenizer=tmp_path / tokenizer)
    assert not (tmp_path / "out").exists()
