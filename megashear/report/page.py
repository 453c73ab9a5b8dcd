"""A report: one HTML page that needs nothing beside it, of one run or of several side by side."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence

import yaml
from plotly.offline import get_plotlyjs

from megashear.records import METRICS
from megashear.report import figures, tables
from megashear.report.drawing import Panel, Runs, Style, styles
from megashear.report.runs import RecordedRun
from megashear.report.series import MAX_POINTS, domains, is_long, labels, missing_steps, part
from megashear.report.tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #222; --pale: #666; --line: #ddd; --paper: #fff;
  --told: #fff4e5 }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 78rem; margin: 0 auto; padding: 0 1rem 4rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 1.2rem 0 .2rem }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; padding-top: .5rem;
  border-top: 2px solid var(--line) }
h3 { font-size: 1rem; margin: 1.6rem 0 .2rem }
p { margin: .2rem 0 .8rem; max-width: 60rem; color: var(--pale) }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0 }
a { color: inherit }
.grid { display: grid; gap: 1.2rem 1.5rem; margin: .4rem 0 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)) }
figure { margin: 0; min-width: 0 }
figcaption, caption { font-weight: 600; text-align: left }
th:first-child { position: sticky; left: 0; background: var(--paper) }
.words th, .words td { white-space: normal; max-width: 24rem; overflow-wrap: break-word;
  vertical-align: top }
.scroll { overflow-x: auto; margin: .4rem 0 1.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .2rem 1.2rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child, .words * { text-align: left }
.told { background: var(--told); border-left: 4px solid #D55E00; padding: .5rem 1rem }
.told ul { margin: 0; padding-left: 1.1rem }
.told pre { border: 0; padding: 0; margin: 0 }
.keys { list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.1rem; margin: 0;
  padding: .35rem 0; font-size: .9rem }
section > .keys { position: sticky; top: 0; z-index: 5; background: var(--paper) }
.key { vertical-align: middle; margin-right: .35rem }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .7rem; font-size: .85rem }
summary { cursor: pointer; font-weight: 600 }
@media (hover: none) { .modebar { display: none } }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --pale: #a8a8a8; --line: #444; --paper: #161616; --told: #33261a }
  .js-plotly-plot, .key { filter: invert(.9) hue-rotate(180deg) }
}
"""


def document(title: str, head: str, content: str) -> str:
    """A whole page: its title as text, what stands below that and the content as HTML."""
    script = f"<script>{get_plotlyjs()}</script>" if "<figure" in content else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)} - megashear</title><style>{STYLE}</style>{script}</head><body>"
        f"<header><h1>{_text(title)}</h1>{head}</header><main>{content}</main></body></html>\n"
    )


def render(found: Sequence[RecordedRun], version: str, now: str) -> str:
    """The page of these runs, as megashear `version` made it at the time `now`."""
    runs: Runs = dict(zip(labels([run.directory for run in found]), found, strict=True))
    bodies = {heading: body for heading, body in _bodies(runs) if body}
    links = "".join(f'<a href="#{heading.lower()}">{heading}</a>' for heading in bodies)
    thinned = (
        f" Of a line with more than {MAX_POINTS:,} points, the least and the greatest of each "
        "stretch of steps are drawn; tables and sums are of all."
    )
    made = f"Made {now} by megashear {version}.{thinned if any(map(is_long, found)) else ''}"
    sections = "".join(
        f'<section id="{heading.lower()}"><h2>{heading}</h2>{body}</section>'
        for heading, body in bodies.items()
    )
    title = " and ".join(runs) if len(runs) < 3 else f"{len(runs)} runs"
    return document(title, f"<p>{_text(made)}</p><nav>{links}</nav>", _told(runs) + sections)


def _bodies(runs: Runs) -> Iterator[tuple[str, str]]:
    """Headings, and what stands below each; nothing, where no run tells of it."""
    wide = 340 * len(runs)
    each = {label: (label, run) for label, run in runs.items()}.values()
    columns: dict[str, dict[str, str]] = {}
    for label, run in each:
        columns |= tables.shapes(label, run)
    yield "Overview", _table(_of_runs("", runs, tables.overview), words=True)
    yield "Domains", _domains(runs)
    yield "Masks", _masks(runs)
    yield "Training", draw(figures.lines(runs, figures.PROGRESS), wide)
    yield (
        "Speed",
        draw(figures.lines(runs, figures.SPEED), wide)
        + draw(figures.time(runs))
        + _table(_of_runs("", runs, tables.times)),
    )
    yield "Sizes", _table(tables.of_runs("", columns))
    yield "Starts", "".join(_table(tables.events(*item), words=True) for item in each)
    yield "Configuration", "".join(_configuration(*item) for item in each)
    yield "Versions", _table(_of_runs("", runs, tables.versions))


