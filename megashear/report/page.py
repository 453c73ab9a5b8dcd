"""A report: one HTML page, of one run or of several, that needs nothing but a browser.

The page's HTML, CSS and JavaScript are in `templates/`; jinja2 escapes every text that they show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megashear.records import METRICS
from megashear.report import results, tables
from megashear.report.drawing import Panel, Runs, Style
from megashear.report.figures import PROGRESS, SPEED, Figures
from megashear.report.runs import RecordedRun
from megashear.report.series import MAX_POINTS, is_long, labels, missing_steps, part
from megashear.report.tables import Table


@dataclass(frozen=True)
class Block:
    """A part of a section: a heading, a note, a legend, figures, and tables.

    Attributes:
        least: pixels that a figure needs to stand beside another; 0 for the whole width.
    """

    heading: str = ""
    note: str = ""
    keys: Mapping[str, Style] | None = None
    panels: Sequence[Panel] = ()
    least: int = 0
    tables: Sequence[Table] = ()

    def __bool__(self) -> bool:
        return bool(self.panels) or any(table.rows for table in self.tables)


def document(title: str, note: str, panels: Sequence[Panel], least: int = 0) -> str:
    """Return a page of figures with a note above them."""
    return _render(title=title, note=note, sections={"": [Block(panels=panels, least=least)]})


def render(runs: Sequence[RecordedRun], version: str, now: str) -> str:
    """Return the page of these runs, made by megashear `version` at the time `now`."""
    by_label: Runs = dict(zip(labels([run.directory for run in runs]), runs, strict=True))
    sections = {}
    for heading, blocks in _sections(by_label, Figures(by_label)):
        if any(blocks):
            sections[heading] = [block for block in blocks if block]
    note = f"Made {now} by megashear {version}."
    if any(map(is_long, runs)):
        note += (
            f" A line with more than {MAX_POINTS:,} points is drawn by the least and the greatest "
            "of each stretch of steps; tables and sums use all points."
        )
    return _render(
        title=" and ".join(by_label) if len(runs) < 3 else f"{len(runs)} runs",
        note=note,
        sections=sections,
        warnings=list(_warnings(by_label)),
        configurations={
            label: yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
            for label, run in by_label.items()
            if run.config
        },
    )


def _render(**values: Any) -> str:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
    )
    style, script = (folder.get_source(environment, f"page.{kind}")[0] for kind in ("css", "js"))
    values = {"warnings": [], "configurations": {}, "style": style, "script": script, **values}
    return environment.get_template("page.html").render(values)


def _sections(runs: Runs, figures: Figures) -> Iterator[tuple[str, list[Block]]]:
    """Headings, and the blocks below each; a block that no run has records for is empty."""
    order = list(figures.domains)
    together = figures.gaps() + figures.weights() + figures.data()
    shapes: dict[str, dict[str, str]] = {}
    for label, run in runs.items():
        shapes |= tables.shapes(label, run)
    yield "Results", [Block(tables=[results.runs(runs), results.losses(runs)])]
    yield (
        "Domains",
        [
            Block(
                heading="Loss of each domain",
                note="Thick: validation. Thin: training, with the mean of a long run. Dotted: "
                "reference, the loss to reach. The scale leaves out the highest 1% of training "
                "losses.",
                panels=figures.losses(),
                least=340,
            ),
            Block(heading="Mixture", keys=figures.domains, panels=together, least=340),
            Block(tables=[tables.losses(name, run, order) for name, run in runs.items()]),
        ],
    )
    yield (
        "Masks",
        [
            Block(tables=[tables.masks(label, run) for label, run in runs.items()]),
            Block(
                heading="Sparsity and multipliers",
                note="Blue: expected fraction of units removed. Dotted: its target, which rises "
                "during the warm-up. λ1 multiplies their difference, λ2 its square.",
                panels=figures.masks(),
                least=270,
            ),
            Block(
                heading="Units kept",
                note="Blue: kept. Pale: removed. Grey: in a layer that is removed as a whole.",
                panels=figures.maps(),
                least=480,
            ),
        ],
    )
    yield "Training", [Block(panels=figures.steps(PROGRESS), least=400)]
    yield (
        "Speed",
        [
            Block(panels=figures.steps(SPEED), least=400),
            Block(panels=figures.time(), tables=[tables.of_runs("", runs, tables.times)]),
        ],
    )
    yield "Overview", [Block(tables=[tables.of_runs("", runs, tables.overview, words=True)])]
    yield "Sizes", [Block(tables=[tables.columns("", shapes)])]
    yield "Starts", [Block(tables=[tables.events(label, run) for label, run in runs.items()])]
    yield "Versions", [Block(tables=[tables.of_runs("", runs, tables.versions)])]


def _warnings(runs: Runs) -> Iterator[tuple[str, str]]:
    """(text, preformatted text) of what a reader must know: damaged files, masks off target."""
    for label, run in runs.items():
        absent = [] if any(run.records.values()) else [f"{METRICS}: no records"]
        for problem in filter(None, [*absent, *run.problems, missing_steps(run)]):
            yield f"{label}: {problem}", ""
        if verdict := part(run.records["end"][-1:], 0, "verdict"):  # a table of the masks
            yield label, str(verdict)
