"""Load a run's YAML file and `key.sub=value` overrides into the dataclasses of `schema`.

Every problem is found in one pass and raised as one ConfigError. An option that is added to a
dataclass can be written in YAML at once (`decode`). Imports the standard library, yaml, `config`
and `errors`; never torch, Megatron or `checkpoint`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from megashear.config.decode import decode
from megashear.config.schema import DataConfig, Domain, ModelShape, RunConfig
from megashear.config.validate import problems
from megashear.config.values import FAULTY, Faulty, Problem, Unreadable, join, show
from megashear.errors import CheckpointError, ConfigError, ShearError

DOMAINS_FILE = "domains.yaml"
"""Domains of a run with their weights at the last save, in its directory; `data.domains_from`."""

FREE_OPTIONS = (
    *("run_dir", "parallel", "log", "data.num_workers", "data.index_cache", "data.tokenizer"),
    "data.other_tokenizer",
    *("platform.device", "platform.layers", "platform.kernels", "platform.loader"),
    "platform.timeout_minutes",
    *("trainer.log_interval", "trainer.save_interval", "trainer.keep_checkpoints"),
    *("trainer.async_save", "trainer.micro_batch_size"),
)
"""Options that a resumed run may change: they do not change what it computes."""

TOKEN_PATH = re.compile(r"data\.domains\.\d+\.(train|valid)")

T = TypeVar("T")


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    source_shape: Callable[[str], ModelShape] | None = None,
    world_size: int | None = None,
    check_files: bool = True,
) -> RunConfig:
    """Load the run that a YAML file describes and check it as a whole; see `problems`.

    Overrides are `key.sub=value`, the value in YAML; `data.domains.0.weight=0.5` for a list.
    `source_shape` reads the shape of the model at `init_from`.

    Raises:
        ConfigError: with every problem that the file and the overrides have.
    """
    found: list[Problem] = []
    tree = _read_yaml(path, "", found)
    if tree is None or isinstance(tree, dict):
        for override in overrides:
            tree = _override(tree, override, found)
    config: RunConfig = decode(RunConfig, tree, "", found)
    if not isinstance(config, Faulty):
        config = _with_domains_from(config, found, check_files)
        source = _source(config, source_shape, found)
        found += problems(config, source, world_size, check_files=check_files)
    if found:
        raise ConfigError(str(path), found)
    return config


def load_domains(path: Path) -> RunConfig:
    """Load the domains of a run's YAML file, a run directory or a YAML file of domains.

    Only the file itself is checked: token files, models and references may still be missing. The
    weights of a run directory are its initial ones. For a file of domains, all other options are
    at their defaults.

    Raises:
        ConfigError: with every problem of the file.
    """
    found: list[Problem] = []
    file = path / "config.yaml" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        text = "is not there: this is no run directory. Give one, or a run's YAML file, or a YAML "
        raise ConfigError(str(path), [("config.yaml", f"{text}file of domains, as --domains")])
    tree = _read_yaml(file, "", found)
    if isinstance(tree, list) or (isinstance(tree, dict) and "domains" in tree):
        domains = _read_domains(tree, "domains", found)
        config = RunConfig(stage="continue", run_dir="", data=DataConfig(domains=domains))
    else:
        config = decode(RunConfig, tree, "", found)
        if not isinstance(config, Faulty):
            config = _with_domains_from(config, found, check_files=True)
    if found:
        raise ConfigError(str(file), found)
    return config


def load_target(path: Path) -> RunConfig | ModelShape:
    """Load a target: a run's YAML file (or directory) that names one, or a YAML file of sizes.

    For a run of stage pretrain, return the shape of its model.

    Raises:
        ConfigError: it is neither.
    """
    found: list[Problem] = []
    tree = None if path.is_dir() else _read_yaml(path, "", found)
    if isinstance(tree, dict) and "num_layers" in tree:
        return load_shape(path)
    config = load_domains(path)
    if config.model or ((config.target or config.target_sparsity) and config.init_from):
        return config.model or config
    text = "names no target: give a run of stage prune or pretrain, or the sizes of a model"
    raise ConfigError(str(path), [("target", text)])


def load_shape(path: Path) -> ModelShape:
    """Load the shape in a YAML file of sizes, named as below `model` in a run's file.

    Raises:
        ConfigError: with every problem of the file.
    """
    found: list[Problem] = []
    shape: ModelShape = decode(ModelShape, _read_yaml(path, "", found), "", found)
    if not isinstance(shape, Faulty):
        run = RunConfig(stage="pretrain", run_dir="", model=shape)
        prefix, of_run = "model.", problems(run, check_files=False)
        found += [(at.removeprefix(prefix), text) for at, text in of_run if at.startswith(prefix)]
    if found:
        raise ConfigError(str(path), found)
    return shape


def load_options(
    cls: type[T], path: Path, check: Callable[[T], Iterable[Problem]] | None = None
) -> T:
    """Load a dataclass of options from a YAML file; `check` finds further problems.

    Raises:
        ConfigError: with every problem of the file.
    """
    found: list[Problem] = []
    value: T = decode(cls, _read_yaml(path, "", found), "", found)
    faulty = isinstance(value, Faulty) or any(isinstance(v, Faulty) for v in vars(value).values())
    if check is not None and not faulty:
        found += check(value)
    if found:
        raise ConfigError(str(path), found)
    return value


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML; reading it gives an equal configuration."""
    return _dump(asdict(config))


