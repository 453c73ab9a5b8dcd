"""`megashear report`: the page of real runs, of large ones, and of damaged ones."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megashear import cli
from megashear.checkpoint import models
from megashear.checkpoint.dense import extract_checkpoint
from megashear.config.schema import RunConfig
from megashear.errors import DataError
from megashear.platform import parallel
from megashear.pruning.counting import parameter_count
from megashear.reference.scaling_law import fit_domains
from megashear.report.figures import Figures
from megashear.report.plots import scaling_laws
from megashear.report.runs import RecordedRun, write_chain_runs
from megashear.report.series import (
    MAX_POINTS,
    STRETCHES,
    data_used,
    labels,
    missing_steps,
    series,
    thin,
    time_spent,
)
from megashear.report.tables import state as state_of
from megashear.training.trainer import Trainer
from tests.report.browser import CHROMIUM, visit
from tests.report.made_runs import SIZES, make_run
from tests.support.distributed import run_distributed
from tests.support.published import LOSSES, PARAMETERS
from tests.support.runs import GQA, TARGETS, prune_options, run_config, write_domains, write_source

MEASURE = """(view, page) => {
  const figures = [...page.querySelectorAll("figure")], plots = [...page.querySelectorAll(".area")];
  const box = element => element.getBoundingClientRect();
  const hover = area => {
    const at = {clientX: box(area).left + box(area).width / 2, clientY: box(area).top + 9};
    for (const kind of ["pointerenter", "pointermove"]) {
      area.dispatchEvent(new view.PointerEvent(kind, at));
    }
    return page.getElementById("tip").textContent;
  };
  const collide = plot => {
    const labels = [...plot.querySelectorAll(".x:not(.title)")].map(box);
    return labels.some((label, at) => at && label.left < labels[at - 1].right);
  };
  return {
    figures: figures.length,
    undrawn: figures.filter(figure => !figure.querySelector(
      "polyline[points*=','], .dot[d], .bar i, img[src^=data]")).length,
    columns: new Set(figures.map(figure => Math.round(box(figure).left))).size,
    too_wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    cut: figures.filter(figure => [figure, ...figure.querySelectorAll("svg, span, i")].some(
      part => box(part).right > box(page.body).right)).length,
    colliding: plots.filter(collide).length,
    broken: [...page.querySelectorAll("img")].filter(image => !image.naturalWidth).length,
    values: hover(page.querySelector(".area[data-x]")),
    fetched: view.performance.getEntriesByType("resource").filter(
      entry => !entry.name.startsWith("data:")).length,
    titles: [...page.querySelectorAll("figcaption")].map(caption => caption.textContent),
    unnamed: figures.filter(figure => !figure.querySelector("[role=img][aria-label]")).length,
    language: page.documentElement.lang,
    attacked: view.attacked === true,
  };
}"""

HOSTILE = "</script><script>attacked = true</script><img src=x onerror='attacked = true'>"


class Tables(HTMLParser):
    """Cells of a page's tables, by row."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._cell = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data

    def row(self, name: str, number: int = 0) -> list[str]:
        """What stands behind a row's name."""
        return [row[1:] for row in self.rows if row and row[0] == name][number]


def train(config: RunConfig) -> None:
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    try:
        Trainer(config, platform).run()
    finally:
        parallel.stop()


def prune_and_continue(directory: Path) -> None:
    """Real runs, the second of what the first came to."""
    write_source(directory, GQA)
    domains = write_domains(directory)
    places = {"run_dir": str(directory / "prune"), "init_from": str(directory / "source")}
    train(run_config(directory, domains, **places, **prune_options(GQA)))
    extract_checkpoint(models.open(directory / "prune"), directory / "prune" / "extracted")
    places = {
        "run_dir": str(directory / "continue"),
        "init_from": str(directory / "prune" / "extracted"),
    }
    train(run_config(directory, domains, stage="continue", **places))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    run_distributed(prune_and_continue, 1, directory)
    return directory


@pytest.fixture(scope="module")
def large(directory: Path) -> Path:
    return make_run(directory / "large", "prune", 3200)


