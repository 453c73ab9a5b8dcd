"""The training loop: one run from its configuration to its last checkpoint, stopped and resumed.

Stages differ in their Objective. Everything that a resumed run needs is in its checkpoint or is a
function of the step.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megashear.checkpoint import models
from megashear.checkpoint.hf.config import export_problem
from megashear.checkpoint.info import CheckpointInfo
from megashear.checkpoint.models import Model
from megashear.checkpoint.runs import CheckpointManager
from megashear.config.loader import (
    DOMAINS_FILE,
    domains_to_yaml,
    from_yaml,
    refuse_other_settings,
    to_yaml,
)
from megashear.config.schema import RunConfig
from megashear.data.dataset import build_train_dataset, build_valid_datasets
from megashear.data.domain_weights import DomainWeights
from megashear.data.fingerprint import content_hashes, refuse_changed_content
from megashear.data.loader import Fetcher, TrainLoader, torch_fetcher
from megashear.errors import CheckpointError, TrainingError
from megashear.files import write_durably
from megashear.model.build import build_model
from megashear.platform.collectives import on_first_process
from megashear.platform.cuda import Moment, ToHost
from megashear.platform.parallel import Platform
from megashear.pruning.counting import parameter_count
from megashear.records import KEPT_UNITS_FILE, pack, utc
from megashear.training.evaluation import Evaluator, cost_of_evaluations
from megashear.training.objective import LanguageModeling, Objective, PruningObjective
from megashear.training.optimizer import WeightOptimizer
from megashear.training.run_lock import RunLock
from megashear.training.run_log import RunLog
from megashear.training.run_records import RunRecords, StepTimes
from megashear.training.signals import StopSignals
from megashear.training.step import DomainLosses, run_micro_batches
from megashear.training.tokenizer_check import check_tokenizer


class Trainer:
    """One run on one process.

    Args:
        config: a validated configuration.
        platform: the initialised process group and device.
        source: the model at `init_from`, where it is open already.
    """

    def __init__(self, config: RunConfig, platform: Platform, source: Model | None = None) -> None:
        # On another device `auto` may mean another precision: a resumed run keeps the one it has.
        config = replace(config, platform=replace(config.platform, precision=platform.precision))
        self.config, self.platform = config, platform
        self.source = _open_source(config, source)
        shape = self.source.shape if self.source else config.model
        assert shape is not None, "the configuration is checked"
        self.shape = shape
        self.run_dir = Path(config.run_dir)
        self.lock = RunLock(self.run_dir)  # before anything in there changes
        trainer, data = config.trainer, config.data
        self.checkpoints = CheckpointManager(self.run_dir, platform, trainer.keep_checkpoints)
        platform.heartbeat.mark("check of the checkpoints")
        resumed, passed_over = self.checkpoints.newest_whole()
        if resumed is not None:
            assert resumed.config is not None, "a run's checkpoint has its configuration"
            # Checkpoints of earlier versions have no hashes: there the paths must stay the same.
            known = "content" in resumed.progress
            refuse_other_settings(config, from_yaml(resumed.config), token_paths=not known)
        self.step = resumed.step if resumed else 0
        begun_from = resumed or self.source
        self.history = resumed.history if resumed else self.source.history if self.source else ()
        self.generation = begun_from.generation if begun_from else {}
        resumed_step = resumed.step if resumed else None
        self.log = RunLog(config, platform.rank == 0, resumed_step)
        if passed_over:
            self.log.warn(passed_over)

        self.losses: dict[str, float] = {}
        self._open_data(resumed)
        self._build_model(new=resumed is None)
        self._introduce()
        if resumed is not None:
            self._resume(resumed)
        self.loader = TrainLoader(
            self.dataset,
            global_batch_size=trainer.global_batch_size,
            micro_batch_size=trainer.micro_batch_size,
            data_rank=platform.data_rank,
            data_size=platform.data_size,
            num_workers=data.num_workers,
            consumed_samples=self.step * trainer.global_batch_size,
            fetcher=self._fetcher(),
        )
        if resumed is not None:  # last: what is built before may draw random numbers
            self.checkpoints.restore_random_states(resumed)
        self.signals = StopSignals(platform)
        self.records = RunRecords(config, platform, self.shape, self.domain_weights)
        self._saving = (0, 0.0)  # step of the newest checkpoint, and seconds that training waited

    def _open_data(self, resumed: CheckpointInfo | None) -> None:
        """Open the token files, and check that they are those of a resumed run."""
        config, data = self.config, self.config.data
        self.domain_weights = DomainWeights.from_config(data)
        self.dataset = build_train_dataset(data, self.shape.vocab_size, self.domain_weights)
        valid = build_valid_datasets(data, self.shape.vocab_size)
        self._check_tokenizer()
        self.content = on_first_process(partial(content_hashes, data.domains))
        if resumed is not None and "content" in resumed.progress:
            refuse_changed_content(data.domains, resumed.progress["content"], self.content)
        self.evaluator = Evaluator(
            valid,
            config.evaluation.sequences_per_domain,
            config.trainer.micro_batch_size,
            self.platform,
            config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1,
        )

    def _check_tokenizer(self) -> None:
        """Refuse token files of another tokenizer than the model's; warn of what is not known."""
        data = self.config.data
        if self.source is None and data.tokenizer is None:
            return  # stage pretrain: the token files decide
        prefixes = [file for domain in data.domains for file in (domain.train, domain.valid)]
        check = partial(check_tokenizer, prefixes, self._tokenizer, self.generation)
        for text in on_first_process(partial(check, other_tokenizer=data.other_tokenizer)):
            self.log.warn(text)

    def _build_model(self, *, new: bool) -> None:
        """Build model, optimizer and objective; a new run gets the weights of `init_from`."""
        config, platform = self.config, self.platform
        chunks = build_model(
            self.shape,
            platform,
            config.parallel,
            config.data.seq_length,
            masked_attention=config.data.reset_attention_mask,
        )
        if new and self.source is not None:
            platform.heartbeat.mark("loading of weights")
            self.source.fill(chunks, platform)
            self.log.say(f"weights from {config.init_from}")
        self.optimizer = WeightOptimizer(
            chunks, config.optimizer, config.parallel, config.trainer.steps
        )
        self.objective: Objective = (
            PruningObjective(config, self.optimizer, self.shape, platform)
            if config.stage == "prune"
            else LanguageModeling()
        )

    def _introduce(self) -> None:
        """Print what is about to run, and on which devices."""
        target = self.objective.target
        size = f"{parameter_count(self.shape):,} parameters"
        size += f" -> {parameter_count(target):,}" if target else ""
        self.log.say(f"{self.config.stage} in {self.run_dir}: {size}; {self.platform}")
        if problem := export_problem(target or self.shape):
            self.log.warn(f"warning: the model that this run makes {problem}")
        cost, high = cost_of_evaluations(self.config, self.evaluator.sequences)
        (self.log.warn if high else self.log.say)(cost)

    def _fetcher(self) -> Fetcher:
        if self.config.platform.loader == "torch":
            return torch_fetcher
        from megashear.data.dali import DaliFetcher

        return partial(DaliFetcher, device=self.platform.device)

    @property
    def _tokenizer(self) -> str | None:
        """Where exports find the tokenizer: as configured, else with the source's weights."""
        if self.config.data.tokenizer is not None:
            return str(Path(self.config.data.tokenizer).resolve())
        return self.source.tokenizer if self.source else None

    def _resume(self, info: CheckpointInfo) -> None:
        self.platform.heartbeat.mark("loading of a checkpoint", info.step)
        tensors = self.checkpoints.load(info, self.optimizer.chunks, self.optimizer.megatron)
        self.objective.load_state(tensors)
        self.domain_weights.load_state_dict(info.progress["mixture"])
        self.losses = info.progress["losses"]
        self.log.say(f"resumed from {info.directory} at step {info.step}")

    def run(self) -> None:
        """Train to the last step, or until a signal; either way the last state is saved.

        Raises:
            TrainingError: a loss or a gradient norm is not finite.
            SystemExit: a signal stopped the run; the status is 128 + its number, as in a shell.
        """
        steps = self.config.trainer.steps
        if self.step >= steps:
            self.log.say(f"{self.run_dir} is complete: {steps} steps. Nothing to do")
            return
        with closing(self.lock), self.signals.caught(), closing(self.log):
            self.log.record(self.records.start(self.step, self.objective.target))
            saved: int | None = self.step
            if not self.losses:  # a new run: a resumed one has the losses of its checkpoint
                self._evaluate()
                self.signals.sync()
                saved = None
            while self.step < steps and not self.signals.agreed:
                self.train_step()
                if self._due(self.config.evaluation.interval):
                    self._evaluate()
                    self.signals.sync()
                if self._due(self.config.trainer.save_interval):
                    self.save()
                    saved = self.step
                    self.signals.sync()
                self._finish_save(wait=False)
            if saved != self.step:
                self.save()
            self._finish_save()
            self._end()
        self.loader.close()
        if self.step < steps:
            raise SystemExit(128 + self.signals.agreed)

    def _end(self) -> None:
        """Print the result of the run or what stopped it, and record it."""
        reason, verdict = "complete", self.objective.verdict()
        if self.step < self.config.trainer.steps:
            reason, verdict = signal.Signals(self.signals.agreed).name, ""
            self.log.say(f"stopped by {reason} at step {self.step}; start it again to go on")
        elif result := self.objective.result():
            self.log.say(result)
        if verdict:
            self.log.warn(verdict)
        self.log.record(
            {"kind": "end", "step": self.step, "time": utc(), "reason": reason, "verdict": verdict}
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.trainer.steps

    def train_step(self) -> None:
        """One optimizer step: every micro-batch forward and backward, then one update.

        Losses and metrics are copied to the host while the weights are updated: the host waits for
        the device where Megatron's own step does, and nowhere else.
        """
        began, platform = time.perf_counter(), self.platform
        mark, device = platform.heartbeat.mark, platform.device
        mark("reading of data", self.step + 1)
        self.loader.fetch_until(self._next_evaluation() * self.config.trainer.global_batch_size)
        batches = self.loader.next_step()
        loaded, first = time.perf_counter(), Moment(device)
        lr_fraction = self.optimizer.begin_step(self.step)
        self.optimizer.zero_grad()
        mark("micro-batches")
        with self.objective.step_weights(self.step):
            self.optimizer.gather()
            totals = run_micro_batches(
                self.optimizer.models, batches, self.platform, len(self.domain_weights.names)
            )
        computed = Moment(device)
        mark("optimizer")
        self.objective.backward(self.step)
        self.objective.update(self.step, lr_fraction)
        totals, signals = self.signals.sum_with(totals)
        copies = ToHost({"losses": totals, "signals": signals, **self.objective.measured()})
        grad_norm = self.optimizer.step()
        measured = copies.read()
        self.signals.agree(measured["signals"])
        losses = DomainLosses(measured["losses"])
        metrics = self.objective.metrics(self.step, measured)
        self._check_finite(losses, {"grad_norm": grad_norm, **metrics})
        self.step += 1
        times = StepTimes(time.perf_counter() - began, loaded - began, computed.since(first))
        results = (losses, self.optimizer.lr, grad_norm, metrics, times)
        self.log.record(self.records.step(self.step, *results))

    def _next_evaluation(self) -> int:
        interval = self.config.evaluation.interval
        return min((self.step // interval + 1) * interval, self.config.trainer.steps)

    def _check_finite(self, losses: DomainLosses, metrics: Mapping[str, Any]) -> None:
        """Raise if a number is not finite: the update spoiled the weights or masks in memory."""
        wrong = [
            f"{name} is {value}"
            for name, value in {"loss": losses.mean, **metrics}.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if not wrong:
            return
        names = self.domain_weights.names
        sequences = (losses.tokens / self.config.data.seq_length).int().tolist()
        counts = zip(names, sequences, strict=True)
        self._finish_save()
        good = self.checkpoints.latest()
        raise TrainingError(
            f"step {self.step + 1}: {', '.join(wrong)}. Sequences of its batch by domain: "
            f"{', '.join(f'{name} {count}' for name, count in counts)}; losses by domain: "
            f"{dict(zip(names, losses.of_domains(), strict=True))}. Last good checkpoint: "
            f"{good.directory if good else 'none'}. Lower the learning rate or check the domain's "
            "text, then start again: the run goes on from that checkpoint"
        )

    def _evaluate(self) -> None:
        self.platform.heartbeat.mark("evaluation", self.step)
        began = time.perf_counter()
        with self.objective.evaluation_weights():
            self.optimizer.gather(wait=True)
            measured = self.evaluator.measure(self.optimizer.models)
        self.losses = {name: domain.loss for name, domain in measured.items()}
        if self.step < self.config.trainer.steps:
            samples = self.step * self.config.trainer.global_batch_size
            self.domain_weights.update(samples, self.losses)
        seconds = time.perf_counter() - began
        kept = self.objective.kept()
        self.log.record(self.records.evaluation(self.step, self.losses, seconds, kept))

    def save(self) -> None:
        """Write a checkpoint; with `async_save` only begin to, and `run` finishes it."""
        self._finish_save()  # of the previous checkpoint, if it is still being written
        began, config = time.perf_counter(), self.config
        self.platform.heartbeat.mark("save", self.step)
        domains = config.data.domains
        next_samples = self.dataset.next_samples(self.step * config.trainer.global_batch_size)
        info = CheckpointInfo(
            shape=self.shape,
            stage=config.stage,
            step=self.step,
            tokens=self.step * config.trainer.global_batch_size * config.data.seq_length,
            target=self.objective.target,
            history=self.history,
            progress={
                "mixture": self.domain_weights.state_dict(),
                "losses": self.losses,
                "content": self.content,
                "samples": {d.name: [d.first_sample, next_samples[d.name]] for d in domains},
            },
            config=to_yaml(config),
            tokenizer=self._tokenizer,
            generation=self.generation,
        )
        on_first_process(partial(self._write_run_files, next_samples))
        self.optimizer.gather(wait=True)
        self.checkpoints.save(
            info, self.optimizer.chunks, self.optimizer.megatron, self.objective.state()
        )
        self._saving = (self.step, time.perf_counter() - began)
        if not config.trainer.async_save:
            self._finish_save()

    def _finish_save(self, *, wait: bool = True) -> None:
        """Publish the checkpoint that is being written once it is complete, and record it."""
        began, (step, seconds) = time.perf_counter(), self._saving
        checkpoint = self.checkpoints.finish() if wait else self.checkpoints.poll()
        seconds += time.perf_counter() - began
        self._saving = (step, seconds)
        if checkpoint is not None:
            self.log.say(f"saved {checkpoint}")
            self.log.record({"kind": "save", "step": step, "time": time.time(), "seconds": seconds})

    def _write_run_files(self, next_samples: Mapping[str, int]) -> None:
        """Write the files beside the checkpoints: records, configuration, domains as of now."""
        weights = self.domain_weights.by_name()
        domains = [
            replace(d, weight=weights[d.name], first_sample=next_samples[d.name])
            for d in self.config.data.domains
        ]
        self.log.flush()
        self.checkpoints.directory.mkdir(exist_ok=True)  # a run with DOMAINS_FILE has checkpoints
        files = {DOMAINS_FILE: domains_to_yaml(domains), "config.yaml": to_yaml(self.config)}
        if masks := self.objective.extracted():
            packed = {name: pack(rows) for name, rows in masks.items()}
            files[KEPT_UNITS_FILE] = json.dumps({"step": self.step, "masks": packed})
        for name, text in files.items():
            write_durably(self.run_dir / name, text, CheckpointError)


def _open_source(config: RunConfig, opened: Model | None) -> Model | None:
    """Return the model at `init_from`, the same for all ranks; None without one."""
    if config.init_from is None:
        return None
    source = opened.shared() if opened else models.open(config.init_from)
    return source.without_masks()
