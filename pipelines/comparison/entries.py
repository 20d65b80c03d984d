"""The models of a comparison: read from a YAML file, and checked to the last option before anything is trained.

An entries file holds

    title:       of the page
    data:        images, as in any recipe
    stage_one:   how every tokenizer is trained, with the common budget (the "training" of its recipe)
    stage_two:   likewise for every prior
    common:      anything; a place for YAML anchors, which models merge with <<
    models:      a list, each with

        name:          of its folder
        title:         on the page; default the name
        tokenizer:     {type, ...}, or
        tokenizer_of:  a model above, whose tokenizer it shares
        prior:         {type, ...} of a second stage; without it, the prior that the tokenizer learned or assumed
        stage_one, stage_two: training options of its own, not of its budget

Priors are trained without classes and captions: p(x) is what is compared.
"""

import io
import re
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from pipelines.checkpoint import build_prior, build_tokenizer_for
from pipelines.config import Polymorphic, parse, read_yaml
from pipelines.images import DataConfig, ImageDataset
from pipelines.training_config import TrainingConfig
from prior import PRIORS
from tokenizer import TOKENIZERS
from tokenizer.registry import nearest_known

FIELDS = ("title", "data", "stage_one", "stage_two", "common", "models")
MODEL_FIELDS = ("name", "title", "tokenizer", "tokenizer_of", "prior", "stage_one", "stage_two")
# What is equal for all models, or it would be no comparison
BUDGET = ("total_steps", "batch_size")
LONGEST_NAME = 60


@dataclass(frozen=True)
class Entry:
    """One model of a comparison.

    name: of its folder; title: what people read; tokenizer_of: name of the model whose tokenizer it shares; stage_one,
    stage_two: the recipes, every default filled in, for scripts/train_tokenizer.py and scripts/train_prior.py. With
    tokenizer_of, stage_one is that of the other model. stage_two is None without a second stage.
    """

    name: str
    title: str
    tokenizer_of: str | None
    stage_one: dict
    stage_two: dict | None


@dataclass
class StageTwoOptions:
    """Of train_prior.py.

    Args:
        class_conditional: on class labels.
        text_conditional: on captions.
    """

    class_conditional: bool = False
    text_conditional: bool = False


@dataclass
class NoOptions:
    """None."""


def read_entries(path: str | Path) -> dict:
    """An entries file with every field in place; values in "data" and options of models are checked later.

    Raises:
        ValueError: the file cannot be read, an unknown field, no models, a name that is missing, taken or no name for a
            folder, a model without a tokenizer, a budget of its own, or a shared tokenizer that is not listed above.
    """
    try:
        entries = read_yaml(path)
    except OSError as error:
        raise ValueError(f"the entries file {path} cannot be read: {error.strerror}") from error
    _check_fields(entries, FIELDS, str(path))
    for name, config in (("data", DataConfig), ("stage_one", TrainingConfig), ("stage_two", TrainingConfig)):
        _check_fields(entries.setdefault(name, {}), [field.name for field in fields(config)], f"{path}, {name}")
    if not isinstance(entries.setdefault("title", None), str | None):
        raise ValueError(f"{path}: title must be text, got {entries['title']!r}")
    models = entries.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError(f"{path} lists no models; under 'models:', write one '- name: ...' for each")
    known: dict[str, dict] = {}
    for number, model in enumerate(models, start=1):
        _check_model(model, known, f"{path}, model {number}")
        known[model["name"]] = model
    return entries


