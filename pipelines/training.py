"""One training loop for both stages, in which a stopped and continued run is the same run, bit for bit.

Everything random is a function of (seed, process, step), and the order of the data a function of (seed, epoch), so
that weights, averages and optimizer are all there is to save. Training code that does this by saving and restoring
generators cannot be exact in the middle of an epoch, because loaders draw ahead.
"""

import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipelines.batches import StepBatches, derived_seed
from pipelines.checkpoint import has_states, load_state, newest_state, save_state
from pipelines.config import differences, flatten, read_yaml
from pipelines.ema import EMA
from pipelines.files import atomic_file, folder_lock, naming, read_json, write_json_atomic
from pipelines.launch import StopRequest, ignore_stop_signals
from pipelines.memory import naming_memory
from pipelines.objectives import Objective

# Fields that may change between a run and its continuation without making it another run.
FREE_TO_CHANGE = (
    "training.total_steps", "training.num_workers", "training.log_every", "training.eval_every", "training.save_every",
    "training.tracker", "training.cpu", "training.allow_process_count_change", "training.compile",
    "training.compile_mode",
    "data.root", "data.download", "data.cache_bytes", "output",
)  # fmt: skip


# Codebooks start from one pass without gradients over this many images at most
LARGEST_INITIAL_BATCH = 256
# Under fp16 a scale that is too large costs a few steps; so many in a row are not the scale's doing
MOST_SKIPPED_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        total_steps: optimizer steps in all.
        batch_size: images per optimizer step, over all processes and accumulated micro-batches: the same number
            means the same training on one device and on eight.
        gradient_accumulation_steps: micro-batches that one step is made of. Batch norm (in networks mlp) and LFQ's
            entropy see one at a time; all else trains as with one batch.
        learning_rate: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        max_grad_norm: gradients are clipped to this norm; 0 turns it off.
        ema_decay: decay of the running average of the weights, which is what is evaluated and saved; 0 turns it off.
        mixed_precision: "no", "fp16" or "bf16"; none takes what accelerate was launched with.
        compile: compile the model with torch.compile, which needs a C++ compiler.
        compile_mode: torch.compile's own; reduce-overhead replays small models from CUDA graphs.
        seed: seed of weights, data order and noise.
        num_workers: processes that load data beside each training process.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations on the validation data, with pictures.
        save_every: steps between saved states.
        tracker: "tensorboard", any other tracker that accelerate knows, or "none"; log.jsonl is always written.
        cpu: train on the CPU even where there is an accelerator.
        allow_process_count_change: let a run continue on another number of processes; its noise then differs.
    """

    total_steps: int = 2000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    seed: int = 0
    num_workers: int = 0
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    tracker: str = "tensorboard"
    cpu: bool = False
    allow_process_count_change: bool = False

    def __post_init__(self):
        for name in (
            "total_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "eval_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"training.seed must lie in [0, 2^63), got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"training.ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not self.adam_eps > 0:
            raise ValueError(f"training.adam_eps must be above 0, got {self.adam_eps}")
        if not self.learning_rate > 0:
            raise ValueError(f"training.learning_rate must be above 0, got {self.learning_rate}")


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient became infinite or NaN; raised on all processes before the optimizer step."""


@dataclass
class Update:
    """One optimizer with the objective it minimises; a GAN is two of them."""

    name: str
    module: Objective
    optimizer: torch.optim.Optimizer


@dataclass
class FitResult:
    """What came out of training.

    best_step: step of the weights that were kept; metrics: their values on the validation data; weights: the best
    weights of the first update's model, on the CPU; steps_run: 0 where the run had been finished before.
    """

    best_step: int
    metrics: dict[str, float]
    weights: dict[str, Tensor]
    steps_run: int

    def summary(self) -> dict:
        """What can be printed of it."""
        return {"best_step": self.best_step, "steps_run": self.steps_run, "validation": self.metrics}


@dataclass
class _Progress:
    """How far the run is; the step is in the state, the rest in best/."""

    step: int = 0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)


