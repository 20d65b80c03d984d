"""Models and training states on disk: safetensors and JSON only, written whole or not at all, loaded strictly.

A *model folder* is `config.json` (with its "type") and `model.safetensors`: what others load. A *training state* is
`step-00000500/` with weights, averaged weights, optimizer and `state.json`: what the same command continues from.
"""

import hashlib
import json
import re
import shutil
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.files import atomic_folder, check_manifest, read_json, write_json_atomic
from prior import PRIORS
from prior.base import CodeSpec, Prior
from tokenizer import TOKENIZERS
from tokenizer.base import Tokenizer
from tokenizer.registry import lookup, nearest_known

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# A model folder comes from anywhere: no size in it may ask for more memory than its own weights could fill.
LARGEST_SIZE = 2**24
FILES_OF_A_HUB_REPOSITORY = ["*.json", "*.safetensors", "README.md"]


# Models from configurations
# ------------------------------------------------------------------------------------------------


def build_tokenizer(config: dict) -> Tokenizer:
    """The tokenizer that {"type": name, **fields} describes. Raises ValueError naming what is unknown or missing."""
    binarize = config.get("preprocessing", {}).get("binarize")
    likelihood = config.get("likelihood", {}).get("type")
    if likelihood == "bernoulli" and binarize == "none":
        raise ValueError("likelihood 'bernoulli' is for binary images: set data.binarize, or take another likelihood")
    return _build("tokenizer", TOKENIZERS, config)


def build_prior(config: dict) -> Prior:
    """The prior that {"type": name, **fields} describes. Raises ValueError naming what is unknown or missing."""
    return _build("prior", PRIORS, config)


def _build(kind: str, registry: dict[str, type], config: dict) -> nn.Module:
    options = dict(config)
    model = lookup(kind, registry, options.pop("type", ""))
    known = [field.name for field in fields(model.Config)]
    for option in options:
        if option not in known:
            raise ValueError(f"{kind} '{config['type']}' has no field '{option}'{nearest_known(option, known)}")
    return model(_typed(model.Config, options))


def _typed(config_class: type, options: dict):
    """A dataclass from a dict, every value checked against the type of its field."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "config")
    options = {key: asdict(value) if isinstance(value, CodeSpec) else value for key, value in options.items()}
    try:
        return parser.instantiate(parser.parse_object({"config": options})).config
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split()).replace('"config.', '"')) from error


def model_config(model: Tokenizer | Prior) -> dict:
    """{"type": name, **fields}: what `build_tokenizer` or `build_prior` makes an equal model from."""
    registry = TOKENIZERS if isinstance(model, Tokenizer) else PRIORS
    names = [name for name, cls in registry.items() if cls is type(model)]
    if not names:
        raise ValueError(f"{type(model).__name__} is not registered (known: {', '.join(sorted(registry))})")
    return {"type": names[0], **asdict(model.config)}


def fingerprint(model: Tokenizer | Prior) -> str:
    """sha256 of a model's configuration and weights: equal exactly where codes mean the same."""
    digest = hashlib.sha256(json.dumps(model_config(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Model folders
# ------------------------------------------------------------------------------------------------


def save_model(model: Tokenizer | Prior, folder: Path | str) -> None:
    """Writes a model folder; an existing one is replaced only once the new one is complete."""
    folder = Path(folder)
    with atomic_folder(folder, overwrite=True) as temporary:
        write_json_atomic(temporary / CONFIG_NAME, model_config(model))
        _save_tensors(model.state_dict(), temporary / WEIGHTS_NAME)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model folder, in evaluation mode.

    Raises:
        ValueError: what is wrong, with the file and key: broken JSON or weights, unknown, missing or misshapen ones.
    """
    return _load(Path(folder), build_tokenizer)


def load_prior(folder: Path | str) -> Prior:
    """The prior of a model folder, in evaluation mode; raises as `load_tokenizer` does."""
    return _load(Path(folder), build_prior)


def _load(folder: Path, build) -> nn.Module:
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is not a model folder: it has no {CONFIG_NAME}")
    config = read_json(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    try:
        _check_sizes(config)
        with torch.device("meta"):  # shapes without memory
            expected = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    _check_weights(weights, expected)
    model = build(config)
    model.load_state_dict(load_file(weights))
    return model.eval()


def _check_sizes(value, key: str = "config") -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_sizes(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            _check_sizes(item, key)
    elif isinstance(value, (int, float)) and not abs(value) <= LARGEST_SIZE:
        raise ValueError(f"{key} = {value} is beyond the limit of {LARGEST_SIZE}")


def _check_weights(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: shape for name, (shape, _) in _read_header(path).items()}
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, the configuration asks for {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not belong to its {CONFIG_NAME}: {'; '.join(problems[:5])}{more}")


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
        hint = ""
        if start.startswith(b"version https://git-lfs"):
            hint = " (it is a Git LFS pointer: run 'git lfs pull')"
        elif start.startswith((b"<!doctype", b"<html")):
            hint = " (it is a web page: download the file itself)"
        raise ValueError(f"{path} is not a readable safetensors file{hint}: {error}") from error


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors takes neither views of one storage nor other memory formats
    save_file(
        {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path,
    )


def resolve_folder(path_or_id: str | Path, **download_options) -> Path:
    """A local folder as it is, or the local copy of a hub repository (JSON, safetensors and README only).

    Args:
        path_or_id: folder, or "user/name" on the hub.
        download_options: passed to `huggingface_hub.snapshot_download` (revision, cache_dir, token, ...).
    Raises:
        ValueError: neither a folder nor something that can be a hub id, or the hub cannot be reached.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)) or str(path_or_id).startswith("."):
        raise ValueError(f"{path_or_id} is neither a folder nor a hub id of the form 'user/name'")
    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=FILES_OF_A_HUB_REPOSITORY, **download_options))
    except (OSError, HFValidationError) as error:  # what the hub library raises offline is an OSError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_id} is not a folder here, and could not be had from the hub: {reason}") from error


# Training states
# ------------------------------------------------------------------------------------------------


def save_state(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], info: dict, keep: int = 2) -> Path:
    """Writes `folder/step-XXXXXXXX` atomically, then removes all but the newest `keep` states.

    Args:
        tensors: file name -> named tensors.
        info: what JSON can hold.
    Raises:
        ValueError: a tensor is not finite: a broken state must never displace a good one.
    """
    for name, group in tensors.items():
        for key, tensor in group.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"step {step}: {name}/{key} is not finite; the state is not saved")
    final = folder / f"step-{step:08d}"
    with atomic_folder(final, overwrite=True) as temporary:
        for name, group in tensors.items():
            _save_tensors(group, temporary / f"{name}.safetensors")
        write_json_atomic(temporary / "state.json", {"step": step, **info})
    for old in _states(folder)[keep:]:
        shutil.rmtree(old)
    return final


def newest_state(folder: Path) -> Path | None:
    """The newest complete state, or None. A damaged one is named in a warning and passed over."""
    for state in _states(folder):
        try:
            check_manifest(state)
            return state
        except ValueError as error:
            warnings.warn(f"{error}; falling back to the state before it", stacklevel=2)
    return None


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(tensors by file name, info) of one state."""
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, read_json(folder / "state.json")


def _states(folder: Path) -> list[Path]:
    """Complete-looking states, newest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)
