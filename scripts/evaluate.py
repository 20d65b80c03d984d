"""Measures a pipeline on held-out images: reconstruction, codebook use, and a bound on log p(x) in nats and bits/dim.

    python scripts/evaluate.py --run runs/digits-vqvae --split test

The numbers go to RUN/evaluation.json and into the model card.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from pipelines.config import parse, peek
from pipelines.evaluation import evaluate_pipeline, format_table
from pipelines.files import write_json_atomic
from pipelines.images import DataConfig
from pipelines.runs import (
    choose_device,
    find_run,
    load_images_for,
    refuse_several_processes,
    run_script,
    saved_data_section,
)
from pipelines.two_stage import INDEX_NAME, Pipeline


@dataclass
class Options:
    """What is measured.

    Args:
        run: run folder; default the newest pipeline under runs/.
        split: which images.
        batch_size: images computed at a time.
        device: where to compute; default an accelerator if there is one.
        json: print JSON in place of a table.
    """

    run: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    batch_size: int = 128
    device: str | None = None
    json: bool = False


def data_of_the_run() -> dict:
    return saved_data_section(find_run(peek("run"), INDEX_NAME))


def main() -> None:
    refuse_several_processes()
    config = parse(__doc__, {"data": DataConfig}, Options, defaults=data_of_the_run)
    run = find_run(config["run"], INDEX_NAME)
    pipeline = Pipeline.from_pretrained(run, device=choose_device(config["device"]))
    images = load_images_for(pipeline.tokenizer, DataConfig(**config["data"]), config["split"])

    metrics = evaluate_pipeline(pipeline, images, batch_size=config["batch_size"])
    result = {"command": shlex.join(sys.argv), "data": images.identity, "metrics": metrics}
    write_json_atomic(run / "evaluation.json", result)
    pipeline.metrics |= {f"{config['split']} {name}": value for name, value in metrics.items()}
    pipeline.save_index(run)
    print(json.dumps(result) if config["json"] else format_table(metrics))


if __name__ == "__main__":
    run_script(main)
