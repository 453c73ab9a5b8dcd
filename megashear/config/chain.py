"""The configuration of `megashear shear`: everything from text and weights to a small model.

Imports neither torch nor Megatron.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from megashear.config.loader import load_config, load_options
from megashear.config.schema import RunConfig
from megashear.config.values import Problem, show
from megashear.errors import ConfigError
from megashear.files import hub_hint

EXTRACTED = "extracted"
"""Directory of the extracted model, in a pruning run's directory."""


@dataclass(frozen=True)
class Chain:
    """One YAML file. Paths are relative to where the command is started."""

    work_dir: str  # logs of the tasks, and what is done
    source: str  # Hugging Face directory of the model to make smaller
    prune_config: (
        str  # YAML file of the run of stage prune; the source is imported to its init_from
    )
    continue_config: str  # YAML file of the run of stage continue
    export: str  # Hugging Face directory to write
    text: str | None = None  # JSONL files, one for each domain; default: token files exist
    tokens: str = "data/{name}"  # token files, {name} stands for the domain's name
    valid_fraction: float = 0.01  # fraction of the documents that is held out
    tokenizer: str | None = None  # default: the source's
    processes: int | None = None  # of a training run; default: one for each GPU


def load_chain(path: Path, *, check_files: bool = True) -> tuple[Chain, RunConfig, RunConfig]:
    """Load a chain's YAML file and those of its two runs, and check all that is known beforehand.

    Args:
        path: of the chain's file.
        check_files: whether source and text have to exist.

    Raises:
        ConfigError: with every problem of the file, and those of the runs' files.
    """
    runs: list[RunConfig] = []
    try:
        chain = load_options(Chain, path, lambda chain: _problems(chain, runs, check_files))
    except ConfigError as error:
        if any(at == "stage" for at, _ in error.problems):
            text = f"is a run's file, not a chain's. Run it with megashear train {path}"
            raise ConfigError(str(path), [("(file)", text)]) from None
        raise
    prune, continue_run = runs
    return chain, prune, continue_run


def _problems(chain: Chain, runs: list[RunConfig], check_files: bool) -> Iterator[Problem]:
    """Yield the problems of a chain, and append its runs to the list."""
    for name in ("prune", "continue"):
        where, file = f"{name}_config", getattr(chain, f"{name}_config")
        try:
            run = load_config(Path(file), world_size=chain.processes, check_files=False)
        except ConfigError as error:
            yield from ((f"{where}: {at}", text) for at, text in error.problems)
            continue
        if run.stage != name:
            yield where, f"= {show(file)} is of stage {run.stage}. Give one of {name}"
        runs.append(run)
    yield from _files(chain, check_files)
    if len(runs) == 2:
        yield from _links(chain, *runs)


def _files(chain: Chain, check_files: bool) -> Iterator[Problem]:
    if check_files and not (Path(chain.source) / "config.json").is_file():
        text = "is no Hugging Face directory: it has no config.json"
        hint = hub_hint(chain.source)
        yield "source", f"= {show(chain.source)} {text}" + (f". {hint}" if hint else "")
    if Path(chain.work_dir).is_file():
        yield "work_dir", f"= {show(chain.work_dir)} is a file. Name a directory"
    if check_files and chain.text is not None and not glob(chain.text, recursive=True):
        yield "text", f"= {show(chain.text)} matches no file"
    if chain.text is not None and "{name}" not in chain.tokens:
        yield "tokens", f"= {show(chain.tokens)} must have {{name}} in it, for the domain's name"
    if not 0 < chain.valid_fraction < 1:
        yield "valid_fraction", f"= {chain.valid_fraction} must be between 0 and 1"
    if chain.processes is not None and chain.processes < 1:
        yield "processes", f"= {chain.processes} must be >= 1"


def _links(chain: Chain, prune: RunConfig, continue_run: RunConfig) -> Iterator[Problem]:
    """Check that each task takes what the one before it makes, and none overwrites another's."""
    extracted = os.path.join(prune.run_dir, EXTRACTED)
    if continue_run.init_from is None or _real(continue_run.init_from) != _real(extracted):
        text = f"= {show(continue_run.init_from)} is not what the chain extracts. Use {extracted}"
        yield "continue_config: init_from", text
    paths = {
        "source": chain.source,
        "prune_config: init_from": prune.init_from,
        "tokens": os.path.dirname(chain.tokens),
        "the extracted model": extracted,
        "prune_config: run_dir": prune.run_dir,
        "continue_config: run_dir": continue_run.run_dir,
        "work_dir": chain.work_dir,
        "export": chain.export,
    }
    if _real(prune.init_from) == _real(chain.source):  # read as it is
        del paths["prune_config: init_from"]
    names: dict[str, str] = {}
    for name, path in paths.items():
        other = names.setdefault(_real(path), name)
        if other != name:
            yield name, f"= {show(path)} is {other} too. Name another directory"
    if chain.text is not None:
        made = chain.tokens.partition("{name}")
        for index, domain in enumerate(prune.data.domains):
            for part in ("train", "valid"):
                prefix = getattr(domain, part)
                if not (prefix.startswith(made[0]) and prefix.endswith(f"{made[2]}_{part}")):
                    text = f"= {show(prefix)} is not made by `tokens`: {chain.tokens}_{part}"
                    yield f"prune_config: data.domains[{index}].{part}", text


def _real(path: str | None) -> str:
    """Return the one absolute path that stands for every way to write it."""
    return os.path.realpath(path or "")
