"""Run folders: where a run lies, what is kept of its configuration, the images that belong to it."""

import os
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from pipelines.checkpoint import CONFIG_NAME, load_tokenizer
from pipelines.config import differences, has_config_file, peek, read_yaml
from pipelines.files import atomic_file, read_json
from pipelines.images import DataConfig, ImageDataset, contents_of, load_images
from pipelines.scripting import say, say_skipped
from pipelines.two_stage import Pipeline
from tokenizer.base import Tokenizer

RUNS = Path("runs")
CODES = "codes/train/spec.json"
# Fields of DataConfig by which images are prepared for a tokenizer; crop is for training, else always the centre
PREPARED_BY = ("image_size", "channels", "resize_filter", "binarize", "binarize_seed")


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


def output_folder(name: str | None, default: Path) -> Path:
    """The folder named, or the default one. Raises ValueError for an empty name: an unset variable of the shell."""
    if name is not None and not name.strip():
        raise ValueError("output must name a folder, got an empty name; leave it out for the default")
    return default if name is None else Path(name)


def _last_trained(folder: Path, containing: str) -> float:
    """When its weights were written, since an evaluation writes other files anew."""
    weights = [path for part in ("tokenizer", "prior") for path in folder.glob(f"{part}/*.safetensors")]
    return max(path.stat().st_mtime for path in weights or [folder / containing])


def load_pipeline(run: str | Path, device: torch.device | str | None = None) -> Pipeline:
    """`Pipeline.from_pretrained`; says so where a run has a prior that is left out, as of an earlier tokenizer."""
    pipeline = Pipeline.from_pretrained(run, device=device)
    prior = Path(run) / "prior"
    if prior.is_dir() and not pipeline.has_stage_two:
        say(f"{prior} is not used: it is no part of the pipeline, whose tokenizer may have been trained on since")
    return pipeline


def find_codes(run: str | None) -> Path:
    """The run folder named, or the newest one, that has codes; see `find_run`.

    Raises:
        ValueError: there are none, with the reason where the tokenizer's codes are real numbers.
    """
    if run is not None and not (Path(run) / CODES).exists() and (Path(run) / "tokenizer").is_dir():
        load_tokenizer(Path(run) / "tokenizer").spec.check_discrete("stage two")
    return find_run(run, CODES)


def digits_recipe(path: Path, data_name: str | None) -> dict:
    """The recipe at `path` if the data are the digits (None: no other was named) and no --config is given."""
    return read_yaml(path) if data_name in (None, "digits") and not has_config_file() else {}


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


def was_trained_on(run: Path, images: ImageDataset) -> bool:
    """Whether a run's tokenizer was trained on these training images, as far as the run tells."""
    recorded, path = contents_trained_on(run), run / "stage_one" / "config.yaml"
    if recorded is not None:
        return images.contents == recorded
    return not path.is_file() or read_yaml(path)["data"].get("name") == images.config.name


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
    """Raises ValueError where a split that is carved out would hold images that a run was trained on.

    Validation images are chosen by a seed and a share, which must be those of the training. And which images of a
    folder are carved out depends on all of them: one more, and most of them are images trained on. So they are in a
    copy of the folder with one more; says so on standard error where the folder itself is gone and none can tell.
    """
    path = run / "stage_one" / "config.yaml"
    if images.split == "train" or not images.source.carved or not path.is_file():
        return
    own = DataConfig(**read_yaml(path)["data"])
    if images.config.name != own.name:
        return
    in_folder = own.name == "folder"
    elsewhere = in_folder and os.path.realpath(own.root) != os.path.realpath(images.config.root)
    if elsewhere and _is_other_folder(run, own, images):
        return
    for name in ("split_seed", "validation_fraction") if images.split == "validation" else ():
        asked, trained_with = getattr(images.config, name), getattr(own, name)
        if asked != trained_with:
            raise ValueError(
                f"data.{name} is {asked}, but {run} was trained with {trained_with}: the validation split that is "
                f"carved out would hold training images; leave --data.{name} out, or take --split test"
            )
    recorded = contents_trained_on(run) if in_folder and not elsewhere else None
    if recorded is not None and load_images(replace(own, cache_bytes=0), "train").contents != recorded:
        raise ValueError(
            f"the images in {own.root}, or their captions, are not those that {run} was trained on: the {images.split} "
            f"split that is carved out of them would hold training images; restore them, or put images into train/ "
            f"and {images.split}/ folders, or name another folder with --data.root"
        )


def _is_other_folder(run: Path, own: DataConfig, images: ImageDataset) -> bool:
    """Whether images are not from the run's own folder, moved to another place.

    Raises ValueError where some are copies of those trained on; says so where none can tell.
    """
    try:
        trained_on = load_images(replace(own, cache_bytes=0), "train").file_digests()
    except ValueError:
        if _is_moved(run, own, images):
            return False
        say(
            f"{run} was trained on images in {own.root}, which are not there now: none can tell whether some of them "
            f"are in the {images.split} split that is carved out of {images.config.root}"
        )
        return True
    num_common = len(images.file_digests() & trained_on)
    if num_common:
        raise ValueError(
            f"{num_common} of the {len(images)} images of the {images.split} split that is carved out of "
            f"{images.config.root} are among those in {own.root} that {run} was trained on; leave --data.root out, or "
            f"put images into train/ and {images.split}/ folders"
        )
    return True


def _is_moved(run: Path, own: DataConfig, images: ImageDataset) -> bool:
    as_found = {name: getattr(images.config, name) for name in ("root", "image_size", "channels")}
    try:
        there = load_images(replace(own, cache_bytes=0, **as_found), "train")
    except ValueError:
        return False
    return there.contents == contents_trained_on(run)


def contents_trained_on(run: Path) -> str | None:
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
