"""What is refused before anything is trained or measured, since its results could never stand in one table."""

from collections.abc import Sequence

import torch

from pipelines.comparison.entries import check_models
from pipelines.comparison.findings import check_same_data
from pipelines.comparison.running import RESULT, Member, Runner
from pipelines.config import read_yaml
from pipelines.evaluation.evaluate import check_groups, check_numbers
from pipelines.evaluation.pretrained import inception_features, lpips_network
from pipelines.evaluation.protocol import comparable, pixels_of, protocol_differences
from pipelines.files import read_json
from pipelines.images import DataConfig, load_images
from pipelines.runs import contents_trained_on
from pipelines.scripting import check_seed, say

# Groups that are measured in the features of a classifier, where there are no weights of Inception
BY_CLASSIFIER = ("reconstruction", "samples", "local")


def check_before(members: Sequence[Member], runner: Runner, data: dict | None = None) -> None:
    """Raises ValueError for all that is known to be refused later, by a stage or by `collect`.

    Args:
        members: of the comparison.
        runner: of the comparison, with the options of the evaluation.
        data: fields of `DataConfig` of the entries; None if there are none.
    """
    options = runner.evaluation
    check_options(options)
    missing = {member.name: runner.missing(member) for member in members}
    results = {member.name: read_json(member.folder / RESULT) for member in members if not missing[member.name]}
    data_of = {
        member.name: results[member.name]["data"] if member.name in results else data_to_come(member, options["split"])
        for member in members
        if member.name in results or member.entry is None
    }
    check_same_data(data_of)
    comparable(results)
    to_do = any(missing.values())
    if to_do:
        check_weights(options)
    images = train_images = None
    if entries := [member for member in members if member.entry is not None]:
        try:
            train_images, images = (load_images(DataConfig(**data), split) for split in ("train", options["split"]))
        except (ValueError, OSError) as error:
            if to_do:
                raise
            say(f"whether the images are still those that the models were trained on is not known: {error}")
            return
        check_models([member.entry for member in entries], train_images)
        to_come = [member.name for member in entries if missing[member.name]]
        name = to_come[0] if to_come else "what the entries name now"
        check_same_data(data_of | {name: images.identity})  # which is that of all entries
        for member in entries:
            check_trained_on(member, missing[member.name], train_images)
    if to_do:
        check_to_come(results, options, images, train_images)


def check_trained_on(member: Member, missing: Sequence[str], train_images) -> None:
    """Raises ValueError where a model's stage one is done, with other training images than these."""
    if "stage_one" in missing or member.entry.tokenizer_of is not None:
        return
    recorded = contents_trained_on(member.folder)
    if recorded not in (None, train_images.contents):
        raise ValueError(
            f"{member.name} was trained on other images than those that are there now, so that others would not stand "
            f"beside it; restore them, or remove {member.folder} to train it anew"
        )


def check_options(evaluation: dict) -> None:
    """Raises ValueError where evaluate.py would not take its options."""
    check_numbers(**{name: evaluation[name] for name in ("num_draws", "num_samples", "batch_size")})
    check_seed(evaluation["seed"])
    check_groups(evaluation["metrics"])


def check_weights(evaluation: dict) -> None:
    """Reads the weights that evaluate.py is given, once. Raises ValueError where they cannot be had."""
    for option, load in (("inception_weights", inception_features), ("lpips_weights", lpips_network)):
        if evaluation[option]:
            load(evaluation[option], device=torch.device("cpu"))


def data_to_come(run: Member, split: str) -> dict:
    """What a run folder says of the identity of the images that it will be evaluated on."""
    known = {"split": split}
    # Images that are prepared otherwise are refused by the evaluation
    if preprocessing := read_json(run.folder / "tokenizer" / "config.json").get("preprocessing"):
        known["preprocessing"] = preprocessing
    config = run.folder / "stage_one" / "config.yaml"
    if config.is_file() and (name := read_yaml(config).get("data", {}).get("name")):
        known["name"] = name
    return known


def check_to_come(results: dict[str, dict], evaluation: dict, images=None, train_images=None) -> None:
    """Raises ValueError where results may not stand in one table with those that are yet to be measured.

    Only what is known of their protocols before any training is looked at, `comparable` sees the rest.

    Args:
        results: of those that are measured already, by name.
        evaluation: options of evaluate.py for those to come.
        images, train_images: what they will be evaluated on, and what a classifier is trained on; None if not known.
    """
    draws, samples, seed = ({name: evaluation[name]} for name in ("num_draws", "num_samples", "seed"))
    data = {} if images is None else {"data": images.identity}
    pixels = {} if images is None else {"pixels": pixels_of(images.preprocessing)}
    trained_on = {} if train_images is None else {"trained_on": train_images.identity}
    feature_space = "" if evaluation["inception_weights"] else "_classifier"
    protocols = [
        (("likelihood",), "likelihood", data | pixels | draws),
        (("reconstruction",), "reconstruction", data),
        (("codebook",), "codebook", data),
        (("samples",), f"samples{feature_space}", samples),
        (("memorisation",), "memorisation", data | samples),
    ]
    if not evaluation["inception_weights"]:
        protocols.append((BY_CLASSIFIER, "classifier", seed | trained_on))
    for name, result in results.items():
        for options, group, expected in protocols:
            if evaluation["metrics"] is not None and not set(options) & set(evaluation["metrics"]):
                continue
            found = _protocol(result, group)
            changed = found and protocol_differences({field: found.get(field) for field in expected}, expected)
            if changed:
                listed = "; ".join(f"{field}: {old} and {new}" for field, (old, new) in changed.items())
                raise ValueError(
                    f"'{group}' of {name} cannot stand in one table with what is yet to be measured, by another "
                    f"protocol ({listed}); give the options that {name} was evaluated with, or evaluate it anew"
                )


def _protocol(result: dict, group: str) -> dict:
    """The protocol of a group, empty without one; of a classifier, what decides its weights, which come later."""
    found = result["protocol"].get(group, {})
    if found and group == "classifier":
        parts = result.get("parts", [result])  # of several evaluations
        seed = next((part["seed"] for part in parts if group in part["groups"]), result["seed"])
        found = {"seed": seed, "trained_on": found["features"]["trained_on"]}
    return found
