"""The rules between the fields of a run; a broken rule is reported with field, value and fix.

`problems` runs a list of small checks, each of which yields (path, message) pairs.
Imports the standard library and `schema` only; never torch or Megatron, so that a run is refused
within a second. Optional packages are searched for, not imported.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from megashear.config import shapes
from megashear.config.schema import (
    FAMILIES,
    HEAD_UNITS,
    ROPE_TYPES,
    STAGES,
    LogConfig,
    ModelShape,
    RunConfig,
)
from megashear.config.values import (
    PRUNED_SIZES,
    Check,
    CheckContext,
    Faulty,
    Problem,
    Unreadable,
    either,
    field,
    given,
    options,
    show,
)

CHOICES: dict[str, tuple[str, ...]] = {
    "stage": STAGES,
    "model.family": FAMILIES,
    "model.rotary_scaling.rope_type": ROPE_TYPES,
    "pruning.head_unit": HEAD_UNITS,
    "pruning.multipliers": ("shared", "per_layer"),
    "data.rule": ("paper", "reference_code", "constant"),
    "evaluation.masks": ("current", "target"),
    "parallel.recompute": ("none", "selective", "full"),
    "platform.device": ("auto", "cpu", "cuda"),
    "platform.layers": ("auto", "torch", "transformer_engine"),
    "platform.kernels": ("auto", "torch", "apex"),
    "platform.precision": ("auto", "fp32", "bf16"),
    "platform.loader": ("torch", "dali"),
    "log.wandb": ("disabled", "offline", "online"),
}

_BOUNDS: dict[str, tuple[str, ...]] = {  # rule -> fields
    ">= 0": (
        "model.num_query_groups",  # 0 stands for the default
        "model.kv_channels",
        "pruning.sparsity_warmup_steps",
        "data.eta",
        "data.smoothing",
        "data.seed",
        "data.num_workers",
        "optimizer.min_lr_ratio",
        "optimizer.warmup_steps",
        "optimizer.adam_beta1",
        "optimizer.adam_beta2",
        "optimizer.weight_decay",
        "trainer.seed",
    ),
    "<= 1": ("data.smoothing", "optimizer.min_lr_ratio"),
    "< 1": ("target_sparsity", "optimizer.adam_beta1", "optimizer.adam_beta2"),
}
_NUMBERS = {int: ">= 1", float: "> 0"}
"""The rule for every number, except those that may be 0."""

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def problems(
    config: RunConfig,
    source: ModelShape | None = None,
    world_size: int | None = None,
    *,
    check_files: bool = True,
) -> list[Problem]:
    """Return every rule that the configuration breaks, in the order of the checks.

    The arguments are those of `CheckContext`; fields that could not be read hold a `Faulty`.
    Rules that need `source` or `world_size` are skipped where that is None.
    """
    run = CheckContext(config, source, world_size, check_files)
    found: list[Problem] = []
    for check in _CHECKS:
        try:
            for problem in check(run):  # not extend(): what came before an Unreadable stays
                found.append(problem)
        except Unreadable:
            continue
    return found


def _choices(run: CheckContext) -> Iterator[Problem]:
    for path, value in given(run.config, CHOICES):
        choices = CHOICES[path]
        if value not in choices:
            close = get_close_matches(value, choices, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            yield path, f"= {show(value)} is no choice. {hint}Use {either(choices)}"


def _bounds(run: CheckContext) -> Iterator[Problem]:
    bounded = {rule: list(paths) for rule, paths in _BOUNDS.items()}
    for path, kind in options(RunConfig):
        if kind in _NUMBERS and path not in _BOUNDS[">= 0"]:
            bounded.setdefault(_NUMBERS[kind], []).append(path)
    for rule, paths in bounded.items():
        sign, bound = rule.split()
        for path, value in given(run.config, paths):
            if not _COMPARE[sign](value, int(bound)):
                yield path, f"= {show(value)} must be {rule}"


def _stage(run: CheckContext) -> Iterator[Problem]:
    """Which of model, init_from, target and target_sparsity each stage takes."""
    config = run.config
    stage = config.stage
    if stage not in STAGES:
        return
    if stage == "pretrain":
        if config.model is None:
            yield "model", "is missing; stage pretrain needs the shape of the model to initialise"
        if config.init_from is not None:
            yield "init_from", "stage pretrain starts from random weights. Leave it out"
    else:
        if config.init_from is None:
            yield "init_from", f"is missing; stage {stage} needs a checkpoint to start from"
        if config.model is not None:
            yield "model", f"stage {stage} reads the shape at init_from. Leave it out"
    goals = [name for name in ("target", "target_sparsity") if field(config, name) is not None]
    if stage == "prune":
        if len(goals) != 1:
            how = "give one of them" if not goals else "both are given; leave one out"
            yield "target", f"stage prune needs either target or target_sparsity: {how}"
        elif goals == ["target"] and all(
            field(config, f"target.{n}") is None for n in PRUNED_SIZES
        ):
            yield "target", f"names no size. Give one or more of {', '.join(PRUNED_SIZES)}"
    else:
        for name in goals:
            yield name, f"stage {stage} does not prune. Leave it out"


def _steps(run: CheckContext) -> Iterator[Problem]:
    steps = run.config.trainer.steps
    paths = ["optimizer.warmup_steps"]
    if run.config.stage == "prune":
        paths.append("pruning.sparsity_warmup_steps")
    for path, value in given(run.config, paths):
        if value > steps:
            yield path, f"= {value} is more than trainer.steps = {steps}. Use at most {steps}"


def _domain_names(run: CheckContext) -> Iterator[Problem]:
    domains = run.config.data.domains
    if not domains and run.config.data.domains_from is None:
        yield "data.domains", "is empty. Give at least one domain, or a run as data.domains_from"
    for name, count in Counter(domain.name for domain in domains).items():
        if count > 1:
            yield "data.domains", f"{count} domains are named {show(name)}. Give each its own name"
    for index, domain in enumerate(domains):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", domain.name):
            text = f"= {show(domain.name)} names files. Use letters, digits, '.', '_' and '-'"
            yield f"data.domains[{index}].name", text


def _domain_weights(run: CheckContext) -> Iterator[Problem]:
    domains = run.config.data.domains
    total = sum(domain.weight for domain in domains)
    if domains and abs(total - 1) > 1e-3:
        yield "data.domains", f"weights sum to {total:.6g}; they must sum to 1"


def _weight_bounds(run: CheckContext) -> Iterator[Problem]:
    """Each weight starts within its bounds, and some weights satisfy all bounds."""
    domains = run.config.data.domains
    for index, domain in enumerate(domains):
        if domain.first_sample < 0:
            yield f"data.domains[{index}].first_sample", f"= {domain.first_sample} must be >= 0"
        low, weight, high = domain.min_weight, domain.weight, domain.max_weight
        if not 0 <= low <= high <= 1:
            text = f"= {low:g} and max_weight = {high:g}: need 0 <= min_weight <= max_weight <= 1"
            yield f"data.domains[{index}].min_weight", text
        elif not low <= weight <= high:
            text = f"= {weight:g} is not between min_weight = {low:g} and max_weight = {high:g}"
            yield f"data.domains[{index}].weight", text
    least, most = (sum(getattr(d, name) for d in domains) for name in ("min_weight", "max_weight"))
    if least > 1 + 1e-9:
        yield "data.domains", f"min_weight sums to {least:.6g}; at most 1 is possible"
    if domains and most < 1 - 1e-9:
        yield "data.domains", f"max_weight sums to {most:.6g}; at least 1 is needed"


def _references(run: CheckContext) -> Iterator[Problem]:
    """Rules that move the weights need every domain's reference loss."""
    data = run.config.data
    for index, domain in enumerate(data.domains):
        if domain.reference_loss is not None and domain.reference_loss <= 0:
            text = f"= {domain.reference_loss:g} must be > 0 (nats per token)"
            yield f"data.domains[{index}].reference_loss", text
    missing = [domain.name for domain in data.domains if domain.reference_loss is None]
    if missing and data.rule in CHOICES["data.rule"] and data.rule != "constant":
        names = ", ".join(map(str, missing))
        text = f"no reference_loss for {names}, which data.rule = {show(data.rule)} needs. "
        text += "Give the loss to reach (nats per token), or use data.rule = 'constant'"
        yield "data.domains", text


