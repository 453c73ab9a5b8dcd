"""`megashear reference-loss`: measure or extrapolate the loss that each domain should reach."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from megashear import console
from megashear.commands import measuring
from megashear.commands.options import positive, require_outputs
from megashear.config.loader import load_domains, load_target
from megashear.config.schema import Domain, ModelShape
from megashear.errors import DataError, ShearError
from megashear.files import write_durably

EPILOG = """\
Both ways write a YAML file for a run's `data.domains_from`, and a plot next to it. The domains keep
the weights that the run of --domains began with. `scaling` reads `models` of such a file, of
`megashear evaluate --json`, or of one with losses that were published or measured elsewhere:

  models:
    - {name: 7B, parameters: 6738415616, losses: {cc: 1.7520, wiki: 1.4844}}
"""


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    both = commands.add_parser(
        "reference-loss",
        help="the losses that domains should reach",
        description="Reference losses for dynamic batch loading, by domain.",
        epilog=EPILOG,
    )
    ways = both.add_subparsers(title="ways", metavar="WAY", required=True)
    source = ways.add_parser(
        "source",
        help="measure a model",
        description="Measure a model, usually the source, on the sequences of a run's evaluations.",
        epilog="example:\n\n  megashear reference-loss source checkpoints/llama2-7b \\\n"
        "      --domains prune.yaml --out references.yaml\n\n" + EPILOG,
    )
    source.add_argument(
        "model", metavar="MODEL", help="a run, a checkpoint, or a Hugging Face directory"
    )
    measuring.add_options(source, "the run that MODEL is, or is a checkpoint of")
    source.set_defaults(run=run_source)
    scaling = ways.add_parser(
        "scaling",
        help="extrapolate the losses of a family of models to another size",
        description="Fit L(N) = E + A / N^b per domain to the losses of three or more models with\n"
        "N parameters (embeddings included), and evaluate it at the size of the target.",
        epilog="example:\n\n  megashear reference-loss scaling 7b.yaml 13b.yaml 70b.yaml \\\n"
        "      --domains prune.yaml --out references.yaml\n\n" + EPILOG,
    )
    scaling.add_argument(
        "models", nargs="+", type=Path, metavar="FILE", help="YAML file with `models`"
    )
    scaling.add_argument(
        "--domains",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run's YAML file, a run directory, or a YAML file of domains",
    )
    target = scaling.add_mutually_exclusive_group()
    target.add_argument(
        "--target",
        type=Path,
        metavar="FILE",
        help="a run's YAML file with a target, or the sizes of a model (default: --domains)",
    )
    target.add_argument("--parameters", type=positive, metavar="N", help="size of the target")
    scaling.set_defaults(run=run_scaling)
    for parser in (source, scaling):
        parser.add_argument(
            "--out", type=Path, required=True, metavar="FILE", help="YAML file to write"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")


def run_source(args: argparse.Namespace) -> None:
    """Measure one model, and write its losses as references."""
    from megashear.platform import launched

    with launched.report_once():
        _check_output(args)
    config, (measured,) = measuring.measure_all([args.model], args)
    if launched.launched_rank() > 0:
        return
    print("these are the sequences of an evaluation in a run with the same `data`, `evaluation`\n")
    print(measuring.measured_table(measured, config))
    model, domains = measuring.record(measured, config), config.data.domains
    losses = model["losses"]
    earlier = {d.name: d.reference_loss for d in domains if d.reference_loss is not None}
    content = {"domains": _referring(domains, losses), "models": [model]}
    _write(args, content, lambda plots: plots.domain_losses(measured.model, losses, earlier))


def run_scaling(args: argparse.Namespace) -> None:
    """Fit a law to each domain, and write its loss at the target's size as the reference."""
    from megashear.reference.models import read_models
    from megashear.reference.scaling_law import PARAMETERS, fit_domains

    _check_output(args)
    domains = load_domains(args.domains).data.domains
    models = read_models(args.models, [domain.name for domain in domains])
    sizes = [model.parameters for model in models]
    laws = fit_domains(sizes, {d.name: [m.losses[d.name] for m in models] for d in domains})
    target = args.parameters or _parameters(args.target or args.domains)
    losses = {name: law.loss(target) for name, law in laws.items()}
    print(console.table([(m.name, f"{m.parameters:,}") for m in models], ("model", "parameters")))
    print(f"target: {target:,} parameters{_extrapolation(target, sizes)}")
    rows = []
    for name, law in laws.items():
        residuals = " ".join(f"{round(residual, 4) + 0.0:+.4f}" for residual in law.residuals)
        fitted = f"{law.E:.4f}", f"{law.A:.4g}", f"{law.b:.4f}", residuals
        rows.append((name, *fitted, f"{losses[name]:.4f}", law.flag))
    print(console.table(rows, ("domain", "E", "A", "b", "residuals", "reference", "")))
    if len(set(sizes)) == PARAMETERS and any(law.misfit < 1e-6 for law in laws.values()):
        print("as many sizes as a law has parameters: residuals of 0 do not show that it fits")
    warnings = [f"warning: {name}: {law.flag}" for name, law in laws.items() if law.flag]
    if len({(model.seq_length, model.sequences_per_domain) for model in models}) > 1:
        warnings.append("warning: the models were measured on different sequences")
        print(warnings[-1], file=sys.stderr)
    content = {
        "domains": _referring(domains, losses),
        "parameters": target,
        "laws": {n: {"E": f.E, "A": f.A, "b": f.b, "flag": f.flag} for n, f in laws.items()},
        "models": [asdict(model) for model in models],
    }
    _write(args, content, lambda plots: plots.scaling_laws(laws, target), warnings)


