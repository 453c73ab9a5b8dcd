"""docs/metrics.md and docs/configuration.md say what the code says, of every field."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from megashear import records
from megashear.config.chain import Chain
from megashear.config.schema import Domain, RunConfig
from megashear.config.validate import CHOICES
from megashear.config.values import options
from tools import docs

ROOT = Path(__file__).parents[2]


def rows(page: str, section: str) -> dict[str, list[str]]:
    """The other cells of a section's table, by its first column."""
    text = re.split(r"^## ", (ROOT / "docs" / page).read_text(), flags=re.MULTILINE)
    (found,) = (part for part in text if part.splitlines()[0].strip("`") == section)
    lines = re.findall(r"^\|.*`.*", found, re.MULTILINE)
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {name.strip("` "): [each.strip("` ") for each in others] for name, *others in cells}


def test_the_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    """If not, `python tools/docs.py` makes them so."""
    assert docs.update(check=True) == 0, capsys.readouterr().out


def test_a_page_that_is_not_current_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.md").write_text(docs.metrics_page() + "\n")
    monkeypatch.setattr(docs, "PAGES", tmp_path)
    assert docs.update(check=True) == 1
    assert "docs/metrics.md is not what the code says" in capsys.readouterr().out
    assert docs.update(check=False) == 0
    assert docs.update(check=True) == 0


@pytest.mark.parametrize("kind", ["start", "step", "evaluation", "save", "end"])
def test_every_field_of_a_record_is_explained(kind: str) -> None:
    hints = typing.get_type_hints(getattr(records, f"{kind.capitalize()}Record"))
    found = rows("metrics.md", kind)
    assert ["kind", *found] == list(hints)
    for field, (shown, said) in found.items():
        assert eval(shown.replace("\\|", "|"), vars(typing)) == hints[field]
        assert len(said) > 5, field


def default_of(path: str) -> Any:
    """Of an option, as the dataclasses have it."""
    kind: Any = RunConfig
    *above, name = path.replace("data.domains[]", "domain").split(".")
    for section in above:
        if section == "domain":
            kind = Domain
            continue
        hint = typing.get_type_hints(kind)[section]
        kind = hint if dataclasses.is_dataclass(hint) else typing.get_args(hint)[0]
    return {field.name: field.default for field in dataclasses.fields(kind)}[name]


def test_every_option_is_there_with_its_default_and_choices() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    sections = re.findall(r"^## `?([^`\n]+)`?$", text, re.MULTILINE)
    shown = {
        path: cells
        for section in sections
        if section != "The chain"
        for path, cells in rows("configuration.md", section).items()
    }
    domain = [f"data.domains[].{field.name}" for field in dataclasses.fields(Domain)]
    assert set(shown) == {*(path for path, _ in options(RunConfig)), *domain}
    for path, (kind, default, *_) in shown.items():
        expected = default_of(path)
        if expected is dataclasses.MISSING:
            assert default == "", path
        else:
            read = yaml.safe_load(default)
            assert (float(read) if isinstance(expected, float) else read) == expected, path
        if path in CHOICES:
            assert kind.split(" \\| ") == list(CHOICES[path])


def test_every_option_of_a_chain_is_there() -> None:
    shown = rows("configuration.md", "The chain")
    assert list(shown) == [field.name for field in dataclasses.fields(Chain)]
    for field in dataclasses.fields(Chain):
        _, default, said = shown[field.name]
        assert len(said) > 5
        expected = "" if field.default is dataclasses.MISSING else field.default
        assert (yaml.safe_load(default) if default else "") == expected, field.name
