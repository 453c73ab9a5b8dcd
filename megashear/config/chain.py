"""The whole way from text and weights to a small model: what `megashear shear` reads, and checks.

Imports neither torch nor Megatron.
"""

from __future__ import annotations

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
    chain = load_options(Chain, path)
    found: list[Problem] = []
    runs = []
    for name in ("prune", "continue"):
        where, file = f"{name}_config", getattr(chain, f"{name}_config")
        try:
            run = load_config(Path(file), world_size=chain.processes, check_files=False)
        except ConfigError as error:
            found += [(f"{where}: {at}", text) for at, text in error.problems]
            continue
        if run.stage != name:
            found.append((where, f"= {show(file)} is of stage {run.stage}. Give one of {name}"))
        runs.append(run)
    found += _files(chain)
    if len(runs) == 2:
        found += _links(chain, *runs)
    if found:
        raise ConfigError(str(path), found)
    prune, go_on = runs
    return chain, prune, go_on


def _files(chain: Chain) -> list[Problem]:
    found = []
    if not (Path(chain.source) / "config.json").is_file():
        text = "is no Hugging Face directory: it has no config.json"
        found.append(("source", f"= {show(chain.source)} {text}"))
    if chain.text is not None and not glob(chain.text, recursive=True):
        found.append(("text", f"= {show(chain.text)} matches no file"))
    if chain.text is not None and "{name}" not in chain.tokens:
        text = "must have {name} in it, for the domain's name"
        found.append(("tokens", f"= {show(chain.tokens)} {text}"))
    if not 0 < chain.valid_fraction < 1:
        found.append(("valid_fraction", f"= {chain.valid_fraction} must be between 0 and 1"))
    return found


def _links(chain: Chain, prune: RunConfig, go_on: RunConfig) -> list[Problem]:
    """Each stage takes what the one before it makes."""
    found = []
    extracted = Path(prune.run_dir, EXTRACTED)
    if go_on.init_from is None or Path(go_on.init_from) != extracted:
        text = f"= {show(go_on.init_from)} is not what the chain extracts. Use {extracted}"
        found.append(("continue_config: init_from", text))
    places = {
        "work_dir": chain.work_dir,
        "export": chain.export,
        "prune_config: run_dir": prune.run_dir,
        "continue_config: run_dir": go_on.run_dir,
    }
    names: dict[Path, str] = {}
    for name, place in places.items():
        other = names.setdefault(Path(place), name)
        if other != name:
            found.append((name, f"= {show(place)} is {other} too. Name another directory"))
    if chain.text is not None:
        made = chain.tokens.partition("{name}")
        for index, domain in enumerate(prune.data.domains):
            for part in ("train", "valid"):
                prefix = getattr(domain, part)
                if not (prefix.startswith(made[0]) and prefix.endswith(f"{made[2]}_{part}")):
                    text = f"= {show(prefix)} is none of what `tokens` makes: {chain.tokens}_{part}"
                    found.append((f"prune_config: data.domains[{index}].{part}", text))
    return found
