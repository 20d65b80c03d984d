"""model_index.json: which parts a saved pipeline has, the names of its classes, what was measured of it."""

import json
import reprlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.files import read_json

INDEX_NAME = "model_index.json"
PIPELINE = "Pipeline"  # the class
TEXT_TOKENIZER = "text_tokenizer"  # the folder of one


def library_version() -> str:
    try:
        return version("tessera-codes")
    except PackageNotFoundError:  # used from a folder, not installed
        return "0+unknown"


def read_index(folder: Path) -> dict:
    """The index of a folder. Raises ValueError where there is none, or one of another form."""
    if not (folder / INDEX_NAME).is_file():
        raise ValueError(f"{folder} is not a pipeline: it has no {INDEX_NAME}. Did stage one finish?")
    index = read_json(folder / INDEX_NAME)
    if index.get("_class_name") != PIPELINE:
        raise ValueError(f"{folder / INDEX_NAME} describes a {index.get('_class_name')!r}, not a {PIPELINE}")
    index.setdefault("evaluations", {})  # pipelines saved before there were any
    expected = {"tokenizer": list, "prior": list, "id2label": dict, "metrics": dict, "evaluations": dict}
    for key, kind in expected.items():
        if not isinstance(index.get(key), kind):
            raise ValueError(f"{folder / INDEX_NAME}: '{key}' must be a {kind.__name__}, got {index.get(key)!r}")
    for split, evaluation in index["evaluations"].items():
        if not _is_evaluation(evaluation):
            raise ValueError(
                f"{folder / INDEX_NAME}: 'evaluations' holds none of the {split} images, got {evaluation!r}"
            )
    names = index["id2label"]
    if set(names) != {str(i) for i in range(len(names))} or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{folder / INDEX_NAME}: 'id2label' must give a name to each of the classes 0, 1, 2, ...")
    return index


def _is_evaluation(found) -> bool:
    """Whether it holds what the model card says of one."""
    kinds = {"command": str, "data": dict, "protocol": dict, "not_measured": dict, "versions": dict, "seed": int}
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
        and found["data"].keys() >= {"name", "split", "count", "content"}
    )


def checked_part(index: dict, name: str, model):
    """`model`, if it is what the index says; the index never decides what is imported."""
    if index[name] != [name, type(model).__name__]:
        raise ValueError(
            f"{INDEX_NAME} says that '{name}' is {index[name]}, "
            f"but {name}/config.json describes a {type(model).__name__}"
        )
    return model


def as_json(what: str, values: dict) -> dict:
    """A dict as JSON gives it back, numbers of NumPy and torch as Python's. Raises ValueError naming other objects."""

    def number(value):
        if hasattr(value, "item"):
            return value.item()
        raise TypeError(f"{type(value).__name__} is not a number")

    plain = {}
    for name, value in values.items():
        try:
            plain[name] = json.loads(json.dumps(value, default=number, allow_nan=False))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{what}['{name}'] = {reprlib.repr(value)} cannot be written as JSON: {error}") from error
    return plain