def report(*runs: Path, out: Path) -> Tables:
    assert cli.execute(["report", *map(str, runs), "--out", str(out)]) is None
    return Tables(out)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_every_figure_at_every_width(directory: Path) -> None:
    """About 10 s, most of it drawing. The last page is wrong in every way, and that is seen."""
    both, hostile, wrong = (directory / f"{name}.html" for name in ("both", "hostile", "wrong"))
    report(directory / "prune", directory / "continue", out=both)
    many = make_run(directory / "many", "continue", 60, names=(HOSTILE, *"abcdefgh"))
    report(many, out=hostile)
    broken = "<div style='width: 2000px'>wide</div><script>fail()</script></body>"
    wrong.write_text(hostile.read_text().replace("</body>", broken))
    laws = directory / "laws.html"
    sizes = [PARAMETERS[name][1] for name in ("7B", "13B", "70B")]
    laws.write_text(scaling_laws(fit_domains(sizes, LOSSES), PARAMETERS["1.3B"][1]))
    two = directory / "two.html"
    report(many, make_run(directory / "more", "prune", 60), out=two)
    visits = [(both, 1280), (both, 390), (two, 390), (hostile, 390), (wrong, 390), (laws, 390)]
    found, console = visit(visits, MEASURE)
    for measured, (page, width) in zip(found, visits, strict=True):
        assert measured["figures"] == len(measured["titles"]) >= 7, page
        assert (measured["columns"] == 1) == (width == 390), page
        assert measured["language"] == "en"
        nothing = ("fetched", "attacked", "unnamed", "cut", "undrawn", "broken", "colliding")
        assert not any(measured[what] for what in nothing), (page, measured)
        assert (measured["too_wide"] > 0) == (page == wrong), page
        assert re.match(r"(tokens|parameters) \S+\n.+: [0-9.]+", measured["values"]), page
    assert {line.rpartition("/")[2].split(" ")[0] for line in console} == {"wrong.html"}
    assert len(found[0]["titles"]) > 20
    masks = {f"{mask} (prune)" for mask in ("layer", "hidden", "head", "intermediate")}
    assert {"first", "second", *masks} < {*found[0]["titles"]}
    assert HOSTILE in found[3]["titles"]


def test_the_tables_say_what_the_records_say(directory: Path) -> None:
    page = report(directory / "prune", directory / "continue", out=directory / "tables.html")
    for number, name in enumerate(("prune", "continue")):
        evaluations = records(directory / name, "evaluation")
        for domain in ("first", "second"):
            row = page.row(domain, number + 1)  # the first one is that of the results
            losses = [f"{evaluations[end]['losses'][domain]:.4f}" for end in (0, -1)]
            gap = evaluations[-1]["losses"][domain] - 4.0
            assert row[:4] == [*losses, "4.0000", f"{gap:+.4f}"]
    step = records(directory / "prune", "step")[-1]
    for mask, target in (("layer", 1 / 3), ("hidden", 1 / 4), ("head", 1 / 2)):
        now = step["sparsity"][mask]
        assert page.row(mask)[1:4] == [f"{now:.4f}", f"{target:.4f}", f"{now - target:+.4f}"]
    assert page.row("state") == ["complete: step 6 of 6"] * 2
    assert page.row("tokens") == [f"{6 * 4 * 16:,}"] * 2
    assert page.row("num_layers") == ["3", "2", "2"]
    assert page.row("hidden_size") == ["32", "24", "24"]
    count = f"{parameter_count(GQA):,}"
    assert page.row("parameters", 1)[0] == count  # the first one is rounded
    assert TARGETS[GQA].num_layers == 2
    assert page.row("megatron-core") == page.row("megatron-core")[:1] * 2


