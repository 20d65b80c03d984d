"""The page of a comparison: one HTML file that needs nothing else, and Markdown with its pictures in a folder."""

import base64
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pipelines.comparison import charts
from pipelines.comparison.charts import PALETTE
from pipelines.comparison.findings import Column, Findings, budget_of
from pipelines.comparison.plots import Chart, charts_of
from pipelines.comparison.running import IN_WORDS, Member, training_folder
from pipelines.comparison.templates import CSS, HTML, MARKDOWN, SCRIPT
from pipelines.config import read_yaml
from pipelines.evaluation.protocol import is_any
from pipelines.files import atomic_file

MISSING = "–"
ARROWS = {"lower": "↓", "higher": "↑", None: ""}
ALT_TEXTS = {"reconstructions": "held-out images, each above its reconstruction", "samples": "a grid of samples"}


def write_page(
    findings: Findings, output: Path, *, title: str, command: str, pictures: dict[str, dict[str, Path]]
) -> None:
    """comparison.html, which holds all it needs; comparison.md, with the charts in pictures/.

    Args:
        findings: see `collect`.
        output: folder of the comparison.
        title: heading.
        command: that made it.
        pictures: {member's name: {kind: file in output/pictures}} of reconstructions and samples.
    """
    drawn = charts_of(findings)
    values = context(findings, title=title, command=command, pictures=pictures, drawn=drawn)
    files = {"comparison.html": render_html(values), "comparison.md": render_markdown(values)}
    files |= {f"pictures/{chart.name}.svg": charts.as_file(chart.svg) for chart in drawn}
    (output / "pictures").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with atomic_file(output / name) as file:
            file.write(text.encode())


def render_html(values: dict) -> str:
    """Args: values: see `context`."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["swatch"] = _swatch
    css = f"{charts.css_variables()}\n{charts.CHART_CSS}\n{CSS}"
    return environment.from_string(HTML).render(**values, css=Markup(css), script=SCRIPT)


def render_markdown(values: dict) -> str:
    """Args: values: see `context`."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": escape_markdown, "md_cell": _cell_text}
    return environment.from_string(MARKDOWN).render(**values, folder="pictures").strip() + "\n"


def context(
    findings: Findings, *, title: str, command: str, pictures: dict[str, dict[str, Path]], drawn: Sequence[Chart]
) -> dict:
    """What both templates show, of text and numbers that are not escaped yet."""
    columns = findings.columns
    best = {column.metric: best_rows(findings.rows, column) for column in columns}
    return {
        "title": title,
        "lead": lead(findings),
        "command": command,
        "missing": MISSING,
        "failures": [
            {"title": failure.title, "stage": IN_WORDS[failure.stage], "reason": failure.reason,
             "log": failure.log and str(failure.log)}
            for failure in findings.failures.values()
        ],
        "columns": [
            {"heading": f"{column.label}\u00a0{ARROWS[column.better]}".rstrip("\u00a0"), "unit": column.unit,
             "better": column.better, "arrow": ARROWS[column.better], "meaning": column.meaning,
             "full_label": full_label(column)}
            for column in columns
        ],
        "rows": [
            {"title": member.title, "colour": number,
             "cells": [_cell(row, column, number in best[column.metric]) for column in columns]}
            for number, (member, row) in enumerate(zip(findings.members, findings.rows))
        ],
        "charts": drawn,
        "cards": [
            {"title": member.title, "colour": number, "recipe": recipe_of(member),
             "pictures": [_picture(member, kind, path) for kind, path in pictures.get(member.name, {}).items()]}
            for number, member in enumerate(findings.members)
        ],
        "protocol": [{"name": group, "fields": fields} for group, fields in protocol_of(findings)],
        "not_measured": not_measured(findings),
    }  # fmt: skip


# What is said of a comparison
# --------------------------------------------------------------------------------------------


def lead(findings: Findings) -> str:
    """What was compared, in two sentences."""
    count = len(findings.rows)
    said = f"{count} model{'s' if count != 1 else ''}"
    if findings.results:
        result = next(iter(findings.results.values()))
        data = result["data"]
        said += f" on {data['name']} {data['split']} ({data['count']:,} images)"
        if "likelihood" in result["protocol"]:
            said += f"; pixels have {result['protocol']['likelihood']['pixels']}"
    return f"{said}. {budget_of(findings.members)}".strip()


def shown(value: float, column: Column) -> str:
    """A number of the table, as a person reads it."""
    return f"{100 * value if column.unit == '%' else value:,.{column.decimals}f}"


