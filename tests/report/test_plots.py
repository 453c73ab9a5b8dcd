"""Plots of losses and laws show what was measured. That a browser draws them: test_report.py."""

from __future__ import annotations

import pytest

from megashear.reference.scaling_law import fit_domains
from megashear.report import plots
from tests.support.published import LOSSES, PARAMETERS

SIZES = [PARAMETERS[name][1] for name in ("7B", "13B", "70B")]


def test_a_panel_for_each_law_with_the_loss_at_the_target() -> None:
    panels = plots.law_panels(fit_domains(SIZES, LOSSES), PARAMETERS["1.3B"][1])
    titles = [panel.title for panel in panels]
    assert titles[0] == "cc (unphysical): 1.9643 at 1.35B"
    assert [title.split(":")[0] for title in titles[1:]] == list(LOSSES)[1:]
    law, models, target = panels[1].figure.data
    assert list(models.x) == SIZES and list(models.y) == list(LOSSES["github"])
    assert (target.x[0], round(target.y[0], 4)) == (PARAMETERS["1.3B"][1], 0.7459)
    assert law.x[0] < target.x[0] and law.x[-1] > SIZES[-1]
    assert list(panels[1].figure.layout.xaxis.ticktext) == ["1.35B", "6.74B", "13B", "69B"]


@pytest.mark.parametrize(
    ("size", "shown"),
    [(950, "950"), (2e5, "200K"), (15e6, "15M"), (1_345_423_360, "1.35B"), (1.2e12, "1.2T")],
)
def test_sizes_are_short(size: float, shown: str) -> None:
    assert plots.short(size) == shown


def test_a_bar_for_each_loss_and_a_mark_for_an_earlier_reference() -> None:
    losses = {name: loss[0] for name, loss in LOSSES.items()}
    for earlier in ({"github": 0.5, "c4": 1.8}, {}):
        figure = plots.losses_panel(losses, earlier).figure
        bars, *marks = figure.data
        names = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
        shown = {names[row]: loss for row, loss in zip(bars.y, bars.x, strict=True)}
        assert shown == losses
        marked = {
            names[row]: loss for mark in marks for row, loss in zip(mark.y, mark.x, strict=True)
        }
        assert marked == earlier