def test_it_opens_with_what_came_of_the_runs(large: Path, tmp_path: Path) -> None:
    continued = make_run(tmp_path / "continue", "continue", 60)
    scratch = make_run(tmp_path / "scratch", "pretrain", 40, every=20)
    report(large, continued, scratch, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.index("<h2>Results") < text.index("<h2>Domains")
    page = Tables(tmp_path / "page.html")
    assert page.row("parameters")[0] == "6.74B → 1.35B"
    assert page.row("sizes")[0].startswith("layers 32 → 24, hidden 4,096 → 2,048, heads 32 → 16")
    assert page.row("masks") == ["on target", "-", "-"]
    assert page.row("tokens")[:2] == ["419M", "62.9M"]
    assert page.row("hours")[0].endswith(" on 8 x NVIDIA H100 80GB HBM3")
    models = ["source", "pruned", "extracted", "continued", "from scratch", "reference"]
    assert page.row("domain") == models
    ends = [records(run, "evaluation") for run in (large, continued, scratch)]
    losses = [ends[0][0], ends[0][-1], ends[1][0], ends[1][-1], ends[2][-1]]
    expected = [f"{record['losses']['cc']:.4f}" for record in losses]
    assert page.row("cc") == [*expected, f"{ends[0][0]['references']['cc']:.4f}"]
    assert len(page.row("mean")) == len(models)


def test_runs_are_drawn_over_tokens_in_the_same_axes(large: Path, tmp_path: Path) -> None:
    runs = {"prune": large, "scratch": make_run(tmp_path / "scratch", "pretrain", 40, every=20)}
    read = {label: RecordedRun.read(directory) for label, directory in runs.items()}
    panel = Figures(read).losses()[0]
    assert (panel.title, list(panel.keys)) == ("cc", list(runs))
    lines = {line.name: line for line in panel.plots[0].lines}
    assert lines["validation (prune)"].points[0][-1] == 3200 * 131_072
    assert lines["validation (scratch)"].points[0][-1] == 40 * 1_048_576
    assert panel.plots[0].x.title == "tokens"
    assert panel.plots[0].has_dots(lines["validation (scratch)"])  # evaluated 3 times
    assert not panel.plots[0].has_dots(lines["validation (prune)"])


def test_data_used_is_what_was_drawn(large: Path) -> None:
    used = data_used(RecordedRun.read(large))
    weights = [list(record["domain_weights"].values()) for record in records(large, "step")]
    assert list(used.values()) == pytest.approx(131_072 * np.sum(weights, 0), rel=1e-12)
    assert sum(used.values()) == pytest.approx(131_072 * 3200)


def test_without_weights_of_steps_those_of_evaluations_count(tmp_path: Path) -> None:
    lines = [
        {"kind": "evaluation", "step": 0, "domain_weights": {"a": 0.75, "b": 0.25}},
        *({"kind": "step", "step": step, "tokens": 100 * step} for step in (1, 2)),
        {"kind": "evaluation", "step": 2, "domain_weights": {"a": 0.5, "b": 0.5}},
        *({"kind": "step", "step": step, "tokens": 100 * step} for step in (3, 4)),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert data_used(RecordedRun.read(tmp_path)) == {"a": 250, "b": 150}


def test_records_of_schema_2_are_read(tmp_path: Path) -> None:
    """Lines that a run of schema 2 wrote, which called the weights of the domains `weights`."""
    lines = (
        '{"kind": "start", "schema": 2, "step": 0, "time": "2026-11-23T05:40:00Z", "stage": '
        '"continue", "steps": 4, "tokens_per_step": 32, "weights": {"a": 0.75, "b": 0.25}}',
        '{"kind": "evaluation", "step": 0, "time": 1.0, "seconds": 0.5, "losses": {"a": 3.0, '
        '"b": 2.0}, "references": {}, "gaps": {}, "weights": {"a": 0.5, "b": 0.5}}',
        '{"kind": "step", "step": 1, "time": 2.0, "tokens": 32, "loss": 2.5, "weights": '
        '{"a": 0.5, "b": 0.5}, "lr": 0.1, "grad_norm": 1.0, "seconds": 0.5}',
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = RecordedRun.read(tmp_path)
    assert run.problems == []
    assert run.start["domain_weights"] == {"a": 0.75, "b": 0.25}
    for kind in ("evaluation", "step"):
        assert run.last(kind)["domain_weights"] == {"a": 0.5, "b": 0.5}
        assert "weights" not in run.last(kind)


def test_all_time_is_accounted_for(large: Path) -> None:
    spent = time_spent(RecordedRun.read(large))
    assert spent["waiting for data"] == pytest.approx(320)
    assert spent["forward and backward"] == pytest.approx(25600)
    assert spent["optimizer and rest of the step"] == pytest.approx(0.8 * 3200)
    assert (spent["evaluation"], spent["saving"]) == (65 * 40, 30)
    assert spent["between starts"] == pytest.approx(3600, abs=1)
    assert spent["start-up and other"] == pytest.approx(200, abs=1)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300),
    st.integers(10, 50),
)
def test_thinned_lines_keep_their_ends_and_peaks(values: list[float], most: int) -> None:
    line = np.arange(len(values)) * 3, np.array(values)
    steps, kept = thin(line, most)
    assert len(steps) <= most and np.all(np.diff(steps) > 0)
    assert all(values[step // 3] == value for step, value in zip(steps, kept, strict=True))
    assert (steps[0], steps[-1]) == (line[0][0], line[0][-1])
    assert (kept.min(), kept.max()) == (min(values), max(values))


def test_a_page_of_long_runs_has_at_most_1_5_megabytes(large: Path, tmp_path: Path) -> None:
    """Lines are thinned, and it says so; maps have as many kept units as the masks."""
    page = report(large, make_run(tmp_path / "on", "continue", 4800), out=tmp_path / "large.html")
    text = (tmp_path / "large.html").read_text()
    assert (tmp_path / "large.html").stat().st_size < 1.5e6
    assert f"more than {MAX_POINTS:,} points" in text
    assert "Warnings" not in text
    for name, (rows, units, keep) in SIZES.items():
        assert f"{name} (large): {rows * keep:,} of {rows * units:,} kept" in text
        assert page.row(name)[0] == f"{keep:,} of {units:,}"


DAMAGES = {
    "no records": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: no records"),
    "empty": (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl: no records"),
    "half a line in the middle": (lambda run: edit(run, 30, '{"kind": "step", "st'), "line 31"),
    "bytes in the middle": (lambda run: edit(run, 30, "\x00\x93\ufffd\x1b[2J"), "line 31"),
    "a word for a loss": (
        lambda run: edit(run, 30, '{"kind": "step", "step": 28, "loss": "<b>low</b>"}'),
        "step 28: loss is no finite number",
    ),
    "numbers that are none": (
        lambda run: edit(
            run, 30, '{"kind": "step", "step": 28, "loss": NaN, "domain_losses": [1]}'
        ),
        "step 28: loss is no finite number",
    ),
    "a step that goes back": (
        lambda run: edit(run, 30, '{"kind": "step", "step": 2}'),
        "line 31: step 2 after 27, and no start between them. Nothing after it is shown",
    ),
    "lines lost": (
        lambda run: edit(run, 30, *[""] * 6),
        "no record of 3 steps, the first from 28 to 30",
    ),
    "configuration": (lambda run: (run / "config.yaml").write_text("a: [b"), "config.yaml: "),
    "masks of any size": (
        lambda run: (run / "masks.json").write_text(
            '{"masks": {"head": {"units": 1000000000000, "rows": ["1"]}}}'
        ),
        "masks.json: ValueError: 1 rows of 1000000000000 units",
    ),
    "masks": (
        lambda run: (run / "masks.json").write_text('{"masks": {"head": {"units": 1, "rows": 7}}}'),
        "masks.json: ",
    ),
}


def edit(run: Path, line: int, *texts: str) -> None:
    """Write other lines in the place of some."""
    lines = (run / "metrics.jsonl").read_text().split("\n")
    lines[line : line + len(texts)] = [text for text in texts if text]
    (run / "metrics.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_has_its_page_and_the_page_says_so(damage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "continue", 60, names=("a", "b"), every=20)
    losses = records(run, "evaluation")[-1]["losses"]
    spoil, told = DAMAGES[damage]
    spoil(run)
    page = report(run, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert told in text.partition("Warnings")[2].partition("</ul>")[0]
    assert "<b>low" not in text
    if "record" not in told and "line" not in told:
        assert [page.row(name)[1] for name in "ab"] == [f"{losses[name]:.4f}" for name in "ab"]


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        (20, "running, or ended without a record: step 18 of 60"),
        (35, "stopped by SIGUSR1: step 30 of 60"),
        (36, "running, or ended without a record: step 30 of 60"),
        (None, "complete: step 60 of 60"),
    ],
)
def test_an_unfinished_run_says_where_it_is(lines: int | None, state: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "continue", 60, names=("a", "b"), every=20)
    file = run / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:lines]))
    assert state_of(RecordedRun.read(run)) == state


def test_masks_that_are_off_their_targets_are_told_first_and_whole(tmp_path: Path) -> None:
    verdict = "\n".join(f"head of layer {layer}: 0.1 off its target" for layer in range(40))
    end = {"kind": "end", "step": 3, "reason": "complete", "verdict": verdict}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(end) + "\n")
    report(tmp_path, out=tmp_path / "page.html")
    assert f"<pre>{verdict}</pre>" in (tmp_path / "page.html").read_text()


