"""How numbers were measured, and which may therefore stand side by side.

The result of an evaluation holds `metrics` {name: value}, `groups` {group: names of its metrics} and `protocol`
{group: fields}. Two values of one metric compare if and only if the protocols of their groups are equal, but for fields
that changed nothing, see `ANY`.
"""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations

from pipelines.config import differences

# How a field begins whose value changed nothing, before the reason; it compares with any value
ANY = "any: "
VERSIONS_OF = ("tessera-codes", "torch", "torchvision", "torchmetrics", "torch-fidelity", "scikit-learn", "numpy")


def comparable(results: Mapping[str, dict], metrics: Sequence[str] | None = None) -> list[dict]:
    """The rows of a table of several results, if one may be made of them.

    Args:
        results: results of `evaluate`, by the name of the row.
        metrics: the columns; None takes all that any result has, in the order in which they are met.
    Returns:
        for each result {"name": its name, metric: its value, or None where it was not measured}.
    Raises:
        ValueError: values of one metric were measured by different protocols, with the fields that differ; or no result
            has a metric that was named.
    """
    if metrics is None:
        metrics = list(dict.fromkeys(name for result in results.values() for name in result["metrics"]))
    for metric in metrics:
        measured = {
            name: protocol_of(result, metric) for name, result in results.items() if metric in result["metrics"]
        }
        if not measured:
            known = sorted({name for result in results.values() for name in result["metrics"]})
            raise ValueError(f"no result has the metric '{metric}'; there are {', '.join(known) or 'none at all'}")
        # Each with each: what compares with any value says nothing of two others
        for (first, expected), (name, protocol) in combinations(measured.items(), 2):
            if changed := protocol_differences(expected, protocol):
                listed = "; ".join(f"{field}: {old} and {new}" for field, (old, new) in changed.items())
                raise ValueError(
                    f"'{metric}' of {first} and of {name} cannot stand in one table, they were measured by different "
                    f"protocols ({listed}); evaluate both in the same way"
                )
    return [
        {"name": name, **{metric: result["metrics"].get(metric) for metric in metrics}}
        for name, result in results.items()
    ]


def protocol_differences(one: dict, other: dict) -> dict[str, tuple]:
    """{dotted field: (its value in one, in the other)} that keep numbers of two protocols apart."""
    return {field: values for field, values in differences(one, other).items() if not any(map(is_any, values))}


def is_any(value) -> bool:
    """Whether a value of a protocol compares with any other."""
    return isinstance(value, str) and value.startswith(ANY)


def protocol_of(result: dict, metric: str) -> dict:
    """The protocol by which a metric of a result was measured. Raises ValueError if the result does not say."""
    for group, names in result.get("groups", {}).items():
        if metric in names and group in result.get("protocol", {}):
            return result["protocol"][group]
    raise ValueError(f"the result does not say how '{metric}' was measured; run scripts/evaluate.py again")


def pixels_of(preprocessing: dict) -> str:
    """Which pixel values probabilities are of."""
    how = preprocessing["binarize"]
    if how == "none":
        return "256 discrete values, no dequantisation"
    if how == "threshold":
        return "2 discrete values, by a threshold at 0.5"
    return f"2 discrete values, one fixed draw with seed {preprocessing['binarize_seed']}"


def versions(packages: Sequence[str] = VERSIONS_OF) -> dict[str, str]:
    """Of Python and of packages that numbers depend on, where they are installed."""
    import torch  # here, since results are compared without it

    found = {"python": platform.python_version()}
    for name in packages:
        try:
            # which build of torch it is, its package does not say
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return found
