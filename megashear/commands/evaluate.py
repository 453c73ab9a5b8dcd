"""`megashear evaluate`: validation losses by domain of any checkpoint or Hugging Face directory."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear import console
from megashear.config.loader import load_domains
from megashear.config.schema import ParallelConfig, RunConfig, TrainerConfig
from megashear.config.validate import CHOICES
from megashear.errors import DataError
from megashear.files import write_durably

if TYPE_CHECKING:
    from megashear.training.measure import Measured


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "evaluate",
        help="validation losses by domain, of any checkpoint",
        description="Measure models on the validation sets of a run: the losses that the run\n"
        "itself would log. MODEL is a run directory (its latest checkpoint), a checkpoint of any\n"
        "stage and parallel layout, or a Hugging Face directory.",
        epilog="example: a pruned model, and what was exported of it\n\n"
        "  megashear evaluate runs/continue models/sheared-1.3b --domains runs/continue\n\n"
        "a large one on 8 GPUs\n\n"
        "  torchrun --nproc-per-node 8 -m megashear evaluate checkpoints/llama2-70b \\\n"
        "      --domains prune.yaml --tensor 8 --json losses.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="what to measure")
    add_options(parser, "the run that the first MODEL is, or is a checkpoint of")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same, for programs")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser, default: str) -> None:
    """The options of whatever measures: which text, on what, in which layout."""
    option = parser.add_argument
    option(
        "--domains",
        type=Path,
        metavar="PATH",
        help="a run's YAML file, a run directory, or a YAML file of domains; of a run it also says "
        f"how long sequences are, how many, which masks and platform (default: {default})",
    )
    sizes = {
        "sequences": "of a domain, at most, as a run takes them",
        "seq-length": "tokens of a sequence",
        "micro-batch-size": "sequences of one forward pass",
    }
    for name, text in sizes.items():
        option(f"--{name}", type=positive, metavar="N", help=text)
    option("--masks", choices=CHOICES["evaluation.masks"], help="of a checkpoint of stage prune")
    for name in ("device", "precision"):
        option(f"--{name}", choices=CHOICES[f"platform.{name}"], help="in place of the run's")
    for name in ("tensor", "pipeline", "context"):
        text = f"{name}-parallel processes (the others are data-parallel)"
        option(f"--{name}", type=positive, default=1, metavar="N", help=text)


def positive(text: str) -> int:
    """A number of something, for argparse; `1.3e9` too."""
    number = float(text)
    if not number >= 1 or number % 1:  # of infinity NaN, which is true
        raise ValueError
    return int(number)


def run(args: argparse.Namespace) -> None:
    """Measure every model and print its table."""
    from megashear.platform import launched

    with launched.report_once():
        check_outputs([args.json] if args.json else [], args.overwrite)
    config, measured = measure_all(args.models, args)
    if launched.launched_rank() > 0:
        return
    for each in measured:
        print(f"\n{measured_table(each, config)}")
    if args.json is not None:
        records = [record(each, config) for each in measured]
        write_durably(args.json, json.dumps({"models": records}, indent=1) + "\n", DataError)
        print(f"\nwritten to {args.json}")


def measure_all(
    models: Sequence[str], args: argparse.Namespace
) -> tuple[RunConfig, list[Measured]]:
    """What the options come to, and what each model comes to; on every process.

    Raises:
        ShearError: something is wrong with options, models or validation sets.
    """
    from megashear.platform import launched, parallel
    from megashear.training.measure import measure, open_all

    with launched.report_once():
        model = Path(models[0])
        run = model.absolute().parent.parent if model.name.startswith("step-") else model
        args.domains = args.domains or run
        config = configuration(args, launched.world_size())
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


def check_outputs(files: Sequence[Path], overwrite: bool, problems: Sequence[str] = ()) -> None:
    """Refuse, before anything is measured, files that could not be written.

    Raises:
        DataError: names all that is wrong with them, after the `problems` found already.
    """
    found = list(problems)
    for file in files:
        if file.is_dir():
            found.append(f"{file}: is a directory")
        elif file.exists() and not overwrite:
            found.append(f"{file}: there already. Replace by --overwrite")
        if not file.parent.is_dir():
            found.append(f"{file.parent}: there is no such directory")
    if found:
        raise DataError("\n".join(dict.fromkeys(found)))


def configuration(args: argparse.Namespace, processes: int) -> RunConfig:
    """The run of which an evaluation is what the options ask for."""
    given = load_domains(args.domains)
    micro = args.micro_batch_size or given.trainer.micro_batch_size
    # What the run names may need its device; of training batches, and their loader, there are none.
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
    """A section of a configuration with the options that are given."""
    return replace(section, **{k: v for k, v in options.items() if v is not None})


def measured_table(measured: Measured, config: RunConfig) -> str:
    """What a model is; its domains with tokens, loss, perplexity, reference and gap."""
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
    """A model and its losses as `megashear reference-loss scaling` reads them."""
    domains = measured.domains.items()
    return {
        "name": measured.model,
        "parameters": measured.parameters,
        "seq_length": config.data.seq_length,
        "sequences_per_domain": config.evaluation.sequences_per_domain,
        "tokens": {name: domain.tokens for name, domain in domains},
        "losses": {name: domain.loss for name, domain in domains},
    }
