"""The loop: order of data, exact continuation, accumulation, averages, and what it refuses."""

import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from pipelines.batches import StepBatches
from pipelines.checkpoint import build_prior, build_tokenizer, has_states
from pipelines.ema import EMA
from pipelines.files import folder_lock, read_json
from pipelines.images import DataConfig, load_images
from pipelines.launch import LAUNCHED_BY, cpu_computes_bf16, end_with_the_launcher, make_accelerator
from pipelines.objectives import Objective, PriorLoss, TokenizerLoss
from pipelines.runs import save_config
from pipelines.training import NonFiniteLossError, Update, adamw, fit
from pipelines.training_config import TrainingConfig
from pipelines.training_states import make_shardable, own_buffers
from pipelines.validation import validate
from prior import PRIORS
from prior.base import CodeSpec
from tests import tiny
from tokenizer import TOKENIZERS
from tokenizer.quantizers import QUANTIZERS
from tokenizer.registry import build

CONFIG = TrainingConfig(
    total_steps=6, batch_size=8, warmup_steps=2, eval_every=3, save_every=2, log_every=2, tracker="none", cpu=True
)
DATA = DataConfig(max_images=20, horizontal_flip=True, crop_padding=1)
TRAINED_PRIORS = sorted(set(PRIORS) - {"uniform", *tiny.BIT_PRIORS, *tiny.REAL_PRIORS})
OTHER_TOKENIZERS = sorted(set(TOKENIZERS) - {"vqvae"})
MODELS = [*(f"vqvae-{name}" for name in sorted(QUANTIZERS)), *OTHER_TOKENIZERS, *TRAINED_PRIORS, *tiny.BIT_PRIORS]


class Codes(torch.utils.data.Dataset):
    """Twenty random code maps with labels."""

    def __init__(self, spec: CodeSpec = tiny.SPECS["levels"]):
        self.spec = spec

    def __len__(self):
        return 20

    def __getitems__(self, keys):
        rows = torch.tensor([key[0] if isinstance(key, tuple) else key for key in keys])
        generator = torch.Generator().manual_seed(0)
        levels = zip(self.spec.shapes, self.spec.vocab_sizes)
        codes = tuple(torch.randint(k, (20, *shape), generator=generator)[rows] for shape, k in levels)
        return {"codes": codes, "label": rows % 2}

    @staticmethod
    def collate(batch):
        return batch


def make(model: str, config: TrainingConfig = CONFIG, noise: bool = True):
    """(objective, training data, validation data) of a tiny model, with or without dropout."""
    torch.manual_seed(config.seed)
    name, _, quantizer = model.partition("-")
    if name in tiny.TOKENIZERS:
        options = {**tiny.TOKENIZERS[name], "image_shape": (1, 8, 8)}
        if "num_classes" in options:
            options["num_classes"] = 10
        if quantizer:
            options["quantizer"] = {"type": quantizer, **tiny.QUANTIZERS[quantizer]}
        tokenizer = build_tokenizer({"type": name, **options})
        num_values = getattr(getattr(tokenizer, "likelihood", None), "num_values", 256)
        data = DATA if num_values == 256 else replace(DATA, binarize="stochastic")
        return TokenizerLoss(tokenizer), load_images(data, "train"), load_images(data, "validation")
    if name in tiny.BIT_PRIORS:
        codes = Codes(tiny.SPECS["bits"])
        return PriorLoss(build_prior({"type": name, **tiny.PRIORS[name], "spec": codes.spec})), codes, codes
    known = {field.name for field in fields(PRIORS[name].Config)} & {"dropout", "class_dropout"}
    dropout = dict.fromkeys(known, 0.3 if noise else 0.0)
    options = {**tiny.PRIORS[name], **dropout, "num_classes": 2, "spec": Codes().spec}
    return PriorLoss(build_prior({"type": name, **options})), Codes(), Codes()


def train(model: str, folder, config: TrainingConfig = CONFIG, *, change=lambda objective: None, **callbacks):
    AcceleratorState._reset_state(reset_partial_state=True)  # it settles once per process on precision and device
    objective, train_data, validation_data = make(model, config)
    change(objective)
    resolved = {"model": model, "training": dict(vars(config))}
    return fit(
        make_accelerator(config, folder),
        [Update("model", objective, adamw(objective, config))],
        train_data,
        validation_data,
        folder=folder,
        config=config,
        resolved=resolved,
        **callbacks,
    )


def final_tensors(folder) -> dict[str, torch.Tensor]:
    newest = max((folder / "state").glob("step-*"))
    return {f"{p.stem}/{k}": v for p in newest.glob("*.safetensors") for k, v in load_file(p).items()}


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def interrupt_at(step: int):
    return lambda now, model: os.kill(os.getpid(), signal.SIGTERM) if now == step else None


