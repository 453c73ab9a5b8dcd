"""`megashear plan`: what a run will take, before it runs; or target shapes of a wanted size."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megashear import console
from megashear.commands.options import missing, positive, require_model
from megashear.config.chain import Chain
from megashear.config.loader import load_config, load_options, load_shape
from megashear.config.schema import ModelShape, RunConfig
from megashear.config.validate import problems
from megashear.errors import CheckpointError, ConfigError
from megashear.hardware import GPUS, Gpu

if TYPE_CHECKING:
    from megashear.planning.run import PlannedRun

EPILOG = """\
examples:

  megashear plan prune.yaml continue.yaml --gpus 8,16 --gpu a100-80gb
  megashear plan chain.yaml --gpus 8      # the file of `megashear shear`
  megashear plan prune.yaml parallel.tensor=4 --gpus 32
  megashear plan --source models/llama2-7b --size 1.3B --tensor 8
  megashear plan --source models/llama2-7b --memory 2GiB --precision int4

The exit status is 1 if a run fits in no layout.
"""
_FREE = {"platform.layers": "auto", "platform.kernels": "auto", "platform.loader": "torch"}
"""Options whose packages need not be installed where a plan is made."""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "plan",
        help="memory, time and disk of a run before it runs; target shapes of a size",
        description="Parameters, memory of a GPU, layouts that fit by expected speed, hours and\n"
        "disk of one run or of a chain of runs. Or, with --source, target shapes of a size.",
        epilog=EPILOG,
    )
    parser.trailing = "runs"
    add_option = parser.add_argument
    add_option(
        "runs",
        nargs="*",
        metavar="CONFIG",
        help="YAML files of runs, or one of a chain; then key.sub=value for all of them",
    )
    names = ", ".join(gpu.name for gpu in GPUS)
    add_option("--gpus", default="8", help="number of GPUs, or one for each run: 8,16 (default: 8)")
    add_option("--gpu", default="h100-80gb", help=f"{names} (default: h100-80gb)")
    add_option("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    add_option("--network", type=float, default=200, metavar="GBIT", help="Gbit/s from a GPU to "
               "other nodes (default: 200)")  # fmt: skip
    add_option("--mfu", type=float, default=0.3, help="fraction of a GPU's peak that "
               "arithmetic reaches (default: 0.3, as published); a run logs its own")  # fmt: skip
    add_option("--reserve", type=float, default=0.1, help="fraction of a GPU's memory to leave "
               "free for what is not modelled (default: 0.1)")  # fmt: skip
    add_option("--source-shape", type=Path, metavar="FILE", help="sizes (YAML) or config.json of "
               "the source, if init_from does not exist yet")  # fmt: skip
    sizes = parser.add_argument_group("target shapes")
    add_size = sizes.add_argument
    add_size("--source", metavar="DIR", help="directory or config.json of the model to prune")
    add_size("--size", metavar="N", help="wanted parameters: 1.3B, 370M")
    add_size("--memory", metavar="BYTES", help="wanted memory of the weights: 4GiB, 700MB")
    add_size("--precision", choices=("bf16", "int4"), default="bf16",
             help="precision for --memory")  # fmt: skip
    add_size("--kv-cache", metavar="BYTES", help="wanted keys and values per token, in bf16: 64KiB")
    add_size("--tensor", type=positive, metavar="N", help="tensor-parallel ranks that must divide "
             "the target (default: those by 8 first)")  # fmt: skip
    add_option("--json", action="store_true", help="print JSON")
    # argparse takes -1 for a value, and -1KiB for an option: let our error name its option.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plan runs, or propose target shapes; return the exit status."""
    wishes = {"--source": args.source, "--size": args.size, "--memory": args.memory}
    wishes |= {"--kv-cache": args.kv_cache, "--tensor": args.tensor}
    wishes = {name: wish for name, wish in wishes.items() if wish is not None}
    if args.runs and wishes:
        _wrong(", ".join(wishes), "asks for target shapes: leave CONFIG out")
    if wishes:
        propose(args)
        return 0
    files, source = _files([Path(word) for word in args.runs if "=" not in word])
    overrides = [word for word in args.runs if "=" in word]
    if not files:
        _wrong("CONFIG", "is missing: name a run's YAML file, or --source and a size")
    gpu, gpus = _gpu(args), _gpus(args.gpus, len(files))
    configs = [_load(file, overrides) for file in files]
    source = args.source_shape or source
    if configs[0].model is None:  # else it is missed only once torch is imported
        read_source(source or Path(configs[0].init_from or "."))

    from megashear.planning import text
    from megashear.planning.run import plan
    from megashear.planning.throughput import Cluster

    cluster = Cluster(gpu, args.gpus_per_node, args.network * 1e9 / 8, args.mfu)
    runs = _planned_runs(files, configs, gpus, source)
    _warn_of_exports(files, runs)
    plans = [plan(each, cluster, args.reserve) for each in runs]
    if args.json:
        print(json.dumps([each.facts() for each in plans], indent=1))
    else:
        for file, each in zip(files, plans, strict=True):
            print(text.run_text(file, each), end="\n\n")
        if len(plans) > 1:
            print(text.totals_text(files, plans), end="\n\n")
        print(text.assumptions_text(cluster, args.reserve))
    return 0 if all(each.chosen for each in plans) else console.FAILED


