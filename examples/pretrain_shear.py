"""Runs one stage of megashear: pretrain, prune or continue. One YAML file is the whole run.

On one process:       python examples/pretrain_shear.py --config RUN.yaml
On the GPUs of a node: torchrun --nproc-per-node 8 examples/pretrain_shear.py --config RUN.yaml

Options of the file can be overridden behind it: `trainer.steps=100 parallel.tensor=2`. Started
again, a run goes on from its newest checkpoint; Ctrl-C and SIGTERM save before they end it.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megashear.checkpoint.models import Model
    from megashear.config.schema import ModelShape


def main() -> None:
    """Read the configuration, start the platform, train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="options that replace the file's"
    )
    arguments = parser.parse_args()

    # Imported late, so that --help answers at once.
    from megashear.checkpoint import models
    from megashear.config.loader import load_config
    from megashear.platform import launched, parallel

    rank = launched.launched_rank()
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    opened: list[Model] = []

    def source_shape(path: str) -> ModelShape:
        opened.append(models.open(path).without_masks())
        return opened[0].shape

    with launched.report_once():
        config = load_config(
            arguments.config,
            arguments.overrides,
            source_shape=source_shape,
            world_size=launched.world_size(),
        )
    from megashear.training.trainer import Trainer

    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    with platform.watched(config.platform.timeout_minutes):
        Trainer(config, platform, *opened).run()
    parallel.stop()  # not after an error: it might wait for a rank that is lost


if __name__ == "__main__":
    from megashear.console import run

    run(main)