def adamw(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over all parameters. Raises ValueError where there are none, as in the uniform prior."""
    if not any(True for _ in module.parameters()):
        raise ValueError(f"{type(module.model).__name__} has no parameters: there is nothing to train")
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,  # one kernel per parameter instead of a dozen; a third of the time on a CPU
    )


def describe(accelerator: Accelerator, model: nn.Module, train_data: Dataset, validation_data: Dataset) -> str:
    """A line that says what is about to be trained, on what and where."""
    codes = " + ".join(
        f"{'x'.join(map(str, shape))} {'real numbers' if size is None else f'codes of {size}'}"
        for shape, size in zip(model.spec.shapes, model.spec.vocab_sizes)
    )
    return (
        f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, {codes}; "
        f"{len(train_data):,} training and {len(validation_data):,} validation images; "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''} "
        f"on {accelerator.device.type}, mixed precision {accelerator.mixed_precision}"
    )


def fit(
    accelerator: Accelerator,
    updates: list[Update],
    train_data: Dataset,
    validation_data: Dataset,
    *,
    folder: Path,
    config: TrainingConfig,
    resolved: dict,
    on_start: Callable[[], None] | None = None,
    on_evaluate: Callable[[int, nn.Module], None] | None = None,
) -> FitResult:
    """Trains, evaluates, and returns the best weights.

    Run again on the same folder, it continues from the last state, exactly; a finished run is not trained again.

    Args:
        updates: modules with their optimizers, in the order of their updates; the first is the one evaluated and kept.
        train_data, validation_data: data sets with `__getitems__` and `collate`.
        folder: receives state/, best/, log.jsonl and the trackers' files.
        config: see `TrainingConfig`.
        resolved: the whole configuration of the run, by which a continued run is known to be the same.
        on_start: called on the main process once the folder is known to be this run's, for what it may overwrite there.
        on_evaluate: called as on_evaluate(step, model) on the main process at every evaluation, for pictures.
    Raises:
        ValueError: the folder belongs to another configuration, or had states that are damaged or gone; or the batch
            does not divide.
        NonFiniteLossError: a loss, a gradient or the validation metric is not finite.
        MemoryError: a step does not fit into memory.
        SystemExit: 128 + signal number, once the state is saved, after SIGTERM or SIGINT.
    """
    lock = folder_lock(folder) if accelerator.is_main_process else nullcontext()
    with lock, StopRequest() as stop:
        run = _Run(accelerator, updates, train_data, validation_data, folder, config, resolved, on_evaluate)
        if on_start and accelerator.is_main_process:
            on_start()
        try:
            return run.train(stop)
        finally:
            run.end_workers()


class _Run:
    """The state of one call of `fit`, so that its paragraphs can have names."""

    def __init__(self, accelerator, updates, train_data, validation_data, folder, config, resolved, on_evaluate):
        self.accelerator, self.updates, self.folder, self.config = accelerator, updates, folder, config
        self.train_data, self.validation_data, self.resolved = train_data, validation_data, resolved
        self.on_evaluate = on_evaluate
        self.progress = _Progress()
        self.complaints: set[str] = set()
        self.skipped_steps = 0
        self.loader: Iterator[dict] = iter(())
        self.state = newest_state(folder / "state")
        if self.state is None and (has_states(folder / "state") or self._had_states()):
            what = "damaged" if has_states(folder / "state") else "gone"
            raise ValueError(
                f"all states in {folder / 'state'} are {what}, so that the run cannot go on; to start anew, give "
                f"another --output or remove {folder}"
            )
        self.batches = self._step_batches(0)  # fails now, not after the model is prepared
        self._prepare()
        self.window = _LossWindow(accelerator)
        self._resume()

    def train(self, stop: StopRequest) -> FitResult:
        config, accelerator, progress = self.config, self.accelerator, self.progress
        start_step = progress.step
        if start_step < config.total_steps:
            self._start_trackers()
            self.loader = batches = self._loader()
            window = self.window
            window.start_clock()
            bar = self._progress_bar()
            for step in range(start_step, config.total_steps):
                with _naming_memory(config):
                    for micro_batch in range(config.gradient_accumulation_steps):
                        window.add(self._micro_step(step, micro_batch, next(batches)))
                for ema in self.emas:
                    ema.update(step)
                for objective in self.objectives:
                    objective.after_step()
                self.scheduler_step()
                progress.step = step + 1
                bar.update(config.batch_size)
                last = progress.step == config.total_steps
                if progress.step % config.log_every == 0 or last:
                    losses = window.mean()
                    loss = sum(value for name, value in losses.items() if not name.endswith("grad_norm"))
                    values = losses | self.objective.summary() | {"learning_rate": self.learning_rate()}
                    values |= window.rate(config.batch_size // config.gradient_accumulation_steps)
                    bar.set_postfix_str(_brief({"loss": loss, **self.objective.summary()}))
                    self._log(progress.step, {f"train/{k}": v for k, v in values.items()})
                paused = time.monotonic()
                if progress.step % config.eval_every == 0 or last:
                    self._evaluate()
                if self.batches.epoch(progress.step) != self.batches.epoch(step):
                    # Before the state is saved: a continued run would otherwise log this epoch again
                    self._end_epoch()
                stopped = stop.agreed(accelerator)
                if progress.step % config.save_every == 0 or last or stopped:
                    self._save()
                if stopped:
                    bar.close()
                    self._finish_trackers()
                    accelerator.print(f"stopped by signal {stop.signal_number} at step {progress.step}, state saved; "
                                      "run the same command to go on")  # fmt: skip
                    raise SystemExit(128 + stop.signal_number)
                window.started += time.monotonic() - paused  # images/s are those of training alone
            bar.close()
            self._finish_trackers()
        if not progress.best_metrics:  # best/ of a finished run was deleted or damaged
            self._evaluate()
        steps_run = max(0, config.total_steps - start_step)
        return FitResult(progress.best_step, progress.best_metrics, self._best_weights(), steps_run)

    def end_workers(self) -> None:
        """Ends the processes that load data, which heed no signal: an error would otherwise wait for them for ever."""
        if hasattr(self.loader, "_shutdown_workers"):
            self.loader._shutdown_workers()

    # Paragraphs of the loop, in order
    # --------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        from transformers.optimization import get_scheduler  # a second of imports

        self.schedulers, self.emas = [], []
        if self.state is None:
            self._initialize()
        for update in self.updates:
            if self.config.compile:
                update.module.model.compile(mode=self.config.compile_mode)
            if self.accelerator.distributed_type == DistributedType.FSDP:
                _make_shardable(update.module)
            with warnings.catch_warnings():
                # torch's new name for broadcast_buffers is not known to accelerate 1.15
                warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
                update.module, update.optimizer = self.accelerator.prepare(update.module, update.optimizer)
            self.emas.append(EMA(update.module, self.config.ema_decay))
            self.schedulers.append(
                get_scheduler(
                    self.config.lr_schedule,
                    update.optimizer.optimizer,
                    num_warmup_steps=self.config.warmup_steps,
                    num_training_steps=self.config.total_steps,
                )
            )
        self.module = self.updates[0].module
        self.objectives: list[Objective] = [self.accelerator.unwrap_model(update.module) for update in self.updates]
        self.objective = self.objectives[0]

    def _initialize(self) -> None:
        size = min(self.config.batch_size, LARGEST_INITIAL_BATCH)
        keys = StepBatches(len(self.train_data), size, seed=self.config.seed, total_steps=1).keys(0, 0)
        batch = _to_device(self.train_data.collate(self.train_data.__getitems__(keys)), self.accelerator.device)
        for update in self.updates:
            with _naming_memory(self.config):
                update.module.to(self.accelerator.device).initialize(batch)

    def _resume(self) -> None:
        state = self.state
        if state is None:
            if self.accelerator.is_main_process:  # what a run left that was killed before its first state
                shutil.rmtree(self.folder / "best", ignore_errors=True)
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            return
        tensors, info = load_state(state)
        self._check_same_run(info, state)
        for update, ema, scheduler in zip(self.updates, self.emas, self.schedulers):
            saved = info["updates"][update.name]
            if self.config.ema_decay:
                _set_weights(update.module, tensors[f"{update.name}.ema"])
                ema.adopt_current()
            _set_weights(update.module, tensors[f"{update.name}.weights"])
            self._take_own_buffers(update, tensors.get(f"{update.name}.processes", {}))
            _set_optimizer(update, tensors[f"{update.name}.optimizer"], saved["param_groups"])
            scheduler.load_state_dict(saved["scheduler"])
            _set_learning_rates(scheduler)
        if self.accelerator.scaler is not None and info["scaler"]:
            self.accelerator.scaler.load_state_dict(info["scaler"])
        self.window.load_state(info.get("window", {}))
        self.progress = _Progress(info["step"], *self._best_on_disk())
        self.batches = self._step_batches(self.progress.step)
        if self.accelerator.is_main_process:
            _drop_log_after(self.folder / "log.jsonl", self.progress.step)
        self.accelerator.print(f"continuing from step {self.progress.step} ({state})")
        total_steps = info["config"].get("training", {}).get("total_steps", self.config.total_steps)
        if total_steps != self.config.total_steps and "constant" not in self.config.lr_schedule:
            self.accelerator.print(
                f"training.total_steps is {self.config.total_steps} in place of {total_steps}: from here on the "
                f"learning rate follows the schedule of the new total, {self.learning_rate():.3g} now"
            )

    def _best_on_disk(self) -> tuple[int, dict[str, float]]:
        """Step and metrics of the weights in best/, which after a kill may be newer than those in the state."""
        best = newest_state(self.folder / "best")
        if best is None:
            return 0, {}
        info = read_json(best / "state.json")
        return info["step"], info["metrics"]

    def _micro_step(self, step: int, micro_batch: int, batch: dict) -> dict[str, Tensor]:
        accelerator, logged = self.accelerator, {}
        seed = derived_seed(self.config.seed, "noise", accelerator.process_index, step, micro_batch)
        _seed_noise(seed, accelerator.device)
        batch = _to_device(batch, accelerator.device)
        with accelerator.accumulate(*(update.module for update in self.updates)):
            for update in self.updates:
                update.module.train()
                with accelerator.autocast():
                    losses = update.module(batch, step)
                only = {}
                if len(self.updates) > 1:  # a generator's loss leaves nothing with the critic that it went through
                    only["inputs"] = [p for p in update.module.parameters() if p.requires_grad]
                accelerator.backward(sum(losses.values()), **only)
                logged |= {f"{update.name}/{k}" if len(self.updates) > 1 else k: v.detach() for k, v in losses.items()}
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(
                        update.module.parameters(), self.config.max_grad_norm or math.inf
                    )
                    self._check_finite(step, norm, losses)
                    logged["grad_norm"] = norm.detach()
                    # Only a scaler needs accelerate's step, which each time looks for an optional package on disk
                    bare = update.optimizer.optimizer
                    (bare if accelerator.scaler is None else update.optimizer).step()
                    bare.zero_grad()
        return logged

    def _check_finite(self, step: int, norm: Tensor, losses: dict[str, Tensor]) -> None:
        # Gradients are averaged over processes before this point: what is not finite on one is so on all
        if torch.isfinite(norm):
            self.skipped_steps = 0
            return
        self.skipped_steps += 1
        if self.accelerator.scaler is not None and self.skipped_steps < MOST_SKIPPED_STEPS:
            return  # the scaler leaves this step out and lowers its scale
        broken = [name for name, value in losses.items() if not torch.isfinite(value)]
        keys = [self.batches.keys(step, micro) for micro in range(self.config.gradient_accumulation_steps)]
        rank = self.accelerator.process_index
        path = self.folder / f"nonfinite-step{step}-process{rank}.json"
        write_json_atomic(path, {"step": step, "losses": broken, "indices": [i for part in keys for i, _ in part]})
        raise NonFiniteLossError(
            f"step {step}: {'loss ' + ', '.join(broken) if broken else 'the gradient'} is not finite; nothing was "
            f"updated, the last state is kept and the batch's indices are in {path}. "
            "Lower training.learning_rate (with another --output), or look at these images"
        )

    def scheduler_step(self) -> None:
        with warnings.catch_warnings():
            # Under fp16 the first optimizer step may be left out; the schedule is one of our steps all the same
            warnings.filterwarnings("ignore", message=".*optimizer.step", category=UserWarning)
            for scheduler in self.schedulers:
                scheduler.step()

    def learning_rate(self) -> float:
        return self.schedulers[0].get_last_lr()[0]

    def _evaluate(self) -> None:
        accelerator, progress = self.accelerator, self.progress
        # The same draws at every step: the best would otherwise be the luckiest
        _seed_noise(derived_seed(self.config.seed, "validation", accelerator.process_index), accelerator.device)
        with self.emas[0].applied():
            # What fits into memory while training does so here
            size = self.config.batch_size // self.config.gradient_accumulation_steps
            metrics = evaluate(accelerator, self.module, self.validation_data, size)
            self._log(progress.step, {f"validation/{k}": v for k, v in metrics.items()})
            self._complain()
            name = self.objective.best_metric
            if not math.isfinite(metrics[name]):
                raise NonFiniteLossError(
                    f"step {progress.step}: validation {name} is {metrics[name]}; the last state is kept. "
                    "Lower training.learning_rate (with another --output), or look at the validation data"
                )
            # Under FSDP a picture would need all processes to sample together
            if (
                self.on_evaluate
                and accelerator.is_main_process
                and accelerator.distributed_type != DistributedType.FSDP
            ):
                self.on_evaluate(progress.step, self.objective.model)
            best = progress.best_metrics.get(name, math.inf)
            if metrics[name] < best:
                progress.best_step, progress.best_metrics = progress.step, metrics
                weights = _get_weights(self.module)
                if accelerator.is_main_process:
                    kept = save_state(self.folder / "best", progress.step, {"weights": weights}, {"metrics": metrics})
                    for other in set(kept.parent.glob("step-*")) - {kept}:  # earlier or, after a fall back, later ones
                        shutil.rmtree(other)
        accelerator.wait_for_everyone()
        self._say(f"step {progress.step}: validation {_brief(metrics)}")
        if (progress.step - progress.best_step) // self.config.eval_every == 3:  # said once, not at every evaluation
            self._say(
                f"step {progress.step}: validation {name} {metrics[name]:.4f} has not improved on {best:.4f} of step "
                f"{progress.best_step}: the model overfits; the best weights are kept",
            )

    def _end_epoch(self) -> None:
        self._log(self.progress.step, {f"epoch/{k}": v for k, v in self.objective.summary().items()})
        self._complain()
        self.objective.start_epoch()

    def _complain(self) -> None:
        """Says what the objective finds wrong with what it counted, once each; not before training is under way."""
        settling_steps = max(self.config.warmup_steps, self.objective.settling_steps)
        if self.progress.step < min(settling_steps, self.config.total_steps):
            return
        for subject, text in self.objective.complaints().items():
            if subject not in self.complaints:
                self.complaints.add(subject)
                self._say(f"step {self.progress.step}: {text}")

    def _save(self) -> None:
        tensors, infos = {}, {}
        for update, ema, scheduler in zip(self.updates, self.emas, self.schedulers):
            tensors[f"{update.name}.weights"] = _get_weights(update.module)
            tensors[f"{update.name}.optimizer"], groups = _get_optimizer(update)
            if self.config.ema_decay:
                with ema.applied():
                    tensors[f"{update.name}.ema"] = _get_weights(update.module)
            if own := self._gather_own_buffers(update):
                tensors[f"{update.name}.processes"] = own
            infos[update.name] = {"param_groups": groups, "scheduler": scheduler.state_dict()}
        window = self.window.state()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            info = {
                "updates": infos,
                "window": window,
                "scaler": None if scaler is None else scaler.state_dict(),
                "num_processes": self.accelerator.num_processes,
                "surroundings": self._surroundings(),
                "config": self.resolved,
                "torch": torch.__version__,
            }
            save_state(self.folder / "state", self.progress.step, tensors, info)
        self.accelerator.wait_for_everyone()

    def _best_weights(self) -> dict[str, Tensor]:
        # Read back from disk by every process, so that all go on with equal ones
        best = newest_state(self.folder / "best")
        if best is None:
            raise ValueError(
                f"{self.folder / 'best'} was removed or damaged while training went on; run the command again"
            )
        tensors, _ = load_state(best)
        return {name.removeprefix("model."): t for name, t in tensors["weights"].items() if name.startswith("model.")}

    def _gather_own_buffers(self, update: Update) -> dict[str, Tensor]:
        """(P, ...) by name: buffers that differ between processes by design, such as the chains of a sampler."""
        buffers = _own_buffers(self.accelerator.unwrap_model(update.module))
        return {name: self.accelerator.gather(buffer[None]) for name, buffer in buffers.items()}

    def _take_own_buffers(self, update: Update, saved: dict[str, Tensor]) -> None:
        for name, buffer in _own_buffers(self.accelerator.unwrap_model(update.module)).items():
            of_processes = saved[name]
            buffer.copy_(of_processes[self.accelerator.process_index % len(of_processes)])

    # Smaller parts
    # --------------------------------------------------------------------------------------------

    def _surroundings(self) -> dict:
        """What decides the run beside its configuration."""
        data = {"training data": self.train_data, "validation data": self.validation_data}
        return {
            "training images": len(self.train_data),
            "validation images": len(self.validation_data),
            "mixed precision": self.accelerator.mixed_precision,
            **{name: part.contents for name, part in data.items() if hasattr(part, "contents")},
        }

    def _had_states(self) -> bool:
        """Whether a run that has no state left was evaluated after it must have saved one, or at its end.

        One that was killed before its first state may have best weights too. Its own options say when that was due.
        """
        if not has_states(self.folder / "best"):
            return False
        path = self.folder / "config.yaml"  # of the scripts, which write it anew only after this
        options = vars(self.config) | (read_yaml(path).get("training") or {} if path.is_file() else {})
        step = _last_evaluation(self.folder / "log.jsonl")
        return step > options["save_every"] or step >= options["total_steps"]

    def _check_same_run(self, info: dict, state: Path) -> None:
        changed = {
            name: values
            for name, values in differences(info["config"], self.resolved).items()
            if name not in FREE_TO_CHANGE
        }
        # a state of an earlier version says less of them
        known = info.get("surroundings", {})
        changed |= differences(known, {name: now for name, now in self._surroundings().items() if name in known})
        if changed:
            listed = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
            raise ValueError(
                f"{state} was trained with another configuration ({listed}). "
                f"Give the old values to continue it; to start anew, give another --output or remove {self.folder}"
            )
        processes = self.accelerator.num_processes
        if info["num_processes"] != processes and not self.config.allow_process_count_change:
            raise ValueError(
                f"{state} was trained on {info['num_processes']} processes and would continue on {processes}, with "
                "other noise. Set training.allow_process_count_change true to accept that"
            )

    def _step_batches(self, start_step: int) -> StepBatches:
        return StepBatches(
            len(self.train_data),
            self.config.batch_size,
            num_micro_batches=self.config.gradient_accumulation_steps,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            seed=self.config.seed,
            start_step=start_step,
            total_steps=self.config.total_steps,
        )

    def _loader(self) -> Iterator[dict]:
        return iter(
            DataLoader(
                self.train_data,
                batch_sampler=self.batches,
                collate_fn=self.train_data.collate,
                num_workers=self.config.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
                worker_init_fn=ignore_stop_signals,
            )
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.total_steps * self.config.batch_size,
            initial=self.progress.step * self.config.batch_size,
            unit="img",
            unit_scale=True,
            desc="training",
            disable=None if self.accelerator.is_main_process else True,
            dynamic_ncols=True,
        )

    def _start_trackers(self) -> None:
        if self.config.tracker != "none":
            flat = flatten(self.resolved).items()
            # TensorBoard takes neither lists nor None
            scalars = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in flat}
            self.accelerator.init_trackers("tessera", config=scalars)

    def _finish_trackers(self) -> None:
        # accelerator.end_training would also take down the processes' connection, which codes are written over
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _log(self, step: int, values: dict[str, float]) -> None:
        if not values:
            return
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            # JSON has no infinity, which the norm of gradients is in a step that fp16 leaves out
            line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
            path = self.folder / "log.jsonl"
            with naming(path), path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


class _LossWindow:
    """Mean of each logged value since the last log line, without waiting for the device in between."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.start_clock()

    def start_clock(self) -> None:
        self.num_micro_batches = 0
        self.started = time.monotonic()

    def state(self) -> dict[str, tuple[str, int]]:
        """{name: (sum, number of values)} since the last log line, with the mean over processes of the sums.

        As text, since JSON has no infinite numbers, which gradients are where fp16 leaves out a step.
        """
        means = {name: self.accelerator.reduce(total, "mean").item() for name, total in self.sums.items()}
        return {name: (str(mean), self.counts[name]) for name, mean in means.items()}

    def load_state(self, state: dict[str, tuple[str, int]]) -> None:
        device = self.accelerator.device
        self.sums = {name: torch.tensor(float(total), device=device) for name, (total, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}

    def add(self, values: dict[str, Tensor]) -> None:
        self.num_micro_batches += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def mean(self) -> dict[str, float]:
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        return {name: self.accelerator.reduce(value, "mean").item() for name, value in means.items()}

    def rate(self, images_per_micro_batch: int) -> dict[str, float]:
        rate = self.num_micro_batches * images_per_micro_batch / (time.monotonic() - self.started)
        self._restart()
        return {"images_per_second": rate}


@torch.no_grad()
def evaluate(accelerator: Accelerator, module: nn.Module, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Mean over `dataset` of an objective's values per image, and its summary; the same numbers on all processes.

    Each process takes every num_processes-th image.
    """
    objective: Objective = accelerator.unwrap_model(module)
    was_training = module.training
    module.eval()
    indices = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    size = max(1, batch_size // accelerator.num_processes)
    passes = math.ceil(math.ceil(len(dataset) / accelerator.num_processes) / size)
    parts = [indices[start : start + size] for start in range(0, len(indices), size)]
    sums: dict[str, Tensor] = {}

    def add(part: range, weight: int) -> None:
        batch = dataset.collate(dataset.__getitems__(list(part)))
        for name, value in module(_to_device(batch, accelerator.device)).items():
            sums[name] = sums.get(name, 0) + weight * value.double().sum()

    for _ in range(passes - len(parts)):  # sharded models need equally many passes on every process
        add(range(1), weight=0)
    objective.start_evaluation()
    for part in parts:
        add(part, weight=1)
    means = {name: (accelerator.reduce(total, "sum") / len(dataset)).item() for name, total in sums.items()}
    means |= objective.summary()
    module.train(was_training)
    return means


def _seed_noise(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which also formats a stack trace for each kind of device that is not in use (0.3 ms)."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _to_device(batch, device: torch.device):
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    return tuple(_to_device(value, device) for value in batch)


def _make_shardable(module: nn.Module) -> None:
    """FSDP takes neither other memory formats nor scalars."""
    module.to(memory_format=torch.contiguous_format)
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(
            f"FSDP cannot shard a parameter that is one number ({', '.join(scalars)}); launch without --use_fsdp, "
            "DDP holds the whole model on each device, or take a likelihood without a scale"
        )


def _set_learning_rates(scheduler) -> None:
    """Those of its step: a state's are of its own schedule, which another total of steps changes."""
    scheduler._last_lr = [
        base_lr * factor(scheduler.last_epoch) for base_lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
        group["lr"] = lr


# The functions below gather and scatter whole states whether the model is alone, under DDP or sharded by FSDP
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _get_weights(module: nn.Module) -> dict[str, Tensor]:
    # On the CPU these are the module's own tensors, which go on changing
    return {name: tensor.clone() for name, tensor in get_model_state_dict(module, options=_WHOLE).items()}


def _set_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    set_model_state_dict(module, weights, options=_WHOLE)


def _get_optimizer(update: Update) -> tuple[dict[str, Tensor], list[dict]]:
    whole = get_optimizer_state_dict(update.module, update.optimizer.optimizer, options=_WHOLE)
    if not whole:  # only the main process holds a gathered state
        return {}, []
    tensors = {f"{name}/{key}": value for name, state in whole["state"].items() for key, value in state.items()}
    return tensors, whole["param_groups"]


def _set_optimizer(update: Update, tensors: dict[str, Tensor], param_groups: list[dict]) -> None:
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(parameter, {})[key] = value
    groups = [{**group, "betas": tuple(group["betas"])} for group in param_groups]
    optimizer = update.optimizer.optimizer
    set_optimizer_state_dict(update.module, optimizer, {"state": state, "param_groups": groups}, options=_WHOLE)
    # Files know no memory format, and the fused AdamW goes through memory without a look at it
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def _own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a part of the model names in `per_process_buffers`, by their name in the whole."""
    return {
        f"{path}.{name}": part.get_buffer(name)
        for path, part in module.named_modules()
        for name in getattr(part, "per_process_buffers", ())
    }


def _last_evaluation(path: Path) -> int:
    """The last step of which a log has validation metrics; 0 without one."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return max((entry["step"] for entry in entries if any(key.startswith("validation/") for key in entry)), default=0)


def _drop_log_after(path: Path, step: int) -> None:
    """Removes lines that a continued run will write again."""
    if path.exists():
        with atomic_file(path) as file:
            for line in path.read_bytes().splitlines(keepends=True):
                # A line that a killed run or a full disk cut off has no end
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    file.write(line)


def _naming_memory(config: TrainingConfig) -> AbstractContextManager[None]:
    """Says what to do where a step does not fit into memory."""
    return naming_memory(
        f"with batches of {config.batch_size} in {config.gradient_accumulation_steps} micro-batches; "
        f"set training.gradient_accumulation_steps {2 * config.gradient_accumulation_steps} (with another --output "
        "if this run has a state), which trains alike, but for batch norm, in less memory; or take a smaller model"
    )


def _brief(values: dict[str, float]) -> str:
    skipped = ("learning_rate", "images_per_second", "grad_norm")
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in skipped)
