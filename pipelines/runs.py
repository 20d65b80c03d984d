"""Run folders and the manners of a script: where a run lies, what is kept of its configuration, how it ends."""

import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from pipelines.checkpoint import CONFIG_NAME, load_tokenizer
from pipelines.config import differences, flatten, has_config_file, peek, read_yaml, wants_json
from pipelines.evaluation.report import format_table
from pipelines.files import atomic_file, read_json
from pipelines.images import DataConfig, ImageDataset, contents_of, load_images
from pipelines.launch import exit_process
from tokenizer.base import Tokenizer

RUNS = Path("runs")
CODES = "codes/train/spec.json"
SHOWN = 8  # of a list in a table
# Fields of DataConfig by which images are prepared for a tokenizer; crop is for training, else always the centre
PREPARED_BY = ("image_size", "channels", "resize_filter", "binarize", "binarize_seed")


@dataclass
class Outcome:
    """What a script says at its end.

    values: what --json prints, on one line. text: what people read in its place; default a table of the values.
    error: what part of the work failed, for the exit status and standard error.
    """

    values: dict
    text: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        if self.text is not None:
            return self.text
        rows = flatten(self.values)
        return format_table({name: _in_words(value) for name, value in rows.items() if value is not None})


def _in_words(value):
    if isinstance(value, list):
        return ", ".join([*map(str, value[:SHOWN]), *(["..."] if len(value) > SHOWN else [])])
    return f"{value:,}" if isinstance(value, int) else value


def run_script(main: Callable[[], Outcome | None]) -> None:
    """Calls `main` and prints its outcome, as JSON if --json is given; then nothing else goes to standard output.

    A user's mistake ends with status 1 and one line, unless TESSERA_TRACEBACK is set.
    """
    as_json = wants_json()
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            outcome = main()
        if outcome is not None:
            print(json.dumps(outcome.values) if as_json else outcome, flush=True)
            if outcome.error is not None:
                raise ValueError(outcome.error)
    except (ValueError, OSError, ArithmeticError, MemoryError) as error:
        if os.environ.get("TESSERA_TRACEBACK"):
            raise
        exit_process(f"error: {one_line(error)}")
    except RuntimeError as error:
        if not _lost_another_process(error):
            raise
        exit_process(1)  # the other one says why
    except KeyboardInterrupt:
        exit_process(130)
    except SystemExit as stop:  # of a run that was told to stop
        exit_process(stop.code or 0)
    if dist.is_initialized():
        exit_process()


def _lost_another_process(error: RuntimeError) -> bool:
    """Whether a process other than the first waited for one that had ended, in which case its error is no news."""
    lost = isinstance(error, dist.DistError) or "onnection closed by peer" in str(error) or "gloo" in str(error)
    return dist.is_initialized() and dist.get_rank() > 0 and lost


def one_line(error: BaseException) -> str:
    """The message of an error on one line; of one that a worker process raised, without its traceback."""
    message = str(error)
    if message.startswith("Caught ") and "Original Traceback" in message:
        *_, last = re.finditer(r"^[\w.]+: ", message, re.MULTILINE)  # after the traceback: its class, and what it says
        message = message[last.end() :]
    return " ".join(message.split())


def find_run(run: str | None, containing: str, runs: Path = RUNS) -> Path:
    """The run folder named, or of those under `runs` that have `containing` the one that was trained last.

    Raises:
        ValueError: the folder named does not have `containing`, or there is none that has.
    """
    if run is not None:
        if not (Path(run) / containing).exists():
            raise ValueError(f"{run} has no {containing}; is it a run folder, and did its training finish?")
        return Path(run)
    found = [path.parents[len(Path(containing).parts) - 1] for path in runs.glob(f"*/{containing}")]
    if not found:
        raise ValueError(f"no run under {runs.absolute()} has {containing}; train a tokenizer first, or give --run")
    return max(found, key=lambda folder: _last_trained(folder, containing))


def _last_trained(folder: Path, containing: str) -> float:
    """When its weights were written, since an evaluation writes other files anew."""
    weights = [path for part in ("tokenizer", "prior") for path in folder.glob(f"{part}/*.safetensors")]
    return max(path.stat().st_mtime for path in weights or [folder / containing])


def find_codes(run: str | None) -> Path:
    """The run folder named, or the newest one, that has codes; see `find_run`.

    Raises:
        ValueError: there are none, with the reason where the tokenizer's codes are real numbers.
    """
    if run is not None and not (Path(run) / CODES).exists() and (Path(run) / "tokenizer").is_dir():
        load_tokenizer(Path(run) / "tokenizer").spec.check_discrete("stage two")
    return find_run(run, CODES)


def choose_device(name: str | None) -> torch.device:
    """The device named, or an accelerator where there is one. Raises ValueError for one that cannot be used here."""
    # Of a CUDA build, current_accelerator() names the GPU also on a machine that has none
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        known = "cpu" if accelerator is None else f"cpu or {accelerator.type}"
        raise ValueError(f"device '{name}' cannot be used here; take {known}") from error


def digits_recipe(path: Path, data_name: str | None) -> dict:
    """The recipe at `path` if the data are the digits (None: no other was named) and no --config is given."""
    return read_yaml(path) if data_name in (None, "digits") and not has_config_file() else {}