def _files(files: list[Path]) -> tuple[list[Path], Path | None]:
    """Return the files of runs; for a chain, the files of its two runs, and its source."""
    text = files[0].read_text(errors="replace") if files and files[0].is_file() else ""
    if len(files) != 1 or not re.search(r"^prune_config:", text, re.MULTILINE):
        return files, None
    chain = load_options(Chain, files[0])
    return [Path(chain.prune_config), Path(chain.continue_config)], Path(chain.source)


def _wrong(path: str, text: str) -> NoReturn:
    raise ConfigError("command line", [(path, text)])


def _gpu(args: argparse.Namespace) -> Gpu:
    """Return the GPU that is named, once the other options of the cluster are checked too."""
    found = [gpu for gpu in GPUS if gpu.name == args.gpu]
    if not found:
        _wrong("--gpu", f"= {args.gpu} is none of {', '.join(gpu.name for gpu in GPUS)}")
    if not 0 < args.mfu <= 1 or not 0 <= args.reserve < 1:
        _wrong("--mfu, --reserve", "are fractions: between 0 and 1")
    if not 0 < args.network < math.inf:
        _wrong("--network", "must be a number above 0")
    return found[0]


def _gpus(text: str, count: int) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(words) not in (
        1,
        count,
    ):
        _wrong("--gpus", f"= {text}: expected one number, or one for each of {count} runs: 8,16")
    return [int(word) for word in words] * (count if len(words) == 1 else 1)


def _planned_runs(
    files: Sequence[Path], configs: Sequence[RunConfig], gpus: Sequence[int], source: Path | None
) -> list[PlannedRun]:
    from megashear.planning.run import PlannedRun, count_domains, shape_after

    runs: list[PlannedRun] = []
    for file, config, number in zip(files, configs, gpus, strict=True):
        shape = config.model or shape_after(runs, config.init_from or "")
        shape = shape or read_source(source or Path(config.init_from or "."))
        found = problems(config, shape, check_files=False)
        if found := [problem for problem in found if problem[0] not in _FREE]:
            raise ConfigError(str(file), found)
        runs.append(PlannedRun(config, shape, number, count_domains(config, runs)))
    return runs


def _warn_of_exports(files: Sequence[Path], runs: Sequence[PlannedRun]) -> None:
    """Print a warning on stderr for each run whose model cannot be exported."""
    from megashear.checkpoint.hf.config import export_problem

    for file, each in zip(files, runs, strict=True):
        if problem := export_problem(each.target or each.shape):
            print(f"warning: {file}: the model that it makes {problem}", file=sys.stderr)


def _load(file: Path, overrides: Sequence[str]) -> RunConfig:
    """Load a run's configuration; its data, source and packages may be on another machine."""
    try:
        return load_config(file, overrides, check_files=False)
    except ConfigError as error:
        absent = [path for path, text in error.problems if "is not installed" in text]
        if len(absent) < len(error.problems):
            raise
        free = [f"{path}={_FREE[path]}" for path in absent]
        return load_config(file, [*overrides, *free], check_files=False)


def read_source(path: Path) -> ModelShape:
    """Read the shape in a YAML file of sizes, a config.json, or a checkpoint, without its weights.

    Raises:
        CheckpointError: nothing is there.
    """
    if path.suffix in (".yaml", ".yml"):
        return load_shape(path)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        from megashear.checkpoint.foreign import read_json
        from megashear.checkpoint.hf.config import shape_from_hf_config

        return shape_from_hf_config(read_json(file), str(file))
    if not path.is_dir():
        raise CheckpointError(f"{missing(path)}. Or give its sizes or config.json: --source-shape")
    require_model(path)
    from megashear.checkpoint import models

    return models.open(path).without_masks().shape


def propose(args: argparse.Namespace) -> None:
    """Print target shapes of a wanted size."""
    asked, tensor = _goal(args), args.tensor or 1
    source = read_source(Path(args.source))

    from megashear.planning import targets, text

    goal = targets.Goal(**asked)
    found = targets.propose(source, goal, tensor)
    if not found:
        option, why = targets.why_none(source, goal, tensor)
        _wrong(f"--{option}", f"= {getattr(args, option.replace('-', '_'))} {why}")
    if args.json:
        more = [{"kv_bytes": targets.kv_bytes(each.shape), "tensor": each.tensor} for each in found]
        values = [asdict(each) | other for each, other in zip(found, more, strict=True)]
        print(json.dumps(values, indent=1))
        return
    print(text.proposals_text(source, found))


def _goal(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the `Goal` that the options ask for."""
    asked = {"size": args.size, "memory": args.memory, "kv-cache": args.kv_cache}
    figures = {
        kind: _number(f"--{kind}", given) for kind, given in asked.items() if given is not None
    }
    limit = {"kv_bytes": figures["kv-cache"]} if "kv-cache" in figures else {}
    sizes = [kind for kind in figures if kind != "kv-cache"] or list(figures)
    if args.source is None or len(sizes) != 1:
        _wrong("target shapes", "need --source and one of --size, --memory and --kv-cache")
    return {"kind": sizes[0], "wanted": figures[sizes[0]], "precision": args.precision, **limit}


def _number(path: str, text: str) -> float:
    """`1.3B` -> 1.3e9, `4GiB` -> 2**32, `700MB` -> 7e8."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)", text.lower())
    units = {"": 1.0, "b": 1e9 if path == "--size" else 1.0}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1e3**power, f"{letter}b": 1e3**power, f"{letter}ib": 1024.0**power}
    value = float(found[1]) * units.get(found[2], 0) if found else 0
    if not 0 < value < math.inf:
        _wrong(path, f"= {text}: expected a number such as 1.3B or 370M, of bytes 4GiB or 700MB")
    return value
