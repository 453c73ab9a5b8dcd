"""What all benchmarks do alike: cases take turns, ratios are of one round, JSON says it all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    ROOT,
    Ratio,
    Report,
    devices,
    gpus,
    interleaved,
    parser,
    ratio,
    take_directory,
)
from megashear.errors import PlatformError


def test_cases_take_turns_in_an_order_that_turns_round() -> None:
    called = []

    def case(name: str) -> Callable[[], float]:
        def call() -> float:
            called.append(name)
            return float(len(called))

        return call

    found = interleaved({name: case(name) for name in "abc"}, rounds=3, warm_up=1)
    assert "".join(called) == "abccbaabccba"
    assert found == {"a": [6, 7, 12], "b": [5, 8, 11], "c": [4, 9, 10]}  # none of the warm-up


def test_a_case_that_returns_nothing_is_timed() -> None:
    found = interleaved({"short": lambda: None, "long": lambda: time.sleep(0.02)}, rounds=3)
    assert min(found["long"]) >= 0.02 > max(found["short"])


def test_a_ratio_is_the_median_of_rounds_not_that_of_medians() -> None:
    """A machine that grew ten times slower in the end: the ratio is as it was."""
    seconds = [1.0, 1.0, 10.0, 10.0, 10.0]
    found = ratio([2.0, 2.2, 21.0, 19.0, 20.0], seconds)
    assert found.median == 2.0
    assert found.low == pytest.approx(1.95)  # Q1 of 1.9, 2.0, 2.0, 2.1, 2.2 by (n + 1) p
    assert found.high == pytest.approx(2.15)
    assert str(Ratio(1.0214, 1.01, 1.03)) == "1.021 [1.010, 1.030]"


def test_a_ratio_needs_rounds_and_as_many_of_both() -> None:
    with pytest.raises(ValueError, match="3 rounds or more, not 2"):
        ratio([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 1.0, 1.0], [1.0, 1.0])


def test_what_was_found_is_printed_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--of", "two words"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = Report("some", "What it costs.\n\nMore of it.")
    report.table("On a CPU", ["model", "ratio", "GPU"], [["5M", ratio([3, 4, 5], [2, 2, 2]), None]])
    report.note("as expected")
    report.write(tmp_path / "some.json")

    printed = capsys.readouterr().out
    assert printed.startswith("What it costs.\n")
    assert "5M     2.000 [1.500, 2.500]  not measured" in printed
    kept = json.loads((tmp_path / "some.json").read_text())
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True, cwd=ROOT)
    assert head.startswith(kept["commit"].removesuffix(", changed"))
    assert kept["command"] == "OMP_NUM_THREADS=1 python benchmarks/some.py --of 'two words'"
    assert kept["threads"] == torch.get_num_threads()
    assert kept["about"] == "What it costs.\n\nMore of it."
    assert {"python", "torch", "megatron-core"} <= kept["versions"].keys()
    assert kept["machine"].keys() == {"cpu", "cores", "load", "gpu"}
    assert kept["notes"] == ["as expected"]
    (table,) = kept["tables"]
    assert table["rows"] == [["5M", {"median": 2.0, "low": 1.5, "high": 2.5}, None]]


def test_every_benchmark_takes_rounds_and_a_place_for_its_result() -> None:
    given = parser("about", rounds=5).parse_args(["--out", "here.json"])
    assert (given.rounds, given.out) == (5, Path("here.json"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--rounds 2", "--rounds: 2: a spread needs 3 rounds or more"),
        ("--rounds many", "--rounds: many: a spread needs 3 rounds or more"),
        ("--out /nowhere/here.json", "--out: /nowhere: there is no such directory"),
        ("--out /", "--out: /: is a directory, not a file"),
        ("--directory /nowhere", "--directory: /nowhere: there is no such directory"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_refused_before_anything_is_measured(
    given: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = parser("about")
    take_directory(made)
    with pytest.raises(SystemExit, match="2"):
        made.parse_args(given.split())
    assert f"error: argument {problem}\n" in capsys.readouterr().err


def test_a_gpu_is_measured_where_there_is_one_and_found_without_using_it() -> None:
    assert devices("cpu") == ["cpu"]
    assert devices(None) == ["cpu", *["cuda"] * bool(gpus())]
    assert len(gpus()) == torch.cuda.device_count()
    assert not torch.cuda.is_initialized()
    if not gpus():
        with pytest.raises(PlatformError, match="there is no GPU here"):
            devices("cuda")
