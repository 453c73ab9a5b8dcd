"""The whole way from text and weights to a small model: what `megashear shear` reads, and checks.

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

EXTRACTED = "extracted"
"""In a pruning run's directory: the model that was cut out of it."""


@dataclass(frozen=True)
class Chain:
    """One YAML file: a whole way. Paths are relative to where the command is started."""

    work_dir: str  # logs of the stages, and what is done
    source: str  # Hugging Face directory of the model to make smaller
    prune_config: str  # YAML file of the run of stage prune; its init_from is where source goes
    continue_config: str  # YAML file of the run of stage continue
    export: str  # Hugging Face directory to write
    text: str | None = None  # JSONL files, each a domain; default: token files are there already
    tokens: str = "data/{name}"  # token files, with the domain's name in the place of {name}
    valid_fraction: float = 0.01  # share of the documents that is held out
    tokenizer: str | None = None  # default: the source's
    processes: int | None = None  # of a training stage; default: one a GPU, or one without any


def load_chain(path: Path) -> tuple[Chain, RunConfig, RunConfig]:
    """The chain in a YAML file, and its two runs, checked for what can be known beforehand.

    Raises:
        ConfigError: with every problem of the file, and those of the runs' files.
    """
    runs: list[RunConfig] = []
    chain = load_options(Chain, path, lambda chain: _problems(chain, runs))
    prune, go_on = runs
    return chain, prune, go_on


def _problems(chain: Chain, runs: list[RunConfig]) -> Iterator[Problem]:
    """What is wrong with a chain; its runs are put into the list."""
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
    yield from _files(chain)
    if len(runs) == 2:
        yield from _links(chain, *runs)


def _files(chain: Chain) -> Iterator[Problem]:
    if not (Path(chain.source) / "config.json").is_file():
        text = "is no Hugging Face directory: it has no config.json"
        yield "source", f"= {show(chain.source)} {text}"
    if Path(chain.work_dir).is_file():
        yield "work_dir", f"= {show(chain.work_dir)} is a file. Name a directory"
    if chain.text is not None and not glob(chain.text, recursive=True):
        yield "text", f"= {show(chain.text)} matches no file"
    if chain.text is not None and "{name}" not in chain.tokens:
        yield "tokens", f"= {show(chain.tokens)} must have {{name}} in it, for the domain's name"
    if not 0 < chain.valid_fraction < 1:
        yield "valid_fraction", f"= {chain.valid_fraction} must be between 0 and 1"
    if chain.processes is not None and chain.processes < 1:
        yield "processes", f"= {chain.processes} must be >= 1"


def _links(chain: Chain, prune: RunConfig, go_on: RunConfig) -> Iterator[Problem]:
    """Each stage takes what the one before it makes, and none writes over another's."""
    extracted = os.path.join(prune.run_dir, EXTRACTED)
    if go_on.init_from is None or _place(go_on.init_from) != _place(extracted):
        text = f"= {show(go_on.init_from)} is not what the chain extracts. Use {extracted}"
        yield "continue_config: init_from", text
    places = {
        "source": chain.source,
        "prune_config: init_from": prune.init_from,
        "tokens": os.path.dirname(chain.tokens),
        "what is extracted": extracted,
        "prune_config: run_dir": prune.run_dir,
        "continue_config: run_dir": go_on.run_dir,
        "work_dir": chain.work_dir,
        "export": chain.export,
    }
    if _place(prune.init_from) == _place(chain.source):  # read as it is
        del places["prune_config: init_from"]
    names: dict[str, str] = {}
    for name, place in places.items():
        other = names.setdefault(_place(place), name)
        if other != name:
            yield name, f"= {show(place)} is {other} too. Name another directory"
    if chain.text is not None:
        made = chain.tokens.partition("{name}")
        for index, domain in enumerate(prune.data.domains):
            for part in ("train", "valid"):
                prefix = getattr(domain, part)
                if not (prefix.startswith(made[0]) and prefix.endswith(f"{made[2]}_{part}")):
                    text = f"= {show(prefix)} is none of what `tokens` makes: {chain.tokens}_{part}"
                    yield f"prune_config: data.domains[{index}].{part}", text


def _place(path: str | None) -> str:
    """The same for every way to write a path."""
    return os.path.realpath(path or "")