def _check_fields(values, allowed: Sequence[str], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold fields and their values, got {values!r}")
    for name in values:
        if name not in allowed:
            raise ValueError(f"{where}: unknown field '{name}'{nearest_known(str(name), allowed)}")


def _check_model(model, known: dict[str, dict], where: str) -> None:
    _check_fields(model, MODEL_FIELDS, where)
    name = model.get("name")
    if not isinstance(name, str) or not re.fullmatch(rf"[A-Za-z0-9][\w.-]{{0,{LONGEST_NAME - 1}}}", name, re.ASCII):
        raise ValueError(
            f"{where}: name must consist of letters, digits, '-', '_' and '.', because it names a folder, got {name!r}"
        )
    # a.lower(): there are file systems that do not tell them apart
    if name.lower() in {other.lower() for other in known}:
        raise ValueError(f"{where}: there are two models named '{name}'; each needs a name of its own")
    where = f"{where} ({name})"
    if not isinstance(model.get("title", ""), str):
        raise ValueError(f"{where}: title must be text, got {model['title']!r}")
    if ("tokenizer" in model) == ("tokenizer_of" in model):
        raise ValueError(
            f"{where}: needs either tokenizer, its options, or tokenizer_of, the model that it shares one with"
        )
    for section in ("tokenizer", "prior"):
        value = model.get(section)
        if section in model and not (isinstance(value, dict) and isinstance(value.get("type"), str)):
            raise ValueError(f"{where}: {section} must hold a type and its options, got {value!r}")
    for stage in ("stage_one", "stage_two"):
        own = model.get(stage, {})
        _check_fields(own, [field.name for field in fields(TrainingConfig)], f"{where}, {stage}")
        for budget in BUDGET:
            if budget in own:
                raise ValueError(
                    f"{where}: {stage}.{budget} is part of the budget, which is equal for all; set it above the models"
                )
    if "tokenizer_of" in model:
        _check_sharing(model, known, where)
    if "stage_two" in model and "prior" not in model:
        raise ValueError(f"{where}: stage_two says how its prior is trained, but it has no prior")


def _check_sharing(model: dict, known: dict[str, dict], where: str) -> None:
    owner = model["tokenizer_of"]
    if owner not in known:
        raise ValueError(f"{where}: tokenizer_of must name a model listed above it, got {owner!r}")
    if "tokenizer" not in known[owner]:
        raise ValueError(f"{where}: '{owner}' shares its tokenizer too; name '{known[owner]['tokenizer_of']}' itself")
    if "stage_one" in model:
        raise ValueError(f"{where}: its tokenizer is that of '{owner}', so stage_one has no effect; remove it")
    if "prior" not in model:
        raise ValueError(f"{where}: with the tokenizer of '{owner}' and no prior of its own it would be the same model")


def resolve(models: list[dict], *, data: dict, stage_one: dict, stage_two: dict) -> list[Entry]:
    """The models with every option filled in and checked.

    Args:
        models: of `read_entries`.
        data: fields of `DataConfig`.
        stage_one, stage_two: fields of `TrainingConfig`, what is common to all.
    Raises:
        ValueError: an option that a model does not know, or a value it does not take; the model is named.
    """
    entries: dict[str, Entry] = {}
    for model in models:
        where = f"model '{model['name']}'"
        if "tokenizer" in model:
            recipe = {"data": data, "tokenizer": model["tokenizer"], "training": stage_one | model.get("stage_one", {})}
            sections = {"data": DataConfig, "tokenizer": Polymorphic(TOKENIZERS, "vqvae"), "training": TrainingConfig}
            first = _fill_in(recipe, sections, NoOptions, where)
        else:
            first = entries[model["tokenizer_of"]].stage_one
        second = None
        if "prior" in model:
            recipe = {"prior": model["prior"], "training": stage_two | model.get("stage_two", {})}
            sections = {"prior": Polymorphic(PRIORS, "gpt"), "training": TrainingConfig}
            second = _fill_in(recipe, sections, StageTwoOptions, where)
        name = model["name"]
        entries[name] = Entry(name, model.get("title", name), model.get("tokenizer_of"), first, second)
    return list(entries.values())


def _fill_in(recipe: dict, sections: dict, options: type, where: str) -> dict:
    """A recipe as the training script would read it from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                return parse("", sections, options, ["--config", str(path)])
        except SystemExit as error:
            message = said.getvalue().partition("error: ")[2].strip().replace(f"{path}: ", "")
            raise ValueError(f"{where}: {message}") from error


def check_models(entries: Sequence[Entry], images: ImageDataset) -> None:
    """Builds every model once, so that none is found impossible after the others were trained.

    Args:
        entries: the models.
        images: what they will be trained on.
    Raises:
        ValueError: a model that cannot be built for these data, or a prior for these codes; the model is named.
    """
    tokenizers = {}
    for entry in entries:
        try:
            TrainingConfig(**entry.stage_one["training"])
            if entry.tokenizer_of is None:
                tokenizers[entry.name] = build_tokenizer_for(images, entry.stage_one["tokenizer"])
            tokenizer = tokenizers[entry.tokenizer_of or entry.name]
            if entry.stage_two is not None:
                TrainingConfig(**entry.stage_two["training"])
                tokenizer.spec.check_discrete("stage two")
                prior = build_prior({**entry.stage_two["prior"], "spec": tokenizer.spec})
                if not any(True for _ in prior.parameters()):
                    raise ValueError(f"a {type(prior).__name__} prior has nothing to train; leave 'prior' out")
        except ValueError as error:
            raise ValueError(f"model '{entry.name}': {error}") from error