def from_yaml(text: str) -> RunConfig:
    """Return the configuration that `to_yaml` of this or an earlier release wrote.

    An option that the release did not know is at its default; one that no longer exists is dropped.

    Raises:
        ConfigError: fields are missing or of another type.
    """
    found: list[Problem] = []
    config: RunConfig = decode(RunConfig, yaml.safe_load(text), "", found, strict=False)
    if found:
        raise ConfigError("stored configuration", found)
    return config


def settings(config: RunConfig, *, token_paths: bool = True) -> dict[str, Any]:
    """Return the options that decide what a run computes, by their paths.

    Without `token_paths` the paths of token files are left out: the run compares their content.
    """
    return {
        path: value
        for path, value in _flat(asdict(config), "")
        if not path.startswith(FREE_OPTIONS) and (token_paths or not TOKEN_PATH.fullmatch(path))
    }


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict | list | tuple):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _flat(value, join(path, str(key)))


def refuse_other_settings(
    config: RunConfig, before: RunConfig, *, token_paths: bool = True
) -> None:
    """Refuse to resume a run with options that would change what it computes; see `settings`.

    Raises:
        CheckpointError: lists all options that differ.
    """
    old, new = (settings(each, token_paths=token_paths) for each in (before, config))
    differences = [
        f"  {name}: {old.get(name)!r} in the run, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{config.run_dir} holds a run of another configuration:\n"
            + "\n".join(differences)
            + "\nUndo the changes to continue it, or give another run_dir"
        )


def domains_to_yaml(domains: Sequence[Domain]) -> str:
    """Return the text of a run's DOMAINS_FILE."""
    return _dump([asdict(domain) for domain in domains])


def _dump(tree: Any) -> str:
    plain = json.loads(json.dumps(tree))  # YAML knows lists, not tuples
    return yaml.safe_dump(plain, sort_keys=False, width=100)


def _read_yaml(file: Path, path: str, found: list[Problem]) -> Any:
    """Return a file's plain lists and mappings; FAULTY, and a problem at `path`, if it has none."""
    try:
        text = file.read_text(encoding="utf-8")
        found += _duplicates(yaml.compose(text, Loader=yaml.SafeLoader), path, ())
        return yaml.safe_load(text)
    except FileNotFoundError:
        problem = "does not exist"
    except (OSError, ValueError) as error:  # YAML raises ValueError for a date such as 2020-13-45
        problem = f"cannot be read: {error}"
    except yaml.YAMLError as error:
        problem = f"is not YAML: {_one_line(error)}"
    found.append((path or "(file)", problem))
    return FAULTY


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _duplicates(node: yaml.Node | None, path: str, above: tuple[int, ...]) -> Iterator[Problem]:
    """Find keys that a mapping has twice: YAML would silently take the last."""
    if id(node) in above:  # an alias to a node that contains it
        return
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, f"{path}[{index}]", above)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                text = f"is given twice, in lines {lines[name]} and {line}. Leave one out"
                yield join(path, name), text
            lines.setdefault(name, line)
            yield from _duplicates(value, join(path, name), above)