def assert_same_state(folder, other) -> None:
    a, b = final_tensors(folder), final_tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# The order of the data
# ------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2))
def test_every_image_comes_once_per_epoch(length, share, num_micro_batches, num_processes):
    batch_size = share * num_micro_batches * num_processes
    if batch_size > length:
        return
    steps = 2 * length // batch_size
    keys = [
        key
        for step in range(steps)
        for micro in range(num_micro_batches)
        for process in range(num_processes)
        for key in StepBatches(
            length,
            batch_size,
            num_micro_batches=num_micro_batches,
            process_index=process,
            num_processes=num_processes,
            total_steps=steps,
        ).keys(step, micro)
    ]
    assert max(Counter(keys).values()) == 1
    assert sorted(index for index, epoch in keys if epoch == 0) == list(range(length))
    # the split into processes and micro-batches changes nothing about a step
    whole = StepBatches(length, batch_size, total_steps=steps)
    assert keys == [key for step in range(steps) for key in whole.keys(step, 0)]


def test_epochs_have_different_orders():
    batches = StepBatches(50, 50, total_steps=2)
    assert [i for i, _ in batches.keys(0, 0)] != [i for i, _ in batches.keys(1, 0)]


@pytest.mark.parametrize(("options", "message"), [({"batch_size": 30}, "larger"), ({"batch_size": 9}, "multiple of 2")])
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepBatches(20, **options, num_micro_batches=2 if options["batch_size"] == 9 else 1, total_steps=1)


# Continuation
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_stopped_and_continued_run_is_the_uninterrupted_run(model, tmp_path):
    config = replace(CONFIG, eval_every=1)  # stopping is asked for in an evaluation, here at every step
    train(model, tmp_path / "whole", config)
    for step in (1, 4):
        with pytest.raises(SystemExit) as stop:
            train(model, tmp_path / "parts", config, on_evaluate=interrupt_at(step))
        assert stop.value.code == 128 + signal.SIGTERM
        assert (tmp_path / "parts" / "state" / f"step-{step:08d}").is_dir()
    result = train(model, tmp_path / "parts", config)
    assert result.steps_run == 2
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole" / "best").exists()
    logs = [read_log(tmp_path / name) for name in ("whole", "parts")]
    values = [[(line["step"], k, v) for line in log for k, v in line.items() if "validation" in k] for log in logs]
    assert values[0] == values[1]


def test_workers_change_nothing(tmp_path):
    train("vqvae-ema_vq", tmp_path / "none")
    train("vqvae-ema_vq", tmp_path / "two", replace(CONFIG, num_workers=2))
    assert_same_state(tmp_path / "none", tmp_path / "two")


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, second = train("gpt", tmp_path), train("gpt", tmp_path)
    assert (first.steps_run, second.steps_run) == (6, 0)
    assert first.metrics == second.metrics
    assert all(torch.equal(first.weights[k], second.weights[k]) for k in first.weights)


def test_a_finished_run_can_be_prolonged(tmp_path):
    train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup"))
    longer = replace(CONFIG, lr_schedule="constant_with_warmup", total_steps=8)
    assert train("gpt", tmp_path, longer).steps_run == 2
    train("gpt", tmp_path / "whole", longer)
    assert_same_state(tmp_path, tmp_path / "whole")


