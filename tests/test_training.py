"""The loop: order of data, exact continuation, accumulation, averages, and what it refuses."""

import json
import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipelines.batches import StepBatches
from pipelines.checkpoint import build_prior, build_tokenizer
from pipelines.ema import EMA
from pipelines.files import folder_lock
from pipelines.images import DataConfig, load_images
from pipelines.launch import cpu_computes_bf16, make_accelerator
from pipelines.objectives import PriorLoss, TokenizerLoss
from pipelines.training import NonFiniteLossError, TrainingConfig, Update, adamw, evaluate, fit
from tests import tiny
from tokenizer.quantizers import QUANTIZERS

CONFIG = TrainingConfig(
    total_steps=6, batch_size=8, warmup_steps=2, eval_every=3, save_every=2, log_every=2, tracker="none", cpu=True
)
DATA = DataConfig(max_images=20, horizontal_flip=True, crop_padding=1)
MODELS = [f"vqvae-{name}" for name in sorted(QUANTIZERS)] + ["vqvae2", "pixelcnn", "gpt"]


class Codes(torch.utils.data.Dataset):
    """Twenty random code maps with labels."""

    spec = tiny.SPECS["levels"]

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
        train, validation = load_images(DATA, "train"), load_images(DATA, "validation")
        options = {**tiny.TOKENIZERS[name], "image_shape": train.image_shape}
        if quantizer:
            options["quantizer"] = {"type": quantizer, **tiny.QUANTIZERS[quantizer]}
        return TokenizerLoss(build_tokenizer({"type": name, **options})), train, validation
    dropout = dict.fromkeys(("dropout", "class_dropout"), 0.3 if noise else 0.0)
    options = {**tiny.PRIORS[name], **dropout, "num_classes": 2, "spec": Codes.spec}
    return PriorLoss(build_prior({"type": name, **options})), Codes(), Codes()


def train(model: str, folder, config: TrainingConfig = CONFIG, on_evaluate=None, change=lambda objective: None):
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
        on_evaluate=on_evaluate,
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


def test_another_configuration_is_refused_by_name(tmp_path):
    train("gpt", tmp_path)
    with pytest.raises(ValueError, match=r"training.learning_rate: 0.001 -> 0.5.*--output"):
        train("gpt", tmp_path, replace(CONFIG, learning_rate=0.5))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with folder_lock(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        train("gpt", tmp_path)


# What a step does
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["vqvae-ema_vq", "vqvae-vq", "vqvae2"])
def test_two_accumulated_micro_batches_equal_one_batch(model, tmp_path):
    train(model, tmp_path / "one")
    train(model, tmp_path / "two", replace(CONFIG, gradient_accumulation_steps=2))
    one, two = final_tensors(tmp_path / "one"), final_tensors(tmp_path / "two")
    for name in one:  # another order of float32 sums; Adam divides by small second moments
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-3, msg=name)


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
    assert evaluate(accelerator, prior, data, 8)["nll"] == pytest.approx(result.metrics["nll"], abs=1e-6)


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
    metrics, whole = (evaluate(accelerator, objective, data, size) for size in (batch_size, len(data)))
    assert metrics == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("field", "value"), [("total_steps", 0), ("batch_size", 0), ("ema_decay", 1.0)])
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"training.{field}.*{value}"):
        replace(CONFIG, **{field: value})


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


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vqvae-ema_vq", "gpt"])
def test_a_compiled_model_trains_alike_and_is_saved_under_the_same_names(model, tmp_path):
    compiled = train(model, tmp_path / "compiled", replace(CONFIG, compile=True))
    plain = train(model, tmp_path / "plain")
    assert compiled.weights.keys() == plain.weights.keys()
    assert compiled.metrics["nll"] == pytest.approx(plain.metrics["nll"], rel=1e-3)
