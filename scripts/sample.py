"""Draws images from a saved pipeline and writes them as one PNG.

python scripts/sample.py --run runs/digits-vqvae --num_images 64 --temperature 0.9
python scripts/sample.py --run user/name --class_labels '[3, 7]' --output three_and_seven.png
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.config import parse
from pipelines.pictures import check_picture, save_grid
from pipelines.runs import choose_device, find_run, refuse_several_processes, run_script
from pipelines.two_stage import INDEX_NAME, Pipeline


@dataclass
class Options:
    """What is drawn, and how.

    Args:
        run: run folder, pipeline folder or hub id; default the newest pipeline under runs/.
        num_images: number of images; default 64, or as many as class labels are listed.
        class_labels: class number or name for all images, or a list of them, one per image; default drawn uniformly.
        temperature: divides the logits; 0 takes the most probable code each time.
        top_k: keep only the k most probable codes.
        top_p: keep the smallest set of codes whose probability reaches p.
        guidance_scale: classifier-free guidance; 1 is off.
        seed: seed of the samples.
        batch_size: images computed at a time.
        columns: images in a row of the picture.
        output: the picture.
        device: where to compute; default an accelerator if there is one.
    """

    run: str | None = None
    num_images: int | None = None
    class_labels: list[int | str] | int | str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int = 64
    columns: int = 8
    output: str = "samples.png"
    device: str | None = None


def main() -> None:
    refuse_several_processes()
    config = parse(__doc__, {}, Options)
    output = Path(config["output"])
    check_picture(output, config["columns"])
    run = config["run"] or find_run(None, INDEX_NAME)
    pipeline = Pipeline.from_pretrained(run, device=choose_device(config["device"]))
    pipeline.set_progress_bar_config(disable=None)  # in a terminal only
    listed = isinstance(config["class_labels"], list)
    num_images = 64 if config["num_images"] is None and not listed else config["num_images"]
    images = pipeline.sample(
        num_images,
        config["class_labels"],
        **{name: config[name] for name in ("temperature", "top_k", "top_p", "guidance_scale", "batch_size")},
        generator=torch.Generator().manual_seed(config["seed"]),
        output_type="pt",
    )
    print(save_grid(images, output, columns=config["columns"]))


if __name__ == "__main__":
    run_script(main)
