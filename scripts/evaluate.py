"""Measures a pipeline: a bound on log p(x) in nats and bits/dim, reconstructions, samples, codebook, memorisation.

    python scripts/evaluate.py --run runs/digits-vqvae
    python scripts/evaluate.py --num_draws 100 --num_samples 10000 --ood noise
    python scripts/evaluate.py --metrics '[likelihood]' --json
    python scripts/evaluate.py --inception_weights download --lpips_weights download
    python scripts/evaluate.py --metrics '[likelihood]' --ais_temperatures 10000

The numbers go to RUN/evaluation.json, each with the protocol that it was measured by, and into the model card. Those of
groups that are not measured this time stay, as long as images and weights are the same. Pictures go to RUN/evaluation/:
of each codebook, and of samples, each above its nearest training images (first the samples that are nearest to any,
then others). Without the weights of Inception, FID is measured in the feature space of a small
classifier that is trained on the data set itself, and called fid_classifier. --data.max_images cuts the images to
evaluate alone: the training images that they are compared with stay those of the run.
"""

import shlex
import sys
from dataclasses import dataclass

from pipelines.checkpoint import weights_of
from pipelines.config import parse, peek
from pipelines.evaluation.evaluate import NEED_TRAINING_IMAGES, Group, evaluate
from pipelines.evaluation.likelihood import set_ais_sizes
from pipelines.evaluation.report import RESULT_NAME, dropped, earlier_result, format_summary, record, with_earlier
from pipelines.files import write_json_atomic
from pipelines.images import DataConfig
from pipelines.images import Split as ImageSplit
from pipelines.launch import end_with_the_launcher
from pipelines.pipeline_index import INDEX_NAME
from pipelines.runs import find_run, load_images_for, load_pipeline, saved_data_section, was_trained_on
from pipelines.scripting import (
    Outcome,
    check_seed,
    check_writable,
    choose_device,
    refuse_several_processes,
    run_script,
)
from pipelines.two_stage import Pipeline


@dataclass
class Options:
    """What is measured, and how.

    Args:
        run: run folder; default the newest pipeline under runs/.
        split: which images.
        metrics: groups to measure, of likelihood, reconstruction, codebook, samples, memorisation, local; default all.
        num_draws: draws of codes per image for the bound, where the encoder is stochastic.
        num_samples: samples drawn for samples, memorisation and local.
        ais_temperatures: of the estimate of log Z of a Boltzmann prior; default the model's own.
        ais_chains: of that estimate; default the model's own.
        ood: other data sets to tell from this one by log p(x): noise, a torchvision name (in data.root), or a folder.
        inception_weights: safetensors file for FID, or download.
        lpips_weights: safetensors file of AlexNet for LPIPS, or download.
        keep: whether numbers of earlier evaluations, of the same images and weights, stay beside those measured now.
        cache: folder where reference statistics and classifiers are kept.
        seed: of draws, samples and the classifier.
        batch_size: images computed at a time.
        device: where to compute; default an accelerator if there is one.
    """

    run: str | None = None
    split: ImageSplit = "test"
    metrics: list[Group] | Group | None = None
    num_draws: int = 1
    num_samples: int = 1000
    ais_temperatures: int | None = None
    ais_chains: int | None = None
    ood: list[str] | str | None = None
    inception_weights: str | None = None
    lpips_weights: str | None = None
    keep: bool = True
    cache: str = "runs/.evaluation_cache"
    seed: int = 0
    batch_size: int = 128
    device: str | None = None


def data_of_the_run() -> dict:
    return saved_data_section(find_run(peek("run"), INDEX_NAME))


def main() -> Outcome:
    refuse_several_processes()
    end_with_the_launcher()  # which compare.py is
    config = parse(__doc__, {"data": DataConfig}, Options, defaults=data_of_the_run)
    check_seed(config["seed"])
    run = find_run(config["run"], INDEX_NAME)
    check_writable(run / RESULT_NAME)
    if isinstance(config["metrics"], str):
        config["metrics"] = [config["metrics"]]
    pipeline = load_pipeline(run, choose_device(config["device"]))
    set_ais_sizes(pipeline.prior, **{name: config[name] for name in ("ais_temperatures", "ais_chains")})
    pipeline.set_progress_bar_config(disable=None)
    images = load_images_for(pipeline.tokenizer, DataConfig(**config["data"]), config["split"], run=run)
    train_images = None
    if config["metrics"] is None or set(config["metrics"]) & set(NEED_TRAINING_IMAGES):
        trained_on = config["data"] | {"max_images": saved_data_section(run)["data"].get("max_images")}
        train_images = load_images_for(pipeline.tokenizer, DataConfig(**trained_on), "train")
    options = (
        "metrics",
        "num_draws",
        "num_samples",
        "batch_size",
        "seed",
        "inception_weights",
        "lpips_weights",
        "cache",
    )

    result = {
        "command": shlex.join(["python", *sys.argv]),
        **evaluate(
            pipeline,
            images,
            train_images,
            trained_on_them=train_images is None or was_trained_on(run, train_images),
            ood=[config["ood"]] if isinstance(config["ood"], str) else config["ood"] or (),
            folder=run / "evaluation",
            **{name: config[name] for name in options},
        ),
    }
    now = Pipeline.from_pretrained(run)
    if weights_of(now) != result["weights"]:
        print(format_summary(result))
        raise ValueError(
            f"the models in {run} were trained anew while the old ones were measured: their numbers, shown above, are "
            "not recorded; evaluate again"
        )
    pipeline.metrics, pipeline.evaluations = now.metrics, now.evaluations  # with what others measured meanwhile
    places = [f"run: {run}"] + [f"picture: {run / 'evaluation' / name}" for name in result["pictures"].values()]
    earlier = earlier_result(pipeline, config["split"], result, run) if config["keep"] else None
    result = with_earlier(result, earlier)
    for line in dropped(pipeline, config["split"], result, run):
        print(line, file=sys.stderr)
    write_json_atomic(run / RESULT_NAME, result)
    record(pipeline, config["split"], result)
    pipeline.save_index(run)
    return Outcome(result, text="\n".join([format_summary(result), *places]))


if __name__ == "__main__":
    run_script(main)
