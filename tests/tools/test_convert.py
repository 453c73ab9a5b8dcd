"""The commands in tools/checkpoint that convert and compare, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megashear.checkpoint.checksums import FILE, checksum
from megashear.checkpoint.info import read_info
from tests.support.hf_models import SIZES, save_llama
from tests.support.make_tokenizer import make_tokenizer
from tests.tools.conftest import TOOLS, Tool


def lines(output: str) -> dict[str, str]:
    """The two columns of a printed table."""
    cells = [line.rsplit("  ", 1) for line in output.splitlines() if "  " in line]
    return {name.strip(): value.strip() for name, value in cells}


def test_there_and_back(tmp_path: Path, tool: Tool) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    model = save_llama(source, num_key_value_heads=2, tie_word_embeddings=True)
    status, output, _ = tool("import", "--hf", source, "--out", checkpoint)
    assert status == 0
    assert lines(output)["parameters"] == f"{model.num_parameters():,}"
    assert lines(output)["key/value heads"] == "2"
    status, _, _ = tool("export", "--checkpoint", checkpoint, "--out", out)
    assert status == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    card = (out / "README.md").read_text()
    assert f"| huggingface | 0 | 0 | {model.num_parameters():,} | `{source}` |" in card
    for pair in ((source, checkpoint), (checkpoint, out), (source, out)):
        status, output, _ = tool("verify", *pair, "--tokens", 100)
        assert status == 0, output
        assert lines(output)["same likeliest token"] == "100.00%"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out", "source"]


def test_verify_tells_another_model(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "a", seed=0)
    save_llama(tmp_path / "b", seed=1)
    status, output, _ = tool("verify", tmp_path / "a", tmp_path / "b", "--tokens", 50)
    assert status == 1
    assert "NOT within the tolerance" in output
    assert float(lines(output)["KL (nats per token)"]) > 0.1
    status, _, _ = tool("verify", tmp_path / "a", tmp_path / "b", "--tolerance", 1e9)
    assert status == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", -1), ("--seed", 2**64), ("--tolerance", "nan")],
)
def test_verify_refuses_numbers_that_judge_nothing(tool: Tool, option: str, value: object) -> None:
    status, _, errors = tool("verify", "a", "b", option, value)
    assert status == 2 and f"{option} {value} must be" in errors


def test_random_tokens_depend_on_the_seed_alone(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "a", seed=0)
    save_llama(tmp_path / "b", seed=1)
    outputs = [
        tool("verify", tmp_path / "a", tmp_path / "b", "--seed", seed)[1] for seed in (3, 3, 4)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


def test_models_of_different_vocabularies_are_not_compared(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "a")
    save_llama(tmp_path / "b", vocab_size=97)
    status, _, error = tool("verify", tmp_path / "a", tmp_path / "b")
    assert status == 2
    assert "96 tokens" in error and "97" in error


def test_text_and_tokenizer_go_all_the_way(tmp_path: Path, tool: Tool) -> None:
    model = make_tokenizer(tmp_path / "tokenizer", 500) / "tokenizer.model"
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    save_llama(source, vocab_size=500)
    (source / "tokenizer.model").write_bytes(model.read_bytes())  # as LLaMA was published
    tool("import", "--hf", source, "--out", checkpoint)
    assert read_info(checkpoint).tokenizer == str(source)
    status, _, error = tool("export", "--checkpoint", checkpoint, "--out", out)
    assert status == 0, error
    text = "  def main():\n    return 'two  spaces'\n"
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(text, return_tensors="pt")
    generated = AutoModelForCausalLM.from_pretrained(out).generate(**ids, max_new_tokens=4)
    assert tokenizer.decode(generated[0], skip_special_tokens=True).startswith(text)
    (tmp_path / "text").write_text(text)
    status, output, _ = tool("verify", source, checkpoint, "--text", tmp_path / "text")
    assert status == 0
    assert lines(output)["tokens compared"] == str(ids["input_ids"].shape[1] - 1)  # without bos


def test_an_export_without_a_tokenizer_says_how_to_add_one(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "source")
    tool("import", "--hf", tmp_path / "source", "--out", tmp_path / "checkpoint")
    arguments = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out")
    status, _, errors = tool("export", *arguments)
    assert status == 0 and "export again with --tokenizer PATH" in errors
    assert "--tokenizer PATH" not in tool("export", *arguments, "--tokenizer", "none")[2]


def test_half_precision_export(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "source")
    tool("import", "--hf", tmp_path / "source", "--out", tmp_path / "checkpoint")
    arguments = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out")
    assert tool("export", *arguments, "--dtype", "bfloat16")[0] == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    status, output, _ = tool("verify", tmp_path / "checkpoint", tmp_path / "out")
    assert status == 1
    assert float(lines(output)["KL (nats per token)"]) < 1e-3


def test_existing_output_is_refused_without_overwrite(tmp_path: Path, tool: Tool) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    save_llama(source)
    for name, arguments in (
        ("import", ("--hf", source, "--out", checkpoint)),
        ("export", ("--checkpoint", checkpoint, "--out", out)),
    ):
        assert tool(name, *arguments)[0] == 0
        status, _, error = tool(name, *arguments)
        assert status == 2
        assert error.endswith("exists. Remove it, or allow it with --overwrite\n")
        assert tool(name, *arguments, "--overwrite")[0] == 0
    save_llama(source, num_hidden_layers=2)
    (source / "model.safetensors").write_bytes(b"damaged")
    assert tool("import", "--hf", source, "--out", checkpoint, "--overwrite")[0] == 2
    assert read_info(checkpoint).shape.num_layers == SIZES["num_hidden_layers"]
    assert tool("verify", checkpoint, out)[0] == 0  # a failed run left the former result


def test_what_cannot_be_read_is_one_message(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "odd", hidden_act="relu")
    (tmp_path / "not").mkdir()
    out = tmp_path / "out"
    for name, arguments, message in (
        ("import", ("--hf", tmp_path / "odd", "--out", out), "hidden_act = 'relu'"),
        ("import", ("--hf", tmp_path / "not", "--out", out), "config.json"),
        ("export", ("--checkpoint", tmp_path / "not", "--out", out), "neither"),
        ("verify", (tmp_path / "not", tmp_path / "nowhere"), "neither"),
    ):
        status, _, error = tool(name, *arguments)
        assert status == 2
        assert error.startswith("error: ")
        assert message in error
        assert not out.exists()


def test_tokenizer_that_is_gone_can_be_named(tmp_path: Path, tool: Tool) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    save_llama(source)
    make_tokenizer(source)
    tool("import", "--hf", source, "--out", checkpoint)
    source.rename(tmp_path / "moved")
    arguments = ("--checkpoint", checkpoint, "--out", out)
    status, _, error = tool("export", *arguments)
    assert status == 2
    assert "Name one with --tokenizer" in error
    assert tool("export", *arguments, "--tokenizer", "none")[0] == 0
    named = ("--overwrite", "--tokenizer", tmp_path / "moved")
    assert tool("export", *arguments, *named)[0] == 0
    assert (out / "tokenizer.json").is_file()


def test_pruning_run_is_to_be_extracted_first(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "source")
    tool("import", "--hf", tmp_path / "source", "--out", tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "stage": "prune"}))
    status, _, error = tool(
        "export", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out"
    )
    assert status == 2
    assert "extract" in error


# In the midst of the third tensor, while torch has its archive open and must close it.
PAUSE = """
import sys, time
appended = []
class Pause:
    def find_spec(self, name, path, target=None):
        if name != "megashear.checkpoint.torch_dist.stream":
            return None
        sys.meta_path.remove(self)
        import torch
        save = torch.save
        def paused(tensor, stream):
            appended.append(None)
            save(tensor, Slow(stream) if len(appended) == 3 else stream)
        torch.save = paused
