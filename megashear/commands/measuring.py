"""How `evaluate` and `reference-loss` measure models: their options, configuration and tables."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear import console
from megashear.commands.options import positive, require_model
from megashear.config.loader import load_domains
from megashear.config.schema import ParallelConfig, RunConfig, TrainerConfig
from megashear.config.validate import CHOICES

if TYPE_CHECKING:
    from megashear.training.measure import Measured


def add_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options of a measurement: its text, its device and its parallel layout."""
    option = parser.add_argument
    option(
        "--domains",
        type=Path,
        metavar="PATH",
        help="a run's YAML file, a run directory, or a YAML file of domains; a run also gives the "
        f"length and number of sequences, masks and platform (default: {default})",
    )
    sizes = {
        "sequences": "of each domain, at most, as a run takes them",
        "seq-length": "tokens of a sequence",
        "micro-batch-size": "sequences of one forward pass",
    }
    for name, text in sizes.items():
        option(f"--{name}", type=positive, metavar="N", help=text)
    option("--masks", choices=CHOICES["evaluation.masks"], help="for a checkpoint of stage prune")
    for name in ("device", "precision"):
        option(f"--{name}", choices=CHOICES[f"platform.{name}"], help="instead of the run's")
    for name in ("tensor", "pipeline", "context"):
        text = f"{name}-parallel processes (the others are data-parallel)"
        option(f"--{name}", type=positive, default=1, metavar="N", help=text)


def measure_all(
    models: Sequence[str], args: argparse.Namespace
) -> tuple[RunConfig, list[Measured]]:
    """Measure each model as the options say; return the run that they describe, and the results.

    Every process calls it and gets the same.

    Raises:
        ShearError: something is wrong with options, models or validation sets.
    """
    from megashear.platform import launched

    with launched.report_once():
        model = Path(models[0])
        run = model.absolute().parent.parent if model.name.startswith("step-") else model
        args.domains = args.domains or run
        if len(models) == 1:  # of several, all that is wrong with them is reported together
            require_model(models[0])
        config = configuration(args, launched.world_size())

        from megashear.platform import parallel
        from megashear.training.measure import measure, open_all

        opened = open_all(models, config)
    platform = parallel.start(config.platform, config.parallel, seed=0)
    if platform.rank == 0:
        print(
            f"up to {config.evaluation.sequences_per_domain} sequences of "
            f"{config.data.seq_length} tokens a domain; {platform}"
        )
    with platform.watched(config.platform.timeout_minutes):
        measured = [measure(model, config, platform) for model in opened]
    parallel.stop()
    return config, measured


def configuration(args: argparse.Namespace, processes: int) -> RunConfig:
    """Return the run whose evaluation is what the options ask for."""
    given = load_domains(args.domains)
    micro = args.micro_batch_size or given.trainer.micro_batch_size
    # The run's layers, kernels and loader may need its device, and nothing here needs a loader.
    free = {"layers": "auto", "kernels": "auto"} if args.device else {}
    platform = {"loader": "torch", "device": args.device, "precision": args.precision, **free}
    evaluation = {"sequences_per_domain": args.sequences, "masks": args.masks}
    return RunConfig(
        stage="continue",
        run_dir="evaluation",
        init_from="model",
        data=_changed(given.data, rule="constant", seq_length=args.seq_length),  # no references
        evaluation=_changed(given.evaluation, **evaluation),
        trainer=TrainerConfig(micro_batch_size=micro, global_batch_size=micro * processes),
        parallel=ParallelConfig(tensor=args.tensor, pipeline=args.pipeline, context=args.context),
        platform=_changed(given.platform, **platform),
    )


def _changed(section: Any, **options: Any) -> Any:
    """Return a section of a configuration with the options that are not None replaced."""
    return replace(section, **{k: v for k, v in options.items() if v is not None})


def measured_table(measured: Measured, config: RunConfig) -> str:
    """Return a table of a model's domains: tokens, loss, perplexity, reference and gap."""
    rows = []
    for domain in config.data.domains:
        loss, tokens = measured.domains[domain.name]
        reference = domain.reference_loss
        gap = ("-", "-") if reference is None else (f"{reference:.4f}", f"{loss - reference:+.4f}")
        perplexity = math.exp(min(loss, 700.0))
        rows.append((domain.name, f"{tokens:,}", f"{loss:.4f}", f"{perplexity:.4g}", *gap))
    header = ("domain", "tokens", "loss", "perplexity", "reference", "gap")
    title = f"{measured.model}: {measured.parameters:,} parameters\n"
    return title + console.table(rows, header)


def record(measured: Measured, config: RunConfig) -> dict[str, Any]:
    """Return a model and its losses as `megashear reference-loss scaling` reads them."""
    domains = measured.domains.items()
    return {
        "name": measured.model,
        "parameters": measured.parameters,
        "seq_length": config.data.seq_length,
        "sequences_per_domain": config.evaluation.sequences_per_domain,
        "tokens": {name: domain.tokens for name, domain in domains},
        "losses": {name: domain.loss for name, domain in domains},
    }
