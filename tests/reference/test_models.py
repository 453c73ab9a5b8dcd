"""Models and their losses as files hold them, and everything that is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megashear.errors import ConfigError
from megashear.reference.models import Model, read_models


def test_models_of_several_files_in_yaml_or_json(tmp_path: Path) -> None:
    record = {"name": "b", "parameters": 2000, "seq_length": 16, "losses": {"cc": 1.5, "wiki": 1}}
    (tmp_path / "a.yaml").write_text(
        "models:\n- {parameters: 1e3, losses: {cc: 2.0, wiki: 1.5, other: x}}\n"
    )
    (tmp_path / "b.json").write_text(json.dumps({"domains": [], "models": [record]}))
    files = [tmp_path / "a.yaml", tmp_path / "b.json"]
    assert read_models(files, ["wiki", "cc"]) == [
        Model(f"{files[0]} 0", 1000, {"wiki": 1.5, "cc": 2.0}),
        Model("b", 2000, {"wiki": 1.0, "cc": 1.5}, seq_length=16),
    ]


def test_everything_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "models:\n- {parameters: many, losses: {cc: .nan}}\n- {parameters: 5, losses: 3}\n"
    )
    (tmp_path / "b.yaml").write_text("- {name: cc}\n")
    (tmp_path / "c.yaml").write_text("models: [\n")
    files = [tmp_path / f"{name}.yaml" for name in "abcd"]
    with pytest.raises(ConfigError) as refused:
        read_models(files, ["cc", "wiki"])
    paths = [path.removeprefix(f"{tmp_path}/") for path, _ in refused.value.problems]
    assert paths == [
        "a.yaml: models[0].parameters",
        "a.yaml: models[0].losses.cc",
        "a.yaml: models[0].losses.wiki",
        "a.yaml: models[1].losses.cc",
        "a.yaml: models[1].losses.wiki",
        *("b.yaml", "c.yaml", "d.yaml"),
    ]