class Slow:
    def __init__(self, stream):
        self.stream, self.flush, self.writes = stream, stream.flush, 0
    def write(self, data):
        self.writes += 1
        if self.writes == 2:  # of the first torch tells nothing that followed
            open("paused", "w").close()
            time.sleep(60)
        return self.stream.write(data)
sys.meta_path.insert(0, Pause())
"""


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "hung up"),
    ],
)
def test_a_signal_leaves_nothing(
    sent: signal.Signals, status: int, message: str, tmp_path: Path
) -> None:
    """A real one, to the whole group, in the midst of a tensor; takes about 5 seconds."""
    save_llama(tmp_path / "source")
    (tmp_path / "sitecustomize.py").write_text(PAUSE)
    out = tmp_path / "out" / "checkpoint"
    process = subprocess.Popen(
        [
            *(sys.executable, TOOLS / "hf_to_megatron.py"),
            *("--hf", tmp_path / "source", "--out", out),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{TOOLS.parents[1]}"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (tmp_path / "paused").exists():
        time.sleep(0.01)
    (begun,) = (out.parent / ".checkpoint.partial" / "model").glob("__0_1.distcp")
    assert begun.stat().st_size > 0
    os.killpg(process.pid, sent)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error.strip()) == (status, message)
    assert not list(out.parent.iterdir())


def test_torchrun_imports_and_speaks_once(tmp_path: Path, tool: Tool) -> None:
    """Two real processes; takes about 10 seconds."""
    source, by_one, by_two = (tmp_path / name for name in ("source", "by-one", "by-two"))
    save_llama(source)
    _, output, _ = tool("import", "--hf", source, "--out", by_one)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--"]
    arguments = [TOOLS / "hf_to_megatron.py", "--hf", source, "--out", by_two]
    found = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(TOOLS.parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    assert found.stdout == output.replace("by-one", "by-two")
    assert read_info(by_two).shape == read_info(by_one).shape


def test_the_other_processes_of_torchrun_leave_it_to_the_first(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "checkpoint", "out"))
    save_llama(source)
    tool("import", "--hf", source, "--out", checkpoint)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        export = tool("export", "--checkpoint", checkpoint, "--out", out)
        told = tool("inspect", checkpoint)
        assert out.exists() == bool(export[1]) == bool(told[1]) == (rank == "0")
        assert (export[0], told[0]) == (0, 0)
        status, output, error = tool("verify", source, checkpoint)
        assert (status, output) == (2, "")
        assert ("error: verify runs in one process" in error) == (rank == "0")


def test_no_file_of_the_user_is_published_as_a_tokenizer(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "source")
    tool("import", "--hf", tmp_path / "source", "--out", tmp_path / "checkpoint")
    file, secret = tmp_path / "checkpoint" / "checkpoint.json", tmp_path / "credentials.json"
    secret.write_text('{"key": "secret"}')
    fields = json.loads(file.read_text())
    for path in (str(secret), str(secret.with_name("x" * 5000))):
        file.write_text(json.dumps({**fields, "tokenizer": path}))
        rewrite_checksums(tmp_path / "checkpoint")
        arguments = ("--checkpoint", tmp_path / "checkpoint", "--out", tmp_path / "out")
        status, _, error = tool("export", *arguments)
        assert status == 2
        assert "not a tokenizer's file" in error or "is not there" in error
        assert not (tmp_path / "out").exists()


def rewrite_checksums(directory: Path) -> None:
    files = [file for file in directory.rglob("*") if file.is_file() and file.name != FILE]
    sums = {str(file.relative_to(directory)): checksum(file) for file in files}
    (directory / FILE).write_text(json.dumps(sums))


def test_settings_of_generation_go_all_the_way(tmp_path: Path, tool: Tool) -> None:
    source, checkpoint, out = (tmp_path / name for name in ("source", "check\x1bpoint", "out"))
    save_llama(source, eos_token_id=88, pad_token_id=7)
    make_tokenizer(source)
    settings = {"eos_token_id": [81, 88, 89], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(settings))
    tool("import", "--hf", source, "--out", checkpoint)
    for tokenizer in ((), ("--tokenizer", "none"), ("--tokenizer", source)):
        arguments = ("--checkpoint", checkpoint, "--out", out, "--overwrite", *tokenizer)
        status, output, _ = tool("export", *arguments)
        assert status == 0
        assert lines(output)["tokenizer"] == ("none" if "none" in tokenizer else str(source))
        assert json.loads((out / "generation_config.json").read_text()) == settings
        config = json.loads((out / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
            1,
            88,
            7,
        )
    card = (out / "README.md").read_text()
    assert "\x1b" not in card and "check\\x1bpoint" in card and "license files" in card


def test_the_wrong_way_round_is_said(tmp_path: Path, tool: Tool) -> None:
    save_llama(tmp_path / "source")
    tool("import", "--hf", tmp_path / "source", "--out", tmp_path / "checkpoint")
    status, _, error = tool("import", "--hf", tmp_path / "checkpoint", "--out", "out")
    assert status == 2 and "checkpoint: a Megatron checkpoint, not a Hugging Face model" in error
    status, _, error = tool("verify", tmp_path / "source", tmp_path / "source", "--shape", "x.yaml")
    assert status == 2 and "Leave --shape out" in error
