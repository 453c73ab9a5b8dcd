"""Every layout computes what one process computes: losses, gradients, masks, parameters.

Each row of LAYOUTS runs the real trainer for three steps and is compared with one process. Adding a
layout is adding a row. fp32, to 1e-5 of the largest value of each tensor (2e-5 for gradients of the
first step), and parameters after three steps, through which Adam amplifies.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from megashear.config.schema import (
    EvaluationConfig,
    ModelShape,
    ParallelConfig,
    PruningConfig,
    RotaryScaling,
    RunConfig,
)
from megashear.model.build import bound_rules
from megashear.platform import parallel
from megashear.pruning.table import ParamRule, param_rules
from megashear.training import optimizer
from megashear.training.trainer import Trainer
from tests.support.distributed import run_distributed
from tests.support.runs import (
    BIASES,
    GQA,
    GQA_QUERY_HEAD,
    MHA,
    prune_options,
    run_config,
    write_domains,
    write_source,
)

DISTRIBUTED = {"distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}


def layout(ranks: int, **parallel: Any) -> tuple[int, ParallelConfig]:
    return ranks, ParallelConfig(**parallel)


LAYOUTS = {
    "tp2": layout(2, tensor=2),
    "tp2-sp": layout(2, tensor=2, sequence=True),
    "pp2": layout(2, pipeline=2),
    "pp2-interleaved": layout(2, pipeline=2, virtual_pipeline=2),
    "cp2": layout(2, context=2),
    "dp2": layout(2),
    "dp2-overlap": layout(2, overlap_grad_reduce=True),
    "dp2-distopt": layout(2, **DISTRIBUTED),
    "dp2-distopt-overlap-grad": layout(2, **DISTRIBUTED, overlap_grad_reduce=True),
    "dp2-distopt-overlap": layout(2, **OVERLAPPED),
    "recompute-full": layout(1, recompute="full"),
    "tp2-sp-recompute-selective": layout(2, tensor=2, sequence=True, recompute="selective"),
    "tp2-sp-dp2": layout(4, tensor=2, sequence=True),
    "tp2-sp-pp2": layout(4, tensor=2, sequence=True, pipeline=2),
    "tp2-pp2-recompute-full": layout(4, tensor=2, pipeline=2, recompute="full"),
    "tp2-sp-cp2": layout(4, tensor=2, sequence=True, context=2),
    "pp2-cp2": layout(4, pipeline=2, context=2),
    "cp2-dp2-distopt-overlap": layout(4, context=2, **OVERLAPPED),
    "tp4-sp": layout(4, tensor=4, sequence=True),
    "pp4": layout(4, pipeline=4),
    "pp2-interleaved-dp2-distopt-overlap": layout(4, pipeline=2, virtual_pipeline=2, **OVERLAPPED),
    "tp2-sp-pp2-dp2-distopt-overlap": layout(8, tensor=2, sequence=True, pipeline=2, **OVERLAPPED),
    "tp2-sp-pp2-interleaved-cp2": layout(
        8, tensor=2, sequence=True, pipeline=2, virtual_pipeline=2, context=2
    ),
}
SHAPES = {
    "mha": replace(MHA, num_layers=4),
    "variants": replace(  # of everything that a model may have, more than any has
        BIASES,
        num_layers=4,
        qk_norm=True,
        tied_embeddings=True,
        rotary_scaling=RotaryScaling("yarn", 4.0, 32),
        sliding_window=7,
    ),
    "query-head": replace(GQA_QUERY_HEAD, num_layers=4),
    "vocabulary-61": replace(MHA, num_layers=4, vocab_size=61),
    "vocabulary-9-tied": replace(GQA, num_layers=4, vocab_size=9, tied_embeddings=True),
}
BF16 = (
    *("recompute-full", "tp2-sp", "tp2-sp-cp2", "dp2-distopt"),
    "pp2-interleaved-dp2-distopt-overlap",
)
BY_QUERY_HEAD = ("tp2", "tp4-sp", "tp2-sp-pp2-dp2-distopt-overlap")
PADDED = ("tp4-sp", "tp2-sp-pp2-dp2-distopt-overlap")  # 9 on four ranks: one has no token
# Every layout prunes the model that has everything. Without masks most of what a row compares is
# Megatron's own: there are a few, for what we add to it (optimizer, data, evaluation, vocabulary).
WITHOUT_MASKS = ("recompute-full", "tp2-sp-pp2-dp2-distopt-overlap")
ALL_PAIRS = ("tp2-sp", "pp2-interleaved", "cp2", "dp2-distopt-overlap")  # each way to divide
ROWS = [
    *((name, "fp32", "prune", "variants") for name in LAYOUTS),
    *((name, "bf16", "prune", "variants") for name in BF16),
    *((name, "fp32", "continue", "mha") for name in WITHOUT_MASKS),
    *((name, "fp32", "prune", "mha") for name in ALL_PAIRS),
    *((name, "fp32", "continue", "variants") for name in ALL_PAIRS),
    (BF16[-1], "bf16", "continue", "mha"),
    *((name, "fp32", "prune", "query-head") for name in BY_QUERY_HEAD),
    *((name, "fp32", stage, shape)
      for name in PADDED
      for stage, shape in (("continue", "vocabulary-61"), ("prune", "vocabulary-9-tied"))),
]  # fmt: skip
# Of losses; of gradients at step 1; of weights after three steps; of masks and multipliers then.
# bf16 has 8 bits, and Adam makes whole steps of a gradient whose sign is rounding's.
TOLERANCES = {"fp32": (1e-5, 2e-5, 1e-5, 1e-5), "bf16": (1e-2, 0.25, 0.02, math.inf)}


def three_steps(config: RunConfig) -> dict[str, Any]:
    """What a rank computes: losses, gradients of step 1, state after step 3; weights by shard."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    # Small buckets, so that there are several, whose borders cut parameters.
    small = partial(DistributedDataParallelConfig, bucket_size=3000)
    optimizer.DistributedDataParallelConfig = small  # type: ignore[assignment, misc]
    trainer = Trainer(config, platform)
    found: dict[str, Any] = {
        "losses": [],
        "norms": [],
        "evaluations": [],
        "rank": (platform.tensor_rank, platform.tensor_size),
    }
    found["stage"] = parallel_state.get_pipeline_model_parallel_rank()
    owned = trainer.optimizer.owned

    def keep(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            found["losses"].append(record["loss"])
            found["norms"].append(record["grad_norm"])

    trainer.log.record = keep  # type: ignore[method-assign, assignment]
    found["early"] = count_early_reductions(trainer.optimizer.models)
    objective, megatron_step = trainer.objective, trainer.optimizer.step
    if config.stage == "prune":
        leave_saturation(objective)

    def weights() -> dict[str, Tensor]:
        return {b.rule.name: b.parameter for b in bound_rules(trainer.optimizer.chunks)}

    def step_and_keep_gradients() -> float:
        if "gradients" not in found:
            found["gradients"] = {n: p.main_grad.clone() for n, p in weights().items()}
            found["owned"] = {n: (owned(p).start, owned(p).stop) for n, p in weights().items()}
            if config.stage == "prune":
                found["mask_gradients"] = {
                    **{n: p.grad.clone() for n, p in objective.masks.log_alpha.items()},
                    **{
                        n + ".l": p.grad.clone()
                        for n, p in objective.lagrangian.multipliers.items()
                    },
                }
        return megatron_step()

    trainer.optimizer.step = step_and_keep_gradients  # type: ignore[method-assign]
    for step in range(3):
        if step % config.evaluation.interval == 0:
            trainer._evaluate()
            found["evaluations"].append(list(trainer.losses.values()))
        trainer.train_step()
    trainer.optimizer.gather(wait=True)
    found["weights"] = {name: p.detach().clone() for name, p in weights().items()}
    found["state"] = objective.state()
    parallel.stop()
    return found


def count_early_reductions(models: list[Any]) -> Tensor:
    """[buckets, reductions that begin before the backward pass has ended], filled by training."""
    groups = [group for model in models for group in model.bucket_groups]
    counts = torch.tensor([len(groups), 0])
    in_backward = [True]
    config = models[0].config
    finalize = config.finalize_model_grads_func

    def finalize_at_the_end(*args: Any, **kwargs: Any) -> None:
        in_backward[0] = False
        finalize(*args, **kwargs)
        in_backward[0] = True

    config.finalize_model_grads_func = finalize_at_the_end
    for group in groups:

        def start(*args: Any, start: Any = group.start_grad_sync, **kwargs: Any) -> None:
            counts[1] += in_backward[0]
            start(*args, **kwargs)

        group.start_grad_sync = start
    return counts


@torch.no_grad()
def leave_saturation(objective: Any) -> None:
    """Masks at 5 are nearly all exactly 1 and without a gradient; multipliers at 0 do nothing."""
    generator = torch.Generator().manual_seed(0)
    for log_alpha in objective.masks.log_alpha.values():
        log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator) + 1)
    for multipliers in objective.lagrangian.multipliers.values():
        multipliers.fill_(0.5)