def test_a_damaged_state_is_passed_over(tmp_path):
    train("gpt", tmp_path / "whole")
    train("gpt", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "state" / "step-00000006" / "model.weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.warns(UserWarning, match=r"model.weights.safetensors: sha256 mismatch"):
        result = train("gpt", tmp_path / "damaged")
    assert result.steps_run == 2
    assert_same_state(tmp_path / "whole", tmp_path / "damaged")


def test_a_run_whose_states_are_all_damaged_is_not_begun_anew(tmp_path):
    train("gpt", tmp_path)
    for path in (tmp_path / "state").glob("*/model.weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    damaged = pytest.warns(UserWarning, match="falling back to the state before it")
    with damaged, pytest.raises(ValueError, match=r"all states in .* are damaged"):
        train("gpt", tmp_path, replace(CONFIG, learning_rate=0.5))
    assert list((tmp_path / "best").glob("step-*"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_every": 100},  # only at the end
        {"learning_rate": 10.0, "warmup_steps": 0, "eval_every": 1},  # the best step is an early one
    ],
)
def test_a_run_whose_states_were_removed_is_not_begun_anew(options, tmp_path):
    config = replace(CONFIG, **options)
    best_step, log = train("gpt", tmp_path, config).best_step, read_log(tmp_path)
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(ValueError, match=r"all states in .*state are gone.*give another --output or remove"):
        train("gpt", tmp_path, config)
    assert [path.name for path in (tmp_path / "best").glob("step-*")] == [f"step-{best_step:08d}"]
    assert read_log(tmp_path) == log


def test_a_prolonged_run_takes_its_first_step_at_the_rate_of_its_new_schedule(tmp_path, capsys):
    config = replace(CONFIG, lr_schedule="linear", warmup_steps=0, total_steps=4, log_every=1)
    train("gpt", tmp_path, config)
    train("gpt", tmp_path, replace(config, total_steps=8))
    rates = [line["train/learning_rate"] for line in read_log(tmp_path) if "train/learning_rate" in line]
    # logged after each step: the rate of the next
    assert rates[4:] == pytest.approx([config.learning_rate * left / 8 for left in (3, 2, 1, 0)])
    assert "follows the schedule of the new total, 0.0005 now" in capsys.readouterr().out


def test_a_run_of_more_steps_than_asked_for_stays_as_it_is(tmp_path, capsys):
    config, started = replace(CONFIG, lr_schedule="linear", warmup_steps=0, total_steps=4), []
    best = train("gpt", tmp_path, config, on_start=lambda: started.append(4)).best_step
    result = train("gpt", tmp_path, replace(config, total_steps=3), on_start=lambda: started.append(3))
    assert (result.steps_run, result.best_step, started) == (0, best, [4])
    said = capsys.readouterr().out
    assert "training.total_steps is 3, and these are more: nothing is trained" in said
    assert "learning rate" not in said


def test_another_configuration_is_refused_by_name(tmp_path):
    train("gpt", tmp_path)
    with pytest.raises(ValueError, match=r"training.learning_rate: 0.001 -> 0.5.*--output"):
        train("gpt", tmp_path, replace(CONFIG, learning_rate=0.5))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with folder_lock(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        train("gpt", tmp_path)


def test_a_best_folder_newer_than_the_state_is_taken_up(tmp_path):
    # killed between the writing of best/ and of the state
    config = replace(CONFIG, lr_schedule="constant_with_warmup", total_steps=8, eval_every=4, save_every=4)
    assert train("gpt", tmp_path, config).best_step == 8
    shutil.rmtree(tmp_path / "state" / "step-00000008")
    result = train("gpt", tmp_path, replace(config, total_steps=6))
    assert (result.steps_run, result.best_step) == (2, 8)
    weights = load_file(tmp_path / "best" / "step-00000008" / "weights.safetensors")
    assert all(torch.equal(value, weights[f"model.{name}"]) for name, value in result.weights.items())
    assert len(list((tmp_path / "best").glob("step-*"))) == 1


@pytest.mark.parametrize("killed", [{"total_steps": 20, "save_every": 15}, {"eval_every": 2, "save_every": 100}])
def test_what_a_run_left_that_had_no_state_yet_does_not_count(killed, tmp_path):
    killed = replace(CONFIG, **killed)

    def kill(step, model):
        if step > 3:
            raise KeyboardInterrupt

    save_config(tmp_path / "config.yaml", {"training": vars(killed)})
    with pytest.raises(KeyboardInterrupt):
        train("gpt", tmp_path, killed, on_evaluate=kill)
    assert has_states(tmp_path / "best")
    assert not has_states(tmp_path / "state")
    result = train("gpt", tmp_path, replace(CONFIG, seed=1))
    assert result.best_step <= 6
    assert max(line["step"] for line in read_log(tmp_path)) == 6
    assert [path.name for path in (tmp_path / "best").glob("step-*")] == [f"step-{result.best_step:08d}"]


def test_a_finished_run_without_its_best_weights_evaluates_the_last(tmp_path):
    train("gpt", tmp_path)
    shutil.rmtree(tmp_path / "best")
    result = train("gpt", tmp_path)
    assert (result.steps_run, result.best_step) == (0, 6)
    assert result.weights


def test_a_log_line_cut_off_by_a_kill_is_dropped(tmp_path):
    train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup"))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "tra')
    train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup", total_steps=8))
    assert read_log(tmp_path)[-1]["step"] == 8


def test_a_damaged_log_is_named(tmp_path):
    train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup"))
    log = tmp_path / "log.jsonl"
    log.write_bytes(damaged := b"\0\0\0\n" + log.read_bytes())
    with pytest.raises(ValueError, match=r"log\.jsonl has a damaged line"):
        train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup", total_steps=8))
    assert log.read_bytes() == damaged
    log.unlink()
    assert train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup", total_steps=8)).steps_run == 2


def test_a_run_killed_after_the_end_of_an_epoch_logs_it_once(tmp_path):
    num_images = len(make("vqvae-vq")[1])
    config = replace(CONFIG, batch_size=num_images // 2, total_steps=3, eval_every=100)  # saved at the end of an epoch
    train("vqvae-vq", tmp_path, config)
    shutil.rmtree(tmp_path / "state" / "step-00000003")
    train("vqvae-vq", tmp_path, config)
    assert [line["step"] for line in read_log(tmp_path) if "epoch/perplexity" in line] == [2]


def test_other_data_or_precision_are_refused_by_name(tmp_path, monkeypatch):
    train("gpt", tmp_path)
    monkeypatch.setattr(Codes, "__len__", lambda self: 19)
    with pytest.raises(ValueError, match="training images: 20 -> 19"):
        train("gpt", tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate launch --mixed_precision bf16` does
    monkeypatch.setattr("pipelines.launch.cpu_computes_bf16", lambda: True)
    with pytest.raises(ValueError, match="mixed precision: no -> bf16"):
        train("gpt", tmp_path)


def test_a_refused_run_overwrites_nothing(tmp_path):
    started = []
    train("gpt", tmp_path, on_start=lambda: started.append(1))
    with pytest.raises(ValueError, match="another configuration"):
        train("gpt", tmp_path, replace(CONFIG, learning_rate=0.5), on_start=lambda: started.append(2))
    assert started == [1]


def test_an_error_ends_the_workers_that_heed_no_signal(tmp_path):
    def break_down(step, model):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault") as raised:  # whose traceback keeps the loader alive
        train("vqvae-fsq", tmp_path, replace(CONFIG, num_workers=2), on_evaluate=break_down)
    left = multiprocessing.active_children()
    for worker in left:
        worker.kill()  # or this process would not end
    assert left == []
    assert raised.value.__traceback__ is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are told apart by fork")
def test_a_signal_to_the_whole_group_leaves_the_workers_until_the_state_is_saved(tmp_path):
    def signal_all(now, model):
        # from another process: workers let the one that started them end them
        workers = [str(worker.pid) for worker in multiprocessing.active_children()]
        subprocess.run(["kill", "-TERM", str(os.getpid()), *workers], check=True)
        time.sleep(0.5)

    config = replace(CONFIG, total_steps=60, num_workers=2, save_every=100)
    with pytest.raises(SystemExit):
        train("vqvae-ema_vq", tmp_path, config, on_evaluate=signal_all)
    assert (tmp_path / "state" / "step-00000003").exists()


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup"))
    before = final_tensors(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match=r"bytes free"):
            train("gpt", tmp_path, replace(CONFIG, lr_schedule="constant_with_warmup", total_steps=8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list((tmp_path / "state").glob(".tmp-*"))
    assert all(torch.equal(value, before[name]) for name, value in final_tensors(tmp_path).items())


# What a step does
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vqvae-ema_vq", "vqvae-vq", "vqvae2"])
def test_two_accumulated_micro_batches_equal_one_batch(model, tmp_path):
    train(model, tmp_path / "one")
    train(model, tmp_path / "two", replace(CONFIG, gradient_accumulation_steps=2))
    one, two = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "two")
    for name in one:  # another order of float32 sums; Adam divides by small second moments
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_a_codebook_moves_once_per_step(num_micro_batches, tmp_path):
    train("vqvae-ema_vq", tmp_path, replace(CONFIG, gradient_accumulation_steps=num_micro_batches))
    assert final_tensors(tmp_path)["model.weights/model.quantizer.num_updates"] == CONFIG.total_steps


def test_ema_follows_its_recursion():
    module = torch.nn.Linear(2, 1)
    ema = EMA(module, decay=0.6)
    expected = module.weight.detach().clone()
    for step in range(20):
        module.weight.data.normal_()
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    kept = module.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, kept)


def test_the_best_weights_are_kept(tmp_path):
    # at this rate the model soon gets worse
    result = train("gpt", tmp_path, replace(CONFIG, total_steps=30, learning_rate=0.3, ema_decay=0.0))
    curve = {line["step"]: line["validation/nll"] for line in read_log(tmp_path) if "validation/nll" in line}
    assert result.best_step == min(curve, key=curve.get) < 30
    assert result.metrics["nll"] == min(curve.values())
    prior, _, data = make("gpt")
    prior.model.load_state_dict(result.weights)
    accelerator = make_accelerator(CONFIG, tmp_path)
    assert validate(accelerator, prior, data, 8)["nll"] == pytest.approx(result.metrics["nll"], abs=1e-6)


@pytest.mark.parametrize("model", ["dvaepp", "nvil", "gaussian_vae"])
def test_the_best_step_is_not_the_one_with_the_luckiest_draws(model, tmp_path):
    def stand_still(objective):
        for part in objective.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.momentum = 0.0
        objective.requires_grad_(False)
        next(objective.model.parameters()).requires_grad_()

    config = replace(CONFIG, eval_every=1, learning_rate=1e-30, weight_decay=0.0, ema_decay=0.0)
    train(model, tmp_path, config, change=stand_still)
    kept = "validation/negative_elbo"
    assert len({line[kept] for line in read_log(tmp_path) if kept in line}) == 1


def test_the_log_of_a_continued_run_is_that_of_the_uninterrupted_one(tmp_path):
    config = replace(CONFIG, log_every=4, save_every=3, eval_every=3)
    train("vqvae-vq", tmp_path / "whole", config)
    with pytest.raises(SystemExit):
        train("vqvae-vq", tmp_path / "parts", config, on_evaluate=interrupt_at(3))
    train("vqvae-vq", tmp_path / "parts", config)
    logs = [
        [{name: value for name, value in line.items() if "per_second" not in name} for line in read_log(tmp_path / run)]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_the_gradient_of_one_update_leaves_nothing_with_another(num_micro_batches, tmp_path):
    def final(detached: bool):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = replace(CONFIG, gradient_accumulation_steps=num_micro_batches)
        first, train_data, validation_data = make("gpt", config, noise=False)
        second, _, _ = make("pixelcnn", config, noise=False)

        class Both(type(first)):
            def forward(self, batch, step=None):
                losses, through = (
                    super().forward(batch, step),
                    second.model.log_prob(batch["codes"], batch["label"]).mean(),
                )
                return {**losses, "through": 0 * through if detached else through}

        first.__class__ = Both
        folder = tmp_path / str(detached)
        updates = [Update(name, one, adamw(one, config)) for name, one in (("first", first), ("second", second))]
        fit(
            make_accelerator(config, folder),
            updates,
            train_data,
            validation_data,
            folder=folder,
            config=config,
            resolved={},
        )
        return final_tensors(folder)

    alone, both = final(detached=True), final(detached=False)
    for name, tensor in alone.items():
        if name.startswith("second.weights"):
            assert torch.equal(tensor, both[name]), name


def test_overfitting_is_said(tmp_path, capsys):
    train("gpt", tmp_path, replace(CONFIG, total_steps=30, learning_rate=0.3, ema_decay=0.0))
    assert "the model overfits; the best weights are kept" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    train("vqvae-ema_vq", tmp_path, replace(CONFIG, total_steps=2))

    def poison(objective):
        forward = objective.forward
        objective.forward = lambda batch, step=None: forward({**batch, "image": batch["image"] / (step != 3)}, step)

    with pytest.raises(NonFiniteLossError, match=r"step 3: loss .*reconstruction.*learning_rate"):
        train("vqvae-ema_vq", tmp_path, change=poison)
    report = json.loads((tmp_path / "nonfinite-step3-process0.json").read_text())
    batches = StepBatches(len(make("vqvae-ema_vq")[1]), 8, total_steps=6)
    assert report["indices"] == [index for index, _ in batches.keys(3, 0)]
    assert all(torch.isfinite(value).all() for value in final_tensors(tmp_path).values())


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_evaluation_does_not_depend_on_the_batch_size(batch_size, tmp_path):
    objective, _, data = make("vqvae-ema_vq")
    accelerator = make_accelerator(CONFIG, tmp_path)
    metrics, whole = (validate(accelerator, objective, data, size) for size in (batch_size, len(data)))
    assert metrics == pytest.approx(whole, rel=1e-5)


def test_a_collapsed_codebook_is_said_once_with_numbers_and_advice(tmp_path, capsys):
    def collapse(objective):
        objective.model.quantizer.codebook.data[1:] += 1e3

    sixteen = {**tiny.QUANTIZERS["vq"], "codebook_size": 16, "init": "normal"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.QUANTIZERS, "vq", sixteen)
        train("vqvae-vq", tmp_path, replace(CONFIG, total_steps=20), change=collapse)
    said = [line for line in capsys.readouterr().out.splitlines() if "collapsed" in line]
    assert len(said) == 1
    assert "codebook of level 0 has collapsed: 6.2% of its 16 codes are used, perplexity 1.0" in said[0]
    assert "revive_below" in said[0]


def test_entries_that_are_not_replaced_yet_are_no_collapse():
    # an average of 1 that decays by 0.99 is below 0.03 after 349 steps
    assert TokenizerLoss(build_tokenizer({"type": "vqvae", **tiny.TOKENIZERS["vqvae"]})).settling_steps == 349
    assert build("quantizer", QUANTIZERS, {"type": "ema_vq", "revive_below": 0.0}).settling_steps == 0
    assert build("quantizer", QUANTIZERS, {"type": "ema_vq", "decay": 0.0}).settling_steps == 0


def test_a_prior_says_what_is_wrong_with_it(monkeypatch):
    objective, *_ = make(tiny.BIT_PRIORS[0])
    monkeypatch.setattr(objective.model, "complaints", lambda: {"chains": "they are frozen"})
    assert objective.complaints() == {"chains": "they are frozen"}


def test_a_validation_metric_that_is_not_finite_is_an_error(tmp_path):
    def poison(objective):
        forward = objective.forward

        def infinite(batch, step=None):
            values = forward(batch, step)
            return values if objective.training else {name: value / 0 for name, value in values.items()}

        objective.forward = infinite

    with pytest.raises(NonFiniteLossError, match="step 3: validation nll is inf; the last state is kept"):
        train("gpt", tmp_path, change=poison)


def test_a_step_that_does_not_fit_into_memory_says_what_to_do(tmp_path):
    def swell(objective):
        objective.forward = lambda batch, step=None: {"nll": torch.empty(2**50).sum()}

    with pytest.raises(MemoryError, match=r"batches of 8 in 1 micro-batches.*gradient_accumulation_steps 2"):
        train("gpt", tmp_path, change=swell)


def as_fp16(accelerator):
    """accelerate refuses fp16 on a CPU, where its scaler works as on a GPU."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return accelerator


def test_fp16_leaves_out_steps_that_overflow_and_continues_exactly(tmp_path, monkeypatch):
    start = make_accelerator
    monkeypatch.setattr("tests.test_training.make_accelerator", lambda *a: as_fp16(start(*a)))
    config = replace(CONFIG, total_steps=30, eval_every=10, save_every=5, log_every=7)
    train("vqvae-ema_vq", tmp_path / "whole", config)
    state = read_json(tmp_path / "whole" / "state" / "step-00000030" / "state.json")
    assert 0 < state["scaler"]["scale"] < 2.0**24
    assert any(line.get("train/grad_norm", 0) is None for line in read_log(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        train("vqvae-ema_vq", tmp_path / "parts", config, on_evaluate=interrupt_at(10))
    train("vqvae-ema_vq", tmp_path / "parts", config)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


SGD = partial(torch.optim.SGD, lr=0.05)


class Player(Objective):
    """One of two models, the first of which is trained through the second."""

    def __init__(self, other=None):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
        self.__dict__["other"] = other  # no module of this one's

    def forward(self, batch, step=None):
        z = self.model(batch["codes"][1].flatten(1).float())
        z = z if self.other is None else self.other.model(z)
        loss = z.square() + (z - 1).abs()
        return {"nll": loss.mean() if self.training else loss.mean(dim=1)}

    def initialize(self, batch):
        pass


def play(folder, *, fp16: bool, accumulation: int, optimizer=SGD, **changed):
    AcceleratorState._reset_state(reset_partial_state=True)
    config = replace(CONFIG, gradient_accumulation_steps=accumulation, warmup_steps=0, log_every=1, max_grad_norm=0.5,
                     lr_schedule="constant_with_warmup", **changed)  # fmt: skip
    accelerator = make_accelerator(config, folder)
    if fp16:
        accelerator = as_fp16(accelerator)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(0)
    second = Player()
    first = Player(second)
    players = {"first": first, "second": second}
    updates = [Update(name, player, optimizer(player.parameters())) for name, player in players.items()]
    fit(accelerator, updates, Codes(), Codes(), folder=folder, config=config, resolved={})
    names = ("train/first/grad_norm", "train/second/grad_norm")
    return [[line[name] for name in names] for line in read_log(folder) if names[0] in line]


def test_gradients_of_two_models_are_scaled_and_clipped_each_on_its_own(tmp_path):
    norms = {
        (fp16, accumulation): play(tmp_path / f"{fp16}{accumulation}", fp16=fp16, accumulation=accumulation)
        for fp16 in (False, True)
        for accumulation in (1, 2)
    }
    assert len(norms[False, 1]) == CONFIG.total_steps
    for found in norms.values():
        np.testing.assert_allclose(found, norms[False, 1], rtol=0.02)  # fp16 rounds


def test_a_run_with_any_optimizer_goes_on(tmp_path):
    options = {"fp16": False, "accumulation": 1, "save_every": 3}
    for optimizer in (partial(torch.optim.SGD, lr=0.05, momentum=0.9), partial(torch.optim.RMSprop, lr=0.01)):
        name = optimizer.func.__name__
        play(tmp_path / name, optimizer=optimizer, total_steps=6, **options)
        for steps in (3, 6):
            play(tmp_path / f"{name}-parts", optimizer=optimizer, total_steps=steps, **options)
        assert_same_state(tmp_path / name, tmp_path / f"{name}-parts")


def test_own_buffers_have_the_same_names_where_the_model_is_compiled():
    objective, *_ = make("rbm")
    names = list(own_buffers(objective))
    objective.model = torch.compile(objective.model, backend="eager")
    assert list(own_buffers(objective)) == names == ["model.chains", "model.num_updates"]


def test_pictures_that_are_made_while_training_change_nothing(tmp_path):
    def look(step, model):
        assert not model.training
        model.decode(model.encode(torch.zeros(2, 1, 8, 8)))

    train("dvaepp", tmp_path / "plain")
    train("dvaepp", tmp_path / "looked", on_evaluate=look)
    assert_same_state(tmp_path / "plain", tmp_path / "looked")


def test_a_loss_that_is_not_finite_is_named_in_whatever_micro_batch(tmp_path):
    def poison(objective):
        forward, passes = objective.forward, itertools.count()

        def poisoned(batch, step=None):
            first = objective.training and next(passes) == 4  # of two micro-batches of step 2
            return {name: loss * (math.inf if first else 1) for name, loss in forward(batch, step).items()}

        objective.forward = poisoned

    with pytest.raises(NonFiniteLossError, match="step 2: loss nll is not finite"):
        train("gpt", tmp_path, replace(CONFIG, gradient_accumulation_steps=2), change=poison)


def test_fp16_ends_where_no_scale_helps(tmp_path, monkeypatch):
    start = make_accelerator
    monkeypatch.setattr("tests.test_training.make_accelerator", lambda *a: as_fp16(start(*a)))

    def poison(objective):
        forward = objective.forward
        objective.forward = lambda batch, step=None: {k: v / 0 for k, v in forward(batch, step).items()}

    with pytest.raises(NonFiniteLossError, match="step 19: loss nll"):
        train("gpt", tmp_path, replace(CONFIG, total_steps=40, eval_every=100), change=poison)


def test_the_environment_does_not_change_the_number_of_micro_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert make_accelerator(CONFIG, tmp_path).gradient_accumulation_steps == 1


def test_processes_wait_for_one_that_downloads_longer_than_nccl_would(tmp_path):
    assert make_accelerator(CONFIG, tmp_path).init_handler.timeout > timedelta(minutes=10)


@pytest.mark.parametrize(
    ("field", "value"),
    [("total_steps", 0), ("batch_size", 0), ("ema_decay", 1.0), ("max_grad_norm", -1.0), ("warmup_steps", -1)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"training.{field}.*{value}"):
        replace(CONFIG, **{field: value})


def lives_on(launched: dict[str, str], *, parent_ends_first: bool) -> bool:
    """Whether a process that calls `end_with_the_launcher` is there after its parent's end."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        parent = os.getpid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
            os.environ |= launched
            if not parent_ends_first:
                end_with_the_launcher()
            while os.getppid() == parent:
                time.sleep(0.01)
            if parent_ends_first:
                end_with_the_launcher()
            time.sleep(0.1)
            os.write(write, b"x" if os.getppid() == 1 else b"?")
        else:
            time.sleep(0 if parent_ends_first else 0.3)
        os._exit(0)
    os.waitpid(parent, 0)
    os.close(write)
    answer = os.read(read, 1)
    os.close(read)
    if answer == b"?":
        pytest.skip("orphans do not become children of process 1 here")
    return answer == b"x"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process of its parent's end")
def test_a_process_ends_with_its_launcher_but_not_with_a_shell():
    for launched in ({"ACCELERATE_MIXED_PRECISION": "no"}, {LAUNCHED_BY: "123456"}):
        assert not lives_on(launched, parent_ends_first=False)
        assert not lives_on(launched, parent_ends_first=True)
    assert lives_on({}, parent_ends_first=False)


def test_a_full_disk_is_named_where_a_tracker_meets_it(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("accelerate.Accelerator.log", full)
    with pytest.raises(OSError, match=rf"No space left on device \(\d+ bytes free\): '{tmp_path}"):
        train("vqvae-ema_vq", tmp_path)


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    left = [tmp_path / ".tmp-log.jsonl", tmp_path / "samples" / ".tmp-0000003.png"]
    (tmp_path / "samples").mkdir()
    left = [path.with_name(f"{path.name}@{socket.gethostname()}@{2**22 + 1}@0123abcd") for path in left]
    for path in left:
        path.touch()
    train("vqvae-ema_vq", tmp_path)
    assert not any(path.exists() for path in left)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path, monkeypatch):
    make_accelerator(CONFIG, tmp_path)  # accelerate settles here on being alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate sees 1"):
        make_accelerator(CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("wandb", "'wandb' is not installed"), ("tensorbord", "did you mean 'tensorboard'")]
)
def test_a_tracker_that_cannot_be_had_is_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_accelerator(replace(CONFIG, tracker=name), tmp_path)


def test_bf16_on_a_cpu_without_bf16_units_is_refused(tmp_path):
    if cpu_computes_bf16():
        pytest.skip("this CPU has bf16 units")
    with pytest.raises(ValueError, match="over twice as slow"):
        train("gpt", tmp_path, replace(CONFIG, mixed_precision="bf16"))


@pytest.mark.parametrize("model", ["vqvae-ema_vq", "gpt"])
def test_training_under_bf16_autocast_keeps_weights_and_codebook_in_float32(model, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.launch.cpu_computes_bf16", lambda: True)  # slow, but it computes
    result = train(model, tmp_path, replace(CONFIG, mixed_precision="bf16"))
    plain = train(model, tmp_path / "float32", CONFIG)
    assert {t.dtype for t in result.weights.values() if t.is_floating_point()} == {torch.float32}
    assert result.metrics["nll"] == pytest.approx(plain.metrics["nll"], rel=0.02)
    assert result.metrics["nll"] != plain.metrics["nll"]


def test_a_priors_first_batch_is_looked_at_since_a_compiled_model_looks_at_none():
    kind = PRIORS["gpt"]
    prior = kind(kind.Config(spec=tiny.SPECS["map"], num_classes=3, **tiny.PRIORS["gpt"]))
    batch = {"codes": [torch.zeros(2, 2, 2, dtype=torch.int64)], "label": torch.tensor([0, 2])}
    PriorLoss(prior).initialize(batch)
    for name, wrong in (("label", torch.tensor([0, 3])), ("codes", [batch["codes"][0] + 3])):
        with pytest.raises(ValueError, match=r"must lie in \[0, 3\)"):
            PriorLoss(prior).initialize(batch | {name: wrong})


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_micro_batches_are_not_replayed_from_graphs(mode):
    with pytest.raises(
        ValueError, match=f"compile_mode {mode} .*gradient_accumulation_steps is 2; take compile_mode default"
    ):
        TrainingConfig(compile=True, compile_mode=mode, gradient_accumulation_steps=2)
    TrainingConfig(compile=True, compile_mode=mode)
    TrainingConfig(compile_mode=mode, gradient_accumulation_steps=2)
    TrainingConfig(compile=True, gradient_accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("model", ["vqvae-ema_vq", "vqvae2", "dvaepp", "gpt", "rbm"])
def test_a_compiled_model_trains_alike_and_is_saved_under_the_same_names(model, mode, tmp_path):
    compiled = train(model, tmp_path / "compiled", replace(CONFIG, compile=True, compile_mode=mode))
    plain = train(model, tmp_path / "plain")
    assert compiled.weights.keys() == plain.weights.keys()
    # the compiler's random numbers are its own
    assert compiled.metrics["nll"] == pytest.approx(plain.metrics["nll"], rel=0.02 if model == "dvaepp" else 1e-3)


# --- sharding -------------------------------------------------------------------------------------------------------


def test_a_run_is_not_continued_with_as_many_other_images(tmp_path, monkeypatch):
    train("gpt", tmp_path / "earlier")  # whose state does not say what the data were
    monkeypatch.setattr(Codes, "contents", "some", raising=False)
    assert train("gpt", tmp_path / "earlier").steps_run == 0
    train("gpt", tmp_path / "later")
    monkeypatch.setattr(Codes, "contents", "others")
    with pytest.raises(ValueError, match=r"another configuration \(training data: some -> others"):
        train("gpt", tmp_path / "later")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
@pytest.mark.parametrize("quantizer", ["ema_vq", "residual"])
def test_a_compiled_quantizer_is_not_compiled_anew_for_each_micro_batch(quantizer):
    quantizer = build("quantizer", QUANTIZERS, {"type": quantizer, **tiny.QUANTIZERS[quantizer]})
    compiled, h = torch.compile(quantizer, backend="eager"), torch.randn(2, 4, 3, 3, requires_grad=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(12):
            compiled(h)
    quantizer.after_step()


@pytest.mark.parametrize("model", ["vqvae-fsq", "vqvae-ema_vq", "dvaepp"])
def test_training_goes_on_from_loaded_weights_as_they_are(model, tmp_path):
    objective, train_data, validation_data = make(model)
    objective.initialize(train_data.collate(train_data.__getitems__([(0, 0), (1, 1), (2, 2)])))
    weights = copy.deepcopy(objective.model.state_dict())
    for loaded in (objective.model, make(model)[0].model):
        loaded.load_state_dict(weights)
        TokenizerLoss(loaded).initialize(validation_data.collate(validation_data.__getitems__([0, 1, 2])))
        assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())


def test_what_fsdp_cannot_shard_is_said_before_it_fails(tmp_path, monkeypatch):
    """FSDP itself needs GPUs: here is what comes before it."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"\(model\.likelihood\.scale_parameter\); launch without --use_fsdp"):
        train("vqvae", tmp_path)


def test_weights_are_laid_out_for_convolutions_and_for_fsdp():
    objective, _, _ = make("vqvae")
    weights = [parameter for parameter in objective.parameters() if parameter.dim() == 4]
    assert len(weights) > 5
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    del objective.model.likelihood.scale_parameter
    make_shardable(objective)
    assert all(parameter.is_contiguous() for parameter in objective.parameters())
