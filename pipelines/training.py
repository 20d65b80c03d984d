"""One training loop for both stages, in which a stopped and continued run is the same run, bit for bit.

Everything random is a function of (seed, process, step), and the order of the data a function of (seed, epoch), so
that weights, averages and optimizer are all there is to save. Training code that does this by saving and restoring
generators cannot be exact in the middle of an epoch, because loaders draw ahead.
"""

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipelines.batches import StepBatches, derived_seed, read_batch, to_device
from pipelines.checkpoint import has_states, load_state, newest_state, save_state
from pipelines.config import differences, read_yaml
from pipelines.ema import EMA
from pipelines.files import folder_lock, read_json, remove_stale, write_json_atomic
from pipelines.launch import StopRequest, ignore_stop_signals
from pipelines.memory import naming_memory
from pipelines.objectives import Objective
from pipelines.training_config import FREE_TO_CHANGE, TrainingConfig
from pipelines.training_log import LossWindow, TrainingLog, brief
from pipelines.training_states import (
    get_optimizer,
    get_weights,
    make_shardable,
    own_buffers,
    set_learning_rates,
    set_optimizer,
    set_weights,
)
from pipelines.validation import validate
from prior.base import evaluating

# Codebooks start from one pass without gradients over this many images at most
LARGEST_INITIAL_BATCH = 256
# Under fp16 a scale that is too large costs a few steps; so many in a row are not the scale's doing
MOST_SKIPPED_STEPS = 20


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
        on_start: called on the main process once the folder is known to be this run's, for what it may overwrite there;
            not where the run has more steps than are asked for, so that nothing is trained.
        on_evaluate: called as on_evaluate(step, model) on the main process at every evaluation, for pictures.
    Raises:
        ValueError: the folder belongs to another configuration, had states that are damaged or gone, or is not the same
            for all processes; or the batch does not divide.
        NonFiniteLossError: a loss, a gradient or the validation metric is not finite.
        MemoryError: a step does not fit into memory.
        SystemExit: 128 + signal number, once the state is saved, after SIGTERM or SIGINT.
    """
    lock = folder_lock(folder) if accelerator.is_main_process else nullcontext()
    with lock, StopRequest() as stop:
        run = _Run(accelerator, updates, train_data, validation_data, folder, config, resolved, on_evaluate)
        if on_start and accelerator.is_main_process and run.progress.step <= config.total_steps:
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
        self.log = TrainingLog(accelerator, folder)
        self.complaints: set[str] = set()
        self.skipped_steps = dict.fromkeys((update.name for update in updates), 0)
        self.loader: Iterator[dict] = iter(())
        self.state = newest_state(folder / "state")
        self._check_all_see_it()
        if self.state is None and (has_states(folder / "state") or self._had_states()):
            what = "damaged" if has_states(folder / "state") else "gone"
            raise ValueError(
                f"all states in {folder / 'state'} are {what}, so that the run cannot go on; to start anew, give "
                f"another --output or remove {folder}"
            )
        self.batches = self._step_batches(0)  # fails now, not after the model is prepared
        self._prepare()
        self.window = LossWindow(accelerator)
        self._resume()

    def train(self, stop: StopRequest) -> FitResult:
        config, accelerator, progress = self.config, self.accelerator, self.progress
        start_step = progress.step
        if start_step < config.total_steps:
            if config.tracker != "none":
                self.log.start_trackers(self.resolved)
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
                    counted = self.objective.summary()
                    values = losses | counted | {"learning_rate": self.learning_rate()}
                    values |= window.rate(config.batch_size // config.gradient_accumulation_steps)
                    bar.set_postfix_str(brief({"loss": loss, **counted}))
                    self.log.write(progress.step, {f"train/{k}": v for k, v in values.items()})
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
                    self.log.finish_trackers()
                    accelerator.print(f"stopped by signal {stop.signal_number} at step {progress.step}, state saved; "
                                      "run the same command to go on")  # fmt: skip
                    raise SystemExit(128 + stop.signal_number)
                window.started += time.monotonic() - paused  # images/s are those of training alone
            bar.close()
            self.log.finish_trackers()
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
                make_shardable(update.module)
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
        batch = to_device(read_batch(self.train_data, keys), self.accelerator.device)
        for update in self.updates:
            with _naming_memory(self.config):
                update.module.to(self.accelerator.device).initialize(batch)

    def _resume(self) -> None:
        if self.accelerator.is_main_process:
            for folder in (self.folder, self.folder / "samples"):
                remove_stale(folder)
        state = self.state
        if state is None:
            if self.accelerator.is_main_process:  # what a run left that was killed before its first state
                shutil.rmtree(self.folder / "best", ignore_errors=True)
                self.log.path.unlink(missing_ok=True)
            return
        tensors, info = load_state(state)
        self._check_same_run(info, state)
        for update, ema, scheduler in zip(self.updates, self.emas, self.schedulers):
            saved = info["updates"][update.name]
            if self.config.ema_decay:
                set_weights(update.module, tensors[f"{update.name}.ema"])
                ema.adopt_current()
            set_weights(update.module, tensors[f"{update.name}.weights"])
            self._take_own_buffers(update, tensors.get(f"{update.name}.processes", {}))
            set_optimizer(
                update.module, update.optimizer.optimizer, tensors[f"{update.name}.optimizer"], saved["param_groups"]
            )
            scheduler.load_state_dict(saved["scheduler"])
            set_learning_rates(scheduler)
        if self.accelerator.scaler is not None and info["scaler"]:
            self.accelerator.scaler.load_state_dict(info["scaler"])
        self.window.load_state(info.get("window", {}))
        self.progress = _Progress(info["step"], *self._best_on_disk())
        self.batches = self._step_batches(self.progress.step)
        if self.accelerator.is_main_process:
            self.log.drop_after(self.progress.step)
        self.accelerator.print(f"continuing from step {self.progress.step} ({state})")
        if self.progress.step > self.config.total_steps:
            self.accelerator.print(
                f"training.total_steps is {self.config.total_steps}, and these are more: nothing is trained"
            )
            return
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
        batch = to_device(batch, accelerator.device)
        if micro_batch == 0:
            self.step_losses: dict[str, list[dict[str, Tensor]]] = {update.name: [] for update in self.updates}
        with accelerator.accumulate(*(update.module for update in self.updates)):
            for update in self.updates:
                update.module.train()
                with accelerator.autocast():
                    losses = update.module(batch, step)
                only = {}
                if len(self.updates) > 1:  # a generator's loss leaves nothing with the critic that it went through
                    only["inputs"] = [p for p in update.module.parameters() if p.requires_grad]
                accelerator.backward(sum(losses.values()), **only)
                losses = {name: loss.detach() for name, loss in losses.items()}
                self.step_losses[update.name].append(losses)
                prefix = f"{update.name}/" if len(self.updates) > 1 else ""
                logged |= {f"{prefix}{name}": loss for name, loss in losses.items()}
                if accelerator.sync_gradients:
                    norm = self._clip(update)
                    if hasattr(norm, "full_tensor"):  # of FSDP 2: each process's part
                        norm = norm.full_tensor()
                    self._check_finite(step, norm, update.name)
                    logged[f"{prefix}grad_norm"] = norm.detach()
                    # Only a scaler needs accelerate's step, which each time looks for an optional package on disk
                    bare = update.optimizer.optimizer
                    (bare if accelerator.scaler is None else update.optimizer).step()
                    bare.zero_grad()
        return logged

    def _clip(self, update: Update) -> Tensor:
        """Clips the gradient of one update; its norm before that."""
        largest = self.config.max_grad_norm or math.inf
        if self.accelerator.scaler is None or len(self.updates) == 1:
            return self.accelerator.clip_grad_norm_(update.module.parameters(), largest)
        # accelerate's would also unscale what the other updates have accumulated so far
        self.accelerator.unscale_gradients(update.optimizer)
        return nn.utils.clip_grad_norm_(update.module.parameters(), largest)

    def _check_finite(self, step: int, norm: Tensor, update: str) -> None:
        # Gradients are averaged over processes before this point: what is not finite on one is so on all
        if torch.isfinite(norm):
            self.skipped_steps[update] = 0
            return
        self.skipped_steps[update] += 1
        if self.accelerator.scaler is not None and self.skipped_steps[update] < MOST_SKIPPED_STEPS:
            return  # the scaler leaves this step out and lowers its scale
        losses = self.step_losses[update]
        broken = [name for name in losses[0] if not all(torch.isfinite(of_batch[name]) for of_batch in losses)]
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
            metrics = validate(accelerator, self.module, self.validation_data, size)
            self.log.write(progress.step, {f"validation/{k}": v for k, v in metrics.items()})
            self._complain()
            nll = metrics["nll"]
            if not math.isfinite(nll):
                raise NonFiniteLossError(
                    f"step {progress.step}: validation nll is {nll}; the last state is kept. "
                    "Lower training.learning_rate (with another --output), or look at the validation data"
                )
            # Under FSDP a picture would need all processes to sample together
            if (
                self.on_evaluate
                and accelerator.is_main_process
                and accelerator.distributed_type != DistributedType.FSDP
            ):
                with evaluating(self.objective.model):  # batch norm would learn, and wait for the other processes
                    self.on_evaluate(progress.step, self.objective.model)
            best = progress.best_metrics.get("nll", math.inf)
            if nll < best:
                progress.best_step, progress.best_metrics = progress.step, metrics
                weights = get_weights(self.module)
                if accelerator.is_main_process:
                    kept = save_state(self.folder / "best", progress.step, {"weights": weights}, {"metrics": metrics})
                    for other in set(kept.parent.glob("step-*")) - {kept}:  # earlier or, after a fall back, later ones
                        shutil.rmtree(other)
        accelerator.wait_for_everyone()
        self.log.say(f"step {progress.step}: validation {brief(metrics)}")
        if (progress.step - progress.best_step) // self.config.eval_every == 3:  # said once, not at every evaluation
            self.log.say(
                f"step {progress.step}: validation nll {nll:.4f} has not improved on {best:.4f} of step "
                f"{progress.best_step}: the model overfits; the best weights are kept",
            )

    def _end_epoch(self) -> None:
        self.log.write(self.progress.step, {f"epoch/{k}": v for k, v in self.objective.summary().items()})
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
                self.log.say(f"step {self.progress.step}: {text}")

    def _save(self) -> None:
        tensors, infos = {}, {}
        for update, ema, scheduler in zip(self.updates, self.emas, self.schedulers):
            tensors[f"{update.name}.weights"] = get_weights(update.module)
            tensors[f"{update.name}.optimizer"], groups = get_optimizer(update.module, update.optimizer.optimizer)
            if self.config.ema_decay:
                with ema.applied():
                    tensors[f"{update.name}.ema"] = get_weights(update.module)
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
        buffers = own_buffers(self.accelerator.unwrap_model(update.module))
        return {name: self.accelerator.gather(buffer[None]) for name, buffer in buffers.items()}

    def _take_own_buffers(self, update: Update, saved: dict[str, Tensor]) -> None:
        for name, buffer in own_buffers(self.accelerator.unwrap_model(update.module)).items():
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

    def _check_all_see_it(self) -> None:
        """Raises ValueError where processes would go on from different states, since they do not share the folder."""
        step = -1 if self.state is None else int(self.state.name.removeprefix("step-"))
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            seen = ", ".join("none" if step < 0 else f"step {step}" for step in steps)
            raise ValueError(
                f"the processes see different states in {self.folder / 'state'} ({seen}); the folder must be on a disk "
                "that they share"
            )

    def _had_states(self) -> bool:
        """Whether a run that has no state left was evaluated after it must have saved one, or at its end.

        One that was killed before its first state may have best weights too. Its own options say when that was due.
        """
        if not has_states(self.folder / "best"):
            return False
        path = self.folder / "config.yaml"  # of the scripts, which write it anew only after this
        options = vars(self.config) | (read_yaml(path).get("training") or {} if path.is_file() else {})
        step = self.log.last_evaluation()
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


def _seed_noise(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which also formats a stack trace for each kind of device that is not in use (0.3 ms)."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _naming_memory(config: TrainingConfig) -> AbstractContextManager[None]:
    """Says what to do where a step does not fit into memory."""
    return naming_memory(
        f"with batches of {config.batch_size} in {config.gradient_accumulation_steps} micro-batches; "
        f"set training.gradient_accumulation_steps {2 * config.gradient_accumulation_steps} (with another --output "
        "if this run has a state), which trains alike, but for batch norm, in less memory; or take a smaller model"
    )