def _domains(runs: Runs) -> str:
    names = styles(domains(list(runs.values())))
    together = figures.gaps(runs, names) + figures.weights(runs, names)
    apart = figures.losses(runs, names)
    if not names:
        return ""
    summaries = [tables.losses(label, run, list(names)) for label, run in runs.items()]
    return (
        _legend(names)
        + draw(together + figures.data(runs, names), 340 * len(runs))
        + "".join(map(_table, summaries))
        + "<h3>Loss of each domain</h3>"
        "<p>Thick: validation. Grey: training, of a long run with its mean. Dotted: reference, "
        "which the target is to reach. The scale leaves out the highest 1% of training losses.</p>"
        + draw(apart, 300 * len(runs))
    )


def _masks(runs: Runs) -> str:
    curves = figures.masks(runs)
    maps = [
        panel for label, run in runs.items() for panel in figures.maps(label, run, len(runs) > 1)
    ]
    summaries = [tables.masks(label, run) for label, run in runs.items()]
    body = "".join(map(_table, summaries))
    if curves:
        body += (
            "<h3>Sparsity and multipliers</h3><p>Blue: expected share of units removed. Dotted: "
            "its target, which is warmed up. λ1 multiplies the difference of the two, λ2 its "
            "square.</p>" + draw(curves, 270)
        )
    if maps:
        body += (
            "<h3>Units that are kept</h3><p>Blue: kept. Faint: removed. Grey: in a layer that is "
            "removed as a whole.</p>" + draw(maps, 480)
        )
    return body


def _configuration(label: str, run: RecordedRun) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return f"<details><summary>{_text(label)}</summary><pre>{_text(text)}</pre></details>"


def _told(runs: Runs) -> str:
    """What a reader must know first: what could not be read, and masks that are off."""
    items = []
    for label, run in runs.items():
        lacking = [] if any(run.records.values()) else [f"{METRICS}: no records"]
        verdict = part(run.records["end"][-1:], 0, "verdict")
        gaps = [missing_steps(run)]
        for problem in filter(None, [*lacking, *run.problems, *gaps]):
            items.append(f"<li>{_text(f'{label}: {problem}')}</li>")
        if verdict:  # a table of the masks
            items.append(f"<li>{_text(label)}: <pre>{_text(str(verdict))}</pre></li>")
    heading = '<div class="told" role="note"><strong>To be known first</strong>'
    return f"{heading}<ul>{''.join(items)}</ul></div>" if items else ""


def draw(panels: Sequence[Panel], least: int = 0) -> str:
    """Figures beside each other where each has `least` pixels, else below each other."""
    drawn = []
    for panel in panels:
        alone = "".join(map(_key, panel.keys.values())) if panel.title in panel.keys else ""
        plot = panel.figure.to_html(
            config={"displaylogo": False, "responsive": True},
            full_html=False,
            include_plotlyjs=False,
            default_height=f"{panel.figure.layout.height}px",
        )
        drawn.append(
            f"<figure><figcaption>{alone}{_text(panel.title)}</figcaption>"
            f"{'' if alone else _legend(panel.keys)}"
            f'<div role="img" aria-label="{_text(f"{panel.title}. {panel.description}")}">{plot}'
            "</div></figure>"
        )
    style = f"--least: {least}px" if least else "--least: 100%"
    return f'<div class="grid" style="{style}">{"".join(drawn)}</div>' if drawn else ""


def _table(table: Table, words: bool = False) -> str:
    """A table that scrolls inside itself; empty without rows."""
    if not table.rows:
        return ""
    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.header)
    rows = "".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    )
    kind = ' class="words"' if words else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _of_runs(title: str, runs: Runs, facts: Callable[[RecordedRun], Mapping[str, str]]) -> Table:
    return tables.of_runs(title, {label: facts(run) for label, run in runs.items()})


def _legend(keys: Mapping[str, Style]) -> str:
    items = "".join(f"<li>{_key(style)}{_text(name)}</li>" for name, style in keys.items())
    return f'<ul class="keys">{items}</ul>' if items else ""


def _key(style: Style) -> str:
    """A piece of a domain's line."""
    dashes = {"dash": "7 3", "dot": "2 3", "dashdot": "7 3 2 3"}.get(str(style["dash"]), "none")
    return (
        '<svg class="key" width="26" height="10" aria-hidden="true"><line x2="26" y1="5" y2="5" '
        f'stroke="{style["color"]}" stroke-width="4" stroke-dasharray="{dashes}"/></svg>'
    )


def _text(text: str) -> str:
    """As HTML; what cannot be printed is shown by its number."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text))
