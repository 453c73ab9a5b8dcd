"""A model in a layout, as a plan sees it. Imports config and pruning only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megashear.config.schema import ModelShape, ParallelConfig, RunConfig
from megashear.pruning.table import ParamRule, layer_rules, mask_sizes, outer_rules

CPU, TORCH, TRANSFORMER_ENGINE = BACKENDS = ("cpu", "torch", "transformer_engine")
"""Layers: torch on a CPU (norms in several operations), torch or Transformer Engine on a GPU."""


@dataclass(frozen=True)
class Setup:
    """One layout of a run.

    Attributes:
        shape: shape of the trained model.
        parallel: the layout.
        data_size: data-parallel ranks.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        micro_batches: micro-batches of a data-parallel rank in a step.
        masked: whether masks are trained too (stage prune).
        masked_units: units of all masks of the model.
        backend: one of BACKENDS.
        precision: bf16 | fp32.
    """

    shape: ModelShape
    parallel: ParallelConfig
    data_size: int
    seq_length: int
    micro_batch_size: int
    micro_batches: int
    masked: bool
    masked_units: int
    backend: str
    precision: str

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def layers(self) -> int:
        """Transformer layers of a pipeline stage."""
        return self.shape.num_layers // self.parallel.pipeline

    @property
    def owners(self) -> int:
        """Ranks that share the optimizer's state of the same parameters."""
        shared = self.parallel.distributed_optimizer
        return self.data_size * self.parallel.context if shared else 1

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.micro_batch_size * self.seq_length // self.parallel.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks in a step."""
        sequences = self.data_size * self.micro_batches * self.micro_batch_size
        return sequences * self.seq_length


def setup_of(config: RunConfig, shape: ModelShape, gpus: int, backend: str) -> Setup:
    """Return the layout of a configuration that `config.validate` accepts for this many GPUs."""
    parallel, trainer = config.parallel, config.trainer
    data_size = gpus // parallel.model_ranks
    sizes = mask_sizes(shape, config.pruning.head_unit).values()
    return Setup(
        shape=shape,
        parallel=parallel,
        data_size=data_size,
        seq_length=config.data.seq_length,
        micro_batch_size=trainer.micro_batch_size,
        micro_batches=trainer.global_batch_size // (trainer.micro_batch_size * data_size),
        masked=config.stage == "prune",
        masked_units=sum(rows * units for rows, units in sizes) if config.stage == "prune" else 0,
        backend=backend,
        precision=config.platform.precision_on(backend != CPU),
    )


@dataclass(frozen=True)
class Sizes:
    """Parameters of a rank.

    Attributes:
        parameters: all parameters.
        scaled: those that masks scale.
        largest: those of the largest tensor.
        most_scaled: the most that tensors of one name have in all layers, if masks scale them.
        replicated: those that every tensor-parallel rank holds whole.
        qk_norms: those in the norms of queries and keys, which are replicated.
    """

    parameters: int
    scaled: int
    largest: int
    most_scaled: int
    replicated: int
    qk_norms: int


@lru_cache(maxsize=4096)
def sizes_of_stage(shape: ModelShape, tensor: int, layers: int, first: bool, last: bool) -> Sizes:
    """Parameters that a rank of a pipeline stage holds.

    Args:
        shape: shape of the whole model.
        tensor: tensor-parallel ranks.
        layers: layers of the stage.
        first: whether it has the embedding.
        last: whether it has the output head; with tied embeddings, a copy of the embedding.
    """
    embedding, norm, *head = outer_rules(shape)
    rules = [(rule, layers) for rule in layer_rules(shape, 0)]
    rules += [(embedding, 1)] if first or (last and not head) else []
    rules += [(rule, 1) for rule in (norm, *head)] if last else []
    numbers = [(_number(rule, tensor), rule.scaled, count) for rule, count in rules]
    return Sizes(
        parameters=sum(number * count for number, _, count in numbers),
        scaled=sum(number * count for number, scaled, count in numbers if scaled),
        largest=max(number for number, *_ in numbers),
        most_scaled=max((number * count for number, scaled, count in numbers if scaled), default=0),
        replicated=sum(_number(rule, 1) * count for rule, count in rules if not rule.parallel),
        qk_norms=2 * shape.kv_channels * layers if shape.qk_norm else 0,
    )


def _number(rule: ParamRule, tensor: int) -> int:
    return math.prod(rule.shape(tensor))
