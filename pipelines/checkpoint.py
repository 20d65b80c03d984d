"""Models and training states on disk: safetensors and JSON only, written whole or not at all, loaded strictly.

A *model folder* is `config.json` (with its "type") and `model.safetensors`: what others load. A *training state* is
`step-00000500/` with weights, averaged weights, optimizer and `state.json`: what the same command continues from.
"""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from pipelines.files import MANIFEST, OS_LITTER, atomic_folder, check_manifest, naming, read_json, write_json_atomic
from prior import PRIORS
from prior.base import CodeSpec, Prior
from tokenizer import TOKENIZERS
from tokenizer.base import Tokenizer
from tokenizer.registry import lookup, nearest_known, options_holder

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
# A model folder comes from anywhere: no size in it may ask for more memory than its own weights could fill.
LARGEST_SIZE = 2**24
# Numbers that take none: steps of training, and vocabularies of int64 codes, which take some only as shapes of weights
LARGEST_INTEGER = 2**63
TAKE_NO_MEMORY = ("config.spec.vocab_sizes", "config.quantizer.decay_steps", "config.kl_warmup_steps")
DOWNLOAD_OPTIONS = (
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "device",
    "dtype",
    "subfolder",
)
FILES_OF_A_HUB_REPOSITORY = ["*.json", "*.safetensors", "README.md"]


# Models from configurations
# ------------------------------------------------------------------------------------------------


def build_tokenizer(config: dict) -> Tokenizer:
    """The tokenizer that {"type": name, **fields} describes. Raises ValueError naming what is unknown or missing."""
    tokenizer = _build("tokenizer", TOKENIZERS, config)
    likelihood = getattr(tokenizer.config, "likelihood", {}).get("type")
    if likelihood == "bernoulli" and tokenizer.config.preprocessing.get("binarize") == "none":
        raise ValueError("likelihood 'bernoulli' is for binary images: set data.binarize, or take another likelihood")
    return tokenizer


def build_tokenizer_for(images, options: dict) -> Tokenizer:
    """The tokenizer that {"type": name, **options} describes, for images as of `load_images`: their shape, preparation
    and, where it is conditional on them, classes."""
    implied = {"image_shape": images.image_shape, "preprocessing": images.preprocessing}
    kind = lookup("tokenizer", TOKENIZERS, str(options.get("type", "")))
    if "num_classes" in {field.name for field in fields(kind.Config)}:
        implied["num_classes"] = images.num_classes
    return build_tokenizer({**options, **implied})


def build_prior(config: dict) -> Prior:
    """The prior that {"type": name, **fields} describes. Raises ValueError naming what is unknown or missing."""
    return _build("prior", PRIORS, config)


def _build(kind: str, registry: dict[str, type], config: dict) -> nn.Module:
    options = dict(config)
    model = lookup(kind, registry, str(options.pop("type", "")))
    known = [field.name for field in fields(model.Config)]
    for option in options:
        if option not in known:
            raise ValueError(f"{kind} '{config['type']}' has no field '{option}'{nearest_known(option, known)}")
    config = _typed(model.Config, options)
    _check_sizes(asdict(config))
    parts = {
        part: _typed_part(part, classes, getattr(config, part)) for part, classes in getattr(model, "parts", {}).items()
    }
    return model(replace(config, **parts))


def _typed(config_class: type, options: dict):
    """A dataclass from a dict, every value checked against the type of its field."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, "config")
    options = {key: asdict(value) if isinstance(value, CodeSpec) else value for key, value in options.items()}
    _refuse_null(config_class, options)
    with _one_line_errors():
        return parser.instantiate(parser.parse_object({"config": options})).config


def _typed_part(name: str, classes: dict[str, type], options: dict) -> dict:
    """The options of a part, of the types that it declares; unknown ones are `build`'s to refuse.

    A number may come as text: YAML reads 1e-4 so.
    """
    cls = options_holder(lookup(name, classes, str(options.get("type", ""))))
    known = [option for option, p in inspect.signature(cls).parameters.items() if p.default is not p.empty]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, name, skip=set(inspect.signature(cls).parameters) - set(known))
    _refuse_null(cls, options)
    declared = {option: value for option, value in options.items() if option in known}
    with _one_line_errors():
        typed = parser.parse_object({name: declared}).get(name, {})
    return options | {option: typed[option] for option, value in declared.items() if isinstance(value, str)}


def _refuse_null(cls: type, options: dict) -> None:
    """The parser takes None for "not given", whatever the type."""
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in options and options[name] is None and type(None) not in get_args(parameter.annotation):
            raise ValueError(f'"{name}" must not be null')


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split()).replace('"config.', '"')) from error


def model_config(model: Tokenizer | Prior) -> dict:
    """{"type": name, **fields}: what `build_tokenizer` or `build_prior` makes an equal model from."""
    model = uncompiled(model)
    registry = TOKENIZERS if isinstance(model, Tokenizer) else PRIORS
    names = [name for name, cls in registry.items() if cls is type(model)]
    if not names:
        raise ValueError(f"{type(model).__name__} is not registered (known: {', '.join(sorted(registry))})")
    return {"type": names[0], **asdict(model.config)}


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` made a wrapper of it."""
    return getattr(model, "_orig_mod", model)