def _override(tree: Any, override: str, found: list[Problem]) -> Any:
    """Return the tree with one `key.sub=value` applied."""
    key, equals, text = override.partition("=")
    names = [name for name in re.split(r"[.\[\]]+", key.strip()) if name]
    try:
        if not equals or not names:
            raise ValueError("is not of the form key.sub=value")
        return _put(tree, names, yaml.safe_load(text), "")
    except yaml.YAMLError as error:
        found.append((override, f"its value is not YAML: {_one_line(error)}"))
    except ValueError as error:
        found.append((override, str(error)))
    return tree


def _put(tree: Any, names: Sequence[str], value: Any, path: str) -> Any:
    """Return a copy of the tree with `value` at `names`; YAML aliases of that node stay unchanged.

    Raises:
        ValueError: the tree has no such path.
    """
    if not names:
        return value
    name, *rest = names
    if isinstance(tree, list):
        if not name.isdecimal() or int(name) >= len(tree):
            count = f"{len(tree)} item{'s' if len(tree) != 1 else ''}"
            raise ValueError(f"{path} has {count}, and none is number {show(name)} (0 is first)")
        index = int(name)
        inner = _put(tree[index], rest, value, f"{path}[{name}]")
        return [*tree[:index], inner, *tree[index + 1 :]]
    if tree is not None and not isinstance(tree, dict):
        raise ValueError(f"{path} = {show(tree)} has no options of its own")
    tree = tree or {}
    return {**tree, name: _put(tree.get(name), rest, value, join(path, name))}


def _with_domains_from(config: RunConfig, found: list[Problem], check_files: bool) -> RunConfig:
    """Replace `data.domains_from` by the domains that it names."""
    where, data = "data.domains_from", config.data
    try:
        if data.domains_from is None:
            return config
        file = Path(data.domains_from)
        if data.domains:
            found.append((where, "data.domains are given as well. Leave one of the two out"))
            return config
    except Unreadable:
        return config
    if not file.is_file() and file.suffix not in (".yaml", ".yml"):
        file /= DOMAINS_FILE
    if not file.is_file():
        if check_files:
            text = f"= {show(data.domains_from)}: no file {file}. Name a run directory that has "
            found.append((where, text + "been saved, or a YAML file of domains"))
        return config
    domains = _read_domains(_read_yaml(file, str(file), found), str(file), found)
    # In other stages than continue the model has not read what that run has.
    if not found and (config.stage != "continue" or data.reread_domains):
        domains = tuple(replace(domain, first_sample=0) for domain in domains)
    data = replace(data, domains=domains, domains_from=None, reread_domains=False)
    return replace(config, data=data)


def _read_domains(tree: Any, path: str, found: list[Problem]) -> Any:
    """Decode a list of domains, or a mapping that has one as `domains`."""
    if isinstance(tree, dict) and "domains" not in tree:
        found.append((path, "has no list `domains`"))
        return FAULTY
    tree = tree["domains"] if isinstance(tree, dict) else tree
    return decode(tuple[Domain, ...], tree, path, found)


def _source(
    config: RunConfig, source_shape: Callable[[str], ModelShape] | None, found: list[Problem]
) -> ModelShape | None:
    """Return the shape of the model at `init_from`; None if it cannot be known."""
    try:
        if source_shape is None or config.init_from is None or not Path(config.init_from).exists():
            return None
        return source_shape(config.init_from)
    except Unreadable:
        return None
    except ShearError as error:
        found.append(("init_from", f"= {show(config.init_from)}: {error}"))
        return None
