"""A comparison for a terminal and for machines."""

from dataclasses import asdict

from pipelines.comparison.findings import Findings
from pipelines.comparison.page import not_measured, protocol_of, with_error

# The most that stand beside each other in a terminal; the page has all
IN_TERMINAL = ("nats", "bits_per_dim", "rate_nats", "distortion_nats", "psnr", "fid", "fid_classifier",
               "copying", "class_agreement", "codebook_usage", "stage_one_seconds", "stage_two_seconds")  # fmt: skip


def terminal_table(findings: Findings) -> str:
    """Aligned columns, names to the left and numbers to the right."""
    columns = [column for column in findings.columns if column.metric in IN_TERMINAL]
    lines = [
        ["", *(column.label.replace("\u00a0", " ") for column in columns)],
        ["", *(column.unit for column in columns)],
    ]
    for member, row in zip(findings.members, findings.rows):
        lines.append([member.title, *(with_error(row, column) for column in columns)])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return "\n".join(
        "  ".join(
            [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        ).rstrip()
        for cells in lines
    )


def as_json(findings: Findings, *, title: str, command: str) -> dict:
    """Everything on the page that is no picture."""
    return {
        "title": title,
        "command": command,
        "columns": [asdict(column) for column in findings.columns],
        "models": [
            {"name": member.name, "title": member.title, "folder": str(member.folder),
             "metrics": {name: value for name, value in row.items() if value is not None}}
            for member, row in zip(findings.members, findings.rows)
        ],
        "curves": {
            quantity: {curve.name: curve.points for curve in curves} for quantity, curves in findings.curves.items()
        },
        "protocol": {group: dict(fields) for group, fields in protocol_of(findings)},
        "not_measured": not_measured(findings),
        "failures": {
            name: {"stage": failure.stage, "reason": failure.reason, "log": failure.log and str(failure.log)}
            for name, failure in findings.failures.items()
        },
    }  # fmt: skip
