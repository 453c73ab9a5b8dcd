"""The training loop: one run from its configuration to its last checkpoint, stopped and resumed.

Stages differ by their Objective. Everything that a resumed run needs is in its checkpoint or is a
function of the step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megashear.checkpoint import manager
from megashear.checkpoint.agreement import on_first_process
from megashear.checkpoint.load import load_model
from megashear.checkpoint.manager import CheckpointInfo
from megashear.checkpoint.run_checkpoints import CheckpointManager
from megashear.config.loader import DOMAINS_FILE, domains_to_yaml, from_yaml, settings, to_yaml
from megashear.config.schema import ModelShape, RunConfig
from megashear.data.dataset import build_train_dataset, build_valid_datasets
from megashear.data.loader import Fetcher, MicroBatch, TrainLoader, torch_fetcher
from megashear.data.mixture import Mixture
from megashear.errors import CheckpointError, TrainingError
from megashear.model.build import build_model
from megashear.platform import cuda
from megashear.platform.parallel import Platform
from megashear.pruning.counting import parameter_count
from megashear.training.evaluation import Evaluator, cost_of_evaluations
from megashear.training.objective import LanguageModeling, PruningObjective
from megashear.training.optimizer import WeightOptimizer
from megashear.training.run_log import RunLog
from megashear.training.step import DomainLosses, run_microbatches


def source_shape(config: RunConfig) -> ModelShape:
    """The shape that a run trains: its `model`, or that of the model at `init_from`."""
    if config.model is not None:
        return config.model
    assert config.init_from is not None
    return manager.read_shape(config.init_from)


class Trainer:
    """One run on one process.

    Args:
        config: checked.
        platform: started.
    """

    def __init__(self, config: RunConfig, platform: Platform) -> None:
        # On another device `auto` may come to another precision: the run keeps the one it has.
        config = replace(config, platform=replace(config.platform, precision=platform.precision))
        self.config, self.platform = config, platform
        self.shape = source_shape(config)
        self.run_dir = Path(config.run_dir)
        trainer, data = config.trainer, config.data
        self.checkpoints = CheckpointManager(self.run_dir, platform, trainer.keep_checkpoints)
        platform.progress.mark("check of the checkpoints")
        resumed, passed_over = self.checkpoints.newest_whole()
        if resumed is not None:
            _refuse_other_config(resumed, config)
        self.step = resumed.step if resumed else 0
        self.history = resumed.history if resumed else manager.history_of(config.init_from)
        kept = resumed.generation if resumed else manager.generation_of(config.init_from)
        self.generation = kept
        resumed_step = resumed.step if resumed else None
        self.log = RunLog(self.run_dir, trainer.steps, platform.rank == 0, resumed_step)
        if passed_over:
            self.log.warn(passed_over)

        self.mixture = Mixture.from_config(data)
        dataset = build_train_dataset(data, self.shape.vocab_size, self.mixture)
        self.evaluator = Evaluator(
            build_valid_datasets(data, self.shape.vocab_size),
            config.evaluation.sequences_per_domain,
            trainer.micro_batch_size,
            platform,
            config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1,
        )
        self.losses: dict[str, float] = {}
        chunks = build_model(
            self.shape,
            platform,
            config.parallel,
            data.seq_length,
            masked_attention=data.reset_attention_mask,
        )
        if resumed is None and config.init_from is not None:
            self._initialise(chunks, config.init_from)
        self.optimizer = WeightOptimizer(chunks, config.optimizer, config.parallel, trainer.steps)
        self.objective = (
            PruningObjective(config, self.optimizer, self.shape, platform)
            if config.stage == "prune"
            else LanguageModeling()
        )
        self._introduce()
        if resumed is not None:
            self._resume(resumed)
        self.loader = TrainLoader(
            dataset,
            global_batch_size=trainer.global_batch_size,
            micro_batch_size=trainer.micro_batch_size,
            dp_rank=platform.data_rank,
            dp_size=platform.data_size,
            num_workers=data.num_workers,
            consumed_samples=self.step * trainer.global_batch_size,
            fetcher=self._fetcher(),
        )
        if resumed is not None:  # last, since what is made before may draw numbers
            self.checkpoints.restore_random_states(resumed)
        self._signal = 0  # the one that ends the run

    def _introduce(self) -> None:
        """Say what is about to run, on what."""
        target = self.objective.target
        size = f"{parameter_count(self.shape):,} parameters"
        size += f" -> {parameter_count(target):,}" if target else ""
        self.log.say(f"{self.config.stage} in {self.run_dir}: {size}; {self.platform}")
        cost, much = cost_of_evaluations(self.config, self.evaluator.sequences)
        (self.log.warn if much else self.log.say)(cost)

    def _fetcher(self) -> Fetcher:
        if self.config.platform.loader == "torch":
            return torch_fetcher
        from megashear.data.dali import DaliFetcher

        return partial(DaliFetcher, device=self.platform.device)

    def _initialise(self, chunks: list[Any], init_from: str) -> None:
        self.platform.progress.mark("loading of weights")
        load_model(init_from, chunks, self.platform)
        self.log.say(f"weights from {init_from}")

    @property
    def _tokenizer(self) -> str | None:
        """Where exports find the tokenizer: as configured, else with the source's weights."""
        given, init_from = self.config.data.tokenizer, self.config.init_from
        if given is not None:
            return str(Path(given).resolve())
        if init_from is None:
            return None
        if manager.is_huggingface(init_from):
            return str(Path(init_from).resolve())
        return manager.read_info(init_from).tokenizer

    def _resume(self, info: CheckpointInfo) -> None:
        self.platform.progress.mark("loading of a checkpoint", info.step)
        tensors = self.checkpoints.load(info, self.optimizer.chunks, self.optimizer.megatron)
        self.objective.load_state(tensors)
        self.mixture.load_state_dict(info.progress["mixture"])
        self.losses = info.progress["losses"]
        self.log.say(f"resumed from {info.directory} at step {info.step}")

    def run(self) -> None:
        """Train to the last step, or until a signal; either way the last state is saved.

        Raises:
            TrainingError: the loss is not finite.
            SystemExit: a signal ended the run; the status is 128 + its number, as in a shell.
        """
        steps = self.config.trainer.steps
        if self.step >= steps:
            self.log.say(f"{self.run_dir} is complete: {steps} steps. Nothing to do")
            return
        with self._signals():
            saved: int | None = self.step
            if not self.losses:  # the run begins: a resumed one has those of its checkpoint
                self._evaluate()
                saved = None
            while self.step < steps and not self._must_stop():
                self.train_step()
                if self._due(self.config.evaluation.interval):
                    self._evaluate()
                if self._due(self.config.trainer.save_interval):
                    self.save()
                    saved = self.step
                self._say_saved(self.checkpoints.poll())
            if saved != self.step:
                self.save()
            self._say_saved(self.checkpoints.finish())
        self.loader.close()
        if self.step < steps:
            self.log.say(f"stopped by a signal at step {self.step}; start it again to go on")
            raise SystemExit(128 + self._signal)
        if result := self.objective.result():
            self.log.say(result)
        if verdict := self.objective.verdict():
            self.log.warn(verdict)

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.trainer.steps

    def train_step(self) -> None:
        """One optimizer step: every micro-batch forward and backward, then one update."""
        began, mark = time.perf_counter(), self.platform.progress.mark
        mark("reading of data", self.step + 1)
        self.loader.fetch_until(self._next_evaluation() * self.config.trainer.global_batch_size)
        batches = self.loader.next_step()
        loaded = time.perf_counter()
        lr_share = self.optimizer.begin_step(self.step)
        self.optimizer.zero_grad()
        mark("micro-batches")
        with self.objective.step_weights(self.step):
            self.optimizer.gather()
            losses = run_microbatches(
                self.optimizer.models, batches, self.platform, len(self.mixture.names)
            )
        self._check_finite(losses, batches)
        mark("optimizer")
        penalty = self.objective.backward(self.step)
        grad_norm = self.optimizer.step()
        self.objective.update(lr_share)
        record = self.objective.metrics(self.step)
        self.step += 1
        self._log_step(record, losses, penalty, grad_norm, loaded - began, began)

    def _next_evaluation(self) -> int:
        interval = self.config.evaluation.interval
        return min((self.step // interval + 1) * interval, self.config.trainer.steps)

    def _check_finite(self, losses: DomainLosses, batches: list[MicroBatch]) -> None:
        if math.isfinite(losses.mean):
            return
        counts = {
            name: int(tokens) // self.config.data.seq_length
            for name, tokens in zip(self.mixture.names, losses.tokens, strict=True)
        }
        self._say_saved(self.checkpoints.finish())
        good = self.checkpoints.latest()
        raise TrainingError(
            f"the loss of step {self.step + 1} is {losses.mean}. Sequences of its batch by domain: "
            f"{', '.join(f'{name} {count}' for name, count in counts.items())}; losses by domain: "
            f"{dict(zip(self.mixture.names, losses.of_domains(), strict=True))}. Last good "
            f"checkpoint: {good.directory if good else 'none'}. Lower the learning rate or check "
            "the domain's text, then start again: the run goes on from that checkpoint"
        )

    def _log_step(
        self,
        record: dict[str, Any],
        losses: DomainLosses,
        penalty: float | None,
        grad_norm: float,
        data_seconds: float,
        began: float,
    ) -> None:
        trainer, seq_length = self.config.trainer, self.config.data.seq_length
        seconds = time.perf_counter() - began
        of_domains = zip(self.mixture.names, losses.of_domains(), strict=True)
        record = {
            "step": self.step,
            "tokens": self.step * trainer.global_batch_size * seq_length,
            "loss": losses.mean,
            "penalty": penalty,
            "grad_norm": grad_norm,
            "lr": self.optimizer.lr,
            **record,
            "domain_losses": {name: loss for name, loss in of_domains if not math.isnan(loss)},
            "seconds": seconds,
            "data_seconds": data_seconds,
            "tokens_per_second": trainer.global_batch_size * seq_length / seconds,
            "memory_gib": cuda.peak_memory_gib(self.platform.device),
        }
        self.log.step(record, show=self.step == 1 or self._due(trainer.log_interval))

    def _evaluate(self) -> None:
        self.platform.progress.mark("evaluation", self.step)
        began = time.perf_counter()
        with self.objective.evaluation_weights():
            self.optimizer.gather(wait=True)
            measured = self.evaluator.measure(self.optimizer.models)
        self.losses = {name: domain.loss for name, domain in measured.items()}
        before = self.mixture.weights
        if self.step < self.config.trainer.steps:
            self.mixture.update(self.step * self.config.trainer.global_batch_size, self.losses)
        self.log.evaluation(
            {"step": self.step, "seconds": time.perf_counter() - began},
            self.losses,
            self.mixture.references,
            before,
            self.mixture.weights,
        )

    def save(self) -> None:
        """Write a checkpoint; with `async_save` begin to, and `run` finishes it."""
        config = self.config
        self.platform.progress.mark("save", self.step)
        info = CheckpointInfo(
            shape=self.shape,
            stage=config.stage,
            step=self.step,
            tokens=self.step * config.trainer.global_batch_size * config.data.seq_length,
            target=self.objective.target,
            history=self.history,
            progress={"mixture": self.mixture.state_dict(), "losses": self.losses},
            config=to_yaml(config),
            tokenizer=self._tokenizer,
            generation=self.generation,
        )
        self._say_saved(self.checkpoints.finish())  # the one before, if it takes so long
        on_first_process(self._write_run_files)
        self.optimizer.gather(wait=True)
        self.checkpoints.save(
            info, self.optimizer.chunks, self.optimizer.megatron, self.objective.state()
        )
        if not config.trainer.async_save:
            self._say_saved(self.checkpoints.finish())

    def _say_saved(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self.log.say(f"saved {checkpoint}")

    def _write_run_files(self) -> None:
        """Beside the checkpoints: records, configuration, and domains with their newest weights."""
        weights = zip(self.config.data.domains, self.mixture.weights, strict=True)
        domains = [replace(domain, weight=weight) for domain, weight in weights]
        self.log.flush()
        self.checkpoints.directory.mkdir(exist_ok=True)  # before DOMAINS_FILE, which tells of it
        manager.write_durably(self.run_dir / DOMAINS_FILE, domains_to_yaml(domains))
        manager.write_durably(self.run_dir / "config.yaml", to_yaml(self.config))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning) end the run after the step."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.getsignal(number) for number in numbers}

        def stop(number: int, frame: Any) -> None:
            self._signal = number

        for number in numbers:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _must_stop(self) -> bool:
        """Whether any rank got a signal: they come between different steps on different ranks."""
        agreed = self.platform.largest(self._signal)
        if agreed:  # else one that came meanwhile counts the next time
            self._signal = agreed
        return agreed != 0


def _refuse_other_config(info: CheckpointInfo, config: RunConfig) -> None:
    """A run is continued under the configuration that it began with, but for free options."""
    assert info.config is not None, "a run's checkpoint has its configuration"
    before, after = settings(from_yaml(info.config)), settings(config)
    differences = [
        f"  {name}: {before.get(name)!r} in the run, {after.get(name)!r} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{config.run_dir} holds a run of another configuration:\n"
            + "\n".join(differences)
            + "\nUndo the changes to continue it, or give another run_dir"
        )