def with_error(row: dict, column: Column) -> str:
    """As `shown`, with the standard error where there is one."""
    return _cell_text(_cell(row, column, best=False))


def best_rows(rows: Sequence[dict], column: Column) -> set[int]:
    """The rows of the best value; none where neither direction is better, or all are alike."""
    values = {number: row[column.metric] for number, row in enumerate(rows) if row.get(column.metric) is not None}
    if column.better is None or len(set(values.values())) < 2:
        return set()
    best = (min if column.better == "lower" else max)(values.values())
    return {number for number, value in values.items() if value == best}


def protocol_of(findings: Findings) -> list[tuple[str, list[tuple[str, str]]]]:
    """By group of numbers, what they depend on; it is the same for all models, or they had not come together."""
    groups: dict[str, dict] = {}
    seeds: set[int] = set()
    versions: dict[str, set[str]] = {}
    for result in findings.results.values():
        for group, fields in result["protocol"].items():
            said_of = groups.setdefault(group, {})
            said_of |= {name: v for name, v in fields.items() if name not in said_of or is_any(said_of[name])}
        for part in result.get("parts", [result]):  # of several evaluations
            seeds.add(part["seed"])
            for name, version in part["versions"].items():
                versions.setdefault(name, set()).add(version)
    said = [(group.replace("_", " "), _fields(fields)) for group, fields in groups.items()]
    if said:
        general = {"seed": seeds, **versions}
        said.append(("seed and versions", [(name, ", ".join(map(str, sorted(v)))) for name, v in general.items()]))
    return said


def not_measured(findings: Findings) -> list[dict[str, str]]:
    """what, why, and of which models."""
    count = len(findings.members)
    return [
        {"what": metric, "why": reason, "models": "all models" if len(titles) == count else ", ".join(titles)}
        for (metric, reason), titles in findings.not_measured.items()
    ]


def full_label(column: Column) -> str:
    label = column.label.replace("\u00a0", " ")
    return f"{label} ({column.unit})" if column.unit else label


def recipe_of(member: Member) -> str:
    """Models and training of both stages as YAML; "" where the run does not say."""
    said = {}
    for stage, model in (("stage_one", "tokenizer"), ("stage_two", "prior")):
        path = training_folder(member, stage) / stage / "config.yaml"
        if path.is_file():
            config = read_yaml(path)
            said[stage] = {part: config[part] for part in ("data", model, "training") if part in config}
    return yaml.safe_dump(said, sort_keys=False) if said else ""


# Small pieces
# --------------------------------------------------------------------------------------------


def _cell(row: dict, column: Column, best: bool) -> dict:
    value, error = row.get(column.metric), row.get(column.error) if column.error else None
    return {
        "value": value,
        "text": None if value is None else shown(value, column),
        "error": None if error is None else shown(error, column),
        "best": best,
    }


def _picture(member: Member, kind: str, path: Path) -> dict:
    content = path.read_bytes()
    with Image.open(path) as image:
        width, height = image.size
    return {
        "kind": kind,
        "file": quote(path.name),
        "alt": f"{member.title}: {ALT_TEXTS[kind]}",
        "data": f"data:image/png;base64,{base64.b64encode(content).decode()}",
        "width": width,
        "height": height,
    }


def _fields(fields: dict) -> list[tuple[str, str]]:
    """Names and values of a protocol, nested ones on lines of their own."""
    rows = []
    for name, value in fields.items():
        name = name.replace("_", " ")
        if isinstance(value, dict) and "content" in value:
            value = f"{value['name']} {value['split']}, {value['count']:,} images, content {value['content'][:12]}"
        if isinstance(value, dict):
            rows += [(f"{name}, {inner}", text) for inner, text in _fields(value)]
        else:
            text = str(value)
            rows.append((name, text[:12] if len(text) == 64 and text.isalnum() else text))  # a hash
    return rows


def _swatch(number: int) -> Markup:
    return Markup("<span class='swatch' style='background:var(--s{})'></span>").format(number % len(PALETTE))


def _cell_text(cell: dict) -> str:
    """As plain text, in which the best is bold in Markdown."""
    if cell["value"] is None:
        return MISSING
    text = cell["text"] + (f" ± {cell['error']}" if cell["error"] else "")
    return f"**{text}**" if cell["best"] else text


def escape_markdown(text: str) -> str:
    """Text as it is, on one line, also within a table."""
    for character in "\\|*_`<>[]#~":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())
