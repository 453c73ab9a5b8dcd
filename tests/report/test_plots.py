"""Plots are PNG files that are there whole, without a display."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from megashear.reference.scaling_law import fit_domains
from megashear.report import plots
from tests.reference.published import LOSSES, PARAMETERS
from tests.report.figures import saved_figures

image = pytest.importorskip("matplotlib.image")


def test_a_panel_for_each_law_with_the_loss_at_the_target(tmp_path: Path) -> None:
    """What is drawn is read from the figure, and the file has as many pixels as it says."""
    laws = fit_domains([PARAMETERS[name][1] for name in ("7B", "13B", "70B")], LOSSES)
    with saved_figures() as figures:
        plots.scaling_laws(tmp_path / "laws.png", laws, PARAMETERS["1.3B"][1])
    (figure,) = figures
    shown = {axes.get_title(): [text.get_text() for text in axes.texts] for axes in figure.axes}
    assert list(shown) == ["cc (unphysical)", *list(LOSSES)[1:]]
    assert shown["c4"] == ["2.1251"]
    _, points, *_ = figure.axes[1].lines
    assert list(points.get_ydata()) == list(LOSSES["github"])
    height, width, _ = image.imread(tmp_path / "laws.png").shape
    assert (width, height) == tuple(figure.get_size_inches() * 150)
    assert [file.name for file in tmp_path.iterdir()] == ["laws.png"]


@pytest.mark.parametrize(
    ("sizes", "target", "expected"),
    [((7e6, 9e6, 15e6), 8e6, "5M 10M 20M"), ((2e5, 5e7, 15e9), 1e6, "1M 10M 100M 1B 10B")],
)
def test_labels_of_sizes_are_short_and_stand_apart(
    sizes: tuple[float, ...], target: float, expected: str, tmp_path: Path
) -> None:
    with saved_figures() as figures:
        laws = fit_domains(sizes, dict.fromkeys("abcd", (2.0, 1.9, 1.85)))
        plots.scaling_laws(tmp_path / "laws.png", laws, target)
    axis = figures[0].axes[0].xaxis
    low, high = axis.get_view_interval()
    marks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    shown = [label for N, label in marks if low <= N <= high]
    assert " ".join(label.get_text() for label in shown).endswith(expected)
    for one, other in pairwise(label.get_window_extent() for label in shown):
        assert one.x1 < other.x0
    assert not any(label.get_text() for label in axis.get_ticklabels(minor=True))


def test_a_bar_for_each_loss_and_a_mark_for_an_earlier_reference(tmp_path: Path) -> None:
    losses = {name: loss[0] for name, loss in LOSSES.items()}
    for earlier in ({"github": 0.5, "c4": 1.8}, {}):
        with saved_figures() as figures:
            plots.domain_losses(tmp_path / "bars.png", "7B", losses, earlier)
        (axes,) = figures[0].axes
        assert [bar.get_width() for bar in axes.patches] == list(losses.values())
        assert [text.get_text() for text in axes.texts] == [f"{v:.4f}" for v in losses.values()]
        assert [text.get_text() for text in axes.get_yticklabels()] == list(losses)
        marks = {y: x for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
        assert marks == earlier
        assert image.imread(tmp_path / "bars.png").shape[1] == figures[0].get_figwidth() * 150
