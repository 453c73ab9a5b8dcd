"""The training loop: one run from its configuration to its last checkpoint, stopped and resumed.

Stages differ by their Objective. Everything that a resumed run needs is in its checkpoint or is a
function of the step.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megashear import console
from megashear.checkpoint.info import CheckpointInfo, read_info
from megashear.checkpoint.models import (
    generation_of,
    history_of,
    is_huggingface,
    load_model,
    read_shape,
)
from megashear.checkpoint.runs import CheckpointManager
from megashear.config.loader import DOMAINS_FILE, domains_to_yaml, from_yaml, settings, to_yaml
from megashear.config.schema import ModelShape, RunConfig
from megashear.data.dataset import build_train_dataset, build_valid_datasets
from megashear.data.domain_weights import DomainWeights
from megashear.data.loader import Fetcher, MicroBatch, TrainLoader, torch_fetcher
from megashear.errors import CheckpointError, TrainingError
from megashear.files import write_durably
from megashear.model.build import build_model
from megashear.platform import cuda
from megashear.platform.collectives import on_first_process
from megashear.platform.cuda import Moment, ToHost
from megashear.platform.parallel import Platform
from megashear.pruning.counting import flops_per_token, parameter_count
from megashear.records import KEPT_UNITS_FILE, EvaluationRecord, pack, utc
from megashear.training.evaluation import Evaluator, cost_of_evaluations
from megashear.training.objective import LanguageModeling, PruningObjective
from megashear.training.optimizer import WeightOptimizer
from megashear.training.run_lock import RunLock
from megashear.training.run_log import RunLog, peak_flops, start_record
from megashear.training.step import DomainLosses, run_micro_batches

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
"""That end a run in order, by their numbers."""


def source_shape(config: RunConfig) -> ModelShape:
    """The shape that a run trains: its `model`, or that of the model at `init_from`."""
    if config.model is not None:
        return config.model
    assert config.init_from is not None
    return read_shape(config.init_from)


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
        self.lock = RunLock(self.run_dir)  # before anything in there changes
        trainer, data = config.trainer, config.data
        self.checkpoints = CheckpointManager(self.run_dir, platform, trainer.keep_checkpoints)
        platform.heartbeat.mark("check of the checkpoints")
        resumed, passed_over = self.checkpoints.newest_whole()
        if resumed is not None:
            _refuse_other_config(resumed, config)
        self.step = resumed.step if resumed else 0
        self.history = resumed.history if resumed else history_of(config.init_from)
        kept = resumed.generation if resumed else generation_of(config.init_from)
        self.generation = kept
        resumed_step = resumed.step if resumed else None
        self.log = RunLog(config, platform.rank == 0, resumed_step)
        if passed_over:
            self.log.warn(passed_over)

        self.domain_weights = DomainWeights.from_config(data)
        dataset = build_train_dataset(data, self.shape.vocab_size, self.domain_weights)
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
            data_rank=platform.data_rank,
            data_size=platform.data_size,
            num_workers=data.num_workers,
            consumed_samples=self.step * trainer.global_batch_size,
            fetcher=self._fetcher(),
        )
        if resumed is not None:  # last, since what is made before may draw numbers
            self.checkpoints.restore_random_states(resumed)
        self._signal = 0  # the newest that this process got
        self._agreed = 0  # the one that ends the run, on all ranks
        peak = peak_flops(platform)
        self._peak_flops = peak and peak * platform.world_size
        self._flops_per_token = flops_per_token(self.shape, data.seq_length)
        self._saving = (0, 0.0)  # step of the newest checkpoint, and seconds that it was waited for

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
        self.platform.heartbeat.mark("loading of weights")
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
        if is_huggingface(init_from):
            return str(Path(init_from).resolve())
        return read_info(init_from).tokenizer

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
            TrainingError: the loss is not finite.
            SystemExit: a signal ended the run; the status is 128 + its number, as in a shell.
        """
        steps = self.config.trainer.steps
        if self.step >= steps:
            self.log.say(f"{self.run_dir} is complete: {steps} steps. Nothing to do")
            return
        with closing(self.lock), self._signals(), closing(self.log):
            self._start()
            saved: int | None = self.step
            if not self.losses:  # the run begins: a resumed one has those of its checkpoint
                self._evaluate()
                self._hear()
                saved = None
            while self.step < steps and not self._agreed:
                self.train_step()
                if self._due(self.config.evaluation.interval):
                    self._evaluate()
                    self._hear()
                if self._due(self.config.trainer.save_interval):
                    self.save()
                    saved = self.step
                    self._hear()
                self._finish_save(wait=False)
            if saved != self.step:
                self.save()
            self._finish_save()
            self._end()
        self.loader.close()
        if self.step < steps:
            raise SystemExit(128 + self._agreed)

    def _start(self) -> None:
        shapes, now = (self.shape, self.objective.target), (self.step, self._weights())
        self.log.start(start_record(self.config, self.platform, *shapes, *now))

    def _weights(self) -> dict[str, float]:
        return dict(zip(self.domain_weights.names, self.domain_weights.weights, strict=True))

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self._peak_flops is None:
            return None
        return tokens_per_second * self._flops_per_token / self._peak_flops

    def _end(self) -> None:
        """Say what the run came to, or what stopped it."""
        reason, verdict = "complete", self.objective.verdict()
        if self.step < self.config.trainer.steps:
            reason, verdict = signal.Signals(self._agreed).name, ""
            self.log.say(f"stopped by {reason} at step {self.step}; start it again to go on")
        elif result := self.objective.result():
            self.log.say(result)
        if verdict:
            self.log.warn(verdict)
        self.log.end(
            {"kind": "end", "step": self.step, "time": utc(), "reason": reason, "verdict": verdict}
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.config.trainer.steps

    def train_step(self) -> None:
        """One optimizer step: every micro-batch forward and backward, then one update.

        What the host wants to know of it comes while the weights are updated: it waits for the
        device where Megatron's own step does, and nowhere else.
        """
        began, platform = time.perf_counter(), self.platform
        mark, device = platform.heartbeat.mark, platform.device
        mark("reading of data", self.step + 1)
        self.loader.fetch_until(self._next_evaluation() * self.config.trainer.global_batch_size)
        batches = self.loader.next_step()
        loaded, first = time.perf_counter(), Moment(device)
        lr_share = self.optimizer.begin_step(self.step)
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
        self.objective.update(self.step, lr_share)
        told = ToHost([*self._agree(totals), *self.objective.numbers()])
        grad_norm = self.optimizer.step()
        totals, signals, *numbers = told.read()
        losses = DomainLosses(totals)
        got = [number for number, ranks in zip(SIGNALS, signals.tolist(), strict=True) if ranks]
        self._agreed = max(got, default=0)
        objective = self.objective.metrics(self.step, numbers)
        norms = {name: value for name, value in objective.items() if isinstance(value, float)}
        self._check_finite({"loss": losses.mean, "grad_norm": grad_norm, **norms}, losses, batches)
        self.step += 1
        self._log_step(losses, grad_norm, objective, (began, loaded, computed.since(first)))

    def _next_evaluation(self) -> int:
        interval = self.config.evaluation.interval
        return min((self.step // interval + 1) * interval, self.config.trainer.steps)

    def _check_finite(
        self, told: dict[str, float], losses: DomainLosses, batches: list[MicroBatch]
    ) -> None:
        """What is not finite has spoilt weights or masks: they must not be saved."""
        wrong = [f"{name} is {value}" for name, value in told.items() if not math.isfinite(value)]
        if not wrong:
            return
        counts = {
            name: int(tokens) // self.config.data.seq_length
            for name, tokens in zip(self.domain_weights.names, losses.tokens, strict=True)
        }
        self._finish_save()
        good = self.checkpoints.latest()
        raise TrainingError(
            f"step {self.step + 1}: {', '.join(wrong)}. Sequences of its batch by domain: "
            f"{', '.join(f'{name} {count}' for name, count in counts.items())}; losses by domain: "
            f"{dict(zip(self.domain_weights.names, losses.of_domains(), strict=True))}. Last good "
            f"checkpoint: {good.directory if good else 'none'}. Lower the learning rate or check "
            "the domain's text, then start again: the run goes on from that checkpoint"
        )

    def _log_step(
        self,
        losses: DomainLosses,
        grad_norm: float,
        objective: dict[str, Any],
        times: tuple[float, float, float],
    ) -> None:
        began, loaded, forward_backward = times
        seconds = time.perf_counter() - began
        tokens = self.config.trainer.global_batch_size * self.config.data.seq_length
        of_domains = zip(self.domain_weights.names, losses.of_domains(), strict=True)
        self.log.step(
            {
                "kind": "step",
                "step": self.step,
                "time": time.time(),
                "tokens": self.step * tokens,
                "loss": losses.mean,
                "domain_losses": {name: loss for name, loss in of_domains if not math.isnan(loss)},
                "domain_weights": self._weights(),
                "lr": self.optimizer.lr,
                "grad_norm": grad_norm,
                **objective,  # type: ignore[typeddict-item]
                "seconds": seconds,
                "data_seconds": loaded - began,
                "forward_backward_seconds": forward_backward,
                "tokens_per_second": tokens / seconds,
                "mfu": self._mfu(tokens / seconds),
                "memory_gib": cuda.peak_memory_gib(self.platform.device),
            }
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
        references, of_domains = self.domain_weights.references, self.losses.items()
        record: EvaluationRecord = {
            "kind": "evaluation",
            "step": self.step,
            "time": time.time(),
            "seconds": time.perf_counter() - began,
            "losses": self.losses,
            "references": references,
            "gaps": {n: loss - references[n] for n, loss in of_domains if n in references},
            "domain_weights": self._weights(),
        }
        if kept := self.objective.kept():
            record["kept"] = kept
        self.log.evaluation(record)

    def save(self) -> None:
        """Write a checkpoint; with `async_save` begin to, and `run` finishes it."""
        self._finish_save()  # the one before, if it takes so long
        began, config = time.perf_counter(), self.config
        self.platform.heartbeat.mark("save", self.step)
        info = CheckpointInfo(
            shape=self.shape,
            stage=config.stage,
            step=self.step,
            tokens=self.step * config.trainer.global_batch_size * config.data.seq_length,
            target=self.objective.target,
            history=self.history,
            progress={"mixture": self.domain_weights.state_dict(), "losses": self.losses},
            config=to_yaml(config),
            tokenizer=self._tokenizer,
            generation=self.generation,
        )
        on_first_process(self._write_run_files)
        self.optimizer.gather(wait=True)
        self.checkpoints.save(
            info, self.optimizer.chunks, self.optimizer.megatron, self.objective.state()
        )
        self._saving = (self.step, time.perf_counter() - began)
        if not config.trainer.async_save:
            self._finish_save()

    def _finish_save(self, *, wait: bool = True) -> None:
        """Give the checkpoint that is being written its name, and tell of it."""
        began, (step, seconds) = time.perf_counter(), self._saving
        checkpoint = self.checkpoints.finish() if wait else self.checkpoints.poll()
        seconds += time.perf_counter() - began
        self._saving = (step, seconds)
        if checkpoint is not None:
            self.log.say(f"saved {checkpoint}")
            self.log.save({"kind": "save", "step": step, "time": time.time(), "seconds": seconds})

    def _write_run_files(self) -> None:
        """Beside the checkpoints: records, configuration, and domains with their newest weights."""
        weights = zip(self.config.data.domains, self.domain_weights.weights, strict=True)
        domains = [replace(domain, weight=weight) for domain, weight in weights]
        self.log.flush()
        self.checkpoints.directory.mkdir(exist_ok=True)  # before DOMAINS_FILE, which tells of it
        write_durably(self.run_dir / DOMAINS_FILE, domains_to_yaml(domains), CheckpointError)
        write_durably(self.run_dir / "config.yaml", to_yaml(self.config), CheckpointError)
        if masks := self.objective.extracted():
            packed = {name: pack(rows) for name, rows in masks.items()}
            text = json.dumps({"step": self.step, "masks": packed})
            write_durably(self.run_dir / KEPT_UNITS_FILE, text, CheckpointError)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM, SIGUSR1 (a scheduler's warning), SIGHUP (a lost terminal) end the run.

        After the step, and with a save. Under nohup SIGHUP stays ignored.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:
            del before[signal.SIGHUP]

        def stop(number: int, frame: Any) -> None:
            self._signal = number
            if number == signal.SIGHUP:
                console.leave_terminal()  # it takes no messages any more

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _agree(self, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of losses over all ranks, and how many of them got each of SIGNALS.

        Signals come at different moments on different ranks; one that comes after this counts in
        the next step, unless an evaluation or a save comes before.
        """
        signals = totals.new_zeros(len(SIGNALS))
        if self._signal:
            signals[SIGNALS.index(self._signal)].fill_(1)
        flat = self.platform.sum_over_all(torch.cat([totals.flatten(), signals]))
        sums, signals = flat.split([totals.numel(), len(SIGNALS)])
        return sums.view_as(totals), signals

    def _hear(self) -> None:
        """Agree on signals where all ranks have waited for the device anyway."""
        self._agreed = max(self._agreed, self.platform.largest(self._signal))


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
