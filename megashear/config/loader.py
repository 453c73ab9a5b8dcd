"""A run's YAML file and `key.sub=value` overrides, read into the dataclasses of `schema`.

Everything that is wrong is found in one pass and raised as one ConfigError. The dataclasses' type
hints are the only description of the format: an option added there can be written at once.
Imports the standard library, yaml and `errors`; never torch, Megatron or `checkpoint`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from megashear.config.schema import (
    FAMILIES,
    ROPE_TYPES,
    DataConfig,
    Domain,
    ModelShape,
    RunConfig,
)
from megashear.config.validate import problems
from megashear.config.values import Faulty, Problem, Unreadable, options, show
from megashear.errors import ConfigError, ShearError

DOMAINS_FILE = "domains.yaml"
"""In a run directory: the domains with their weights of the last save, for `data.domains_from`."""

MAX_LAYERS = 2**14
"""Of a stored shape; a larger number is damage, and would make lists of as many tensors."""

FREE_OPTIONS = (
    *("run_dir", "parallel", "log", "data.num_workers", "data.index_cache", "data.tokenizer"),
    *("platform.device", "platform.layers", "platform.kernels", "platform.loader"),
    "platform.timeout_minutes",
    *("trainer.log_interval", "trainer.save_interval", "trainer.keep_checkpoints"),
    *("trainer.async_save", "trainer.micro_batch_size"),
)
"""Options that may differ between a run and its continuation without changing what it computes."""

T = TypeVar("T")
_FAULTY: Any = Faulty()
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def load_config(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    source_shape: Callable[[str], ModelShape] | None = None,
    world_size: int | None = None,
    check_files: bool = True,
) -> RunConfig:
    """The run that a YAML file describes, checked as a whole; see `problems`.

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
    config: RunConfig = _read(RunConfig, tree, "", found)
    if not isinstance(config, Faulty):
        config = _with_domains_from(config, found, check_files)
        source = _source(config, source_shape, found)
        found += problems(config, source, world_size, check_files=check_files)
    if found:
        raise ConfigError(str(path), found)
    return config


def load_domains(path: Path) -> RunConfig:
    """What a run's YAML file, a run directory or a YAML file of domains says of validation.

    Only what stands in the file is checked: files, models and references may be missing still. Of
    a run directory, weights are those it began with; of domains alone, the rest is at its defaults.

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
        config = _read(RunConfig, tree, "", found)
        if not isinstance(config, Faulty):
            config = _with_domains_from(config, found, check_files=True)
    if found:
        raise ConfigError(str(file), found)
    return config


def load_target(path: Path) -> RunConfig | ModelShape:
    """A run's YAML file (or directory) that names a target, or the shape in a YAML file of sizes.

    Of stage pretrain it is the shape of the run's model.

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
    """The shape in a YAML file of sizes, which are those of `model` in a run's.

    Raises:
        ConfigError: with every problem of the file.
    """
    found: list[Problem] = []
    shape: ModelShape = _read(ModelShape, _read_yaml(path, "", found), "", found)
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
    """A dataclass of options out of a YAML file; `check` finds what else is wrong with them.

    Raises:
        ConfigError: with every problem of the file.
    """
    found: list[Problem] = []
    value: T = _read(cls, _read_yaml(path, "", found), "", found)
    faulty = isinstance(value, Faulty) or any(isinstance(v, Faulty) for v in vars(value).values())
    if check is not None and not faulty:
        found += check(value)
    if found:
        raise ConfigError(str(path), found)
    return value


def stored(cls: type[T], raw: Any) -> T:
    """A dataclass out of the mapping of its fields that a checkpoint has stored.

    Raises:
        ConfigError: fields are missing, of another type, or shapes that no model can have.
    """
    found: list[Problem] = []
    value: T = _read(cls, raw, "", found)
    if not found:
        for path, shape in _shapes(value, ""):
            found += [(_join(path, name), text) for name, text in _no_shape(shape)]
    if found:
        raise ConfigError("damaged", found)
    return value


def _shapes(value: Any, path: str) -> Iterator[tuple[str, ModelShape]]:
    """The shapes in a value, by their paths."""
    if isinstance(value, ModelShape):
        yield path, value
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _shapes(item, f"{path}[{index}]")
    elif is_dataclass(value):  # a checkpoint's description, or a record of its history
        for name, item in vars(value).items():
            yield from _shapes(item, _join(path, name))