def _parameters(file: Path) -> int:
    """Return the parameters of the target that a run's YAML file, or one of sizes, names.

    Raises:
        DataError: it names none, or the source of the run cannot be read.
    """
    from megashear.checkpoint import models
    from megashear.pruning.counting import parameter_count
    from megashear.pruning.masks import resolve_target

    try:
        named = load_target(file)
        if isinstance(named, ModelShape):
            return parameter_count(named)
        assert named.init_from is not None
        source = models.open(named.init_from).without_masks().shape
    except ShearError as error:
        raise DataError(f"{error}\nOr give the target's size: --parameters N") from error
    if named.target is None:
        return round((1 - (named.target_sparsity or 0)) * parameter_count(source))
    return parameter_count(resolve_target(source, named.target, named.pruning.head_unit))


def _extrapolation(target: int, sizes: Sequence[int]) -> str:
    if target < min(sizes):
        return f", {min(sizes) / target:.1f} times fewer than the smallest model: extrapolated"
    if target > max(sizes):
        return f", {target / max(sizes):.1f} times more than the largest model: extrapolated"
    return ""


def _referring(domains: Sequence[Domain], losses: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the domains as mappings, with these losses as their references."""
    return [asdict(replace(d, reference_loss=round(losses[d.name], 6))) for d in domains]


def _plot(args: argparse.Namespace) -> Path:
    return Path(args.out.parent, f"{args.out.stem}.html")


def _check_output(args: argparse.Namespace) -> None:
    named = args.out.suffix in (".yaml", ".yml")
    problems = [] if named else [f"{args.out}: is read by a run as a .yaml file. Name it so"]
    require_outputs([args.out, _plot(args)], args.overwrite, problems)


def _write(
    args: argparse.Namespace,
    content: dict[str, Any],
    draw: Callable[[Any], str],
    warnings: Sequence[str] = (),
) -> None:
    """Write the YAML file, and its plot as an HTML page."""
    from megashear.report import plots

    text = yaml.safe_dump(content, sort_keys=False, width=100)
    use = f"for a run: data.domains_from: {args.out}"
    head = [f"megashear {shlex.join(sys.argv[1:])}", use, *warnings]
    write_durably(args.out, "".join(f"# {line}\n" for line in head) + text, DataError)
    print(f"\nwritten to {args.out}: for a run, data.domains_from={args.out}")
    write_durably(_plot(args), draw(plots), DataError)
    print(f"plot: {_plot(args)}")
