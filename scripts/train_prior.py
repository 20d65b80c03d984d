"""Stage two: trains a prior over the codes of a tokenizer.

    accelerate launch scripts/train_prior.py
    accelerate launch scripts/train_prior.py --run runs/mnist-vqvae --prior.type pixelcnn

Takes the newest run's codes when told nothing else, and makes its folder one that Pipeline.from_pretrained loads. For
codes of the digits the defaults are those of scripts/configs/digits_gpt.yaml. Run again, the command continues.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.belonging import check_codes_belong
from pipelines.checkpoint import build_prior, check_model_folders, fingerprint, load_tokenizer, save_model
from pipelines.codes import CodeDataset
from pipelines.conditions import condition_on
from pipelines.config import Polymorphic, parse, peek
from pipelines.files import read_json
from pipelines.launch import make_accelerator
from pipelines.objectives import PriorLoss, unigram_nats_per_code
from pipelines.pictures import save_samples
from pipelines.pipeline_index import TEXT_TOKENIZER
from pipelines.runs import CODES, adopt_data_section, digits_recipe, find_codes, output_folder, save_config
from pipelines.scripting import Outcome, run_script
from pipelines.stages import save_stage_two
from pipelines.text import TextConfig
from pipelines.training import Update, adamw, describe, fit
from pipelines.training_config import TrainingConfig
from prior import PRIORS

DIGITS_RECIPE = Path(__file__).parent / "configs" / "digits_gpt.yaml"


@dataclass
class Options:
    """The run.

    Args:
        run: run folder of stage one; default the newest under runs/ that has codes.
        output: folder for the prior; default that of stage one. Another one receives a copy of the tokenizer.
        class_conditional: condition the prior on the class labels, where the codes have them.
        text_conditional: condition the prior on the captions, in place of labels, where the codes have them.
    """

    run: str | None = None
    output: str | None = None
    class_conditional: bool = True
    text_conditional: bool = True


def recipe() -> dict:
    return digits_recipe(DIGITS_RECIPE, read_json(find_codes(peek("run")) / CODES)["dataset"]["name"])


def main() -> Outcome | None:
    sections = {"prior": Polymorphic(PRIORS, "gpt"), "text": TextConfig, "training": TrainingConfig}
    config = parse(__doc__, sections, Options, defaults=recipe)
    run = find_codes(config["run"])
    folder = output_folder(config["output"], run)
    training = TrainingConfig(**config["training"])
    accelerator = make_accelerator(training, folder / "stage_two")
    check_model_folders(folder / "tokenizer", folder / "prior")

    # Codes, and the tokenizer that they came from
    train_codes, validation_codes = (CodeDataset(run / "codes" / split) for split in ("train", "validation"))
    tokenizer = load_tokenizer(run / "tokenizer").to(accelerator.device)
    check_codes_belong(tokenizer, train_codes, validation_codes)
    if (folder / "tokenizer").is_dir() and fingerprint(load_tokenizer(folder / "tokenizer")) != train_codes.fingerprint:
        raise ValueError(
            f"{folder} holds another tokenizer than that of {run}, which it would lose; name another --output"
        )

    # What the prior is conditional on
    condition = condition_on(
        train_codes,
        validation_codes,
        config["prior"]["type"],
        TextConfig(**config["text"]) if config["text_conditional"] else None,
        classes=config["class_conditional"],
    )
    for line in condition.lines:
        accelerator.print(line)

    # Model
    torch.manual_seed(training.seed)
    implied = {"spec": train_codes.spec, "tokenizer_fingerprint": train_codes.fingerprint, **condition.implied}
    prior = build_prior({**config["prior"], **implied})
    objective = PriorLoss(prior, unigram_nll=unigram_nats_per_code(train_codes, validation_codes))
    accelerator.print(describe(accelerator, prior, train_codes, validation_codes))

    # Training
    result = fit(
        accelerator,
        [Update("prior", objective, adamw(objective, training))],
        train_codes,
        validation_codes,
        folder=folder / "stage_two",
        config=training,
        resolved={
            **config,
            "run": None,
            "output": None,
            "codes": train_codes.fingerprint,
            "captions": condition.text_tokenizer and condition.text_tokenizer.fingerprint,
        },
        on_start=lambda: save_config(folder / "stage_two" / "config.yaml", config),
        on_evaluate=lambda step, model: save_samples(
            model, tokenizer, folder / f"stage_two/samples/{step:07d}.png", captions=condition.captions
        ),
    )

    # Model folder
    if not accelerator.is_main_process:
        return None
    prior = build_prior({**config["prior"], **implied})
    prior.load_state_dict(result.weights)
    in_place = folder.resolve() == run.resolve()
    if in_place and fingerprint(load_tokenizer(run / "tokenizer")) != fingerprint(tokenizer):
        raise ValueError(
            f"the tokenizer in {run} was trained anew while this prior trained on the old one's codes, so they are "
            f"no pipeline; for a prior over the new codes, give another --output, or remove {folder / 'stage_two'}"
        )
    if not in_place:
        save_model(tokenizer, folder / "tokenizer")
        adopt_data_section(run, folder)
    save_model(prior, folder / "prior")
    if condition.text_tokenizer is not None:
        condition.text_tokenizer.save_pretrained(folder / TEXT_TOKENIZER)
    save_stage_two(folder, tokenizer.cpu(), prior, train_codes.class_names, result.metrics, condition.text_tokenizer)
    pictures = [str(save_samples(prior, tokenizer, folder / "samples.png", captions=condition.captions))]
    following = {"pictures": pictures, "next": shlex.join(["python", "scripts/evaluate.py", "--run", str(folder)])}
    return Outcome({"output": str(folder), **result.summary(), **following})


if __name__ == "__main__":
    run_script(main)