def _no_shape(shape: ModelShape) -> list[Problem]:
    """Why no model can have a shape."""
    sizes = {name: value for name, value in vars(shape).items() if type(value) is int}
    found = [(name, f"= {size} must be >= 1") for name, size in sizes.items() if size < 1]
    if shape.num_layers > MAX_LAYERS:  # whose tensors are listed
        found.append(("num_layers", f"= {shape.num_layers} must be <= {MAX_LAYERS}"))
    if shape.family not in FAMILIES:
        found.append(("family", f"= {show(shape.family)} is none of {FAMILIES}"))
    if shape.rotary_scaling and shape.rotary_scaling.rope_type not in ROPE_TYPES:
        found.append(("rotary_scaling.rope_type", f"must be one of {ROPE_TYPES}"))
    return found


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; reading that again gives an equal configuration."""
    return _dump(asdict(config))


def from_yaml(text: str) -> RunConfig:
    """The configuration that `to_yaml` wrote, of any release.

    An option that it did not know yet is at its default, and one that is no more is dropped.
    """
    config: RunConfig = _stored(RunConfig, yaml.safe_load(text))
    return config


def _stored(hint: Any, raw: Any) -> Any:
    """What `to_yaml` wrote of a value of the type that a hint names."""
    if get_origin(hint) is not None:  # X | None, tuple[X, ...]
        hint = get_args(hint)[0]
    if isinstance(raw, list):
        return tuple(_stored(hint, each) for each in raw)
    if not isinstance(raw, dict):
        return raw
    hints = get_type_hints(hint)
    return hint(**{name: _stored(hints[name], raw[name]) for name in hints if name in raw})


def settings(config: RunConfig) -> dict[str, Any]:
    """The options that decide what a run computes, by their paths."""
    return {
        path: value
        for path, value in _flat(asdict(config), "")
        if not path.startswith(FREE_OPTIONS)
    }


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict | list | tuple):
        yield path, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _flat(value, _join(path, str(key)))


def domains_to_yaml(domains: Sequence[Domain]) -> str:
    """The text of a run's DOMAINS_FILE."""
    return _dump([asdict(domain) for domain in domains])


def _dump(tree: Any) -> str:
    plain = json.loads(json.dumps(tree))  # YAML knows lists, not tuples
    return yaml.safe_dump(plain, sort_keys=False, width=100)


def _read_yaml(file: Path, path: str, found: list[Problem]) -> Any:
    """The file's plain lists and mappings, which stand at `path`; FAULTY where it is no YAML."""
    try:
        text = file.read_text(encoding="utf-8")
        found += _duplicates(yaml.compose(text, Loader=yaml.SafeLoader), path, ())
        return yaml.safe_load(text)
    except FileNotFoundError:
        problem = "does not exist"
    except (OSError, ValueError) as error:  # a date that there is not is a ValueError
        problem = f"cannot be read: {error}"
    except yaml.YAMLError as error:
        problem = f"is not YAML: {_one_line(error)}"
    found.append((path or "(file)", problem))
    return _FAULTY


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _duplicates(node: yaml.Node | None, path: str, above: tuple[int, ...]) -> Iterator[Problem]:
    """Keys that a mapping has twice, of which YAML would silently take the last."""
    if id(node) in above:  # an alias to a node that holds it
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
                yield _join(path, name), text
            lines.setdefault(name, line)
            yield from _duplicates(value, _join(path, name), above)