def test_many_hosts_are_counted_and_all_of_them_stand_with_the_starts(tmp_path: Path) -> None:
    hosts = [f"gpu{number:02}" for number in range(16)]
    start = {"kind": "start", "step": 0, "hosts": hosts, "layout": {"data": 128}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    page = report(tmp_path, out=tmp_path / "page.html")
    assert page.row("hosts") == ["16 hosts: gpu00, gpu01, ..."]
    assert ", ".join(hosts) in page.row("start")[-1]


def test_a_long_noisy_line_has_its_mean(large: Path) -> None:
    run = RecordedRun.read(large)
    panel = Figures({"large": run}).losses()[0]
    lines = {line.name: line for line in panel.plots[0].lines}
    training = series(run, "step", "domain_losses", "cc")[1]
    mean = lines["training, mean"]
    assert len(mean.points[0]) == STRETCHES
    assert np.mean(mean.points[1]) == pytest.approx(training.mean(), rel=1e-3)
    assert mean.style.width > lines["training"].style.width


def test_an_empty_directory_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    report(tmp_path / "empty", out=tmp_path / "page.html")
    assert "Warnings" in (tmp_path / "page.html").read_text()
    assert len((tmp_path / "page.html").read_text()) < 10_000  # no figure, no library


@given(data=st.data())
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bytes_in_the_records_leave_a_page(data: st.DataObject, tmp_path: Path) -> None:
    run = tmp_path / "any"
    if not run.is_dir():
        make_run(run, "continue", 12, names=("a", "b"), every=4)
        (run / "whole").write_bytes((run / "metrics.jsonl").read_bytes())
    content = bytearray((run / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from(b'0123456789.eE-+:,[]{}" nulltrueNaN\x00\xff'))
    (run / "metrics.jsonl").write_bytes(content)
    report(run, out=tmp_path / "page.html")


def test_where_the_page_goes(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    both = ["prune", "continue", "./prune/"]  # of one that is named twice, it shows one
    for runs, out in ((["prune"], "prune/report.html"), (both, "report.html")):
        Path(out).write_text("old")
        cli.execute(["report", *runs])
        text = Path(out).read_text()
        assert text.endswith("</html>\n")
        assert f"<h1>{' and '.join(runs[:2])}</h1>" in text
        assert f"written to {out} (" in capsys.readouterr().out


def test_a_chains_directory_stands_for_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the directories were moved, and before the second run has begun."""
    monkeypatch.chdir(tmp_path)
    make_run(Path("old/prune"), "prune", 20)
    Path("old/chain/logs").mkdir(parents=True)
    write_chain_runs(Path("old/chain"), ["old/prune", "old/continue"])
    Path("old").rename("new")
    cli.execute(["watch", "--once", "new/chain"])
    shown = capsys.readouterr().out
    assert re.search("prune.*complete", shown) and re.search("continue.*not begun", shown)
    make_run(Path("new/continue"), "continue", 20)
    cli.execute(["report", "new/chain", "new/prune/"])
    cli.execute(["report", "new/chain"])
    for page in ("report.html", "new/chain/report.html"):
        assert "<h1>prune and continue</h1>" in Path(page).read_text()


def test_what_is_no_run_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as refused:
        report(tmp_path / "none", tmp_path, tmp_path / "file", out=tmp_path / "page.html")
    assert len(str(refused.value).splitlines()) == 2
    with pytest.raises(DataError, match=r"has none of metrics\.jsonl, config\.yaml and ch"):
        cli.execute(["report", str(tmp_path)])
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(DataError, match="cannot be written: No such file"):
        report(tmp_path, out=tmp_path / "nowhere" / "page.html")


def test_runs_are_called_by_what_tells_them_apart() -> None:
    assert labels([Path("runs/a/prune"), Path("runs/a/continue")]) == ["prune", "continue"]
    assert labels([Path("runs/a/prune"), Path("runs/b/prune")]) == ["a/prune", "b/prune"]


def test_steps_without_a_record_are_told(tmp_path: Path) -> None:
    steps = [1, 2, 6, 7, 9]
    lines = [json.dumps({"kind": "step", "step": step}) + "\n" for step in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert missing_steps(RecordedRun.read(tmp_path)).endswith(
        "no record of 4 steps, the first from 3 to 5"
    )