def plain_weights(model: Tokenizer | Prior) -> dict[str, Tensor]:
    """The state of a model by the names that it has where neither it nor a part of it is compiled."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}


def fingerprint(model: Tokenizer | Prior) -> str:
    """sha256 of a model's configuration and weights: equal exactly where codes mean the same."""
    return weights_digest(plain_weights(model), json.dumps(model_config(model), sort_keys=True))


def weights_digest(tensors: dict[str, Tensor], config: str = "") -> str:
    """sha256 of a configuration and of named tensors."""
    digest = hashlib.sha256(config.encode())
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weights_of(pipeline) -> dict[str, str]:
    """The fingerprints of a pipeline's tokenizer, and of its prior of stage two where there is one."""
    found = {"tokenizer": fingerprint(pipeline.tokenizer)}
    if pipeline.has_stage_two:
        found["prior"] = fingerprint(pipeline.prior)
    return found


# Floating-point types
# ------------------------------------------------------------------------------------------------


def floating_point(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """torch's type by its name; None for "auto", the type that weights have."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a floating-point type of torch or its name, such as 'bfloat16', got {dtype!r}")
    return found


def cast(model: Tokenizer | Prior, dtype: torch.dtype | None) -> Tokenizer | Prior:
    """`model.to(dtype)` that notes which weights were rounded, for `fingerprints` to tell."""
    types = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if dtype is None or types <= {dtype}:
        return model.to(dtype=dtype)
    original = fingerprints(model)[0]
    model.to(dtype=dtype)
    # With what came of the cast, so that the note says nothing of weights that are changed later in any way
    model.cast_from = (original, fingerprint(model))
    return model


def fingerprints(model: Tokenizer | Prior) -> tuple[str, ...]:
    """The fingerprint of a model; before it that of the weights it had before `cast`, if they are those still."""
    found = fingerprint(model)
    original, rounded = getattr(model, "cast_from", (None, None))
    return (original, found) if rounded == found else (found,)


# Model folders
# ------------------------------------------------------------------------------------------------


def save_model(model: Tokenizer | Prior, folder: Path | str) -> None:
    """Writes a model folder; an existing one is replaced only once the new one is complete.

    Raises:
        ValueError: the folder holds other files too, which replacing it would delete; or the configuration or the
            weights (of adapters, parametrizations, replaced layers) are such as could not be loaded again.
    """
    with saving({Path(folder): model}):
        pass


@contextmanager
def saving(models: dict[Path, Tokenizer | Prior]) -> Iterator[None]:
    """Writes model folders that take their places together, once all of them and the block are done without an error.

    Raises:
        ValueError: as `save_model`, of any of them, before anything is written.
    """
    configs = {folder: _savable_config(model, folder) for folder, model in models.items()}
    with ExitStack() as stack:
        for folder, model in models.items():
            temporary = stack.enter_context(atomic_folder(folder, overwrite=True))
            write_json_atomic(temporary / CONFIG_NAME, configs[folder])
            _save_tensors(plain_weights(model), temporary / WEIGHTS_NAME)
        yield


def check_model_folders(*folders: Path) -> None:
    """Raises ValueError for one that holds other files than a model's, which a new model's would delete."""
    ours = {CONFIG_NAME, WEIGHTS_NAME, MANIFEST, *OS_LITTER}
    for folder in folders:
        others = sorted({path.name for path in folder.iterdir()} - ours) if folder.is_dir() else []
        if others:
            raise ValueError(
                f"{folder} holds other files than a model's ({', '.join(others[:3])}); move them away, or name a new "
                "folder"
            )


def _savable_config(model: Tokenizer | Prior, folder: Path) -> dict:
    """`model_config` of a model that can be saved as this folder and loaded again."""
    check_model_folders(folder)
    config = model_config(model)
    try:
        _check_sizes(config)
        json.dumps(config, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{type(uncompiled(model)).__name__} cannot be saved: {error}") from error
    problems = _foreign_weights(model, config)
    if problems:
        raise ValueError(
            f"{type(uncompiled(model)).__name__} cannot be saved, since its weights are not those of its "
            f"configuration: {problems}; merge adapters into their layers, and remove pruning and parametrizations"
        )
    return config


def _foreign_weights(model: Tokenizer | Prior, config: dict) -> str:
    """What of its weights a model built by this configuration would not take; empty where it takes all."""
    build = build_tokenizer if isinstance(uncompiled(model), Tokenizer) else build_prior
    try:
        with torch.device("meta"), _Undrawn():
            expected = build(json.loads(json.dumps(config))).state_dict()
    except (ValueError, TypeError, ArithmeticError, RuntimeError):
        return ""  # a constructor of the user's own, of which loading will say it; weights are better saved than lost
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    return _differences({name: tuple(getattr(x, "shape", ())) for name, x in plain_weights(model).items()}, shapes)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a model folder, in evaluation mode.

    Raises:
        ValueError: what is wrong, with the file and key: broken JSON or weights, unknown, missing or misshapen ones.
    """
    return _load(Path(folder), build_tokenizer)


def load_prior(folder: Path | str) -> Prior:
    """The prior of a model folder, in evaluation mode; raises as `load_tokenizer` does."""
    return _load(Path(folder), build_prior)


def load_pretrained(
    model_class: type,
    path_or_id: Path | str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    **download_options,
) -> Tokenizer | Prior:
    """The model of a model folder or hub repository, which must be a `model_class`; see `Tokenizer.from_pretrained`."""
    dtype = floating_point(dtype)
    folder = resolve_folder(path_or_id, **download_options)
    model = load_tokenizer(folder) if issubclass(model_class, Tokenizer) else load_prior(folder)
    if not isinstance(model, model_class):
        raise ValueError(f"{folder} holds a {type(model).__name__}, not a {model_class.__name__}")
    return cast(model, dtype).to(device)


def _load(folder: Path, build) -> nn.Module:
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is not a model folder: it has no {CONFIG_NAME}")
    config = read_json(folder / CONFIG_NAME)
    weights = folder / WEIGHTS_NAME
    found = _read_header(weights)
    try:
        _check_sizes(config)
        # shapes without memory
        with torch.device("meta"), _Undrawn(), _parameters_at_most(2 * len(found) + 100):
            expected = build(config).state_dict()
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # constructors given nonsense
        reason = " ".join(str(error).split())[:500]
        if "meta tensor" in reason or "meta device" in reason:
            raise ValueError(
                f"{folder} holds a '{config['type']}' whose constructors do not work on the meta device, where tensors "
                f"have no values: {reason}. Compute with Python's numbers, math.prod(levels), not levels.prod().item()"
            ) from error
        raise ValueError(f"{folder / CONFIG_NAME}: {reason}") from error
    problems = _differences(found, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    if problems:
        raise ValueError(f"{weights} does not belong to its {CONFIG_NAME}: {problems}")
    if (folder / MANIFEST).is_file():
        check_manifest(folder)  # safetensors does not see a bit that flipped in the data
    # A copy in memory: the file's own pages are not aligned, and change with the file
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    for name, tensor in tensors.items():
        dtype = expected[name].dtype
        if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
            raise ValueError(f"{weights}: {name} holds {tensor.dtype}, it must be {dtype}")
    with torch.device("cpu"), _Undrawn():  # whatever the default: buffers that are not saved must lie with the weights
        model = build(config)
    model.load_state_dict(tensors, assign=True)  # keeps the precision in which it was saved
    return model.eval()


class _Undrawn(TorchFunctionMode):
    """Within the context parameters are not initialised, and nothing is drawn on the meta device.

    Saved weights are about to replace them: to draw them first takes seconds for a large model. On the meta device it
    is worse, since draws there are written in Python and import torch's compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, nn.Parameter):
                return tensor
        if function in (torch.rand, torch.randn) and torch.get_default_device().type == "meta":
            function = torch.empty
        return function(*args, **kwargs)


@contextmanager
def _parameters_at_most(limit: int) -> Iterator[None]:
    """Ends the building of a model by a ValueError once it has more parameters than `limit`.

    A thousand million layers take time and memory even where their weights take none.
    """
    thread, count = threading.get_ident(), 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        if threading.get_ident() == thread:
            count += 1
            if count > limit:
                raise ValueError(f"the configuration asks for far more layers than {WEIGHTS_NAME} has weights for")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _check_sizes(value, key: str = "config") -> None:
    """Raises ValueError for a number in a configuration that no model of ours can have."""
    if key == "config.preprocessing":  # models never read it
        return
    limit = LARGEST_INTEGER if key in TAKE_NO_MEMORY else LARGEST_SIZE
    if isinstance(value, dict):
        for name, item in value.items():
            _check_sizes(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_sizes(item, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key} = {value} is not a finite number")
    elif isinstance(value, int) and abs(value) > limit:
        raise ValueError(f"{key} = {value} is beyond the limit of {limit}")


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """The first differences between the shapes of weights and those that a configuration asks for; empty without."""
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {found[name]}, the configuration asks for {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    return "; ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a weights file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    path.open("rb").close()  # of a file that cannot be read safetensors says that there is none
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
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
    path.touch()  # with the mode that the umask says; safetensors makes it 0600
    mode = path.stat().st_mode
    # safetensors takes neither views of one storage nor other memory formats
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with naming(path), _system_errors():
        save_file(whole, path, metadata={"format": "pt"})  # transformers asks for it
    path.chmod(mode)


@contextmanager
def _system_errors() -> Iterator[None]:
    """Gives a full disk, which safetensors reports as an error of its own, as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def resolve_folder(path_or_id: str | Path, *, subfolder: str = "", **download_options) -> Path:
    """A local folder as it is, or the local copy of a hub repository (JSON, safetensors and README only).

    Args:
        path_or_id: folder, or "user/name" on the hub.
        subfolder: a folder within it to take in its place.
        download_options: passed to `huggingface_hub.snapshot_download` (revision, cache_dir, token, ...).
    Raises:
        ValueError: neither a folder nor something that can be a hub id, or the hub cannot be reached.
    """
    unknown = sorted(set(download_options) - set(inspect.signature(snapshot_download).parameters))
    if unknown:
        raise ValueError(f"unknown argument '{unknown[0]}'{nearest_known(unknown[0], DOWNLOAD_OPTIONS)}")
    folder = Path(path_or_id)
    if folder.is_dir():
        return _within(folder, subfolder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)) or str(path_or_id).startswith("."):
        raise ValueError(f"{path_or_id} is neither a folder nor a hub id of the form 'user/name'")
    try:
        folder = snapshot_download(str(path_or_id), allow_patterns=FILES_OF_A_HUB_REPOSITORY, **download_options)
    except (OSError, HFValidationError) as error:  # what the hub library raises offline is an OSError
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_id} is not a folder here, and could not be had from the hub: {reason}") from error
    return _within(Path(folder), subfolder)


def _within(folder: Path, subfolder: str) -> Path:
    inner = folder / subfolder
    if not inner.resolve().is_relative_to(folder.resolve()) or not inner.is_dir():
        raise ValueError(f"{folder} has no folder '{subfolder}' within")
    return inner


# Training states
# ------------------------------------------------------------------------------------------------


def save_state(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], info: dict) -> Path:
    """Writes `folder/step-XXXXXXXX` atomically, then removes all but it and the one before it.

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
    # Later ones are damaged, or training would have continued from them; they must not count as kept
    for old in [state for state in _states(folder) if _step(state) < step][1:]:
        shutil.rmtree(old, ignore_errors=True)  # one that is open on NFS is removed at a later save
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


def has_states(folder: Path) -> bool:
    """Whether there are states, damaged or not."""
    return bool(_states(folder))


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(tensors by file name, info) of one state."""
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    return tensors, read_json(folder / "state.json")


def _states(folder: Path) -> list[Path]:
    """Complete-looking states, newest first."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=_step, reverse=True)


def _step(state: Path) -> int:
    return int(state.name.removeprefix("step-"))
