"""A dense and a pruning trainer side by side on each rank, equal in all but the masks.

Same weights, batches, layout and optimizer. They take turns in one process, so that what a machine
does to one it does to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from megashear.config.schema import ModelShape, RunConfig, TargetShape
from megashear.platform import parallel
from megashear.platform.random_states import seed_all
from megashear.training.trainer import Trainer

KINDS = ("dense", "prune")


def half(shape: ModelShape) -> TargetShape:
    """A target that every kind of mask has to work for: about half of each size."""
    return TargetShape(
        num_layers=shape.num_layers // 2,
        hidden_size=shape.hidden_size // 2,
        num_attention_heads=shape.num_attention_heads // 2,
        ffn_hidden_size=shape.ffn_hidden_size // 2,
    )


@contextmanager
def trainers(config: RunConfig, kinds: tuple[str, ...] = KINDS) -> Iterator[dict[str, Trainer]]:
    """This rank's trainers by name; all but `dense` prune, with masks far from saturated.

    Args:
        config: of stage prune, with a `model`.
        kinds: names, each of a run directory beside the configured one.
    """
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    dense = replace(config, stage="continue", target=None)
    made: dict[str, Trainer] = {}
    for kind in kinds:
        seed_all(config.trainer.seed, platform.rank)  # equal weights
        of_kind = dense if kind == "dense" else config
        made[kind] = Trainer(replace(of_kind, run_dir=f"{config.run_dir}-{kind}"), platform)
        if kind != "dense":
            _leave_saturation(made[kind])
    try:
        yield made
    finally:
        for trainer in made.values():
            trainer.loader.close()
            trainer.lock.close()
        parallel.stop()


@torch.no_grad()
def _leave_saturation(trainer: Trainer) -> None:
    generator = torch.Generator().manual_seed(7)
    for log_alpha in trainer.objective.masks.log_alpha.values():  # type: ignore[attr-defined]
        log_alpha.copy_(2 * torch.randn(log_alpha.shape, generator=generator))