def _data_files(run: CheckContext) -> Iterator[Problem]:
    if not run.check_files:
        return
    for index, domain in enumerate(run.config.data.domains):
        for name in ("train", "valid"):
            prefix = getattr(domain, name)
            if isinstance(prefix, Faulty):
                continue
            absent = [f for f in (f"{prefix}.bin", f"{prefix}.idx") if not Path(f).is_file()]
            if absent:
                text = f"= {show(prefix)}: no file {either(absent)}. "
                suffixed = prefix.endswith((".bin", ".idx"))
                text += "Leave out the suffix" if suffixed else "Write it by `megashear tokenize`"
                yield f"data.domains[{index}].{name}", text


def _paths(run: CheckContext) -> Iterator[Problem]:
    if not run.config.run_dir:
        yield "run_dir", "is empty. Name a directory for the run"
    elif Path(run.config.run_dir).is_file():
        yield "run_dir", f"= {show(run.config.run_dir)} is a file. Name a directory for the run"
    if run.check_files:
        for path, value in given(run.config, ("init_from", "data.tokenizer")):
            if not Path(value).exists():
                yield path, f"= {show(value)} does not exist"


def _packages(run: CheckContext) -> Iterator[Problem]:
    """Packages that are asked for by name are installed and can run on the device."""
    platform = run.config.platform
    asked = []
    if platform.layers == "transformer_engine":
        install = "Install it by `pip install megashear[te]`"
        asked.append(("layers", "transformer_engine", "Transformer Engine", install))
    if platform.kernels == "apex":
        # Its compiled kernels identify it: the package index has another project named apex.
        asked.append(("kernels", "amp_C", "NVIDIA's Apex", "Build it from its sources"))
    for name, module, title, install in asked:
        if platform.device == "cpu":
            text = f"{title} needs platform.device = 'cuda'. Use that, or 'torch' or 'auto' here"
        elif find_spec(module) is None:
            text = f"{title} is not installed. {install}, or use 'torch' or 'auto' here"
        else:
            continue
        yield f"platform.{name}", f"= {show(getattr(platform, name))}: {text}"


def _loader(run: CheckContext) -> Iterator[Problem]:
    if run.config.platform.loader != "dali" or (find_spec("nvidia") and find_spec("nvidia.dali")):
        return
    text = "NVIDIA DALI is not installed. Install it by `pip install megashear[dali]`, or where "
    text += "CUDA is 12 by `pip install megashear[dali-cuda12]`, or use 'torch' here"
    yield "platform.loader", f"= 'dali': {text}"


def _views(run: CheckContext) -> Iterator[Problem]:
    log = run.config.log
    asked = {"tensorboard": log.tensorboard, "wandb": log.wandb in ("offline", "online")}
    for name, wanted in asked.items():
        if wanted and find_spec(name) is None:
            value, off = show(getattr(log, name)), show(getattr(LogConfig, name))
            text = f"{name} is not installed. Install it by `pip install megashear[{name}]`, "
            yield f"log.{name}", f"= {value}: {text}or use {off} here"


_CHECKS: tuple[Check, ...] = (
    _choices,
    _bounds,
    _stage,
    *shapes.CHECKS,
    _steps,
    _domain_names,
    _domain_weights,
    _weight_bounds,
    _references,
    _data_files,
    _paths,
    _packages,
    _loader,
    _views,
)
