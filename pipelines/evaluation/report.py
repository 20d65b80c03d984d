"""The result of an evaluation for people: a table in the terminal, rows of the model card, beside earlier results."""

import math
from pathlib import Path

from pipelines.files import read_json

RESULT_NAME = "evaluation.json"
# Of a result, what the pipeline keeps beside its numbers
RECORDED = ("command", "data", "groups", "protocol", "not_measured", "pictures", "seed", "versions", "weights", "parts")


def format_table(metrics: dict[str, float]) -> str:
    """Two aligned columns; a standard error, NAME_se, or deviation, NAME_std, stands behind its value."""
    rows = format_rows(metrics)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def format_rows(metrics: dict[str, float]) -> dict[str, str]:
    """Each value by its name, with its spread where there is one."""
    spreads = {f"{name}{suffix}" for name in metrics for suffix in ("_se", "_std")}
    return {name: format_value(metrics, name) for name in metrics if name not in spreads}


def format_value(metrics: dict[str, float], name: str) -> str:
    """A value with its spread, where there is one."""
    value = metrics[name]
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    spread = metrics.get(f"{name}_se", metrics.get(f"{name}_std"))
    if spread is None:
        return text
    if 0 < spread < 10 * abs(float(text) - value):  # rounded more coarsely than it is known
        text = f"{value:.{max(0, 1 - math.floor(math.log10(spread)))}f}"
    return f"{text} ± {spread:.2g}"


def format_summary(result: dict) -> str:
    """The result of `evaluate` for a terminal: its numbers by group, and what could not be measured."""
    blocks, kept = [], {group for part in result.get("parts", ())[:-1] for group in part["groups"]}
    for group, names in result["groups"].items():
        table = format_table({name: result["metrics"][name] for name in names})
        heading = f"{group} (of an earlier evaluation)" if group in kept else group
        blocks.append("\n".join([heading, *(f"  {line}" for line in table.splitlines())]))
    reasons = [f"  {name}: {why}" for name, why in result["not_measured"].items()]
    if reasons:
        blocks.append("\n".join(["not measured", *reasons]))
    return "\n".join(blocks)


def with_earlier(result: dict, earlier: dict | None) -> dict:
    """A result of `evaluate`, with its command, and the groups of an earlier one that were not attempted this time.

    Args:
        earlier: see `earlier_result`.
    Returns:
        the result; each group by its own protocol, and parts: command, seed, versions and groups of each evaluation.
    """
    if earlier is None:
        return {**result, "parts": [_as_part(result)]}
    attempted = result["groups"].keys() | result["not_measured"].keys()
    kept = {
        group: names
        for group, names in earlier["groups"].items()
        if group not in attempted and earlier["metrics"].keys() >= set(names)
    }
    groups = result["groups"] | kept
    metrics = result["metrics"] | {name: earlier["metrics"][name] for names in kept.values() for name in names}
    reasons = earlier["not_measured"] | result["not_measured"]
    parts = [{**part, "groups": [group for group in part["groups"] if group in kept]} for part in parts_of(earlier)]
    parts = [*(part for part in parts if part["groups"]), _as_part(result)]
    return {
        **result,
        "command": "\n".join(part["command"] for part in parts),
        "metrics": metrics,
        "groups": groups,
        "protocol": result["protocol"] | {group: earlier["protocol"][group] for group in kept},
        "not_measured": {name: why for name, why in reasons.items() if name not in groups and name not in metrics},
        "pictures": earlier["pictures"] | result["pictures"],
        "parts": parts,
    }


def parts_of(result: dict) -> list[dict]:
    """command, seed, versions and groups of each evaluation that a result is of; an older result is of one."""
    return result.get("parts") or [_as_part(result)]


def _as_part(result: dict) -> dict:
    return {**{name: result[name] for name in ("command", "seed", "versions")}, "groups": list(result["protocol"])}


def earlier_result(pipeline, split: str, result: dict, run: Path) -> dict | None:
    """The last result of a split, if it is of the same images and weights as `result`.

    It stands in the pipeline, by split; what versions before this one measured, only in `run`, and without the
    fingerprints of the weights, whose files must then be older.
    """
    found = pipeline.evaluations.get(split, {})
    if "groups" in found:
        known = pipeline.metrics
        found = found | {"metrics": {name.removeprefix(f"{split} "): value for name, value in known.items()}}
    else:
        found = _saved_result(run)
    if not found or found["data"] != result["data"]:
        return None
    if "weights" in found:
        return found if found["weights"] == result["weights"] else None
    files = [file.stat() for part in ("tokenizer", "prior") for file in run.glob(f"{part}/*.safetensors")]
    # st_ctime too: a file that was copied here may have kept the time when it was written elsewhere
    newest = max(max(file.st_mtime, file.st_ctime) for file in files)
    return found if newest <= (run / RESULT_NAME).stat().st_mtime else None


def _saved_result(run: Path) -> dict:
    """What is in the file of a run; empty where there is none, or none of ours."""
    try:
        found = read_json(run / RESULT_NAME)
    except (OSError, ValueError):
        return {}
    return found if found.keys() >= {"command", "metrics", *RECORDED} - {"weights", "parts"} else {}


def dropped(pipeline, split: str, result: dict, run: Path) -> list[str]:
    """What `result` takes the place of without measuring it anew, in lines for people; to be asked before `record`."""
    lines, saved = [], _saved_result(run)
    groups = list(pipeline.evaluations.get(split, {}).get("protocol", ()))
    if saved and (other := saved["data"]["split"]) != split:
        fate = "stay in the model card" if other in pipeline.evaluations else "are dropped"
        lines.append(f"{run / RESULT_NAME} was of the {other} images, whose numbers {fate}")
    else:
        groups += saved.get("protocol", ())
    gone = [group for group in dict.fromkeys(groups) if group not in result["protocol"]]
    if gone:
        lines.append(
            f"dropped what earlier evaluations measured of {', '.join(gone)}: it was of other images or weights, "
            "cannot be measured this time, or was not to be kept"
        )
    elif not lines and saved and saved["data"] != result["data"]:
        old, new = (data["data"]["name"] for data in (saved, result))
        of = f"{old}, not of {new}" if old != new else "other images"
        lines.append(f"{run / RESULT_NAME} and the model card were of {of}; their numbers are replaced")
    return lines


def record(pipeline, split: str, result: dict) -> None:
    """Enters a result of `with_earlier` into the pipeline, in place of the last one of that split."""
    of_training = (f"{split} tokenizer ", f"{split} prior ")
    kept = {
        name: value
        for name, value in pipeline.metrics.items()
        if not name.startswith(f"{split} ") or name.startswith(of_training)
    }
    pipeline.metrics = kept | {f"{split} {name}": value for name, value in result["metrics"].items()}
    pipeline.evaluations[split] = {name: result[name] for name in RECORDED}
