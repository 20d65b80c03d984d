"""Stage one: trains a tokenizer on images and writes their codes to disk.

    accelerate launch scripts/train_tokenizer.py
    accelerate launch scripts/train_tokenizer.py --config scripts/configs/mnist_vqvae.yaml --training.total_steps 5000

Without --config and --data.name, the embedded digits with the recipe scripts/configs/digits_vqvae.yaml. The same
command run again continues where it stopped. The run folder receives tokenizer/, codes/train/, codes/validation/ and
stage_one/ (log, pictures, states).
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.checkpoint import build_tokenizer_for, check_model_folders, fingerprint, save_model
from pipelines.code_writing import fitting_batch_size, write_codes
from pipelines.codes import smallest_dtype
from pipelines.config import Polymorphic, parse, peek
from pipelines.images import DataConfig, load_images
from pipelines.launch import make_accelerator
from pipelines.objectives import TokenizerLoss
from pipelines.pictures import save_reconstructions, save_samples
from pipelines.runs import RUNS, digits_recipe, output_folder, save_config
from pipelines.scripting import Outcome, run_script, say_skipped, say_unused_captions
from pipelines.stages import save_stage_one
from pipelines.training import Update, adamw, describe, fit
from pipelines.training_config import TrainingConfig
from prior.uniform import Uniform
from tokenizer import TOKENIZERS

DIGITS_RECIPE = Path(__file__).parent / "configs" / "digits_vqvae.yaml"


@dataclass
class Options:
    """The run.

    Args:
        output: run folder; default runs/DATA-TOKENIZER.
    """

    output: str | None = None


def main() -> Outcome | None:
    sections = {"data": DataConfig, "tokenizer": Polymorphic(TOKENIZERS, "vqvae"), "training": TrainingConfig}
    config = parse(__doc__, sections, Options, defaults=lambda: digits_recipe(DIGITS_RECIPE, peek("data.name")))
    folder = output_folder(config["output"], RUNS / f"{config['data']['name'].lower()}-{config['tokenizer']['type']}")
    training = TrainingConfig(**config["training"])
    accelerator = make_accelerator(training, folder / "stage_one")
    check_model_folders(folder / "tokenizer")

    # Data: one process downloads, and validation images take the size and channels found in the training images
    with accelerator.main_process_first():
        train_images = load_images(DataConfig(**config["data"]), "train")
        validation_images = load_images(train_images.config, "validation")
    say_skipped(train_images, validation_images)
    say_unused_captions(train_images, validation_images)

    # Model
    torch.manual_seed(training.seed)
    tokenizer = build_tokenizer_for(train_images, config["tokenizer"])
    if tokenizer.spec.is_discrete:
        for vocab_size in tokenizer.spec.vocab_sizes:
            smallest_dtype(vocab_size)  # codes that could not be stored are refused before training, not after
    objective = TokenizerLoss(tokenizer)
    captions = "with captions" if train_images.source.has_captions else "without captions"
    accelerator.print(f"{describe(accelerator, tokenizer, train_images, validation_images)}; images {captions}")

    # Training
    pictures = folder / "stage_one" / "samples"
    result = fit(
        accelerator,
        [Update("tokenizer", objective, adamw(objective, training))],
        train_images,
        validation_images,
        folder=folder / "stage_one",
        config=training,
        resolved=config,
        on_start=lambda: save_config(folder / "stage_one" / "config.yaml", config),
        on_evaluate=lambda step, model: save_reconstructions(model, validation_images, pictures / f"{step:07d}.png"),
    )

    # Model folder and codes
    outcome = Outcome({"output": str(folder), **result.summary(), "pictures": [str(folder / "reconstructions.png")]})
    tokenizer = build_tokenizer_for(train_images, config["tokenizer"])
    tokenizer.load_state_dict(result.weights)
    tokenizer.to(accelerator.device).eval()
    if accelerator.is_main_process:
        save_model(tokenizer, folder / "tokenizer")
        prior_is_old = save_stage_one(folder, tokenizer, train_images.class_names, result.metrics)
        save_reconstructions(tokenizer, validation_images, folder / "reconstructions.png")
        if not isinstance(tokenizer.prior, Uniform):
            save_samples(tokenizer.prior, tokenizer, folder / "samples.png")
            outcome.values["pictures"].append(str(folder / "samples.png"))
    if not tokenizer.spec.is_discrete:
        accelerator.print(
            f"the pipeline is in {folder}; its codes are real numbers, which are not stored: there is no stage two, "
            "and its prior is the one learned here"
        )
        return outcome if accelerator.is_main_process else None
    next_command = ["accelerate", "launch", "scripts/train_prior.py", "--run", str(folder)]
    if accelerator.is_main_process and prior_is_old:
        next_command += ["--output", f"{folder}-prior"]  # the old one's states are in this folder
    batch_size = training.batch_size // training.gradient_accumulation_steps // accelerator.num_processes
    for split, images in {"train": train_images, "validation": validation_images}.items():
        write_codes(
            folder / "codes" / split,
            tokenizer,
            images,
            split=split,
            tokenizer_folder=folder / "tokenizer",
            fingerprint=fingerprint(tokenizer),
            batch_size=fitting_batch_size(tokenizer, batch_size),
            accelerator=accelerator,
            num_workers=training.num_workers,
            overwrite=True,  # codes of the tokenizer that this one replaces
        )
    outcome.values |= {
        "codes": str(folder / "codes"),
        "next": shlex.join(next_command),
    }
    return outcome if accelerator.is_main_process else None


if __name__ == "__main__":
    run_script(main)
