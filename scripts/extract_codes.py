"""Writes the codes of another split or data set with a trained tokenizer.

    accelerate launch scripts/extract_codes.py --run runs/mnist-vqvae --split test
    accelerate launch scripts/extract_codes.py --data.name folder --data.root photos --split all

Images are prepared as the tokenizer's own training images were; data.* defaults to the data of the run. An interrupted
dump continues when the command is run again.
"""

from dataclasses import dataclass
from typing import Literal

from pipelines.checkpoint import fingerprint, load_tokenizer
from pipelines.code_writing import write_codes
from pipelines.config import parse, peek
from pipelines.images import DataConfig
from pipelines.launch import make_accelerator
from pipelines.runs import find_run, load_images_for, output_folder, saved_data_section
from pipelines.scripting import Outcome, run_script, say_unused_captions
from pipelines.training_config import TrainingConfig

TOKENIZER = "tokenizer/config.json"


@dataclass
class Options:
    """What is encoded, and where to.

    Args:
        run: run folder of the tokenizer; default the newest under runs/.
        split: which images; all is every image of a folder that is not divided into splits.
        output: folder of the codes; default RUN/codes/SPLIT.
        batch_size: images encoded at a time by each process.
        num_workers: worker processes that read images.
        overwrite: replace codes of another tokenizer that lie in the folder.
        cpu: encode on the CPU even where there is an accelerator.
    """

    run: str | None = None
    split: Literal["train", "validation", "test", "all"] = "test"
    output: str | None = None
    batch_size: int = 256
    num_workers: int = 0
    overwrite: bool = False
    cpu: bool = False


def data_of_the_run() -> dict:
    return saved_data_section(find_run(peek("run"), TOKENIZER))


def main() -> Outcome | None:
    config = parse(__doc__, {"data": DataConfig}, Options, defaults=data_of_the_run)
    run = find_run(config["run"], TOKENIZER)
    output = output_folder(config["output"], run / "codes" / config["split"])
    accelerator = make_accelerator(TrainingConfig(cpu=config["cpu"], tracker="none"), output)

    tokenizer = load_tokenizer(run / "tokenizer").to(accelerator.device)
    images = load_images_for(tokenizer, DataConfig(**config["data"]), config["split"], run=run)
    say_unused_captions(images)
    write_codes(
        output,
        tokenizer,
        images,
        split=config["split"],
        tokenizer_folder=run / "tokenizer",
        fingerprint=fingerprint(tokenizer),
        batch_size=config["batch_size"],
        num_workers=config["num_workers"],
        accelerator=accelerator,
        overwrite=config["overwrite"],
    )
    if not accelerator.is_main_process:
        return None
    levels = [f"{shape} of {size}" for shape, size in zip(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes)]
    return Outcome({"output": str(output), "split": config["split"], "images": len(images), "levels": levels})


if __name__ == "__main__":
    run_script(main)
