"""`megashear train`: one run of stage pretrain, prune or continue, from one YAML file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megashear.commands.options import require_model

if TYPE_CHECKING:
    from megashear.checkpoint.models import Model
    from megashear.config.schema import ModelShape


def add(commands: Any) -> None:
    """Add the command to the parser of all."""
    parser = commands.add_parser(
        "train",
        help="run one stage: pretrain, prune or continue",
        description="Run one stage: pretrain, prune or continue. RUN.yaml is the whole run.\n"
        "Started again, a run goes on from its newest checkpoint; Ctrl-C and SIGTERM save one.",
        epilog="examples:\n\n"
        "  megashear train prune.yaml                       # in one process\n"
        "  megashear train prune.yaml trainer.steps=100 parallel.tensor=2\n"
        "  megashear launch train prune.yaml                # on all GPUs of this machine\n"
        "  torchrun --nproc-per-node 8 -m megashear train prune.yaml",
    )
    parser.trailing = "words"
    parser.add_argument("--config", type=Path, metavar="RUN.yaml", help="the same, as an option")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN.yaml key.sub=value",
        help="the run's file, then options that replace the file's",
    )
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> None:
    """Read the configuration, start the platform, train."""
    file, overrides = args.config, args.words
    if file is None and overrides and "=" not in overrides[0]:
        file, *overrides = overrides
    if file is None:
        args.parser.error("a run's YAML file is required")

    from megashear.checkpoint import models
    from megashear.config.loader import load_config
    from megashear.platform import launched

    rank = launched.launched_rank()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    opened: list[Model] = []

    def source_shape(path: str) -> ModelShape:
        require_model(path)
        opened.append(models.open(path).without_masks())
        return opened[0].shape

    with launched.report_once():
        config = load_config(
            Path(file), overrides, source_shape=source_shape, world_size=launched.world_size()
        )
    from megashear.platform import parallel
    from megashear.training.trainer import Trainer

    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    with platform.watched(config.platform.timeout_minutes):
        Trainer(config, platform, *opened).run()
    parallel.stop()  # not after an error: it might wait for a rank that is lost
