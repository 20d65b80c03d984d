"""The result of an evaluation for people: a table in the terminal, rows of the model card."""


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
    return text if spread is None else f"{text} ± {spread:.2g}"


def format_summary(result: dict) -> str:
    """The result of `evaluate` for a terminal: its numbers by group, and what could not be measured."""
    blocks = []
    for group, names in result["groups"].items():
        table = format_table({name: result["metrics"][name] for name in names})
        blocks.append("\n".join([group, *(f"  {line}" for line in table.splitlines())]))
    reasons = [f"  {name}: {why}" for name, why in result["not_measured"].items()]
    if reasons:
        blocks.append("\n".join(["not measured", *reasons]))
    return "\n".join(blocks)


def record(pipeline, split: str, result: dict) -> None:
    """Enters a result of `evaluate`, with its command, into the pipeline, in place of the last one of that split."""
    of_training = (f"{split} tokenizer ", f"{split} prior ")
    kept = {
        name: value
        for name, value in pipeline.metrics.items()
        if not name.startswith(f"{split} ") or name.startswith(of_training)
    }
    pipeline.metrics = kept | {f"{split} {name}": value for name, value in result["metrics"].items()}
    shown = ("command", "data", "protocol", "not_measured", "seed", "versions")
    pipeline.evaluations[split] = {name: result[name] for name in shown}