def _override(tree: Any, override: str, found: list[Problem]) -> Any:
    """The tree with one `key.sub=value` put in."""
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
    """A copy of the tree with `value` at `names`; aliases of what is changed stay as they were.

    Raises:
        ValueError: there is no such place in the tree.
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
    return {**tree, name: _put(tree.get(name), rest, value, _join(path, name))}


def _read(hint: Any, raw: Any, path: str, found: list[Problem]) -> Any:
    """`raw` as a value of the type that a hint names; FAULTY, and a problem, where it is none."""
    if isinstance(raw, Faulty):
        return raw
    if get_origin(hint) in (Union, UnionType):  # X | None
        return None if raw is None else _read(get_args(hint)[0], raw, path, found)
    if get_origin(hint) is tuple:
        if not isinstance(raw, list):
            return _wrong("a list", raw, path, found)
        item = get_args(hint)[0]
        return tuple(_read(item, each, f"{path}[{i}]", found) for i, each in enumerate(raw))
    if get_origin(hint) is dict:  # of text to values of a type, or of any
        if not isinstance(raw, dict):
            return _wrong("a mapping", raw, path, found)
        item = get_args(hint)[1]
        if item is Any:
            return raw
        return {name: _read(item, each, _join(path, name), found) for name, each in raw.items()}
    if is_dataclass(hint):
        return _read_section(hint, {} if raw is None else raw, path, found)
    if hint is float and isinstance(raw, (int, str)) and not isinstance(raw, bool):
        try:
            raw = float(raw)  # YAML 1.1 takes 1e-4 for text
        except (ValueError, OverflowError):
            return _wrong(_EXPECTED[hint], raw, path, found)
    if type(raw) is not hint or (hint is float and not math.isfinite(raw)):
        return _wrong(_EXPECTED[hint], raw, path, found)
    return raw


def _wrong(expected: str, raw: Any, path: str, found: list[Problem]) -> Any:
    quotes = ". Put it in quotes" if expected == "text" and isinstance(raw, (bool, int)) else ""
    found.append((path or "(file)", f"= {show(raw)}: expected {expected}{quotes}"))
    return _FAULTY


def _read_section(cls: Any, raw: Any, path: str, found: list[Problem]) -> Any:
    """A dataclass from a mapping of its options."""
    if not isinstance(raw, dict):
        return _wrong("a mapping of options", raw, path, found)
    hints = get_type_hints(cls)
    given = _known(cls, raw, path, found)
    values = {}
    for field in fields(cls):
        where = _join(path, field.name)
        if field.name in given:
            values[field.name] = _read(hints[field.name], given[field.name], where, found)
        elif field.default is MISSING and field.default_factory is MISSING:
            expected = _EXPECTED.get(hints[field.name], "a mapping of options")
            found.append((where, f"is missing: expected {expected}"))
            values[field.name] = _FAULTY
    try:
        return cls(**values)
    except Unreadable:  # a default is computed from a faulty value
        return _FAULTY


def _known(cls: Any, raw: dict[Any, Any], path: str, found: list[Problem]) -> dict[str, Any]:
    """The known options of a mapping; a misspelt one is reported, and read as what was meant.

    So the checks that follow look at what the user wrote, and `wieght` makes one problem, not two.
    """
    names = [field.name for field in fields(cls)]
    given = {name: raw[name] for name in names if name in raw}
    for key in [key for key in raw if key not in names]:
        close = get_close_matches(str(key), names, n=1)
        elsewhere = [place for place, _ in options(RunConfig) if place.split(".")[-1] == key]
        if close:
            hint = f"Did you mean {close[0]!r}?"
            given.setdefault(close[0], raw[key])
        elif elsewhere:
            hint = f"Did you mean {elsewhere[0]!r}?"
        else:
            hint = f"Known here: {', '.join(names)}"
        found.append((_join(path, str(key)), f"unknown option. {hint}"))
    return given


def _with_domains_from(config: RunConfig, found: list[Problem], check_files: bool) -> RunConfig:
    """The domains that `data.domains_from` names, put in its place."""
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
    return replace(config, data=replace(data, domains=domains, domains_from=None))


def _read_domains(tree: Any, path: str, found: list[Problem]) -> Any:
    """Domains out of a list of them, or of a mapping that has one as `domains`."""
    if isinstance(tree, dict) and "domains" not in tree:
        found.append((path, "has no list `domains`"))
        return _FAULTY
    tree = tree["domains"] if isinstance(tree, dict) else tree
    return _read(tuple[Domain, ...], tree, path, found)


def _source(
    config: RunConfig, source_shape: Callable[[str], ModelShape] | None, found: list[Problem]
) -> ModelShape | None:
    """The shape of the model at `init_from`, where there is one."""
    try:
        if source_shape is None or config.init_from is None or not Path(config.init_from).exists():
            return None
        return source_shape(config.init_from)
    except Unreadable:
        return None
    except ShearError as error:
        found.append(("init_from", f"= {show(config.init_from)}: {error}"))
        return None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
