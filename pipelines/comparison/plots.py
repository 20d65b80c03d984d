"""Which charts a comparison has: rate against distortion, and the validation curves of both stages."""

from dataclasses import dataclass

from pipelines.comparison.charts import Series, curves, scatter
from pipelines.comparison.findings import Findings

# Of each quantity: heading, caption, label of the axis
CURVES = {
    "distortion": ("Stage one: distortion", "-log p(x | codes) of validation images.", "distortion"),
    "negative_elbo": (
        "Stage one: bound",
        "Distortion plus rate of validation images, under the prior that is learned with the tokenizer.",
        "rate + distortion",
    ),
    "codes": (
        "Stage two: codes",
        "-log p(codes) of the codes of validation images. Where these are drawn from q(codes | x), the rate in the "
        "table is less by its entropy.",
        "-log p(codes)",
    ),
}
RATE_DISTORTION = (
    "What the codes cost against what the pixels cost when the codes are known. On a dotted line their sum, the "
    "one-draw bound on -log p(x), is the same: down and left is better."
)


@dataclass(frozen=True)
class Chart:
    """name: of its file; heading, caption: text; svg: the picture."""

    name: str
    heading: str
    caption: str
    svg: str


def charts_of(findings: Findings) -> list[Chart]:
    """The charts for which there are values; in bits/dim, or in nats per image where pixels are bits."""
    number_of = {member.name: number for number, member in enumerate(findings.members)}
    titles = {member.name: member.title for member in findings.members}
    scale, unit = unit_of(findings)
    made = []
    points = [
        Series(number, member.title, [(row["rate_nats"] * scale, row["distortion_nats"] * scale)])
        for number, (member, row) in enumerate(zip(findings.members, findings.rows))
        if "rate_nats" in row and "distortion_nats" in row
    ]
    if points:
        svg = scatter(
            points,
            x_label=f"rate ({unit})",
            y_label=f"distortion ({unit})",
            sum_label="sum",
            description="Rate against distortion of each model; the table holds the same numbers.",
        )
        made.append(Chart("rate-distortion", "Rate and distortion", RATE_DISTORTION, svg))
    for quantity, (heading, caption, label) in CURVES.items():
        series = [
            Series(number_of[curve.name], titles[curve.name], [(step, value * scale) for step, value in curve.points])
            for curve in findings.curves[quantity]
        ]
        if series:
            svg = curves(
                series,
                x_label="optimizer steps",
                y_label=f"{label} ({unit})",
                description=f"{heading} against optimizer steps, a line for each model.",
            )
            made.append(Chart(heading.lower().replace(": ", "-").replace(" ", "-"), heading, caption, svg))
    return made


def unit_of(findings: Findings) -> tuple[float, str]:
    """By what nats per image are multiplied in charts, and the unit that they then have."""
    for row, result in zip(findings.rows, findings.results.values()):
        pixels = result["protocol"].get("likelihood", {}).get("pixels", "")
        if pixels.startswith("256") and row.get("nats"):  # which a model whose bound is NaN does not have
            return row["bits_per_dim"] / row["nats"], "bits/dim"
    return 1.0, "nats per image"
