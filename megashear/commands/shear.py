"""`megashear shear`: the whole way on one machine, from text and weights to a small model."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megashear.config.chain import Chain
    from megashear.config.schema import RunConfig
    from megashear.stages import Stage

STAGES = (
    *("tokenize", "convert", "prune", "extract"),
    *("continue", "export", "evaluate", "report"),
)


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "shear",
        help="the whole way on one machine: tokenize, prune, extract, continue, export",
        description=f"Run the stages {', '.join(STAGES)}.\nCHAIN is a YAML file:\n\n"
        "  work_dir: runs/llama2-7b-to-1.3b     # logs, and what is done\n"
        "  text: text/*.jsonl.gz                # every file a domain; leave out where tokens are\n"
        "  tokens: data/{name}\n"
        "  source: models/llama2-7b             # Hugging Face directory\n"
        "  prune_config: prune.yaml             # its init_from is where the source goes\n"
        "  continue_config: continue.yaml       # its init_from is RUN_DIR/extracted of prune\n"
        "  export: models/sheared-1.3b\n"
        "  processes: 8                         # of a training stage; default: one a GPU\n\n"
        "All that can be known is checked first. Interrupted, the same command goes on where it\n"
        "stopped; stages that are done are not done again.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("chain", type=Path, metavar="CHAIN", help="YAML file of the chain")
    parser.add_argument(
        "--stage", action="append", choices=STAGES, default=[], help="run this one (repeatable)"
    )
    parser.add_argument(
        "--print", action="store_true", dest="prints", help="print the commands, a line each"
    )
    parser.add_argument(
        "--adopt", action="store_true", help="take outputs that are there as those of the stages"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything, then run or print the stages."""
    from megashear.config.chain import load_chain
    from megashear.report.runs import write_chain_runs
    from megashear.stages import Runner

    chain, prune, go_on = load_chain(args.chain)
    if not (args.prints and args.stage):  # a job asks, of a chain that was checked as a whole
        _check_shapes(args.chain, chain, prune, go_on)
    stages = chain_stages(chain, prune, go_on)
    if args.prints:
        for stage in stages:
            if not args.stage or stage.name in args.stage:
                print(shlex.join(stage.command))
        return
    runner = Runner(Path(chain.work_dir), Path.cwd(), threads=None, keeps=True)
    write_chain_runs(Path(chain.work_dir), [prune.run_dir, go_on.run_dir])
    runner.run_all(stages, args.stage, adopts=args.adopt)
    print(f"done: {chain.export}. Its way is told in {_report(go_on)}")


def _check_shapes(file: Path, chain: Chain, prune: RunConfig, go_on: RunConfig) -> None:
    """The runs fit the source's shape and the target's, which no checkpoint has yet.

    Raises:
        ConfigError: with every problem.
    """
    from megashear.checkpoint import models
    from megashear.config.validate import problems
    from megashear.errors import ConfigError
    from megashear.pruning.masks import resolve_target

    source = models.open(chain.source).without_masks().shape
    found = [(f"prune_config: {at}", text) for at, text in
             problems(prune, source, chain.processes, check_files=False)]  # fmt: skip
    if not found and prune.target is not None:
        target = resolve_target(source, prune.target, prune.pruning.head_unit)
        found = [(f"continue_config: {at}", text) for at, text in
                 problems(go_on, target, chain.processes, check_files=False)]  # fmt: skip
    if found:
        raise ConfigError(str(file), found)


def chain_stages(chain: Chain, prune: RunConfig, go_on: RunConfig) -> list[Stage]:
    """The commands of a chain, in their order."""
    from megashear.config.chain import EXTRACTED
    from megashear.stages import Stage, python, script

    def command(name: str, output: str, *words: str) -> Stage:
        return Stage(name, output, python("-m", "megashear", name, *words))

    def tool(name: str, output: str, file: str, *words: str) -> Stage:
        return Stage(name, output, script(f"tools/checkpoint/{file}", *words, "--overwrite"))

    extracted, report = str(Path(prune.run_dir, EXTRACTED)), _report(go_on)
    losses = str(Path(go_on.run_dir, "losses.json"))
    stages = []
    if chain.text is not None:
        words: tuple[str, ...] = ("--input", chain.text, "--output", chain.tokens)
        words += ("--tokenizer", chain.tokenizer or chain.source)
        words += ("--valid-fraction", str(chain.valid_fraction))
        tokens = command("tokenize", str(Path(chain.tokens).parent), *words)
        stages.append(replace(tokens, repeats=True))
    assert prune.init_from is not None
    if Path(prune.init_from) != Path(chain.source):  # else the run reads it as it is
        words = ("--hf", chain.source, "--out", prune.init_from)
        convert = tool("convert", prune.init_from, "hf_to_megatron.py", *words)
        stages.append(replace(convert, reads=(Path(chain.source),)))
    models = (extracted, chain.export, "--domains", go_on.run_dir)
    return [
        *stages,
        _train(chain.prune_config, prune, chain.processes),
        tool("extract", extracted, "extract.py", "--run", prune.run_dir),
        _train(chain.continue_config, go_on, chain.processes),
        tool("export", chain.export, "megatron_to_hf.py",
             "--checkpoint", go_on.run_dir, "--out", chain.export),
        command("evaluate", losses, *models, "--json", losses, "--overwrite"),
        command("report", report, prune.run_dir, go_on.run_dir, "--out", report),
    ]  # fmt: skip


def _train(file: str, run: RunConfig, processes: int | None) -> Stage:
    """The stage of a training run."""
    from megashear.config.loader import settings
    from megashear.stages import Stage, python, script

    # Domains that come from the run before are not known until it has run; a run refuses others.
    decides = {k: v for k, v in settings(run).items() if not k.startswith("data.domains")}
    _, *shear = script("examples/pretrain_shear.py", "--config", file)
    count = ("--nproc-per-node", str(processes)) if processes else ()
    return Stage(
        run.stage,
        str(Path(run.run_dir, "checkpoints")),
        python("-m", "megashear", "launch", *count, *shear),
        settings=decides,
        resumes=True,
    )


def _report(go_on: RunConfig) -> str:
    return str(Path(go_on.run_dir, "report.html"))