def refuse_several_processes() -> None:
    """Raises ValueError where a script that does its work alone was launched several times over."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes were launched, but this script works alone; start it with python")


def check_writable(path: Path) -> None:
    """Raises ValueError where a file could not be written, before the work on what is to be in it is done."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; name a file to write")
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {folder} is not a folder that can be written to; name another")


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2^63), got {seed}")


def say_skipped(*data_sets: ImageDataset) -> None:
    """Names and counts the files that were left out, once per machine, on standard error."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for images in data_sets:
        if images.skipped:
            named = ", ".join(map(str, images.skipped[:10])) + (", ..." if len(images.skipped) > 10 else "")
            count = len(images.skipped)
            print(
                f"left out {count} unreadable of {count + len(images)} {images.split} images: {named}", file=sys.stderr
            )


def say_unused_captions(*data_sets: ImageDataset) -> None:
    """Says why what seem to be captions are not used, once per machine, on standard error."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for reason in dict.fromkeys(images.source.unused_captions for images in data_sets):
            if reason is not None:
                print(reason, file=sys.stderr)


def save_config(path: Path, config: dict) -> None:
    """Writes a resolved configuration as YAML that --config reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(yaml.safe_dump(config, sort_keys=False).encode())


def saved_data_section(run: Path) -> dict:
    """{"data": ...}: the data that a run's tokenizer was trained on, as it stands in its configuration.

    What the configuration left to be found in the data is as it was found there, since other images are to be prepared
    likewise. Of a pipeline that was saved without it, that alone, where the command line names the data.
    """
    path = run / "stage_one" / "config.yaml"
    preprocessing = read_json(run / "tokenizer" / CONFIG_NAME).get("preprocessing", {})
    prepared = {name: preprocessing[name] for name in PREPARED_BY if name in preprocessing}
    if not path.is_file():
        if peek("data.name") is None:
            raise ValueError(
                f"{path} is missing: {run} does not say which data its tokenizer was trained on; give --data.name, and "
                "--data.root where it is a folder"
            )
        return {"data": prepared}
    config = read_yaml(path)
    if not isinstance(config.get("data"), dict):
        raise ValueError(f"{path} has no section 'data'")
    data = config["data"]
    if data.get("name") == "folder" and peek("data.name") not in (None, "folder"):
        # a folder of images is no place for the files of another data set
        data = {name: value for name, value in data.items() if name != "root"}
    return {"data": {**data, **prepared}}


def adopt_data_section(run: Path, folder: Path) -> None:
    """Copies a run's stage-one configuration, where it has one, to the folder of a prior that was trained elsewhere."""
    if (run / "stage_one" / "config.yaml").is_file():
        save_config(folder / "stage_one" / "config.yaml", read_yaml(run / "stage_one" / "config.yaml"))


def load_images_for(tokenizer: Tokenizer, config: DataConfig, split: str, *, run: Path | None = None) -> ImageDataset:
    """Images prepared as the tokenizer's training images were.

    Args:
        run: the folder of the tokenizer's run, to check that images held out there were not trained on.
    Raises:
        ValueError: the data would be prepared in another way, with each difference; or see `check_held_out`.
    """
    images = load_images(config, split)
    say_skipped(images)
    if run is not None:
        check_held_out(run, images)
    changed = differences(tokenizer.config.preprocessing, images.preprocessing)
    if changed:
        listed = "; ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise ValueError(f"the tokenizer was trained on images prepared otherwise ({listed}); set data.* to match")
    return images


def check_held_out(run: Path, images: ImageDataset) -> None:
    """Raises ValueError where a split that is carved out of a run's own images would hold images trained on.

    Validation images are chosen by a seed and a share, which must be those of the training. And which images of a
    folder are carved out depends on all of them: one more, and most of them are images trained on.
    """
    path = run / "stage_one" / "config.yaml"
    if images.split == "train" or not images.source.carved or not path.is_file():
        return
    own = DataConfig(**read_yaml(path)["data"])
    in_folder = own.name == "folder"
    same_root = os.path.realpath(own.root) == os.path.realpath(images.config.root)
    if images.config.name != own.name or (in_folder and not same_root):
        return
    for name in ("split_seed", "validation_fraction") if images.split == "validation" else ():
        asked, trained_with = getattr(images.config, name), getattr(own, name)
        if asked != trained_with:
            raise ValueError(
                f"data.{name} is {asked}, but {run} was trained with {trained_with}: the validation split that is "
                f"carved out would hold training images; leave --data.{name} out, or take --split test"
            )
    recorded = _contents_trained_on(run) if in_folder else None
    if recorded is not None and load_images(replace(own, cache_bytes=0), "train").contents != recorded:
        raise ValueError(
            f"the images in {own.root}, or their captions, are not those that {run} was trained on: the {images.split} "
            f"split that is carved out of them would hold training images; restore them, or put images into train/ "
            f"and {images.split}/ folders, or name another folder with --data.root"
        )


def _contents_trained_on(run: Path) -> str | None:
    """`ImageDataset.contents` of a run's training images, as its training states or its codes tell; None if neither."""
    for stage in ("stage_one", "stage_two"):
        for path in sorted(run.glob(f"{stage}/state/step-*/state.json"), reverse=True):
            contents = read_json(path).get("surroundings", {}).get("training data")
            if contents is not None:
                return contents
    if not (run / CODES).is_file():
        return None
    spec = read_json(run / CODES)
    return contents_of(spec.get("dataset", {}), spec.get("class_names", []))
