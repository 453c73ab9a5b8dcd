"""`megashear plan` as its user meets it: runs, a chain, what is absent, target shapes."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from megashear import cli
from megashear.config.loader import load_config
from megashear.errors import CheckpointError, ConfigError
from tests.checkpoint.hf.test_released_configs import LLAMA_2_7B
from tests.support.make_tokenizer import REPOSITORY

RECIPE = REPOSITORY / "examples" / "configs" / "llama2-7b-to-1.3b"
CHAIN = [RECIPE / "prune.yaml", RECIPE / "continue.yaml"]


@pytest.fixture
def config_json(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return tmp_path / "config.json"


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    cli.execute(["plan", *map(str, arguments)])
    return capsys.readouterr().out


def test_a_chain_before_anything_is_there(
    capsys: pytest.CaptureFixture[str], config_json: Path
) -> None:
    """The recipe on the paper's GPUs: its source's config.json is all that there is."""
    text = planned(
        *(capsys, *CHAIN, "--gpus", "8,16", "--gpu", "a100-80gb", "--source-shape", config_json)
    )
    assert "6,738,415,616 parameters" in text and "1,345,423,360 parameters" in text
    assert "evaluations add 4.7% to the computation" in text  # as examples/configs says
    assert "prune on 8 x a100-80gb" in text and "continue on 16 x a100-80gb" in text
    assert text.count("as configured: fits in 72.0 GiB") == 2
    total = next(
        line for line in text.splitlines() if line.split()[:1] == ["total"] and "," in line
    )
    assert 50 < float(total.split()[1]) < 51  # B tokens
    assert "memory model: within 6% of measured peaks on CPUs; not measured on GPUs" in text


def test_json_says_the_same(capsys: pytest.CaptureFixture[str], config_json: Path) -> None:
    arguments = ("--gpus", "8", "--source-shape", config_json, "--json")
    (prune,) = json.loads(planned(capsys, CHAIN[0], *arguments))
    assert prune["source"]["parameters"] == 6_738_415_616
    assert prune["target_parameters"] == 1_345_423_360
    assert (prune["fits"], prune["problems"]) == (True, [])
    own = prune["configured"]
    assert own["bytes"]["total"] == sum(v for k, v in own["bytes"].items() if k != "total")
    assert own["hours"] * 8 == own["gpu_hours"]
    seconds = own["seconds_per_step"]["total"]
    assert own["tokens_per_second"] == pytest.approx(32 * 4096 / seconds)
    assert own["hours"] == pytest.approx(3200 * seconds / 3600 * 1.047, rel=1e-3)
    text = planned(capsys, CHAIN[0], *arguments[:-1])
    assert f"masks make it {own['mask_overhead']:.2%} longer than without them" in text
    assert own["sent_bytes_per_step"]["masks"] == 2 * 7 / 8 * 4 * 357_408  # over all 8 GPUs


def test_a_chains_file_is_its_two_runs(
    capsys: pytest.CaptureFixture[str], config_json: Path, tmp_path: Path
) -> None:
    chain = {"work_dir": "w", "source": str(tmp_path), "export": "e"}
    chain |= {"prune_config": str(CHAIN[0]), "continue_config": str(CHAIN[1])}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    arguments = ("--gpus", "8,16", "--gpu", "a100-80gb")
    runs = planned(capsys, *CHAIN, *arguments, "--source-shape", config_json)
    assert planned(capsys, tmp_path / "chain.yaml", *arguments) == runs


def test_overrides_and_what_does_not_fit(
    capsys: pytest.CaptureFixture[str], config_json: Path
) -> None:
    arguments = ("--gpu", "a100-40gb", "--source-shape", config_json)
    text = planned(capsys, CHAIN[0], "trainer.micro_batch_size=8", *arguments)
    assert "DOES NOT FIT in 36.0 GiB" in text and " configured\n" not in text
    text = planned(capsys, CHAIN[0], *arguments, "--gpus", "6")
    assert "cannot run as configured" in text and "32 is not divisible" in text
    for gpus, why in (("1", "Take more GPUs, or larger"), ("100000", "size = 32 cannot be split")):
        assert cli.execute(["plan", *map(str, (*CHAIN, *arguments, "--gpus", f"{gpus},16"))]) == 1
        text = capsys.readouterr().out
        assert f"none: {'the least takes' if gpus == '1' else 'trainer.'}" in text and why in text
        assert "nan" not in text and "fits nowhere" in text


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_table_has_each_layout_once_and_the_fastest_first(
    capsys: pytest.CaptureFixture[str], config_json: Path, tensor: int
) -> None:
    sizes = (f"parallel.tensor={tensor}", f"parallel.sequence={str(tensor > 1).lower()}")
    options = (*sizes, "trainer.micro_batch_size=1", "--source-shape", config_json)
    text = planned(capsys, CHAIN[0], *options, "--gpus", "8")
    table = text.partition("fastest first\n")[2].partition("  the fastest as options")[0]
    rows = [line.split() for line in table.splitlines()[1:]]
    speeds = [int(row[8].replace(",", "")) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert [row[-1] for row in rows].count("configured") == 1
    shown = [tuple(row[:8]) for row in rows]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], ConfigError, "name a run's YAML file"),
        ([CHAIN[0]], CheckpointError, "give its sizes or config.json: --source-shape"),
        ([CHAIN[0], "--gpu", "h1000"], ConfigError, "h100-80gb, h100-pcie-80gb"),
        ([CHAIN[0], "--gpus", "8,16"], ConfigError, "one for each of 1 runs"),
        ([CHAIN[0], "trainer.stepz=3"], ConfigError, "Did you mean 'steps'?"),
        ([CHAIN[0], "--mfu", "40"], ConfigError, "between 0 and 1"),
        ([CHAIN[0], "--network", "nan"], ConfigError, "must be a number above 0"),
        ([CHAIN[0], "--size", "1B"], ConfigError, "--size  asks for target shapes"),
        (["--size", "1B"], ConfigError, "need --source and one of"),
        (["--source", "x", "--kv-cache", "-1KiB"], ConfigError, "= -1KiB: expected a number"),
        (["--source", "nowhere", "--size", "1B"], CheckpointError, "nowhere: does not exist"),
    ],
)
def test_wrong_use_says_what_to_do(
    arguments: list[object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?")):
        cli.execute(["plan", *map(str, arguments)])


def test_packages_of_the_cluster_need_not_be_here(
    capsys: pytest.CaptureFixture[str], config_json: Path
) -> None:
    arguments = ("--source-shape", config_json, "--json")
    here = planned(capsys, CHAIN[0], *arguments)
    engine = "platform.layers=transformer_engine"
    assert planned(capsys, CHAIN[0], engine, *arguments) == here
    (torch_layers,) = json.loads(planned(capsys, CHAIN[0], "platform.layers=torch", *arguments))
    (fused,) = json.loads(here)
    more = (each["configured"]["bytes"]["activations"] for each in (torch_layers, fused))
    assert next(more) > next(more)
    with pytest.raises(ConfigError, match="is no choice"):
        planned(capsys, CHAIN[0], "platform.layers=transformer", *arguments)


def test_targets_are_printed_as_a_run_takes_them(
    capsys: pytest.CaptureFixture[str], config_json: Path, tmp_path: Path
) -> None:
    text = planned(capsys, "--source", config_json, "--size", "1.3454B")
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith("target: {"))
    target = yaml.safe_load(line)["target"]
    assert list(target.values()) == [24, 2048, 16, 5504]
    run = tmp_path / "run.yaml"
    run.write_text(f"{line}\n" + (RECIPE / "prune.yaml").read_text().replace("\ntarget:", "\n#"))
    config = load_config(run, check_files=False)
    assert asdict(config.target) == target
    grouped = tmp_path / "grouped.yaml"
    sizes = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32000}
    grouped.write_text(yaml.safe_dump({**sizes, "num_query_groups": 8, "ffn_hidden_size": 14336}))
    text = planned(capsys, "--source", grouped, "--size", "2.7B")
    blocks = re.split(r"^(?=target:)", text.partition("one of:\n")[2], flags=re.MULTILINE)[1:]
    units = [yaml.safe_load(block).get("pruning", {}).get("head_unit") for block in blocks]
    assert "query_head" in units
    for words in (["--memory", "2.6GB"], ["--kv-cache", "192KiB"]):
        assert "near" in planned(capsys, "--source", config_json, *words)


@pytest.mark.parametrize("size", ["0", "-1B", "1.3X", "1e400B", "."])
def test_sizes_that_are_none_are_refused(config_json: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=r"1\.3B or 370M"):
        cli.execute(["plan", "--source", str(config_json), f"--size={size}"])


def test_a_size_that_cannot_be_says_what_can(config_json: Path) -> None:
    with pytest.raises(ConfigError, match="divides by 1, 2, 4, 8, 16 or 32"):
        cli.execute(["plan", "--source", str(config_json), "--size", "1B", "--tensor", "7"])
