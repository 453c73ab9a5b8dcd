"""Plots are PNG files that are there whole, without a display."""

from __future__ import annotations

from pathlib import Path

import pytest

from megashear.reference.scaling_law import fit_domains
from megashear.report import plots
from tests.reference.published import LOSSES, PARAMETERS

image = pytest.importorskip("matplotlib.image")


def test_a_panel_for_each_law_with_the_loss_at_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn is read from the figure, and the file has as many pixels as it says."""
    drawn = []
    save = plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, file: (drawn.append(figure), save(figure, file))
    )
    laws = fit_domains([PARAMETERS[name][1] for name in ("7B", "13B", "70B")], LOSSES)
    plots.scaling_laws(tmp_path / "laws.png", laws, PARAMETERS["1.3B"][1])
    (figure,) = drawn
    shown = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in figure.axes}
    assert list(shown) == ["cc (unphysical)", *list(LOSSES)[1:]]
    assert shown["c4"] == ["2.1251"]
    _, points, *_ = figure.axes[1].lines
    assert list(points.get_ydata()) == list(LOSSES["github"])
    height, width, _ = image.imread(tmp_path / "laws.png").shape
    assert (width, height) == tuple(figure.get_size_inches() * 150)
    assert [file.name for file in tmp_path.iterdir()] == ["laws.png"]


def test_a_bar_for_each_loss(tmp_path: Path) -> None:
    plots.domain_losses(
        tmp_path / "bars.png", "7B", {name: loss[0] for name, loss in LOSSES.items()}
    )
    assert image.imread(tmp_path / "bars.png").std() > 0.1
