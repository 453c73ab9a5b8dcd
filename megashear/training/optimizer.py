"""Megatron-Core's data parallelism, optimizer and schedule, put together for a run."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megashear.config.schema import OptimizerConfig


class WeightOptimizer:
    """AdamW on the weights, clipped by their global norm, with warm-up and cosine decay.

    Args:
        model: this rank's part, without data parallelism around it.
        config: the schedule's and AdamW's numbers.
        steps: length of the run.

    Attributes:
        model: the same in Megatron-Core's DistributedDataParallel; gradients are in `main_grad`.
        megatron: Megatron-Core's optimizer.
    """

    def __init__(self, model: Any, config: OptimizerConfig, steps: int) -> None:
        self.config = config
        buckets = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(model.config, buckets, model)
        self.model.broadcast_params()
        bf16 = model.config.bf16
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.lr * config.min_lr_ratio,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=bf16,
                params_dtype=torch.bfloat16 if bf16 else torch.float32,
            ),
            [self.model],
            use_gloo_process_groups=False,
        )
        self._schedule = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.lr * config.min_lr_ratio,
            lr_warmup_steps=min(config.warmup_steps, steps - 1),
            lr_decay_steps=steps,
            lr_decay_style="cosine",
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
        )
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.megatron.scale_loss

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.model.zero_grad_buffer()
        self.megatron.zero_grad()

    def begin_step(self, step: int) -> float:
        """Set the learning rate of the step after `step` completed ones; returns it as a share.

        The share (of the configured lr) is a function of the step alone: nothing to resume.
        """
        self._schedule.num_steps = step + 1
        self._schedule.step(0)
        return self.lr / self.config.lr if self.config.lr else 0.0

    @property
    def unwrapped(self) -> Any:
        """The model inside Megatron-Core's data parallelism: what checkpoints hold."""
        return self.model.module

    @property
    def lr(self) -> float:
        """Learning rate in force."""
        return float(self.megatron.param_groups[0]["lr"])

    def step(self) -> float:
        """Clip and apply the gradients; returns their norm before clipping."""
        success, grad_norm, _ = self.megatron.step()
        assert success, "only loss scaling, which is not used, can refuse a step"
        return float(grad_norm)