def assert_all_owned(rule: ParamRule, ranks: list[dict[str, Any]]) -> None:
    """The parts that ranks own make up the parameter on every tensor-parallel rank."""
    name = rule.name
    for place in {found["rank"] for found in ranks}:
        owned = {
            found["owned"][name]
            for found in ranks
            if found["rank"] == place and name in found["owned"]
        }
        count = sum(stop - start for start, stop in owned)
        assert count == math.prod(rule.shape(place[1])), (name, owned)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    scale = expected.abs().max().clamp_min(1e-12)
    difference = (ours - expected).abs().max() / scale
    assert difference < tolerance, f"{what}: {difference:.1e} of the maximum {scale:.1e}"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(configuration, what one process computes), once for each stage and shape."""
    made: dict[tuple[str, str, str], tuple[RunConfig, dict[str, Any]]] = {}

    def get(stage: str, shape_name: str, rule: str) -> tuple[RunConfig, dict[str, Any]]:
        case = (stage, shape_name, rule)
        if case not in made:
            directory = tmp_path_factory.mktemp("-".join(case))
            config = configuration(directory, stage, SHAPES[shape_name])
            config = replace(config, data=replace(config.data, rule=rule))
            made[case] = (config, run_distributed(three_steps, 1, config)[0])
        return made[case]

    return get


def configuration(directory: Path, stage: str, shape: ModelShape) -> RunConfig:
    """A prune or continue run from random weights, the same for every layout."""
    run_distributed(write_source, 1, directory, shape)  # not here: this process forks
    options: dict[str, Any] = prune_options(shape) if stage == "prune" else {"stage": stage}
    pruning = options.get("pruning", PruningConfig())
    options["pruning"] = replace(pruning, mask_lr=0.1, multiplier_lr=0.1)
    return run_config(
        directory,
        write_domains(directory, shape.vocab_size),
        evaluation=EvaluationConfig(interval=2, sequences_per_domain=4),
        init_from=str(directory / "source"),
        **options,
    )


@pytest.mark.parametrize(("layout", "precision", "stage", "shape_name"), ROWS)
def test_layout_computes_what_one_process_computes(
    layout: str, precision: str, stage: str, shape_name: str, oracle: Any
) -> None:
    """Also in bf16, which is compared with one process in fp32 (on the same blend of domains)."""
    config, expected = oracle(stage, shape_name, "paper" if precision == "fp32" else "constant")
    world_size, parallel_config = LAYOUTS[layout]
    platform_config = replace(config.platform, precision=precision)
    config = replace(config, parallel=parallel_config, platform=platform_config)
    ranks = run_distributed(three_steps, world_size, config)
    rules = {rule.name: rule for rule in param_rules(SHAPES[shape_name])}
    assert all(any(name in found["weights"] for found in ranks) for name in rules)
    for rule in rules.values():
        assert_all_owned(rule, ranks)
    for found in ranks:
        buckets, early = found["early"].tolist()
        # In the first step Megatron only counts the gradients that each bucket waits for.
        assert early == (2 * buckets if parallel_config.overlap_grad_reduce else 0)
        assert buckets > 1 or not parallel_config.overlap_grad_reduce or found["stage"] > 0
    of_losses, of_gradients, of_weights, of_masks = TOLERANCES[precision]
    for found in ranks:
        place = found["rank"]
        for kind, tolerance in (
            *(("losses", of_losses), ("evaluations", of_losses)),
            ("norms", of_gradients),
        ):
            assert_close(torch.tensor(found[kind]), torch.tensor(expected[kind]), tolerance, kind)
        for name, gradient in found["gradients"].items():
            shard = rules[name].shard(expected["gradients"][name], *place)
            mine = slice(*found["owned"][name])
            part = shard.flatten().clone()
            part[mine] = gradient.flatten()[mine]
            assert_close(part.view_as(shard), shard, of_gradients, f"gradient of {name}")
        for name, gradient in found.get("mask_gradients", {}).items():
            expected_gradient = expected["mask_gradients"][name]
            assert expected_gradient.any(), f"{name} has no gradient: nothing is compared"
            assert_close(gradient, expected_gradient, of_gradients, f"mask gradient {name}")
        for name, weight in found["weights"].items():
            shard = rules[name].shard(expected["weights"][name], *place)
            assert_close(weight.float(), shard, of_weights, f"{name} after three steps")
            if rules[name].axes[0].vocabulary:
                padding = slice(len(rules[name].axes[0].shard_blocks(*place)), None)
                assert not weight[padding].any()
                assert not found["gradients"][name][padding].any()
        for name, value in found["state"].items():
            assert_close(value, expected["state"][name], of_masks, f"{name} after three steps")
            assert torch.equal(value, ranks[0]["state"][name]), f"ranks disagree on {name}"
