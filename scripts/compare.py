"""Compares models on one page: trains and evaluates what is missing, all at equal data and budget, all measured alike.

    python scripts/compare.py --entries scripts/configs/comparison_mnist.yaml
    python scripts/compare.py --entries scripts/configs/comparison_mnist.yaml --data.root path/to/data --num_draws 100
    python scripts/compare.py --runs '[runs/mnist-dvaepp, runs/mnist-gaussian_vae]' --output runs/two

An entries file lists models, a few lines each; --data.*, --stage_one.* and --stage_two.* change what is common to them.
Run folders are taken as they are, with the evaluation that they have; their images must be the same as all others'.
Run again, the command continues; what is finished is not done again. OUTPUT receives comparison.html, one file that
needs no network, comparison.md, comparison.json, and a folder for each model, which is a run like any other. If a model
fails, the others go on.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pipelines.comparison.checks import check_before
from pipelines.comparison.entries import read_entries, resolve
from pipelines.comparison.findings import collect
from pipelines.comparison.grids import Grids, draw_all
from pipelines.comparison.page import write_page
from pipelines.comparison.progress import Progress
from pipelines.comparison.report import as_json, terminal_table
from pipelines.comparison.running import IN_WORDS, Runner, members_of
from pipelines.config import parse, peek
from pipelines.evaluation.evaluate import Group
from pipelines.files import folder_lock, write_json_atomic
from pipelines.images import DataConfig
from pipelines.images import Split as ImageSplit
from pipelines.runs import RUNS, output_folder
from pipelines.scripting import Outcome, choose_device, refuse_several_processes, run_script
from pipelines.training_config import TrainingConfig

EVALUATION = ("split", "metrics", "num_draws", "num_samples", "inception_weights", "lpips_weights", "cache", "seed",
              "batch_size", "device")  # fmt: skip
DATA_SOURCE = ("root", "download", "cache_bytes")


@dataclass
class Options:
    """What is compared, and how it is measured.

    Args:
        entries: YAML file of models to train, see scripts/configs/comparison_mnist.yaml.
        runs: run folders to compare, with those models or without.
        output: folder of the comparison; default runs/NAME of the entries file, or runs/comparison.
        title: of the page; default that of the entries file, or the name of the output folder.
        split: which images are evaluated.
        metrics: groups to measure, of likelihood, reconstruction, codebook, samples, memorisation, local; default all.
        num_draws: draws of codes per image for the bound, where the encoder is stochastic.
        num_samples: samples drawn for samples, memorisation and local.
        inception_weights: safetensors file for FID, or download.
        lpips_weights: safetensors file of AlexNet for LPIPS, or download.
        cache: folder where reference statistics and classifiers are kept.
        seed: of draws, samples and the classifier.
        batch_size: images computed at a time in the evaluation, and for the pictures.
        device: where to evaluate; default an accelerator if there is one.
    """

    entries: str | None = None
    runs: list[str] | str | None = None
    output: str | None = None
    title: str | None = None
    split: ImageSplit = "test"
    metrics: list[Group] | Group | None = None
    num_draws: int = 1
    num_samples: int = 1000
    inception_weights: str | None = None
    lpips_weights: str | None = None
    cache: str = "runs/.evaluation_cache"
    seed: int = 0
    batch_size: int = 128
    device: str | None = None


def main() -> Outcome:
    refuse_several_processes()
    entries = None if (path := peek("entries")) is None else read_entries(path)
    sections = {"data": DataConfig, "stage_one": TrainingConfig, "stage_two": TrainingConfig} if entries else {}
    config = parse(__doc__, sections, Options, defaults=lambda: {name: entries[name] for name in sections})
    runs = [config["runs"]] if isinstance(config["runs"], str) else config["runs"] or []
    if not runs and entries is None:
        raise ValueError("nothing to compare; give --entries FILE, --runs '[FOLDER, FOLDER]' or both")
    if isinstance(config["metrics"], str):
        config["metrics"] = [config["metrics"]]
    device = choose_device(config["device"])
    output = output_folder(config["output"], RUNS / (Path(path).stem if path else "comparison"))

    models = [] if entries is None else resolve(entries["models"], **{name: config[name] for name in sections})
    members = members_of(models, runs, output)
    source = {name: config["data"][name] for name in DATA_SOURCE} if models else {}
    runner = Runner(
        output,
        scripts=Path(__file__).parent,
        evaluation={name: config[name] for name in EVALUATION},
        data_source={f"data.{name}": value for name, value in source.items()},
    )
    check_before(members, runner, config["data"] if models else None)
    with folder_lock(output):
        # Training and evaluation of what is missing
        steps = {name: config[name]["total_steps"] for name in sections if name != "data"}
        failures = runner.run(members, Progress(steps=steps, in_words=IN_WORDS, seconds=runner.seconds(members)))

        # Table, pictures, page
        findings = collect(members, failures)
        options = {name: config[name] for name in ("split", "seed", "batch_size")} | {"device": device}
        grids = Grids(output / "pictures", **options, data_source=source)
        pictures = draw_all(grids, findings)
        title = config["title"] or (entries and entries["title"]) or output.resolve().name
        command = shlex.join(["python", *sys.argv])
        write_page(findings, output, title=title, command=command, pictures=pictures)
        result = as_json(findings, title=title, command=command)
        write_json_atomic(output / "comparison.json", result)
    pages = f"the page is {output / 'comparison.html'}, for other pages {output / 'comparison.md'}"
    error = None
    if failures:
        listed = "; ".join(
            f"{name} in {IN_WORDS[failure.stage]}: {failure.reason}" for name, failure in failures.items()
        )
        error = f"{len(failures)} of {len(members)} models failed ({listed}); their logs are in {output / 'logs'}"
    return Outcome(result, text=f"{terminal_table(findings)}\n{pages}", error=error)


if __name__ == "__main__":
    run_script(main)
