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
    drawn = panels[1].plots[0]
    law, models, target = (line.points for line in drawn.lines)
    assert list(models[0]) == SIZES and list(models[1]) == list(LOSSES["github"])
    assert (target[0][0], round(target[1][0], 4)) == (PARAMETERS["1.3B"][1], 0.7459)
    assert law[0][0] < target[0][0] and law[0][-1] > SIZES[-1]
    assert list(drawn.x.ticks.values()) == ["1.35B", "6.74B", "13B", "69B"]


@pytest.mark.parametrize(
    ("size", "shown"),
    [(950, "950"), (2e5, "200K"), (15e6, "15M"), (1_345_423_360, "1.35B"), (1.2e12, "1.2T")],
)
def test_sizes_are_short(size: float, shown: str) -> None:
    assert plots.short(size) == shown


def test_a_bar_for_each_loss_and_a_mark_for_an_earlier_reference() -> None:
    losses = {name: loss[0] for name, loss in LOSSES.items()}
    for earlier in ({"github": 0.5, "c4": 1.8}, {}):
        bars = plots.losses_panel(losses, earlier).bars
        assert {bar.name: bar.text for bar in bars} == {n: f"{x:.4f}" for n, x in losses.items()}
        most = losses["github"] / bars[list(losses).index("github")].pieces[0][1]
        marked = {bar.name: bar.mark * most for bar in bars if bar.mark is not None}
        assert marked == pytest.approx(earlier)
