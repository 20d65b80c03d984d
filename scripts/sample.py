"""Draws images from a saved pipeline and writes them as one PNG, and as a GIF of their codes arriving if asked.

python scripts/sample.py --run runs/digits-vqvae --num_images 64 --temperature 0.9
python scripts/sample.py --run user/name --class_labels '[3, 7]' --output three_and_seven.png
python scripts/sample.py --run runs/scenes-vqvae --prompts "a three left of a seven" --guidance_scale 2
python scripts/sample.py --class_grid true --guidance_scale 3 --guidance_schedule linear --min_p 0.05
python scripts/sample.py --num_images 16 --columns 4 --animation codes.gif
python scripts/sample.py --run runs/mnist-dvaepp --resample local
accelerate launch scripts/sample.py --num_images 1024 --columns 32

Several processes share the images; image i is the same on any number of them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from pipelines.animation import CodeRecording, save_animation
from pipelines.config import parse, peek
from pipelines.labels import labels_as_typed
from pipelines.masks import check_geometry
from pipelines.pictures import check_picture, class_columns, save_grid
from pipelines.pipeline_index import INDEX_NAME
from pipelines.runs import find_run, load_pipeline
from pipelines.scripting import Outcome, check_seed, run_script
from pipelines.shards import Shards

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "guidance_scale", "guidance_schedule", "batch_size")


@dataclass
class Options:
    """What is drawn, and how.

    Args:
        run: run folder, pipeline folder or hub id; default the newest pipeline under runs/.
        num_images: number of images; default 64, or as many as class labels or prompts are listed.
        class_labels: class name or number for all images, or a list of them, one per image; default drawn uniformly.
            Where classes have names that are numbers, a number is the name.
        prompts: caption for all images, or a list of them, one per image, where the prior is conditional on captions.
        temperature: divides the logits; 0 takes the most probable code each time.
        top_k: keep only the k most probable codes.
        top_p: keep the smallest set of codes whose probability reaches p.
        min_p: keep the codes at least min_p times as probable as the most probable one.
        guidance_scale: classifier-free guidance; 1 is off.
        guidance_schedule: constant; linear, growing from 1 over the sequence of codes; or [start, end], fractions of
            the sequence between which the scale is not 1.
        seed: seed of the samples.
        batch_size: images computed at a time.
        resample: all; or local, where each row of the picture is one thing in several poses: its images share their
            codes, and only what the decoder draws of its own differs. Labels or prompts listed are then those of rows.
        columns: images in a row of the picture; default 8.
        class_grid: a column for each class (those listed, or all) with its name above; num_images is then that of each
            class, default 8.
        output: the picture.
        animation: a GIF of the images' codes arriving; needs a batch_size of at least num_images.
        device: where to compute; default an accelerator if there is one.
    """

    run: str | None = None
    num_images: int | None = None
    class_labels: list[str | int] | str | int | None = None
    prompts: list[str] | str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance_scale: float = 1.0
    guidance_schedule: Literal["constant", "linear"] | tuple[float, float] = "constant"
    seed: int = 0
    batch_size: int = 64
    resample: Literal["all", "local"] = "all"
    columns: int | None = None
    class_grid: bool = False
    output: str = "samples.png"
    animation: str | None = None
    device: str | None = None


def main() -> Outcome | None:
    config = parse(__doc__, {}, Options)
    if config["prompts"] is None:
        config["prompts"] = peek("prompts")  # the word null is a caption too
    if config["class_grid"] and config["columns"] is not None and config["resample"] == "all":
        raise ValueError("--class_grid has a column for each class; leave out --columns")
    output, columns, names = Path(config["output"]), 8 if config["columns"] is None else config["columns"], []
    check_picture(output, columns)
    check_seed(config["seed"])
    if config["num_images"] is not None and config["num_images"] < 1:
        raise ValueError(f"num_images must be at least 1, got {config['num_images']}")
    for name in ("class_labels", "prompts"):
        if config[name] == []:
            raise ValueError(f"{name} must hold at least one, got none")
    if config["animation"] is not None:
        check_picture(Path(config["animation"]), suffix=".gif")
    shards = Shards(config["device"])
    run = find_run(None, INDEX_NAME) if config["run"] is None else config["run"]
    pipeline = load_pipeline(run, shards.device)
    pipeline.set_progress_bar_config(disable=None if shards.is_first else True)  # in a terminal only

    num_images, prompts = config["num_images"], config["prompts"]
    labels = labels_as_typed(config["class_labels"], pipeline.class_names)
    local = config["resample"] == "local"
    size = columns if local else 1  # of what is drawn together: a row of images with the same codes, or an image
    for name in ("class_grid", "animation"):
        if local and config[name]:
            raise ValueError(f"{name} shows each image's codes, and resample local draws them once for a row; drop one")
    if config["class_grid"]:
        labels, names = class_columns(pipeline, labels, rows=8 if num_images is None else num_images)
        columns, num_images = len(names), len(labels)
    listed = labels if prompts is None else prompts
    if num_images is None:
        num_images = size * len(listed) if isinstance(listed, list) else 64
    num_draws = -(-num_images // size)
    if isinstance(listed, list) and len(listed) != num_draws:  # all of them: a process sees those of its share alone
        what, each = (f"{num_draws} rows of {size} images", "row") if local else (f"{num_draws} images", "image")
        raise ValueError(f"got {len(listed)} labels or prompts for {what}; give one per {each}, or one for all")
    recording = None
    if config["animation"] is not None:
        if shards.num_processes > 1 or num_images > config["batch_size"]:
            raise ValueError("an animation shows one batch of one process; raise batch_size or lower num_images")
        check_geometry(pipeline.tokenizer)  # before anything is drawn
        recording = CodeRecording(pipeline.prior.spec)

    share = shards.share(num_draws)
    labels, prompts = ([x[i] for i in share] if isinstance(x, list) and len(x) == num_draws else x
                       for x in (labels, prompts))  # fmt: skip
    generators = shards.generators(num_draws, config["seed"])
    draw = partial(pipeline.sample, **{name: config[name] for name in SAMPLING}, output_type="pt")
    if local:
        pipeline.set_progress_bar_config(disable=True)
        rows = zip(generators, *(x if isinstance(x, list) else [x] * len(share) for x in (labels, prompts)))
        rows = tqdm(rows, "sampling", len(share), unit="row", disable=None if shards.is_first else True)
        images = torch.cat([draw(size, label, prompts=p, generator=g, resample="local") for g, label, p in rows])
    else:
        images = draw(len(share), labels, prompts=prompts, generator=generators, codes_callback=recording)
    images = shards.gather(images, num_draws * size)[:num_images]
    if not shards.is_first:
        return None
    pictures = [save_grid(images, output, columns=columns, column_names=names)]
    if recording is not None:
        pictures.append(save_animation(recording, pipeline.tokenizer, Path(config["animation"]), columns=columns))
    return Outcome(
        {"run": str(run), "images": num_images, "seed": config["seed"], "pictures": list(map(str, pictures))}
    )


if __name__ == "__main__":
    run_script(main)
