"""`megashear shear`: everything on one machine, from text and weights to a small model."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.tasks import Task, TaskRunner, megashear

if TYPE_CHECKING:
    from megashear.config.chain import Chain
    from megashear.config.schema import RunConfig

TASKS = (
    *("tokenize", "convert", "prune", "extract"),
    *("continue", "export", "evaluate", "report"),
)


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "shear",
        help="everything on one machine: tokenize, prune, extract, continue, export",
        description=f"Run the tasks {', '.join(TASKS)}.\n"
        "docs/configuration.md lists the options of CHAIN, docs/walkthrough.md has an example.\n\n"
        "Everything that can be checked is checked first. After an interruption the same command\n"
        "continues where it stopped; finished tasks are not repeated.",
    )
    option = parser.add_argument
    option("chain", type=Path, metavar="CHAIN", help="YAML file of the chain")
    option("--stage", action="append", choices=TASKS, default=[], help="run this task (repeatable)")
    option("--print", action="store_true", dest="prints", help="print the commands, one a line")
    option("--adopt", action="store_true", help="accept outputs that exist as those of the tasks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything, then run or print the tasks."""
    from megashear.config.chain import load_chain
    from megashear.report.runs import write_chain_runs

    chain, prune, continue_run = load_chain(args.chain)
    if not (args.prints and args.stage):  # a job prints a task of a chain that is checked already
        processes = chain.processes or (None if args.prints else _gpus())
        _check_shapes(args.chain, chain, prune, continue_run, processes)
    tasks = chain_tasks(chain, prune, continue_run)
    if args.prints:
        for task in tasks:
            if not args.stage or task.name in args.stage:
                print(shlex.join(task.command))
        return
    runner = TaskRunner(Path(chain.work_dir), Path.cwd(), threads=None, keeps=True)
    write_chain_runs(Path(chain.work_dir), [prune.run_dir, continue_run.run_dir])
    runner.run_all(tasks, args.stage, adopts=args.adopt)
    print(f"done: exported to {chain.export}; report: {_report(continue_run)}")


def _gpus() -> int:
    """Return the number of processes that `megashear launch` starts on this machine."""
    from megashear.platform import cuda

    return cuda.device_count() or 1


def _check_shapes(
    file: Path, chain: Chain, prune: RunConfig, continue_run: RunConfig, processes: int | None
) -> None:
    """Check the runs against the shapes of source and target, which no checkpoint has yet.

    Raises:
        ConfigError: with every problem.
    """
    from megashear.checkpoint import models
    from megashear.checkpoint.hf.config import export_problem
    from megashear.config.validate import problems
    from megashear.errors import ConfigError
    from megashear.pruning.masks import resolve_target

    source = models.open(chain.source).without_masks().shape
    found = [(f"prune_config: {at}", text) for at, text in
             problems(prune, source, processes, check_files=False)]  # fmt: skip
    if not found and prune.target is not None:
        target = resolve_target(source, prune.target, prune.pruning.head_unit)
        found = [(f"continue_config: {at}", text) for at, text in
                 problems(continue_run, target, processes, check_files=False)]  # fmt: skip
        if problem := export_problem(target):
            found.append(("prune_config: target", problem))
    if found:
        raise ConfigError(str(file), found)


def chain_tasks(chain: Chain, prune: RunConfig, continue_run: RunConfig) -> list[Task]:
    """Return the commands of a chain, in their order."""
    from megashear.config.chain import EXTRACTED

    extracted, report = str(Path(prune.run_dir, EXTRACTED)), _report(continue_run)
    losses = str(Path(continue_run.run_dir, "losses.json"))
    tasks = []
    if chain.text is not None:
        files = ("--input", chain.text, "--output", chain.tokens)
        tokenizer = ("--tokenizer", chain.tokenizer or chain.source)
        options = (*tokenizer, "--valid-fraction", str(chain.valid_fraction))
        tokenize = megashear("tokenize", *files, *options)
        tasks.append(Task("tokenize", str(Path(chain.tokens).parent), tokenize, repeats=True))
    assert prune.init_from is not None
    if Path(prune.init_from) != Path(chain.source):  # else the run reads it as it is
        out = ("--out", prune.init_from, "--overwrite")
        convert = megashear("import", "--hf", chain.source, *out)
        tasks.append(Task("convert", prune.init_from, convert, (Path(chain.source),)))
    extract = megashear("extract", "--run", prune.run_dir, "--overwrite")
    models = (extracted, chain.export, "--domains", continue_run.run_dir)
    evaluate = megashear("evaluate", *models, "--json", losses, "--overwrite")
    runs = (prune.run_dir, continue_run.run_dir)
    return [
        *tasks,
        train(chain.prune_config, prune, chain.processes),
        Task("extract", extracted, extract),
        train(chain.continue_config, continue_run, chain.processes),
        export("export", continue_run.run_dir, chain.export),
        Task("evaluate", losses, evaluate),
        Task("report", report, megashear("report", *runs, "--out", report)),
    ]


def train(file: str, run: RunConfig, processes: int | None, name: str | None = None) -> Task:
    """Return the task of a training run, named after its stage unless told otherwise."""
    from megashear.config.loader import settings

    # Domains that come from the run before are not known until it has run; a run refuses others.
    decides = {k: v for k, v in settings(run).items() if not k.startswith("data.domains")}
    count = ("--nproc-per-node", str(processes)) if processes else ()
    return Task(
        name or run.stage,
        str(Path(run.run_dir, "checkpoints")),
        megashear("launch", *count, "train", file),
        settings=decides,
        resumes=True,
        removes=run.run_dir,
    )


def export(name: str, checkpoint: str, out: str) -> Task:
    """Return the task that makes a Hugging Face directory of a checkpoint or run."""
    words = ("--checkpoint", checkpoint, "--out", out, "--overwrite")
    return Task(name, out, megashear("export", *words))


def _report(run: RunConfig) -> str:
    return str(Path(run.run_dir, "report.html"))
