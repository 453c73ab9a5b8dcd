"""Writes the pages that are made of the code: docs/metrics.md and docs/configuration.md.

A field's comment, behind it or above it, is its documentation. With --check nothing is written, and
the status is 1 where a page is not what the code says.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs"

METRICS = """\
# metrics.jsonl

Made by `python tools/docs.py` of `megashear/records.py`.

A run's record is `metrics.jsonl` in its directory; the console, the progress bar, TensorBoard,
W&B, `megashear watch` and `megashear report` are views of it. This is schema {schema}. A reader
passes over fields and kinds that it does not know; `megashear/report/runs.py` reads a run in any
state, a damaged one too.

{about}

What the host waits for in a step, besides the data: the loss of all ranks once the micro-batches
are done, the norm of the weights' gradients, and in stage prune once for all that its fields tell.
No field adds a wait of its own.
"""
AFTER = """\
## masks.json

In stage prune, beside `metrics.jsonl`, written anew before each checkpoint: `{"step": n, "masks":
{name: mask}}` for the masks layer, hidden, head and intermediate, where a mask is `{"units": n,
"rows": [hexadecimal, ...]}`. A row is a number of `units` binary digits, the first unit in the
highest one; 1 is a unit that extraction would keep now: those of the target shape where the run
has one, else as many as the masks keep by now. `records.unpack` reads a mask.

## TensorBoard and W&B

With `log.tensorboard: true` event files are in `tensorboard` of the run directory, with
`log.wandb: offline` (or `online`) W&B's in `wandb`. A resumed run goes on
in TensorBoard's; W&B gets the id in `wandb-id` again, and offline each start makes a directory of
its own with that id (whether a server makes one run of them has not been tried). They show the
numbers of the records of steps, evaluations and saves. A number of a record itself is named by its
kind (`step/loss`, `evaluation/seconds`), one of a domain, mask or constraint by its field
(`losses/cc`, `sparsity/head`, `multipliers/head/lambda1`). Domain weights are those of evaluations;
rows of a mask are shown by their mean. A view that fails, as where a server is not reached, says so
once, and the run goes on without it.
"""
CONFIGURATION = """\
# Configuration

Made by `python tools/docs.py` of `megashear/config/schema.py`.

One YAML file is a whole run. Behind it on the command line `key.sub=value` overrides an option,
such as `trainer.steps=100`, `data.domains.0.weight=0.5` or `target=null`. Every problem of a file
is told at once, before anything is loaded. An option without a default has to be given. What a run
may change when it goes on is in docs/checkpoint-design.md.
"""


class Field(NamedTuple):
    """A field of a class as its source has it; `default` is None where there is none."""

    name: str
    kind: str
    default: str | None
    comment: str


class Described(NamedTuple):
    """A class as its source has it."""

    text: str
    fields: list[Field]


def classes(file: Path) -> dict[str, Described]:
    """The classes of a module, with the comments of their fields."""
    source = file.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            text = ast.get_docstring(node) or ""
            found[node.name] = Described(text, [_field(item, comments) for item in items])
    return found


def _field(item: ast.AnnAssign, comments: dict[int, tokenize.TokenInfo]) -> Field:
    assert isinstance(item.target, ast.Name) and item.end_lineno is not None
    lines = list(range(item.lineno, item.end_lineno + 1))
    above = item.lineno - 1
    while above in comments and comments[above].line.strip().startswith("#"):
        lines.insert(0, above)
        above -= 1
    comment = " ".join(comments[n].string.lstrip("# ") for n in lines if n in comments)
    default = None if item.value is None else ast.unparse(item.value)
    return Field(item.target.id, ast.unparse(item.annotation), default, comment)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |\n" for row in cells)


def metrics_page() -> str:
    """docs/metrics.md."""
    from megashear import records

    about = (
        (records.__doc__ or "").split("\n\n", 1)[1].replace("This module imports nothing of ", "")
    )
    about = about.replace("megashear.\n", "").strip()
    parts = [METRICS.format(schema=records.SCHEMA, about=about)]
    for described in classes(ROOT / "megashear/records.py").values():
        kind, *fields = described.fields
        name = ast.literal_eval(re.sub(r"Literal\[(.*)\]", r"\1", kind.kind))
        rows = [(f"`{f.name}`", f"`{f.kind}`", f.comment) for f in fields]
        parts.append(f"## {name}\n\n{described.text}\n\n{_table(('field', 'type', ''), rows)}")
    return "\n".join([*parts, AFTER])


def configuration_page() -> str:
    """docs/configuration.md."""
    known = classes(ROOT / "megashear/config/schema.py")
    return "\n".join([CONFIGURATION, *_sections(known, "RunConfig", ""), _chain()])


def _chain() -> str:
    """The section of what `megashear shear` reads."""
    chain = classes(ROOT / "megashear/config/chain.py")["Chain"]
    rows = []
    for field in chain.fields:
        default = "" if field.default is None else f"`{field.default}`".replace("None", "null")
        kind = field.kind.removesuffix(" | None")
        rows.append((f"`{field.name}`", f"`{kind}`", default, field.comment))
    table = _table(("option", "type", "default", ""), rows)
    return f"## The chain\n\nWhat `megashear shear` reads. {chain.text}\n\n{table}"


def _sections(known: dict[str, Described], name: str, path: str) -> Iterator[str]:
    """A section for a class of options, and one for each class below it."""
    from megashear.config import schema
    from megashear.config.validate import CHOICES

    rows, below = [], []
    for field in known[name].fields:
        at = f"{path}{field.name}"
        kind = field.kind.removesuffix(" | None")
        inner = re.sub(r"tuple\[(.*), \.\.\.\]", r"\1", kind)
        if inner in known:
            below.append((inner, at if inner == kind else f"{at}[]"))
            continue
        choices = " | ".join(CHOICES.get(at, ()))
        default = getattr(getattr(schema, name), field.name, None)
        shown = "" if field.default is None else f"`{_yaml(default, field.default)}`"
        comment = field.comment.removeprefix(choices).lstrip(":, ") if choices else field.comment
        rows.append((f"`{at}`", f"`{choices or kind}`", shown, comment))
    title = f"`{path.removesuffix('.')}`" if path else "The run"
    table = _table(("option", "type", "default", ""), rows)
    text = re.sub(r"\s*\(?DESIGN section (\d)", r" (docs/design.md, section \1", known[name].text)
    yield f"## {title}\n\n{text}\n\n{table}"
    for inner, at in below:
        yield from _sections(known, inner, f"{at}.")


def _yaml(value: object, source: str) -> str:
    """A default as it would stand in a file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) else source


def update(*, check: bool) -> int:
    """Write the pages that are not current, or tell which; whether any was told."""
    pages = {"metrics.md": metrics_page(), "configuration.md": configuration_page()}
    old = [name for name, text in pages.items() if _read(PAGES / name) != text]
    for name in old:
        if check:
            print(f"docs/{name} is not what the code says. Run python tools/docs.py")
        else:
            (PAGES / name).write_text(pages[name], encoding="utf-8")
            print(f"wrote docs/{name}")
    return int(check and bool(old))


def main() -> int:
    """Write or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell what is not current")
    return update(check=parser.parse_args().check)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


if __name__ == "__main__":
    from megashear.console import run

    run(main)
