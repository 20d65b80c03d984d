"""Fills a region of images, continues them beyond their edges, or fills in between them; writes one PNG.

python scripts/complete.py --images '[seven.png, three.png]' --mask bottom --num_candidates 6
python scripts/complete.py --images photo.png --mask hole.png --num_candidates 64 --ranking importance --columns 8
python scripts/complete.py --images photo.png --mask '[8, 8, 24, 24]' --keep_known_pixels true
python scripts/complete.py --images photo.png --size '[64, 96]'
python scripts/complete.py --images '[seven.png, three.png, two.png]' --interpolate 8

A row of the picture is one image: the original, then what was hidden of it in grey, then its completions in the order
of --ranking. A prior in raster order does not look at what lies to the right of a hole or below it;
--ranking importance with many candidates does.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from pipelines.config import parse, peek, plain
from pipelines.labels import labels_as_typed
from pipelines.masks import as_mask, named_mask, open_image
from pipelines.pictures import check_picture, save_grid
from pipelines.pipeline_index import INDEX_NAME
from pipelines.runs import find_run, load_pipeline
from pipelines.scripting import Outcome, check_seed, choose_device, refuse_several_processes, run_script

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "guidance_scale", "guidance_schedule", "batch_size")
CONDITIONS = ("class_labels", "prompts", "num_candidates", "keep_known_pixels")
# By task, the options of a task that it uses; those that are in no row are for all
USED = {
    "mask": {*SAMPLING, *CONDITIONS, "ranking", "columns"},
    "size": {*SAMPLING, *CONDITIONS, "position", "stride"},
    "interpolate": set(),
}


@dataclass
class Options:
    """What is completed, and how: exactly one of mask, size and interpolate.

    Args:
        images: image file, or a list of them; prepared as the tokenizer's training images were.
        run: run folder, pipeline folder or hub id; default the newest pipeline under runs/.
        mask: fill this region: top, bottom, left or right (half); [top, left, bottom, right] in pixels; or an image
            file, white where pixels are to be filled.
        size: continue the images onto a canvas of [height, width] pixels.
        position: where on the canvas the images lie, [top, left] in pixels.
        stride: pixels by which the window moves over the canvas; default half the shorter side of an image.
        interpolate: that many images on the way from each image to the next.
        class_labels: class name or number for all images, or a list of them; default each candidate draws its own.
            Where classes have names that are numbers, a number is the name.
        prompts: caption for all images, or a list of them, where the prior is conditional on captions.
        num_candidates: completions of each image; of each window of a canvas, one of which is taken.
        ranking: the completions come in the order of their probability (log_prob), or in a random order, drawn with
            weights by how well what is known after the region follows from them (importance).
        columns: completions shown of each image; default all.
        keep_known_pixels: show the images' own pixels wherever they are known, not decoded ones.
        temperature: divides the logits; 0 takes the most probable code each time.
        top_k: keep only the k most probable codes.
        top_p: keep the smallest set of codes whose probability reaches p.
        min_p: keep the codes at least min_p times as probable as the most probable one.
        guidance_scale: classifier-free guidance; 1 is off.
        guidance_schedule: constant; linear, growing from 1 over the sequence of codes; or [start, end], fractions of
            the sequence between which the scale is not 1.
        seed: seed of the completions.
        batch_size: images computed at a time.
        output: the picture.
        device: where to compute; default an accelerator if there is one.
    """

    images: list[str] | str
    run: str | None = None
    mask: list[int] | str | None = None
    size: tuple[int, int] | None = None
    position: tuple[int, int] = (0, 0)
    stride: int | None = None
    interpolate: int | None = None
    class_labels: list[str | int] | str | int | None = None
    prompts: list[str] | str | None = None
    num_candidates: int = 4
    ranking: Literal["log_prob", "importance"] = "log_prob"
    columns: int | None = None
    keep_known_pixels: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance_scale: float = 1.0
    guidance_schedule: Literal["constant", "linear"] | tuple[float, float] = "constant"
    seed: int = 0
    batch_size: int = 64
    output: str = "completed.png"
    device: str | None = None


def main() -> Outcome:
    refuse_several_processes()
    config = parse(__doc__, {}, Options)
    if config["prompts"] is None:
        config["prompts"] = peek("prompts")  # the word null is a caption too
    output = Path(config["output"])
    check_picture(output, 1 if config["columns"] is None else config["columns"])
    check_seed(config["seed"])
    tasks = [name for name in ("mask", "size", "interpolate") if config[name] is not None]
    if len(tasks) != 1:
        raise ValueError(f"give exactly one of --mask, --size and --interpolate, got {', '.join(tasks) or 'none'}")
    refuse_options_of_others(tasks[0], config)
    paths = config["images"] if isinstance(config["images"], list) else [config["images"]]
    if config["interpolate"] is not None and len(paths) < 2:
        raise ValueError("interpolation needs at least two images")
    pictures = [open_image(path) for path in paths]
    run = find_run(None, INDEX_NAME) if config["run"] is None else config["run"]
    pipeline = load_pipeline(run, choose_device(config["device"]))
    pipeline.set_progress_bar_config(disable=None)  # in a terminal only
    options = {name: config[name] for name in (*SAMPLING, *CONDITIONS)}
    options["class_labels"] = labels_as_typed(config["class_labels"], pipeline.class_names)
    options |= {"generator": torch.Generator().manual_seed(config["seed"]), "output_type": "pt"}

    results = {}
    if config["mask"] is not None:
        mask = named_mask(config["mask"], pipeline.tokenizer)
        completions = pipeline.complete(pictures, mask, ranking=config["ranking"], **options)
        results["log_prob"] = completions.log_prob.tolist()
        if completions.weights is not None:
            results["weights"] = completions.weights.tolist()
        candidates = completions.images.unflatten(0, (len(pictures), -1))[:, : config["columns"]]
        originals, hidden = pipeline.prepare(pictures).cpu(), as_mask(mask, len(pictures), pipeline.tokenizer)
        rows = torch.cat([originals[:, None], originals.where(~hidden, 0.5)[:, None], candidates], dim=1)
    elif config["size"] is not None:
        where = {name: config[name] for name in ("position", "stride")}
        rows = pipeline.outpaint(pictures, config["size"], **where, **options)[None]
    else:
        pairs = [pipeline.interpolate(*pair, config["interpolate"], output_type="pt") for pair in pairwise(pictures)]
        rows = torch.stack(pairs)
    picture = save_grid(rows.flatten(0, 1), output, columns=rows.shape[1])
    return Outcome(
        {"run": str(run), "images": len(pictures), **results, "seed": config["seed"], "pictures": [str(picture)]}
    )


def refuse_options_of_others(task: str, config: dict) -> None:
    """Raises ValueError for options that would change nothing, because only other tasks use them."""
    unused = set().union(*USED.values()) - USED[task]
    given = [f.name for f in fields(Options) if f.name in unused and config[f.name] != plain(f.default)]
    if given:
        raise ValueError(f"--{task} makes no use of {', '.join(f'--{name}' for name in given)}; leave it out")


if __name__ == "__main__":
    run_script(main)
